"""The stream of patches as an iterator."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from .batch import Batch
from .errors import FreeTumorError, ProblemError, StreamCut
from .meta import Cursor, Header
from .prefetch import Prefetcher
from .reader import Backoff, Patience, Reader, is_passing
from .transport import ask

#: Reasons for which everything that was asked for has arrived.
_WHOLE: Final = ("end_of_epoch", "count")


class Stream(Iterator[Batch]):
    """An open stream: iterate over it; close it, or use it in ``with``, to leave early.

    A thread reads and decodes up to ``prefetch`` batches ahead. It belongs to the process that opened the stream: open
    streams after a fork, not before.

    Attributes:
        header: what the stream holds.
        cursor: where to go on after the batches consumed so far: a batch counts once the next one is asked for.
        end_reason: ``end_of_epoch`` or ``count`` once the stream ended; ``shutdown`` or ``rebalance`` where the server
            ended it early, which the iterator raises as :class:`StreamCut`; else ``None``.
        reconnects: how often the stream went on over a new connection.
        waited_seconds: how long :meth:`__next__` waited, in all.
    """

    def __init__(self, reader: Reader, prefetch: int) -> None:
        self._source = Prefetcher(reader, prefetch)
        self._pending: Cursor | None = None
        self.header: Header = reader.header
        self.cursor: Cursor = reader.header.cursor
        self.end_reason: str | None = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __next__(self) -> Batch:
        if self._pending is not None:
            self.cursor, self._pending = self._pending, None
        if self._source.is_closed:
            raise StopIteration
        try:
            item = self._source.take()
        except (StreamCut, ProblemError) as error:
            error.cursor = self.cursor  # the reader may have been ahead
            self.close()
            raise
        except BaseException:
            self.close()
            raise
        if isinstance(item, Batch):
            self._pending = item.cursor
            return item
        self.close()
        self.end_reason = str(item)
        if self.end_reason not in _WHOLE:
            # A loop that just ended here would take an early end for a short epoch.
            raise StreamCut(f"the server ended the stream early: {self.end_reason}", self.cursor)
        raise StopIteration

    @property
    def reconnects(self) -> int:
        return self._source.reader.reconnects

    @property
    def waited_seconds(self) -> float:
        return self._source.waited_seconds

    def close(self) -> None:
        """Leaves the stream; the server stops making patches for it."""
        self._source.close()


def stream(
    url: str,
    recipe: Mapping[str, Any] | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    batch_size: int = 2,
    count: int | None = None,
    image: str = "f32",
    codec: str = "raw",
    outputs: Sequence[str] = (),
    cursor: Cursor | Mapping[str, Any] | None = None,
    start: int = 0,
    api_key: str | None = None,
    on_failed: str = "error",
    last_batch: str = "fill",
    timeout: float = 60.0,
    prefetch: int = 2,
    patience: float = 300.0,
    connect_patience: float = 0.0,
) -> Stream:
    """Opens a stream of patches.

    Args:
        url: the server, such as ``http://127.0.0.1:8080``.
        recipe: what the patches are; fields not given, or all without a recipe, are the server's defaults.
        rank, world: this trainer process and how many share the stream.
        batch_size: patches in a batch.
        count: batches to receive; absent: to the end of the epoch.
        image: ``f32`` or ``f16`` windowed to [0, 1], or ``i16`` in HU.
        codec: ``raw``; for slow networks ``zstd_u8``, which compresses labels and masks, or ``zstd``, which compresses all.
        outputs: optional arrays: ``source``, ``soft_mask``, ``lesion_instance``.
        cursor: where to go on, as a :class:`Cursor` or what its ``to_dict`` returned; takes the place of ``start``.
        start: the first global index.
        api_key: the server's key, where it asks for one.
        on_failed: ``error`` raises :class:`PatchError` for a patch that could not be made; ``skip`` delivers it with
            ``meta.failed``, 0 HU and the label 255 everywhere.
        last_batch: what an epoch's end does with an incomplete batch, alike on every rank: ``fill`` goes on into the next
            epoch, ``drop`` leaves it out, ``partial`` sends what is left: a smaller batch, on some ranks an empty one.
        timeout: seconds without any byte after which the connection counts as cut; the server sends a sign of life
            every 15 s (``server.heartbeat_seconds``), and this must be longer.
        prefetch: batches that a background thread reads and decodes ahead; 0: none, the caller reads.
        patience: seconds that an outage of the server may last before the iterator raises. Within them the stream
            connects again, waiting longer each time (0.25 s to 15 s, or what ``Retry-After`` asks for), and goes on
            at the batch that is due: nothing is lost or repeated. A frame whose checksum does not match is asked for
            again, three times at most. 0: the first cut raises.
        connect_patience: the same for the first connection; 0, so that a wrong URL is told at once.

    Raises:
        ProblemError: the server refused the request.
        StreamCut: the connection failed, or the server ended the stream early (``shutdown``, ``rebalance``).
    """
    delivery: dict[str, Any] = {
        "rank": rank,
        "world": world,
        "batch_size": batch_size,
        "from": start,
        "image": image,
        "codec": codec,
        "outputs": list(outputs),
        "on_failed": on_failed,
        "last_batch": last_batch,
    }
    if count is not None:
        delivery["count"] = count
    if cursor is not None:
        delivery["cursor"] = cursor.to_dict() if isinstance(cursor, Cursor) else dict(cursor)
    request: dict[str, Any] = {"delivery": delivery}
    if recipe is not None:
        request["recipe"] = dict(recipe)
    reader = Reader(
        url, request, api_key=api_key, timeout=timeout, patience=Patience(connect_patience, patience),
    )
    return Stream(reader, prefetch)


def resolve(
    url: str, recipe: Mapping[str, Any] | None = None, *, api_key: str | None = None, timeout: float = 60.0,
    patience: float = 0.0,
) -> dict[str, Any]:
    """Asks the server what a recipe comes to, without streaming.

    Args:
        url, recipe, api_key, timeout: as for :func:`stream`.
        patience: seconds for which a server that is away, restarts or has too much to do is asked again; 0: it raises at once.

    Returns:
        ``hash``, ``snapshot``, ``bundle``, ``revision``, ``patches_per_epoch``, ``patch``, ``labels``, ``feasible`` (cases
        by pool and organ), ``recipe`` with every default filled in, and what a stream of it costs in bytes.

    Raises:
        ProblemError: the server refused it: 409 where the recipe holds out a case that the models were trained on.
        StreamCut: nobody listens.
    """
    request = {} if recipe is None else {"recipe": dict(recipe)}
    backoff = Backoff(patience)
    while True:
        try:
            answer: Any = json.loads(ask(url, "/v1/recipes/validate", request, api_key=api_key, timeout=timeout))
            break
        except FreeTumorError as error:
            if patience <= 0 or not is_passing(error):
                raise
            backoff.wait(error, threading.Event())
    if not isinstance(answer, dict):
        raise FreeTumorError(f"expected an object from {url}/v1/recipes/validate, got {answer!r:.80}")
    return answer  # pyright: ignore[reportUnknownVariableType]

"""The stream of patches as an iterator."""

from __future__ import annotations

import http.client
import json
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Union
from urllib.parse import urlsplit

import numpy as np

from . import freetumor_pb2 as pb
from .errors import FrameError, PatchError, ProblemError, StreamCut
from .frames import BATCH, END, ERROR, HEADER, Cut, Frame, read_frame, tensors_of
from .meta import Cursor, Header, PatchMeta, cursor_of, header_of, patch_of, reason_of

_FAILED = "urn:freetumor:problem:failed"
#: Reasons for which everything that was asked for has arrived.
_WHOLE = ("end_of_epoch", "count")


class Batch:
    """One step's patches of this rank.

    Attributes:
        image: ``[B, 1, D, H, W]``; f32 or f16 windowed to [0, 1], or i16 in HU. Axes (z, y, x) grow towards S, A, R.
        label: ``[B, 1, D, H, W]`` u8 ids of ``Stream.header.labels``; 255 is ignore.
        source: like image: the untouched host. Only where asked for in ``outputs``.
        soft_mask: ``[B, 1, D, H, W]`` u8 in 1/255. Only where asked for.
        lesion_instance: ``[B, 1, D, H, W]`` u8, from 1. Only where asked for.
        meta: the patches' provenance, one per patch.
        cursor: where to go on once this batch is consumed.
        step: position in the run.

    All arrays are writable and belong to the caller.
    """

    image: np.ndarray
    label: np.ndarray
    source: np.ndarray
    soft_mask: np.ndarray
    lesion_instance: np.ndarray

    def __init__(self, arrays: Dict[str, np.ndarray], meta: List[PatchMeta], cursor: Cursor, step: int) -> None:
        self.arrays = arrays
        self.meta = meta
        self.cursor = cursor
        self.step = step
        for name, array in arrays.items():
            setattr(self, name, array)

    def __len__(self) -> int:
        return len(self.meta)

    def __repr__(self) -> str:
        arrays = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in self.arrays.items())
        return f"Batch(step={self.step}, {arrays})"


class Stream(Iterator[Batch]):
    """An open stream: iterate over it; close it, or use it in ``with``, to leave early.

    Attributes:
        header: what the stream holds.
        cursor: where to go on after the batches consumed so far: a batch counts once the next one is asked for.
        end_reason: ``end_of_epoch`` or ``count`` once the stream ended; ``shutdown`` or ``rebalance`` where the server
            ended it early, which the iterator raises as :class:`StreamCut`; else ``None``.
    """

    def __init__(self, url: str, request: Mapping[str, Any], api_key: Optional[str], timeout: float) -> None:
        self.end_reason: Optional[str] = None
        self._pending: Optional[Cursor] = None
        self._connection, self._response = _open(url, request, api_key, timeout)
        self.cursor: Optional[Cursor] = None
        try:
            frame = self._next_frame()
            if frame.kind != HEADER:
                raise FrameError(f"expected the stream's header first, got a frame of kind {frame.kind}")
            self.header: Header = header_of(pb.StreamHeader.FromString(frame.header))
            self.cursor = self.header.cursor
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __next__(self) -> Batch:
        if self._pending is not None:
            self.cursor, self._pending = self._pending, None
        if self.end_reason is not None or self._connection is None:
            raise StopIteration
        try:
            return self._next_batch()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leaves the stream; the server stops making patches for it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._response.close()
            connection.close()

    def _next_batch(self) -> Batch:
        while True:
            frame = self._next_frame()
            if frame.kind == BATCH:
                header = pb.BatchHeader.FromString(frame.header)
                self._pending = cursor_of(header.next)
                meta = [patch_of(patch) for patch in header.patches]
                return Batch(tensors_of(header, frame.payload), meta, self._pending, header.step)
            if frame.kind == END:
                end = pb.End.FromString(frame.header)
                self.cursor = cursor_of(end.cursor)
                self.end_reason = reason_of(end.reason)
                if self.end_reason not in _WHOLE:
                    # A loop that just ended here would take an early end for a short epoch.
                    raise StreamCut(f"the server ended the stream early: {self.end_reason}", self.cursor)
                raise StopIteration
            # Heartbeats and kinds of later versions say nothing that a trainer needs.

    def _next_frame(self) -> Frame:
        try:
            frame = read_frame(self._response)
        except (Cut, http.client.HTTPException, OSError) as error:
            raise StreamCut(f"the stream was cut: {error or 'inside a frame'}", self.cursor) from error
        if frame is None:
            raise StreamCut("the stream was cut: the connection ended without an end frame", self.cursor)
        if frame.kind == ERROR:
            problem = pb.Error.FromString(frame.header)
            kind = PatchError if problem.type == _FAILED else ProblemError
            field = problem.field or None
            raise kind(problem.status, problem.title, problem.detail, field, problem.type, cursor=self.cursor)
        return frame


def stream(
    url: str,
    recipe: Optional[Mapping[str, Any]] = None,
    *,
    rank: int = 0,
    world: int = 1,
    batch_size: int = 2,
    count: Optional[int] = None,
    image: str = "f32",
    codec: str = "raw",
    outputs: Sequence[str] = (),
    cursor: Optional[Union[Cursor, Mapping[str, Any]]] = None,
    start: int = 0,
    api_key: Optional[str] = None,
    on_failed: str = "error",
    timeout: float = 60.0,
) -> Stream:
    """Opens a stream of patches.

    Args:
        url: the server, such as ``http://127.0.0.1:8080``.
        recipe: what the patches are; fields not given, or all without a recipe, are the server's defaults.
        rank, world: this trainer process and how many share the stream.
        batch_size: patches in a batch.
        count: batches to receive; absent: to the end of the epoch.
        image: ``f32`` or ``f16`` windowed to [0, 1], or ``i16`` in HU.
        codec: ``raw``, or ``zstd`` for slow networks.
        outputs: optional arrays: ``source``, ``soft_mask``, ``lesion_instance``.
        cursor: where to go on, as a :class:`Cursor` or what its ``to_dict`` returned; takes the place of ``start``.
        start: the first global index.
        api_key: the server's key, where it asks for one.
        on_failed: ``error`` raises :class:`PatchError` for a patch that could not be made; ``skip`` delivers it with
            ``meta.failed``, 0 HU and the label 255 everywhere.
        timeout: seconds without any byte after which the connection counts as cut; the server sends a sign of life
            every 15 s.

    Raises:
        ProblemError: the server refused the request.
        StreamCut: the connection failed, or the server ended the stream early (``shutdown``, ``rebalance``).
    """
    if isinstance(cursor, Cursor):
        cursor = cursor.to_dict()
    delivery: Dict[str, Any] = {
        "rank": rank,
        "world": world,
        "batch_size": batch_size,
        "from": start,
        "image": image,
        "codec": codec,
        "outputs": list(outputs),
        "on_failed": on_failed,
    }
    if count is not None:
        delivery["count"] = count
    if cursor is not None:
        delivery["cursor"] = dict(cursor)
    request: Dict[str, Any] = {"delivery": delivery}
    if recipe is not None:
        request["recipe"] = dict(recipe)
    return Stream(url, request, api_key, timeout)


def _open(url: str, request: Mapping[str, Any], api_key: Optional[str], timeout: float) -> Any:
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"expected a URL such as http://127.0.0.1:8080, got {url!r}")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=timeout)
    headers = {"Content-Type": "application/json", "Accept": "application/vnd.freetumor.stream"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    try:
        connection.request("POST", parts.path.rstrip("/") + "/v1/stream", json.dumps(request), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise _problem(response)
    except (http.client.HTTPException, OSError) as error:
        connection.close()
        raise StreamCut(f"cannot open the stream at {url}: {error}", None) from error
    except BaseException:
        connection.close()
        raise
    return connection, response


def _problem(response: http.client.HTTPResponse) -> ProblemError:
    body = response.read(1 << 20)
    try:
        problem = json.loads(body)
        if not isinstance(problem, dict):
            raise ValueError("no object")
    except ValueError:
        problem = {"title": response.reason, "detail": body[:500].decode("utf-8", "replace")}
    try:
        retry_after: Optional[float] = float(response.headers["Retry-After"])
    except (TypeError, ValueError):
        retry_after = None
    return ProblemError(
        response.status,
        str(problem.get("title", "")),
        str(problem.get("detail", "")),
        problem.get("field"),
        str(problem.get("type", "about:blank")),
        retry_after,
    )

"""PyTorch: a stream as an ``IterableDataset`` that is cut up by rank and worker, and resumes exactly.

>>> dataset = StreamDataset("http://127.0.0.1:8080", batch_size=2)                 # doctest: +SKIP
>>> loader = StatefulDataLoader(dataset, batch_size=None, num_workers=1)           # doctest: +SKIP

The dataset makes batches itself, because which indices form a batch is the server's arithmetic: give loaders
``batch_size=None``. Local step t of rank r holds the indices ``first + t W B + i W + r`` for i < B, whatever the number of
workers: of W ranks and batches of B, step t covers ``[t W B, (t+1) W B)``. Worker w of N makes the steps w, w + N, ...,
which is the order in which a ``DataLoader`` asks its workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Final, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from .batch import Batch
from .client import Stream, resolve, stream
from .errors import FreeTumorError
from .meta import Cursor, PatchMeta

Item = dict[str, Any]


class Position(TypedDict):
    """Where a run stands, free of how many ranks and workers it has: plain data for a checkpoint.

    ``cursor`` is :meth:`freetumor.Cursor.to_dict` of the next index that no rank has had; ``left`` are the indices that
    are left of the epoch, ``None`` where that is a whole one.
    """

    cursor: dict[str, Any]
    epoch: int
    left: int | None


class StreamDataset(IterableDataset[Item]):
    """Batches of a stream as dictionaries of tensors.

    An item has ``image`` (``[B, 1, D, H, W]``, f32 or f16 in [0, 1], or i16 in HU), ``label`` (``[B, 1, D, H, W]`` u8, 255
    is ignore), the asked-for ``outputs``, and where ``with_meta`` is set ``meta`` (list of :class:`PatchMeta`).

    An iterator yields what is left of the epoch; :meth:`set_epoch` chooses another, as with ``DistributedSampler``: without
    it every iterator yields the same epoch. Epochs follow each other without gap or repeat.

    ``torchdata.stateful_dataloader.StatefulDataLoader`` saves and restores the position through :meth:`state_dict`, for the
    same number of workers. To go on with another number of workers or ranks, or with a plain ``DataLoader``, keep
    ``position(loader.state_dict())`` and give it to :meth:`load_state_dict` of a new dataset.

    Attributes:
        resolved: what the recipe comes to on this server (see :func:`freetumor.resolve`).
        labels: class names and ids.
    """

    def __init__(
        self,
        url: str,
        recipe: Mapping[str, Any] | None = None,
        *,
        batch_size: int = 2,
        rank: int | None = None,
        world: int | None = None,
        steps: int | None = None,
        start: int = 0,
        last_batch: str = "fill",
        image: str = "f32",
        codec: str = "raw",
        outputs: Sequence[str] = (),
        on_failed: str = "error",
        with_meta: bool = False,
        api_key: str | None = None,
        prefetch: int = 2,
        patience: float = 300.0,
        timeout: float = 60.0,
    ) -> None:
        """Asks the server what the recipe comes to; from then on models, store and recipe must not change.

        Args:
            url, recipe, image, codec, outputs, on_failed, api_key, prefetch, patience, timeout: as for
                :func:`freetumor.stream`. An outage within ``patience`` is only a pause.
            batch_size: patches in a batch of this rank.
            rank, world: this process and how many share the stream; absent: what ``torch.distributed`` says, or 0 of 1.
            steps: batches of this rank in an epoch; absent: as many as cover the server's epoch.
            start: the first index of epoch 0.
            last_batch: what becomes of indices that fill no step of all ranks: ``fill`` takes as many of the next epoch
                along, ``drop`` leaves them to it; either way all ranks get as many batches of the same size.
            with_meta: whether items carry their provenance.

        Raises:
            ProblemError: the server refused the recipe.
            StreamCut: nobody listens.
            ValueError: an epoch of no whole step, or another ``last_batch``.
        """
        super().__init__()
        if last_batch not in ("fill", "drop"):
            raise ValueError(f"last_batch: expected fill or drop, got {last_batch!r} (freetumor.stream has partial)")
        self._is_filled = last_batch == "fill"
        self._rank, self._world = _place(rank, world)
        self._batch_size = batch_size
        self._with_meta = with_meta
        self.resolved = resolve(url, recipe, api_key=api_key, timeout=timeout, patience=patience)
        self.labels: dict[str, int] = self.resolved["labels"]
        self._options: dict[str, Any] = {
            "url": url, "recipe": None if recipe is None else dict(recipe), "image": image, "codec": codec,
            "outputs": tuple(outputs), "on_failed": on_failed, "api_key": api_key, "prefetch": prefetch,
            "patience": patience, "connect_patience": patience, "timeout": timeout,
        }
        whole: int = steps * self._step if steps is not None else int(self.resolved["patches_per_epoch"])
        self._epoch_indices = self._whole_steps(whole)
        if self._epoch_indices == 0:
            raise ValueError(f"last_batch: an epoch of {whole} patches has no whole step of {self._step}")
        #: First index, epoch, and indices left of it, where epochs are counted from. Shared with workers: one that
        #: resumes tells the others and the main process, which makes the workers of the next epoch.
        self._origin = _shared([start, 0, self._epoch_indices])
        self._epoch = _shared([0])
        #: Batches that this worker had already made of the epoch when its state was saved.
        self._resumed = 0
        self._done = 0

    def __len__(self) -> int:
        """Returns this rank's batches in the current epoch."""
        return self._segment()[1] // self._step

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iterators, also of persistent workers; not before the one resumed in."""
        if epoch < int(self._origin[1]):
            raise ValueError(f"epoch: expected at least {int(self._origin[1])}, in which the run went on, got {epoch}")
        if epoch != int(self._epoch):
            # What was done is of the epoch before.
            self._done = self._resumed = 0
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Item]:
        worker, workers = _worker()
        first, indices = self._segment()
        self._done, self._resumed = self._resumed, 0
        steps = range(worker + self._done * workers, indices // self._step, workers)
        return self._items(first, steps, workers)

    def state_dict(self) -> dict[str, Any]:
        """Returns where this worker stands; :func:`position` joins the states of all."""
        worker, workers = _worker()
        first, indices = self._segment()
        return {
            "cursor": self._cursor(first).to_dict(), "epoch": int(self._epoch), "left": indices,
            "world": self._world, "batch_size": self._batch_size,
            "worker": worker, "workers": workers, "done": self._resumed or self._done,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a state of :meth:`state_dict` or a :class:`Position` stands.

        Raises:
            FreeTumorError: the state is of another recipe, store or models, or of one worker of several.
        """
        cursor = Cursor.from_dict(state["cursor"])
        expected = self._cursor(cursor.next_index)
        if replace(cursor, bundle=expected.bundle) == expected != cursor:
            raise FreeTumorError(
                f"the state is of other models ({cursor.bundle}) than those that are active now ({expected.bundle}): to go on with "
                f'them while the server holds them, give the dataset recipe={{..., "bundle": "{cursor.bundle}"}}'
            )
        if cursor != expected:
            raise FreeTumorError(f"the state is of another stream: expected {expected}, got {cursor}")
        _, workers = _worker()
        here = {"world": self._world, "batch_size": self._batch_size, "workers": workers}
        # Outside of workers there may be any number of them later: the place is made free of it.
        if "worker" in state and (get_worker_info() is None or any(state[key] != value for key, value in here.items())):
            if state["workers"] != 1:
                raise FreeTumorError(
                    f"the state is of one of {state['workers']} workers, and there are {workers} now: give "
                    "freetumor.torch.position(loader.state_dict()) to the dataset, not the state to the loader"
                )
            state = cast("Mapping[str, Any]", _advanced([state], 0))
            cursor = Cursor.from_dict(state["cursor"])
        left: int | None = state["left"]
        indices = self._epoch_indices if left is None else self._whole_steps(left)
        self._origin.copy_(torch.tensor([cursor.next_index, state["epoch"], indices]))
        done = int(state.get("done", 0))
        is_over = state.get("worker", 0) + done * workers >= indices // self._step
        if is_over and int(self._epoch) > state["epoch"]:
            return  # saved at an epoch's end, and the next one was chosen since
        self._epoch.fill_(state["epoch"])
        self._resumed = self._done = done

    @property
    def _step(self) -> int:
        """Indices in a step of all ranks."""
        return self._world * self._batch_size

    def _whole_steps(self, indices: int) -> int:
        """Returns the indices of the whole steps that cover some indices, or fit into them: as many for every rank."""
        steps = -(-indices // self._step) if self._is_filled else indices // self._step
        return steps * self._step

    def _segment(self) -> tuple[int, int]:
        """Returns the current epoch's first index that is due, and how many of its indices are."""
        first, epoch, indices = (int(value) for value in self._origin)
        later = int(self._epoch) - epoch
        if later == 0:
            return first, indices
        return first + indices + (later - 1) * self._epoch_indices, self._epoch_indices

    def _cursor(self, index: int) -> Cursor:
        known = self.resolved
        return Cursor(known["hash"], known["snapshot"], known["bundle"], known["revision"], index)

    def _items(self, first: int, steps: range, workers: int) -> Iterator[Item]:
        if not steps:
            return
        with ExitStack() as stack:
            lanes = [stack.enter_context(lane) for lane in self._lanes(first, steps, workers)]
            for _ in steps:
                batches = [next(lane) for lane in lanes]
                self._done += 1
                yield self._item(batches)

    def _lanes(self, first: int, steps: range, workers: int) -> Iterator[Stream]:
        """Opens the streams that this worker's steps are made of.

        One worker reads whole steps. Of several, each reads every N-th step, which the server's strides express as one
        stream for each place in the batch: index ``first + s W N B + (w B + i) W + r`` is rank ``(w B + i) W + r`` of a world
        of ``W N B`` with batches of one.
        """
        cursor = self._cursor(first + steps.start // workers * workers * self._step)
        if workers == 1:
            yield stream(
                **self._options, cursor=cursor, count=len(steps), rank=self._rank, world=self._world,
                batch_size=self._batch_size,
            )
            return
        worker = steps.start % workers
        for place in range(self._batch_size):
            yield stream(
                **self._options, cursor=cursor, count=len(steps),
                rank=(worker * self._batch_size + place) * self._world + self._rank,
                world=self._world * workers * self._batch_size, batch_size=1,
            )

    def _item(self, batches: Sequence[Batch]) -> Item:
        item: Item = {}
        for name, array in batches[0].arrays.items():
            parts = [batch.arrays[name] for batch in batches]
            item[name] = torch.as_tensor(array if len(parts) == 1 else _joined(parts))
        if self._with_meta:
            metas: list[PatchMeta] = [meta for batch in batches for meta in batch.meta]
            item["meta"] = metas
        return item


def position(loader_state: Mapping[str, Any]) -> Position:
    """Returns where a run stands from ``StatefulDataLoader.state_dict()`` (or the dataset's own), for any workers and ranks.

    All ranks stand at the same step, so one rank's state is enough.
    """
    if "worker" in loader_state:
        return _advanced([loader_state], 0)
    if "cursor" in loader_state:
        return cast(Position, dict(loader_state))
    if "_snapshot" in loader_state:
        workers: Mapping[str, Any] = loader_state["_snapshot"]["_worker_snapshots"]
        return _advanced([state["dataset_state"] for state in workers.values()], loader_state["_steps_since_snapshot"])
    if loader_state.get("dataset_state") is not None:
        return _advanced([loader_state["dataset_state"]], 0)
    inner: Any = loader_state.get("fetcher_state")
    raise FreeTumorError(f"no state of a StreamDataset in {sorted(loader_state)} (fetcher: {inner!r:.80})")


def to_device(
    items: Iterable[Item], device: torch.device | str, *, ahead: int = 1
) -> Iterator[Item]:
    """Yields items with their tensors on a device, copying the next ``ahead`` while the current one is trained on.

    On CUDA the copies run on a stream of their own, from pinned memory: give loaders ``pin_memory=True``, or tensors are
    pinned here. On other devices it only moves.
    """
    device = torch.device(device)
    if device.type != "cuda":
        for item in items:
            yield {key: value.to(device) if torch.is_tensor(value) else value for key, value in item.items()}
        return
    side = torch.cuda.Stream(device)
    waiting: deque[tuple[Item, torch.cuda.Event]] = deque()
    source = iter(items)
    while True:
        while len(waiting) <= ahead and (item := next(source, None)) is not None:
            waiting.append(_copied(item, device, side))
        if not waiting:
            return
        moved, copied = waiting.popleft()
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        for value in moved.values():
            if torch.is_tensor(value):
                value.record_stream(current)  # the allocator must not hand it out again before the trainer is done
        yield moved


def _copied(item: Item, device: torch.device, side: torch.cuda.Stream) -> tuple[Item, torch.cuda.Event]:
    moved: Item = {}
    with torch.cuda.stream(side):
        for key, value in item.items():
            if torch.is_tensor(value):
                pinned = value if value.is_pinned() else value.pin_memory()
                moved[key] = pinned.to(device, non_blocking=True)
            else:
                moved[key] = value
        copied = torch.cuda.Event()
        copied.record(side)
    return moved, copied


def _shared(values: list[int]) -> torch.Tensor:
    """Returns numbers that all processes made from this one see change."""
    tensor = torch.tensor(values, dtype=torch.int64)
    tensor.share_memory_()  # pyright: ignore[reportUnknownMemberType]
    return tensor


_NO_RANK: Final = (0, 1)


def _place(rank: int | None, world: int | None) -> tuple[int, int]:
    if (rank is None) != (world is None):
        raise ValueError(f"expected rank and world, or neither, got rank {rank} and world {world}")
    if rank is not None and world is not None:
        return rank, world
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return _NO_RANK


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _advanced(states: Sequence[Mapping[str, Any]], more_steps: int) -> Position:
    """Joins the states of all workers of a rank."""
    first = states[0]
    indices = (sum(state["done"] for state in states) + more_steps) * first["world"] * first["batch_size"]
    cursor = Cursor.from_dict(first["cursor"]).to_dict()
    cursor["next_index"] += indices
    left = first["left"] - indices
    if left > 0:
        return Position(cursor=cursor, epoch=first["epoch"], left=left)
    return Position(cursor=cursor, epoch=first["epoch"] + 1, left=None)


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(parts)

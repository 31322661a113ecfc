"""Hands streamed patches to nnU-Net's workers in an order that a resume repeats."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..client import Stream
from ..meta import PatchMeta

#: Steps whose patches wait for a worker.
_STEPS_AHEAD = 2


@dataclass(frozen=True)
class Patch:
    """A streamed patch: HU, ids and, where asked for, the soft mask ``[D, H, W]`` as they came, and where it comes from."""

    image_hu: NDArray[np.int16]
    label: NDArray[np.uint8]
    meta: PatchMeta
    soft_mask: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Mix:
    """Which samples of which step are streamed: integer arithmetic, so that a resume needs to know the step alone.

    Sample ``n = step B + j`` of a rank is streamed where ``floor((n + 1) p) > floor(n p)``; it is the ``floor(n p)``-th
    of the rank's streamed samples.
    """

    ratio: Fraction
    batch_size: int

    @classmethod
    def of(cls, ratio: float, batch_size: int) -> Mix:
        """Rounds a ratio to a fraction with a denominator of at most 1000."""
        return cls(Fraction(ratio).limit_denominator(1000), batch_size)

    def before(self, sample: int) -> int:
        """Returns how many of the rank's samples before this one are streamed."""
        return sample * self.ratio.numerator // self.ratio.denominator

    def is_streamed(self, step: int) -> list[bool]:
        """Tells for each sample of a step whether it is streamed."""
        first = step * self.batch_size
        return [self.before(n + 1) > self.before(n) for n in range(first, first + self.batch_size)]

    def streamed(self, step: int) -> range:
        """Returns which of the rank's streamed samples a step has."""
        return range(self.before(step * self.batch_size), self.before((step + 1) * self.batch_size))


class Source(Protocol):
    """A queue of a thread or of a process."""

    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None: ...
    def get(self, block: bool = True, timeout: float | None = None) -> Any: ...


class Feed:
    """Reads one rank's stream in a thread and gives the patches of step t to worker t mod N.

    One stream serves all workers: they get arrays, not connections.

    Attributes:
        error: what ended it, if anything did.
    """

    def __init__(
        self, open_stream: Callable[[], Stream], mix: Mix, first_step: int, make_queue: Callable[[int], Source], workers: int,
        check: Callable[[PatchMeta], None],
    ) -> None:
        self.queues: Sequence[Source] = [make_queue(_STEPS_AHEAD) for _ in range(workers)]
        self.error: BaseException | None = None
        self._open, self._mix, self._step, self._check = open_stream, mix, first_step, check
        self._stream: Stream | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="freetumor-feed", daemon=True)

    def start(self) -> None:
        """Starts reading. Fork workers before: a thread does not survive a fork, but its locks would."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and the stream, also where it waits for a patch; may be called again."""
        self._stopped.set()
        stream = self._stream
        if stream is not None:
            stream.close()
        if self._thread.is_alive():
            self._thread.join()
        for one in self.queues:
            try:
                one.put(None, block=False)
            except queue.Full:
                pass  # its worker does not wait

    def _run(self) -> None:
        try:
            with self._open() as stream:
                self._stream = stream
                step = self._step
                while not self._stopped.is_set():
                    patches = [self._next(stream) for _ in self._mix.streamed(step)]
                    self._put(self.queues[(step - self._step) % len(self.queues)], patches)
                    step += 1
        except BaseException as error:  # noqa: BLE001: the training's thread raises it
            if self._stopped.is_set():
                return  # it was woken
            self.error = error
            for one in self.queues:
                self._put(one, None)

    def _next(self, stream: Stream) -> Patch:
        batch = next(stream)
        self._check(batch.meta[0])
        soft_mask = batch.arrays.get("soft_mask")
        return Patch(batch.image[0, 0], batch.label[0, 0], batch.meta[0], None if soft_mask is None else soft_mask[0, 0])

    def _put(self, one: Source, item: Any) -> None:
        while not self._stopped.is_set():
            try:
                one.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

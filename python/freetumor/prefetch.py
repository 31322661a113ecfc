"""A bounded queue that a background thread fills, so that reading and decoding overlap with training."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from typing import Union

from .batch import Batch
from .errors import StreamCut
from .reader import Reader
from .transport import End

_Item = Union[Batch, End, BaseException]


class Prefetcher:
    """Takes batches from a reader, ahead by at most ``depth`` of them plus the one being read.

    Attributes:
        reader: where the batches come from.
        is_closed: whether nothing more will come.
        waited_seconds: how long :meth:`take` waited, in all.
    """

    def __init__(self, reader: Reader, depth: int) -> None:
        if depth < 0:
            raise ValueError(f"prefetch: expected at least 0 batches, got {depth}")
        self.reader = reader
        self.is_closed = False
        self.waited_seconds = 0.0
        self._queue: queue.Queue[_Item] | None = None
        self._thread: threading.Thread | None = None
        self._reading = threading.Lock()
        if depth > 0:
            self._queue = queue.Queue(depth)
            stopped = threading.Event()
            self._thread = threading.Thread(
                target=_fill, args=(reader, self._queue, stopped), name="freetumor-prefetch", daemon=True
            )
            # The thread holds no reference to this object, so that a stream nobody holds any more ends its thread.
            self._finalizer = weakref.finalize(self, _stop, reader, stopped)
            self._thread.start()

    def take(self) -> Batch | End:
        """Blocks for the next batch or the end; raises what the reader raised, in its place in the order."""
        began = time.perf_counter()
        try:
            item = self._read() if self._queue is None else self._queue.get()
        finally:
            self.waited_seconds += time.perf_counter() - began
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Ends thread and connection; may be called again."""
        if self.is_closed:
            return
        self.is_closed = True
        if self._thread is not None:
            self._finalizer()
            self._thread.join()
        else:
            # Another thread may be reading: it is woken, and leaves before the connection goes.
            self.reader.interrupt()
        with self._reading:
            self.reader.close()

    def _read(self) -> Batch | End:
        with self._reading:
            return self.reader.read()


def _stop(reader: Reader, stopped: threading.Event) -> None:
    stopped.set()
    reader.interrupt()


def _fill(reader: Reader, batches: queue.Queue[_Item], stopped: threading.Event) -> None:
    """The thread: reads until the end, an error, or a stop; then leaves the stream."""
    while not stopped.is_set():
        item: _Item
        try:
            item = reader.read()
        except BaseException as error:  # noqa: BLE001: it is raised where the batch would have been taken
            item = error
        while not stopped.is_set():
            try:
                batches.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if not isinstance(item, Batch):
            break
    reader.close()
    try:
        # Whoever waits for a batch while another thread closes the stream is woken; a full queue wakes them too.
        batches.put_nowait(StreamCut("the stream was closed", None))
    except queue.Full:
        pass

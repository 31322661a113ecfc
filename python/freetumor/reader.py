"""A stream that outlives its connections: reads batches, and connects again at the cursor where one breaks."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from .batch import Batch
from .errors import FrameError, FreeTumorError, ProblemError, StreamCut
from .meta import Cursor, Header
from .transport import Connection, End

_FIRST_WAIT_SECONDS: Final = 0.25
_LONGEST_WAIT_SECONDS: Final = 15.0
#: Too many streams, a proxy without a server behind it, shutting down, a proxy that waited too long.
_PASSING_STATUSES: Final = (429, 502, 503, 504)
_EARLY_ENDS: Final = ("shutdown", "rebalance")
#: A network that damages a frame is asked again; a server that sends a batch damaged so often is at fault itself.
_DAMAGED_IN_A_ROW: Final = 3


@dataclass(frozen=True)
class Patience:
    """How many seconds of outage are waited out: before the first connection, and once the stream has begun."""

    connect_seconds: float
    outage_seconds: float


class Backoff:
    """The waits of one outage: doubling, capped, spread at random so that many clients do not come back at once."""

    def __init__(self, patience_seconds: float) -> None:
        self._ends_at = time.monotonic() + patience_seconds
        self._next = _FIRST_WAIT_SECONDS

    def wait(self, error: FreeTumorError, stopped: threading.Event) -> None:
        """Waits before the next try, at least as long as the server asked for.

        Raises:
            FreeTumorError: the error, where patience would not last as long.
        """
        asked = error.retry_after if isinstance(error, ProblemError) else None
        seconds = max(asked or 0.0, self._next * random.uniform(0.5, 1.0))
        self._next = min(2 * self._next, _LONGEST_WAIT_SECONDS)
        if time.monotonic() + seconds > self._ends_at or stopped.wait(seconds):
            raise error


def is_passing(error: FreeTumorError) -> bool:
    """Tells whether trying again later can help."""
    if isinstance(error, ProblemError):
        return error.status in _PASSING_STATUSES
    return isinstance(error, StreamCut)


class Reader:
    """Reads one rank's batches in order, over as many connections as it takes. For one thread at a time.

    Attributes:
        header: what the stream holds, as its first connection said.
        reconnects: how often a new connection went on with the stream.
    """

    def __init__(
        self, url: str, request: Mapping[str, Any], *, api_key: str | None, timeout: float, patience: Patience
    ) -> None:
        self._url, self._api_key, self._timeout, self._patience = url, api_key, timeout, patience
        self._stopped = threading.Event()
        self._request = dict(request)
        self._connection: Connection | None = self._connect(self._request, patience.connect_seconds)
        self.header: Header = self._connection.header
        self.reconnects = 0
        self._cursor: Cursor = self.header.cursor
        self._left = self.header.batches
        self._is_counted = "count" in self._request["delivery"]
        self._damaged = 0

    def read(self) -> Batch | End:
        """Blocks for the next batch or the end, through outages as long as patience lasts."""
        backoff: Backoff | None = None
        while True:
            try:
                item = self._read_once()
                if isinstance(item, Batch) or item not in _EARLY_ENDS or self._patience.outage_seconds <= 0:
                    return item
                raise StreamCut(f"the server ended the stream early: {item}", self._cursor)
            except FreeTumorError as error:
                self._drop()
                if not self._may_pass(error) or self._stopped.is_set():
                    raise
                if self._left == 0 and self._patience.outage_seconds > 0:
                    # Only the end frame was lost: a cursor at an epoch's end would begin the next epoch.
                    return self._end()
                backoff = backoff or Backoff(self._patience.outage_seconds)
                backoff.wait(error, self._stopped)

    def interrupt(self) -> None:
        """Wakes the thread that reads; any thread may call it."""
        self._stopped.set()
        connection = self._connection
        if connection is not None:
            connection.interrupt()

    def close(self) -> None:
        """Leaves the stream."""
        self._stopped.set()
        self._drop()

    def _read_once(self) -> Batch | End:
        if self._connection is None:
            self._connection = self._go_on()
            if self._stopped.is_set():
                raise StreamCut("the stream was closed", self._cursor)
        item = self._connection.read()
        if isinstance(item, Batch):
            self._cursor = item.cursor
            self._left -= 1
            self._damaged = 0
        # A connection that went on with an epoch counts its batches; the stream still ends with the epoch.
        return self._end() if item == "count" and self.reconnects else item

    def _may_pass(self, error: FreeTumorError) -> bool:
        """Tells whether a new connection can help: also where bytes changed on the way, for which no batch was taken."""
        if isinstance(error, FrameError):
            self._damaged += 1
            return self._patience.outage_seconds > 0 and self._damaged <= _DAMAGED_IN_A_ROW
        return is_passing(error)

    def _end(self) -> End:
        return End("count" if self._is_counted else "end_of_epoch")

    def _go_on(self) -> Connection:
        """Opens a connection at the batch that is due."""
        delivery = {**self._request["delivery"], "cursor": self._cursor.to_dict(), "count": self._left}
        connection = self._connect({**self._request, "delivery": delivery}, 0.0)
        if connection.header.labels != self.header.labels or connection.header.patch != self.header.patch:
            connection.close()
            raise FreeTumorError(
                f"expected labels {self.header.labels} and patches {self.header.patch} as before the outage, got "
                f"{connection.header.labels} and {connection.header.patch}"
            )
        self.reconnects += 1
        return connection

    def _connect(self, request: Mapping[str, Any], patience_seconds: float) -> Connection:
        backoff = Backoff(patience_seconds)
        while True:
            try:
                return Connection(self._url, request, api_key=self._api_key, timeout=self._timeout)
            except FreeTumorError as error:
                if patience_seconds <= 0 or not is_passing(error):
                    raise
                backoff.wait(error, self._stopped)

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

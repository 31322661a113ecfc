"""The stream for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .batch import Batch
from .client import Stream, stream
from .meta import Cursor, Header


class AsyncStream(AsyncIterator[Batch]):
    """A stream whose batches are awaited: ``async with await freetumor.astream(url) as stream: async for batch in stream``.

    The event loop never blocks: a thread of its own waits for the batch. Attributes as of :class:`Stream`.
    """

    def __init__(self, inner: Stream, thread: ThreadPoolExecutor) -> None:
        self._inner = inner
        self._thread = thread
        self._awaited: asyncio.Future[Batch | None] | None = None
        self._is_closed = False

    @property
    def header(self) -> Header:
        return self._inner.header

    @property
    def cursor(self) -> Cursor:
        return self._inner.cursor

    @property
    def end_reason(self) -> str | None:
        return self._inner.end_reason

    async def __anext__(self) -> Batch:
        if self._is_closed:
            raise StopAsyncIteration
        if self._awaited is None:
            # StopIteration cannot cross a future, so the end crosses it as None.
            self._awaited = asyncio.get_running_loop().run_in_executor(self._thread, next, self._inner, None)
        try:
            # A caller that waits no longer leaves the batch to the next one.
            batch = await asyncio.shield(self._awaited)
        except asyncio.CancelledError:
            raise
        except BaseException:
            self._awaited = None
            raise
        self._awaited = None
        if batch is None:
            await self.aclose()
            raise StopAsyncIteration
        return batch

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Leaves the stream, also while a batch is awaited."""
        self._is_closed = True
        await asyncio.get_running_loop().run_in_executor(None, self._inner.close)
        self._thread.shutdown(wait=False)


async def astream(url: str, recipe: Any = None, **delivery: Any) -> AsyncStream:
    """Opens a stream for ``async for``; takes what :func:`freetumor.stream` takes."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="freetumor-async")
    try:
        inner = await asyncio.get_running_loop().run_in_executor(thread, lambda: stream(url, recipe, **delivery))
    except BaseException:
        thread.shutdown(wait=False)
        raise
    return AsyncStream(inner, thread)

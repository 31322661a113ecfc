"""A server that goes away costs a pause, within the configured patience; reading ahead is bounded and ordered."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from pathlib import Path

import pytest

import freetumor
from server import Server
from test_promises import ANALYTIC, content, fetch


def restart_after(seconds: float, store: Path, port: int, started: list[Server]) -> threading.Thread:
    """Starts a server on a port after a while."""

    def run() -> None:
        time.sleep(seconds)
        started.append(Server(store, port=port))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_server_that_dies_mid_epoch_costs_a_pause(store: Path, prefetch: int) -> None:
    recipe = {**ANALYTIC, "patches_per_epoch": 60}
    started = [Server(store)]
    try:
        whole = fetch(started[0].url, None, recipe=recipe)
        got: dict[int, tuple] = {}
        stream = freetumor.stream(started[0].url, recipe, image="i16", prefetch=prefetch, patience=60)
        for batch in stream:
            new = content(batch)
            assert not new.keys() & got.keys(), "an index came twice"
            got |= new
            if batch.step == 5:
                started[0].kill()
                restarting = restart_after(1.0, store, started[0].port, started)
        restarting.join()
    finally:
        for one in started:
            one.kill()
    assert got == whole
    assert stream.reconnects >= 1 and stream.end_reason == "end_of_epoch"
    assert stream.cursor.next_index == 60


def test_an_epoch_with_dropped_indices_ends_at_the_next_one_also_after_an_outage(store: Path) -> None:
    # 302 indices are 75 steps of four; two are dropped.
    recipe = {**ANALYTIC, "patches_per_epoch": 302}
    started = [Server(store)]
    try:
        stream = freetumor.stream(started[0].url, recipe, batch_size=4, last_batch="drop", patience=60)
        indices = []
        for batch in stream:
            indices += [meta.index for meta in batch.meta]
            if batch.step == 2:
                started[0].kill()
                restart_after(0.2, store, started[0].port, started).join()
        assert indices == list(range(300)) and stream.reconnects >= 1
        assert stream.cursor.next_index == 302
        following = next(iter(freetumor.stream(started[-1].url, recipe, batch_size=4, cursor=stream.cursor)))
        assert [meta.index for meta in following.meta] == [302, 303, 304, 305]
    finally:
        for one in started:
            one.kill()


def test_a_server_that_falls_silent_is_given_up(store: Path) -> None:
    """Its kernel still acknowledges what it is sent, as where a process hangs."""
    with Server(store, env={"FREETUMOR__SERVER__HEARTBEAT_SECONDS": "1"}) as running:
        stream = freetumor.stream(running.url, ANALYTIC, image="i16", count=2000, timeout=3, patience=0, prefetch=0)
        next(stream)
        running.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        try:
            with pytest.raises(freetumor.StreamCut, match="timed out"):
                for _ in stream:
                    pass
        finally:
            running.process.send_signal(signal.SIGCONT)
        assert 2.5 < time.monotonic() - began < 30


def test_patience_ends_with_the_cursor(store: Path) -> None:
    with Server(store) as running:
        stream = freetumor.stream(running.url, ANALYTIC, image="i16", patience=1.5, prefetch=1)
        consumed = next(stream).cursor
        running.kill()
        began = time.monotonic()
        with pytest.raises(freetumor.StreamCut, match="cannot open|cut") as caught:
            for batch in stream:
                consumed = batch.cursor
        assert caught.value.cursor == consumed
        assert time.monotonic() - began < 30, "ends when patience does, and not later than what had arrived"


def test_a_server_that_ends_streams_early_is_followed(store: Path) -> None:
    with Server(store, env={"FREETUMOR__SERVER__MAX_STREAM_AGE_SECONDS": "1"}) as running:
        stream = freetumor.stream(running.url, ANALYTIC, image="i16", count=40, prefetch=1)
        indices = []
        for batch in stream:
            indices += [meta.index for meta in batch.meta]
            time.sleep(0.06)  # 40 batches last longer than a second
        assert indices == list(range(80))
        assert stream.reconnects >= 1 and stream.end_reason == "count"
        with pytest.raises(freetumor.StreamCut, match="rebalance"):
            for _ in freetumor.stream(running.url, ANALYTIC, count=2000, patience=0):
                time.sleep(0.1)


def test_a_full_server_is_asked_again_when_it_said(store: Path) -> None:
    limits = {"FREETUMOR__SERVER__MAX_STREAMS": "1", "FREETUMOR__SERVER__RETRY_AFTER_SECONDS": "1"}
    with Server(store, env=limits) as running:
        first = freetumor.stream(running.url, ANALYTIC)
        next(first)
        with pytest.raises(freetumor.ProblemError) as caught:
            freetumor.stream(running.url, ANALYTIC)
        assert caught.value.status == 429 and caught.value.body["type"].startswith("urn:freetumor:problem:")
        threading.Timer(0.3, first.close).start()
        began = time.monotonic()
        with freetumor.stream(running.url, ANALYTIC, connect_patience=20) as second:
            assert len(next(second)) == 2
        assert time.monotonic() - began >= 0.9, "not before the second that the server asked for"


def test_a_changed_recipe_after_an_outage_is_no_outage(server: Server) -> None:
    cursor = next(freetumor.stream(server.url, ANALYTIC)).cursor
    began = time.monotonic()
    with pytest.raises(freetumor.ProblemError) as caught:
        freetumor.stream(server.url, {**ANALYTIC, "seed": 8}, cursor=cursor, connect_patience=60)
    assert caught.value.status == 409 and time.monotonic() - began < 10


def test_streams_that_nobody_holds_end_their_threads(server: Server) -> None:
    def readers() -> int:
        return sum(thread.name == "freetumor-prefetch" for thread in threading.enumerate())

    before = readers()
    for _ in range(3):
        next(freetumor.stream(server.url, ANALYTIC, prefetch=1))
    deadline = time.monotonic() + 10
    while readers() > before:
        assert time.monotonic() < deadline, "threads outlive their streams"
        time.sleep(0.05)


def test_asyncio_gets_the_same_batches_and_never_blocks(server: Server) -> None:
    expected = fetch(server.url, 6, recipe=ANALYTIC)

    async def run() -> tuple[dict[int, tuple], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.ensure_future(tick())
        got: dict[int, tuple] = {}
        async with await freetumor.astream(server.url, ANALYTIC, count=6, image="i16") as stream:
            assert stream.header.batches == 6
            async for batch in stream:
                got |= content(batch)
        ticking.cancel()
        assert stream.end_reason == "count"
        assert [batch async for batch in stream] == [], "after its end there is no more, and no error"
        return got, ticks

    got, ticks = asyncio.run(run())
    assert got == expected and ticks > 1


def test_a_wait_that_was_given_up_loses_no_batch(server: Server) -> None:
    async def run() -> list[int]:
        got: list[int] = []
        async with await freetumor.astream(server.url, ANALYTIC, count=6, batch_size=1, image="i16", prefetch=0) as stream:
            while True:
                try:
                    got += [meta.index for meta in (await asyncio.wait_for(stream.__anext__(), 0.002)).meta]
                except asyncio.TimeoutError:
                    continue
                except StopAsyncIteration:
                    return got

    assert asyncio.run(run()) == list(range(6))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_leaving_an_asyncio_stream_that_waits(server: Server, prefetch: int) -> None:
    async def run() -> None:
        stream = await freetumor.astream(server.url, {"seed": 3}, count=1000, prefetch=prefetch)
        waiting = asyncio.ensure_future(stream.__anext__())
        await asyncio.sleep(0.01)
        await stream.aclose()
        try:
            await asyncio.wait_for(waiting, 10)
        except (freetumor.StreamCut, StopAsyncIteration):
            pass

    asyncio.run(run())

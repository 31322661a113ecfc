"""Loads a server with many streams, slow readers and idle connections, and tells what the others notice of it.

Starts `freetumor serve` on a store (or on a phantom that it makes), then for a while at the same time:

    --streams readers of as many recipes, so that nothing is shared, each as fast as it can
    --slow    readers that take a few bytes a second
    --idle    connections that say nothing, half of them after half a request; what the server closes is opened again
    a client that asks for /livez and /v1/info over a new connection each time

and prints: patches of each reader (fairness), the server's own memory over time beside its bound, and how long control
requests took. Exits 1 where an equal is more than 10 % off the mean, memory grows by more than a tenth from the first half
to the second or is ever over its bound, or a control request's 99th percentile is over 50 ms.

    python benches/load.py --seconds 300
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import resource
import selectors
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, MutableSequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BINARY = Path(os.environ.get("FREETUMOR_BINARY", ROOT / "target" / "release" / "freetumor"))
PREAMBLE = struct.Struct("<4sHHIIQI4x")
BATCH = 2
SIDE = 32
MIB = 1 << 20
CONTROL = ("/livez", "/v1/info")
Counts = MutableSequence[int]
#: `store.cache_mib` as it comes.
CACHE_MIB = 128
#: What the allocator keeps for a stream's thread: pages of 64 KiB, one or more for every size that it ever asked for.
THREAD_MIB = 2.5
#: A connection that says nothing: its buffer and its task, in the allocator's pages.
CONNECTION_KIB = 40


def recipe(seed: int) -> dict:
    """Returns a recipe that costs little, so that many streams get many patches."""
    return {"seed": seed, "synthesizer": "analytic", "gate": {"enabled": False}, "unlabelled_negatives": "trust",
            "patch": [SIDE] * 3, "patches_per_epoch": 1 << 30}


def request(seed: int, **delivery: object) -> bytes:
    body = json.dumps({"recipe": recipe(seed), "delivery": {"batch_size": BATCH, "image": "i16", **delivery}}).encode()
    return (b"POST /v1/stream HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % len(body)) + body


class Chunks:
    """The body of a chunked answer as a stream of bytes."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader, self._left = reader, 0

    async def skip_head(self) -> None:
        status = (await self._reader.readuntil(b"\r\n\r\n")).split(b"\r\n", 1)[0]
        if b" 200 " not in status:
            raise RuntimeError(status.decode())

    async def read(self, count: int) -> bytes:
        parts = []
        while count:
            if self._left == 0:
                self._left = int((await self._reader.readuntil(b"\r\n")).strip() or b"0", 16)
                if self._left == 0:
                    raise EOFError
            part = await self._reader.readexactly(min(count, self._left))
            self._left -= len(part)
            if self._left == 0:
                await self._reader.readexactly(2)
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


class Readers:
    """The readers of one process: as many streams as it was given, and slow ones."""

    def __init__(self, port: int, streams: int, slow: int, patches: Counts) -> None:
        self.port, self.streams, self.slow_streams, self.patches = port, streams, slow, patches

    async def run(self) -> None:
        tasks = [self.slow(n) for n in range(self.slow_streams)]
        tasks += [self.stream(n) for n in range(self.streams)]
        await asyncio.gather(*tasks)

    async def stream(self, number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 18)
        writer.write(request(number))
        chunks = Chunks(reader)
        await chunks.skip_head()
        while True:
            preamble = PREAMBLE.unpack(await chunks.read(PREAMBLE.size))
            await chunks.read(preamble[4] + preamble[5])
            self.patches[number] += BATCH * (preamble[2] == 2)

    async def slow(self, number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 10)
        writer.write(request(1_000_000 + number))
        while True:
            await reader.read(64)
            await asyncio.sleep(1)


def read_streams(port: int, streams: int, slow: int, patches: Counts) -> None:
    asyncio.run(Readers(port, streams, slow, patches).run())


def crowd(port: int, idle: int, opened: Counts) -> None:
    """Holds connections that say nothing, half of them after half a request; what the server closes is opened again."""
    with selectors.DefaultSelector() as selector:

        def open_one(is_half: bool) -> None:
            connection = socket.create_connection(("127.0.0.1", port))
            if is_half:
                connection.sendall(b"GET /v1/info HTTP/1.1\r\nHo")
            selector.register(connection, selectors.EVENT_READ, is_half)
            opened[0] += 1

        for number in range(idle):
            open_one(number % 2 == 1)
        opened[1] = 1
        while True:
            for key, _ in selector.select():
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                try:
                    is_open = connection.recv(4096) != b""
                except ConnectionError:
                    is_open = False
                if not is_open:
                    selector.unregister(connection)
                    connection.close()
                    open_one(key.data)


def control(port: int, answers: multiprocessing.connection.Connection) -> None:
    """Asks for the control routes, each time over a new connection, until the parent says that it is enough."""
    latencies: dict[str, list[float]] = {path: [] for path in CONTROL}
    while not answers.poll(0.05):
        for path, times in latencies.items():
            began = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            times.append(time.perf_counter() - began)
            connection.close()
            assert response.status == 200, response.status
    answers.send(latencies)


def memory_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", text).group(1)) / 1024


def run(port: int, pid: int, options: argparse.Namespace) -> dict:
    """Starts each part of the load in a process of its own, so that none waits for another's turn, and watches."""
    context = multiprocessing.get_context("fork")
    patches = context.Array("q", options.streams, lock=False)
    opened = context.Array("q", 2, lock=False)
    here, there = context.Pipe()
    readers = context.Process(target=read_streams, args=(port, options.streams, options.slow, patches), daemon=True)
    idle = context.Process(target=crowd, args=(port, options.idle, opened), daemon=True)
    asking = context.Process(target=control, args=(port, there), daemon=True)

    def wait_for(what: str, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not is_so():
            assert readers.exitcode is None and idle.exitcode is None, "a part of the load failed"
            assert time.monotonic() < deadline, f"{what}: not in two minutes"
            time.sleep(0.1)

    idle.start()
    wait_for("idle connections", lambda: opened[1] == 1)
    readers.start()
    wait_for("the first patch of every stream", lambda: all(patches))
    before = list(patches)
    asking.start()
    memory = []
    for _ in range(options.seconds):
        time.sleep(1)
        memory.append(memory_mib(pid))
    got = [after - first for after, first in zip(patches, before)]
    here.send(None)
    latencies = here.recv()
    for process in (readers, idle, asking):
        process.kill()
    return {"patches": got, "memory": memory, "latencies": latencies, "opened": opened[0]}


def bound_mib(options: argparse.Namespace) -> float:
    """Returns what may be held: patches ahead, frames on their way, connections, threads, and the store's cache."""
    voxels = SIDE**3
    patch = voxels * (2 + 1 + 2 + 1 + 1)
    streams = options.streams + options.slow
    ahead = (64 + streams + 32) * patch
    frames = streams * 5 * BATCH * voxels * 3
    connections = options.idle * CONNECTION_KIB * 1024
    return (ahead + frames + connections) / MIB + streams * THREAD_MIB + CACHE_MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="a phantom is made without it")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--slow", type=int, default=32)
    parser.add_argument("--idle", type=int, default=10_000)
    parser.add_argument("--seconds", type=int, default=300)
    options = parser.parse_args()
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder:
        store = options.store or Path(folder) / "store"
        if options.store is None:
            subprocess.run([BINARY, "phantom", "--store", store, "--labelled", "2", "--unlabelled", "2"], cwd=ROOT,
                           check=True, capture_output=True)
        limits = {"FREETUMOR__SERVER__MAX_STREAMS": str(options.streams + options.slow + 8)}
        server = subprocess.Popen([BINARY, "serve", "--config", "configs/demo.toml", "--store", store, "--bind",
                                   "127.0.0.1:0"], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                                  env={**os.environ, **limits})
        try:
            port = int(re.search(r":(\d+)$", server.stdout.readline().strip()).group(1))
            at_rest = memory_mib(server.pid)
            seen = run(port, server.pid, options)
        finally:
            server.kill()
    sys.exit(tell(seen, at_rest, options))


def tell(seen: dict, at_rest: float, options: argparse.Namespace) -> int:
    """Prints what was seen; returns 1 where a promise is missed."""
    patches, memory = seen["patches"], seen["memory"]
    mean = statistics.mean(patches)
    off = max(abs(count - mean) for count in patches) / mean
    print(f"patches/s {sum(patches) / options.seconds:.0f} over {options.streams} streams; "
          f"each {min(patches)} to {max(patches)}, at most {100 * off:.1f} % off the mean {mean:.1f}")
    print(f"{seen['opened']} connections were opened that say nothing; {options.idle} at any time")
    half = len(memory) // 2
    first, last = statistics.median(memory[:half]), statistics.median(memory[half:])
    bound = bound_mib(options)
    print(f"memory MiB: {at_rest:.0f} at rest, {first:.0f} in the first half, {last:.0f} in the second, most "
          f"{max(memory):.0f}; its bound {bound:.0f}")
    is_fast = True
    for path, times in seen["latencies"].items():
        times.sort()
        p99 = times[int(len(times) * 0.99)] * 1e3
        is_fast &= p99 < 50
        print(f"{path}: {len(times)} requests, p50 {statistics.median(times) * 1e3:.1f} ms, p99 {p99:.1f} ms, "
              f"most {times[-1] * 1e3:.1f} ms")
    is_fair = off <= 0.1 or max(patches) - min(patches) <= 2 * BATCH
    is_flat, is_bounded = last <= 1.1 * first, max(memory) <= bound
    print(json.dumps({"fair": is_fair, "flat": is_flat, "bounded": is_bounded, "fast": is_fast}))
    return 0 if is_fair and is_flat and is_bounded and is_fast else 1


if __name__ == "__main__":
    main()

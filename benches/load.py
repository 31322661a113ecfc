"""Loads a server with many streams, slow readers and idle connections, and tells what the others notice of it.

Starts `freetumor serve` on a store (or on a phantom that it makes), then for a while at the same time:

    --streams readers of as many recipes, so that nothing is shared, each as fast as it can
    --slow    readers that take a few bytes a second
    --idle    connections that say nothing, half of them after half a request
    a client that asks for /livez and /v1/info over a new connection each time

and prints: patches of each reader (fairness), the server's own memory over time beside its bound, and how long control
requests took. Exits 1 where an equal is more than 10 % off the mean, memory grows by more than a tenth from the first half
to the second, or a control request's 99th percentile is over 50 ms.

    python benches/load.py --seconds 300
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BINARY = Path(os.environ.get("FREETUMOR_BINARY", ROOT / "target" / "release" / "freetumor"))
PREAMBLE = struct.Struct("<4sHHIIQI4x")
BATCH = 2
SIDE = 32
MIB = 1 << 20
#: `store.cache_mib` as it comes.
CACHE_MIB = 128


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


class Load:
    """What runs against one server."""

    def __init__(self, port: int, options: argparse.Namespace) -> None:
        self.port, self.options = port, options
        self.patches = [0] * options.streams
        self.latencies: dict[str, list[float]] = {"/livez": [], "/v1/info": []}
        self.is_over = False

    async def stream(self, number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 18)
        writer.write(request(number))
        chunks = Chunks(reader)
        await chunks.skip_head()
        while not self.is_over:
            preamble = PREAMBLE.unpack(await chunks.read(PREAMBLE.size))
            await chunks.read(preamble[4] + preamble[5])
            self.patches[number] += BATCH * (preamble[2] == 2)
        writer.close()

    async def slow(self, number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 10)
        writer.write(request(1_000_000 + number))
        while not self.is_over:
            await reader.read(64)
            await asyncio.sleep(1)
        writer.close()

    async def idle(self, number: int) -> None:
        _reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        if number % 2:
            writer.write(b"GET /v1/info HTTP/1.1\r\nHo")
        while not self.is_over:
            await asyncio.sleep(1)
        writer.close()

    async def control(self) -> None:
        while not self.is_over:
            for path, times in self.latencies.items():
                began = time.perf_counter()
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                answer = await reader.read()
                times.append(time.perf_counter() - began)
                writer.close()
                assert b" 200 " in answer[:20], answer[:100]
            await asyncio.sleep(0.05)


def memory_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", text).group(1)) / 1024


async def run(port: int, pid: int, options: argparse.Namespace) -> dict:
    load = Load(port, options)
    tasks = [asyncio.ensure_future(load.idle(n)) for n in range(options.idle)]
    await asyncio.sleep(min(10, options.idle / 1000))
    tasks += [asyncio.ensure_future(load.slow(n)) for n in range(options.slow)]
    tasks += [asyncio.ensure_future(load.stream(n)) for n in range(options.streams)]
    deadline = time.monotonic() + 60
    while any(count == 0 for count in load.patches):
        assert time.monotonic() < deadline, f"{load.patches.count(0)} streams got nothing in a minute"
        failed = [task.exception() for task in tasks if task.done() and task.exception()]
        if failed:
            raise failed[0]
        await asyncio.sleep(0.1)
    before = list(load.patches)
    tasks.append(asyncio.ensure_future(load.control()))
    memory = []
    for _ in range(options.seconds):
        await asyncio.sleep(1)
        memory.append(memory_mib(pid))
    got = [after - first for after, first in zip(load.patches, before)]
    load.is_over = True
    await asyncio.wait(tasks, timeout=5)
    for task in tasks:
        task.cancel()
    return {"patches": got, "memory": memory, "latencies": load.latencies}


def bound_mib(options: argparse.Namespace) -> float:
    """Returns what may be held by configuration: patches ahead, frames on their way, and the store's cache.

    The allocator keeps what was freed (docs/performance.md), and a connection that says nothing costs about 24 KiB.
    """
    voxels = SIDE**3
    patch = voxels * (2 + 1 + 2 + 1 + 1)
    streams = options.streams + options.slow
    ahead = (64 + streams + 32) * patch
    frames = streams * 5 * BATCH * voxels * 3
    connections = options.idle * 24 * 1024
    return (ahead + frames + connections) / MIB + CACHE_MIB


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
            seen = asyncio.run(run(port, server.pid, options))
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
    half = len(memory) // 2
    first, last = statistics.median(memory[:half]), statistics.median(memory[half:])
    bound = bound_mib(options)
    print(f"memory MiB: {at_rest:.0f} at rest, {first:.0f} in the first half, {last:.0f} in the second, most "
          f"{max(memory):.0f}; by configuration {bound:.0f}, beside what the allocator keeps")
    is_fast = True
    for path, times in seen["latencies"].items():
        times.sort()
        p99 = times[int(len(times) * 0.99)] * 1e3
        is_fast &= p99 < 50
        print(f"{path}: {len(times)} requests, p50 {statistics.median(times) * 1e3:.1f} ms, p99 {p99:.1f} ms, "
              f"most {times[-1] * 1e3:.1f} ms")
    is_fair = off <= 0.1 or max(patches) - min(patches) <= 2 * BATCH
    is_flat = last <= 1.1 * first
    print(json.dumps({"fair": is_fair, "flat": is_flat, "fast": is_fast}))
    return 0 if is_fair and is_flat and is_fast else 1


if __name__ == "__main__":
    main()

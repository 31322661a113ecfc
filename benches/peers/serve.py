"""Patches per second from a server's memory into numpy arrays, beside what the machine can do and beside gRPC.

Every way carries the same bytes, batches of two patches of 96^3 (f16 image, u8 label), over loopback to one client of
one process, in turns, several rounds; the medians count:

    tcp       a socket, `recv_into` a buffer that is kept; no check
    tcp-small the same with the send buffer that our server gives a peer on loopback
    unix      the same over a Unix domain socket: what a local path could gain
    floor     `http.client`, `readinto` a buffer that is kept, `zlib.crc32`: what a Python client can do at best
    freetumor `freetumor bench serve --listen` and the Python client: new arrays for every batch, every CRC-32 checked; 16 patches
              in turn, whose tensors are made: what is measured is the wire, and the most that a stream which shares its patches can get
    own       the same with patches that one stream alone takes: each is converted and hashed for it
    grpc      a stream of messages, uncompressed, parsed to numpy arrays (as tf.data service sends them)
    grpc-gzip the same, compressed by gRPC

Needs the client (`pip install -e python`) and grpcio; without grpcio the last two are left out.

    python benches/peers/serve.py --rounds 5 --json
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

import freetumor

ROOT = Path(__file__).resolve().parents[2]
BINARY = Path(os.environ.get("FREETUMOR_BINARY", ROOT / "target" / "release" / "freetumor"))
SIDE = 96
BATCH = 2
VOXELS = BATCH * SIDE**3
IMAGE_BYTES = 2 * VOXELS
BATCH_BYTES = IMAGE_BYTES + VOXELS
#: Batches that fill buffers before the clock starts.
WARM_UP = 20
#: As `LOOPBACK_SEND_BYTES` in src/http/connection.rs.
SEND_BYTES = 256 << 10


def payloads() -> list[bytes]:
    """Returns batches of noise in [0, 1] and labels in blocks, as the server's own."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(8):
        image = rng.random(VOXELS, dtype=np.float32).astype("<f2")
        label = np.repeat(rng.integers(0, 3, VOXELS // 64, dtype=np.uint8), 64)
        out.append(image.tobytes() + label.tobytes())
    return out


@contextmanager
def serving(serve: Callable[[socket.socket], None], *, is_local: bool = False) -> Iterator[tuple[str, int] | str]:
    """Runs a server in a process of its own on a free port, or on a Unix domain socket; yields its address."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if is_local:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(f"{folder}/socket")
            listener.listen()
        else:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        process = multiprocessing.get_context("fork").Process(target=serve, args=(listener,), daemon=True)
        process.start()
        try:
            yield listener.getsockname()
        finally:
            process.kill()
            process.join()


def serve_bytes_small(listener: socket.socket) -> None:
    # A socket gets it from the one that listens.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
    serve_bytes(listener)


def serve_bytes(listener: socket.socket) -> None:
    batches = payloads()
    while True:
        connection, _ = listener.accept()
        try:
            while True:
                for batch in batches:
                    connection.sendall(batch)
        except OSError:
            connection.close()


def serve_http(listener: socket.socket) -> None:
    batches = payloads()
    while True:
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1 << 50))
        try:
            while True:
                for batch in batches:
                    connection.sendall(batch)
        except OSError:
            connection.close()


def per_second(batches: int, take: Callable[[], object]) -> float:
    """Returns patches per second of so many batches."""
    for _ in range(WARM_UP):
        take()
    began = time.perf_counter()
    for _ in range(batches):
        take()
    return batches * BATCH / (time.perf_counter() - began)


def measure_socket(batches: int, *, is_local: bool = False, serve: Callable[[socket.socket], None] = serve_bytes) -> float:
    with serving(serve, is_local=is_local) as address, socket.socket(
        socket.AF_UNIX if is_local else socket.AF_INET
    ) as connection:
        connection.connect(address)
        view = memoryview(bytearray(BATCH_BYTES))

        def take() -> None:
            filled = 0
            while filled < BATCH_BYTES:
                filled += connection.recv_into(view[filled:])

        return per_second(batches, take)


def measure_floor(batches: int) -> float:
    with serving(serve_http) as address:
        connection = http.client.HTTPConnection(*address)
        connection.request("GET", "/")
        response = connection.getresponse()
        view = memoryview(bytearray(BATCH_BYTES))

        def take() -> None:
            filled = 0
            while filled < BATCH_BYTES:
                filled += response.readinto(view[filled:])
            zlib.crc32(view)

        try:
            return per_second(batches, take)
        finally:
            connection.close()


def measure_freetumor(batches: int, *options: str) -> float:
    server = subprocess.Popen([BINARY, "bench", "serve", "--listen", "--side", str(SIDE), *options], cwd=ROOT,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        stream = freetumor.stream(url, batch_size=BATCH, count=batches + WARM_UP + 8, image="f16")

        def take() -> None:
            batch = next(stream)
            assert batch.image.nbytes == IMAGE_BYTES and batch.label.flags.writeable

        with stream:
            return per_second(batches, take)
    finally:
        server.kill()
        server.wait()


def measure_grpc(batches: int, compression: str) -> float:
    import grpc

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    process = subprocess.Popen([sys.executable, __file__, "--grpc-server", str(port), compression])
    try:
        channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.max_receive_message_length", -1)])
        grpc.channel_ready_future(channel).result(30)
        messages = channel.unary_stream("/Patches/Get")(b"")

        def take() -> None:
            message = next(messages)
            image = np.frombuffer(message, "<f2", VOXELS)
            label = np.frombuffer(message, np.uint8, VOXELS, IMAGE_BYTES)
            assert image.nbytes + label.nbytes == BATCH_BYTES

        return per_second(batches, take)
    finally:
        process.kill()
        process.wait()


def serve_grpc(port: int, compression: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    batches = payloads()

    def answer(_request: bytes, _context: object) -> Iterator[bytes]:
        while True:
            yield from batches

    server = grpc.server(ThreadPoolExecutor(2), compression=getattr(grpc.Compression, compression),
                         options=[("grpc.max_send_message_length", -1)])
    handler = grpc.unary_stream_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Patches", {"Get": handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=400, help="batches of each way in each round")
    parser.add_argument("--only", default="", help="ways to measure, separated by commas")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--grpc-server", nargs=2, metavar=("PORT", "COMPRESSION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.grpc_server:
        serve_grpc(int(options.grpc_server[0]), options.grpc_server[1])
        return
    ways: dict[str, Callable[[int], float]] = {
        "tcp": measure_socket, "tcp-small": lambda batches: measure_socket(batches, serve=serve_bytes_small),
        "unix": lambda batches: measure_socket(batches, is_local=True), "floor": measure_floor, "freetumor": measure_freetumor,
        "own": lambda batches: measure_freetumor(batches, "--once", "--patches", str(BATCH * (batches + 8))),
        "grpc": lambda batches: measure_grpc(batches // 2, "NoCompression"),
        "grpc-gzip": lambda batches: measure_grpc(max(10, batches // 40), "Gzip"),
    }
    try:
        import grpc  # noqa: F401
    except ImportError:
        ways = {name: way for name, way in ways.items() if not name.startswith("grpc")}
    if options.only:
        ways = {name: ways[name] for name in options.only.split(",")}
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            rounds[name].append(way(options.batches))
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    floor = medians.get("floor")
    if options.json:
        print(json.dumps({"patches_per_s": medians, "rounds": rounds,
                          "to_floor": {name: value / floor for name, value in medians.items()} if floor else None}))
        return
    for name, value in medians.items():
        ratio = f", {value / floor:.2f} of the floor" if floor else ""
        spread = f"{min(rounds[name]):.0f} to {max(rounds[name]):.0f}"
        print(f"{name:>10} {value:7.0f} patches/s ({spread}){ratio}")


if __name__ == "__main__":
    main()

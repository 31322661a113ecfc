"""In every run, whatever fails: each epoch's indices and (case, organ) pairs are the plan's, and the bytes are the same.

Run with the client's environment: `pytest tests/faults`. Random moments come from a seed that a failure prints.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import freetumor
from proxy import Fault, Proxy
from server import Server
from trainer import RECIPE, Epoch, Seen, Trainer, check, finish, open_stream, seen_in


@pytest.fixture(autouse=True)
def chance() -> int:
    seed = random.SystemRandom().randrange(1 << 32)
    random.seed(seed)
    print(f"random seed {seed}")
    return seed


def streams_open(server: Server) -> int:
    found = re.search(r"^freetumor_streams_open (\d+)", server.get("/metrics")[1].decode(), re.MULTILINE)
    return int(found.group(1)) if found else 0


def test_a_server_killed_twenty_times_under_four_clients(store: Path, whole: Epoch) -> None:
    kills = epochs = came_back = 0
    server = Server(store)
    try:
        # However fast an epoch is read: as many epochs as it takes for twenty servers to die in one.
        while kills < 20:
            trainers = [Trainer(server.url, rank, 4, pause=lambda: time.sleep(0.05)) for rank in range(4)]
            for trainer in trainers:
                trainer.start()
            wait_until(lambda: all(trainer.seen for trainer in trainers), "every rank has begun")
            time.sleep(random.uniform(0.0, 0.2))
            while kills < 20 and is_reading(trainers):
                before = reconnects(trainers)
                server.kill()
                kills += 1
                server = Server(store, port=server.port)
                wait_until(lambda: reconnects(trainers) > before or not is_reading(trainers), "somebody comes back")
                time.sleep(random.uniform(0.0, 0.2))
            check(finish(trainers), whole)
            epochs, came_back = epochs + 1, came_back + reconnects(trainers)
    finally:
        server.kill()
    # The last one of an epoch may die after everything was sent.
    assert came_back >= kills - epochs


def test_clients_killed_at_random_moments_lose_and_repeat_nothing(store: Path, whole: Epoch, tmp_path: Path) -> None:
    kills, deadline = 0, time.monotonic() + 120
    with Server(store) as server:
        # On a fast machine an epoch is over before six kills: then there is another one.
        for epoch in itertools.count():
            states = [tmp_path / f"epoch-{epoch}-rank-{rank}.json" for rank in range(3)]

            def start(rank: int) -> subprocess.Popen[bytes]:
                script = Path(__file__).with_name("rank.py")
                return subprocess.Popen([sys.executable, script, server.url, str(rank), "3", states[rank]])

            running = {rank: start(rank) for rank in range(3)}
            while running:
                assert time.monotonic() < deadline, "the ranks hang"
                time.sleep(random.uniform(0.2, 0.5))
                for rank, process in list(running.items()):
                    if process.poll() is not None and process.returncode == 0:
                        del running[rank]
                if running and kills < 12:
                    rank = random.choice(list(running))
                    running[rank].kill()
                    kills += running[rank].wait() == -9
                    running[rank] = start(rank)
            seen: Seen = [tuple(patch) for state in states for patch in json.loads(state.read_text())["seen"]]
            check(seen, whole)
            if kills >= 6:
                break
        wait_until(lambda: streams_open(server) == 0, "places of killed clients are given back")


def is_reading(trainers: list[Trainer]) -> bool:
    return any(trainer.is_alive() for trainer in trainers)


def reconnects(trainers: list[Trainer]) -> int:
    return sum(trainer.stream.reconnects for trainer in trainers if trainer.stream)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_the_world_changes_from_four_to_one_to_three_in_an_epoch(store: Path, whole: Epoch) -> None:
    seen: Seen = []
    cursor: freetumor.Cursor | None = None
    with Server(store) as server:
        for world, steps in [(4, 20), (1, 70), (3, None)]:
            trainers = [Trainer(server.url, rank, world, batch_size=2, cursor=cursor, count=steps)
                        for rank in range(world)]
            for trainer in trainers:
                trainer.start()
            seen += finish(trainers)
            cursors = {trainer.stream.cursor.next_index for trainer in trainers if trainer.stream}
            assert len(cursors) == 1, "the ranks stand at different steps"
            cursor = trainers[0].stream.cursor if trainers[0].stream else None
    # 384 = 4 * 20 * 2 + 1 * 70 * 2 + 3 * 14 * 2: the epoch ends on a step of the last world.
    check(seen, whole)


def test_a_cursor_goes_on_at_another_replica(store: Path, whole: Epoch) -> None:
    seen: Seen = []
    cursor: freetumor.Cursor | None = None
    with Server(store) as first, Server(store) as second:
        replicas = [first, second]
        while len(seen) < RECIPE["patches_per_epoch"]:
            replica = replicas[len(seen) // 64 % len(replicas)]
            stream = open_stream(replica.url, batch_size=4, cursor=cursor)
            for batch in stream:
                seen += seen_in(batch)
                cursor = batch.cursor
                if len(seen) % 64 == 0:
                    break
            stream.close()
            if len(seen) == 192:
                first.kill()
                replicas = [second]
    check(seen, whole)


@pytest.mark.parametrize("kind", ["cut", "truncate", "delay", "flip"])
def test_a_network_that_harms_connections(store: Path, whole: Epoch, kind: str) -> None:
    with Server(store) as server:
        # Past the answer's own header, which carries no checksum; then anywhere in the next 4 MB.
        faults = [Fault(kind, random.randrange(2_000, 4_000_000)) for _ in range(6)]
        proxy = Proxy(server.port, faults)
        trainers = [Trainer(proxy.url, rank, 2) for rank in range(2)]
        for trainer in trainers:
            trainer.start()
        seen = finish(trainers)
        proxy.close()
    check(seen, whole)
    assert len(proxy.done) >= 2, proxy.done
    came_back = reconnects(trainers)
    assert came_back == 0 if kind == "delay" else came_back >= 2

"""A training inside the server beside two external clients: the server dies without warning, the job goes on."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path
from typing import Any, Iterator

import pytest
from server import Server
from trainer import Epoch, Trainer, check, finish

#: A training of seconds, validated and saved at every fourth step.
SEGMENTOR: dict[str, Any] = {
    "widths": [8, 16], "steps": 24, "batch_size": 1, "checkpoint_every": 4,
    "recipe": {"seed": 3, "synthesizer": "analytic", "gate": {"enabled": False}, "patch": [32, 32, 32],
               "unlabelled_negatives": "trust"},
    "split": {"folds": 2}, "validation": {"every": 4, "cases": 1},
    "held_out": {"cases": 1, "window": {"window": [32, 32, 32], "overlap": 0.0}},
}
KEY = "an-admin-key-of-a-test"
ENVIRONMENT = {"FREETUMOR__SERVER__ADMIN_KEYS": KEY}


def ask(server: Server, path: str, body: object = None) -> tuple[int, Any]:
    """Asks as an admin; with a body the request is a POST."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"X-API-Key": KEY, "Content-Type": "application/json"}
    request = urllib.request.Request(server.url + path, data, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.status, json.load(answer)


def events(server: Server, name: str, after: int = 0) -> Iterator[dict[str, Any]]:
    """Reads server-sent events until the server closes the connection."""
    headers = {"X-API-Key": KEY, "Last-Event-ID": str(after)}
    request = urllib.request.Request(f"{server.url}/v1/trainings/{name}/events", headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        for line in answer:
            if line.startswith(b"data:"):
                yield json.loads(line[5:])


def curve(told: list[dict[str, Any]]) -> dict[int, float]:
    """Returns the validation Dice by step."""
    steps = (event for event in told if event["event"] == "step")
    return {event["step"]: event["metrics"]["validation_dice"] for event in steps
            if "validation_dice" in event["metrics"]}


@pytest.fixture
def uninterrupted(store: Path, tmp_path: Path) -> tuple[dict[int, float], bytes]:
    """The curve and the weights of a training that nothing disturbs."""
    with Server(store, "--jobs-dir", tmp_path / "alone", env=ENVIRONMENT) as server:
        assert ask(server, "/v1/trainings", {"name": "job", "segmentor": SEGMENTOR})[0] == 201
        told = list(events(server, "job"))
    assert told[-1]["event"] == "finished"
    return curve(told), (tmp_path / "alone" / "job" / "segmentor.safetensors").read_bytes()


def test_a_training_survives_the_server_beside_two_clients(
    store: Path, whole: Epoch, tmp_path: Path, uninterrupted: tuple[dict[int, float], bytes],
) -> None:
    jobs = tmp_path / "jobs"
    arguments = ("--jobs-dir", jobs)
    server = Server(store, *arguments, env=ENVIRONMENT)
    try:
        assert ask(server, "/v1/trainings", {"name": "job", "segmentor": SEGMENTOR})[0] == 201
        ranks = [Trainer(server.url, rank, 2, pause=lambda: time.sleep(0.02)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        told: list[dict[str, Any]] = []
        for event in events(server, "job"):
            told.append(event)
            # Two steps behind the second checkpoint: what follows it is lost and made again.
            if event["event"] == "step" and event["step"] >= 8:
                break
        time.sleep(0.2)
        server.kill()
        server = Server(store, *arguments, port=server.port, env=ENVIRONMENT)
        told += events(server, "job", after=told[-1]["id"])
        names = [event["event"] for event in told if event["event"] not in ("step", "note")]
        assert names == ["queued", "started", "queued", "started", "finished"]
        ids = [event["id"] for event in told]
        assert ids == list(range(1, len(ids) + 1)), "no event is lost with the connection, none told twice"
        expected, weights = uninterrupted
        assert list(expected) == [4, 8, 12, 16, 20, 24]
        assert curve(told) == expected, "the curve continues as if nothing had happened"
        assert (jobs / "job" / "segmentor.safetensors").read_bytes() == weights

        # The clients lost nothing either.
        check(finish(ranks), whole)

        status, listed = ask(server, "/v1/models")
        assert [model["name"] for model in listed["segmentors"]] == ["job"]
        request = urllib.request.Request(f"{server.url}/v1/trainings/job/files/segmentor.safetensors",
                                         headers={"X-API-Key": KEY})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.read() == weights
    finally:
        server.kill()

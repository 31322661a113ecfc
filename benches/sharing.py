"""A hosted training beside two streams on one device: patches per second of each, by ``stream.weights``.

    cargo build --release
    pip install ./python
    python benches/sharing.py
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python" / "tests"))

import freetumor  # noqa: E402
from server import Server, command  # noqa: E402

KEY = "an-admin-key-of-a-bench"
SEGMENTOR: dict[str, Any] = {
    "widths": [16, 32, 64], "steps": 100_000, "batch_size": 2, "checkpoint_every": 100_000,
    "recipe": {"seed": 3, "synthesizer": "analytic", "gate": {"enabled": False}, "patch": [48, 48, 48],
               "unlabelled_negatives": "trust"},
    "split": {"folds": 1}, "held_out": {"cases": 1, "window": {"window": [48, 48, 48]}},
}
#: Streams ask for all that the models can do.
RECIPE: dict[str, Any] = {"patch": [96, 96, 96], "unlabelled_negatives": "trust", "patches_per_epoch": 1 << 20}


def step(server: Server) -> int:
    return int(json.loads(server.get("/v1/trainings/bench", key=KEY)[1])["step"])


def learnt(server: Server, seconds: float) -> float:
    """Returns the patches per second that the training learns from."""
    first, began = step(server), time.monotonic()
    time.sleep(seconds)
    return (step(server) - first) * SEGMENTOR["batch_size"] / (time.monotonic() - began)


def measure(store: Path, jobs: Path, weights: dict[str, int]) -> None:
    settings = {f"FREETUMOR__STREAM__WEIGHTS__{kind.upper()}": str(weight) for kind, weight in weights.items()}
    with Server(store, "--jobs-dir", jobs, env={"FREETUMOR__SERVER__ADMIN_KEYS": KEY, **settings}) as server:
        body = json.dumps({"name": "bench", "segmentor": SEGMENTOR}).encode()
        status, answer = server.get("/v1/trainings", body, key=KEY)
        assert status == 201, answer
        time.sleep(5)
        alone = learnt(server, 15)
        counts, stop = [0, 0], threading.Event()

        def read(client: int) -> None:
            for _ in freetumor.stream(server.url, {**RECIPE, "seed": client}, batch_size=1):
                counts[client] += 1
                if stop.is_set():
                    return

        for client in range(2):
            threading.Thread(target=read, args=(client,), daemon=True).start()
        time.sleep(5)
        before, began = sum(counts), time.monotonic()
        beside = learnt(server, 25)
        streamed = (sum(counts) - before) / (time.monotonic() - began)
        stop.set()
        print(f"{weights}: training {alone:.1f} patches/s alone, {beside:.1f} ({beside / alone:.0%}) beside two streams, "
              f"which get {streamed:.2f} together", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        command("phantom", "--store", store, "--labelled", 2, "--unlabelled", 2, "--seed", 5)
        for number, (stream, training) in enumerate([(4, 4), (4, 1), (1, 4)]):
            measure(store, Path(folder) / f"jobs-{number}", {"stream": stream, "training": training})


if __name__ == "__main__":
    main()

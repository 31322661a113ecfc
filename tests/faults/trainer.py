"""A trainer that takes an epoch, and what it must have seen at its end."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import freetumor

#: Nothing waits for a network, so that faults and not lesions take the time.
RECIPE: dict[str, Any] = {
    "seed": 7, "synthesizer": "analytic", "gate": {"enabled": False}, "patches_per_epoch": 384,
    "unlabelled_negatives": "trust", "patch": [32, 32, 32],
}

#: (index, case, organ, digest of everything else) of every patch, in the order of arrival.
Seen = list[tuple[int, str, str, str]]
Epoch = dict[int, tuple[int, str, str, str]]


def seen_in(batch: freetumor.Batch) -> Seen:
    """Returns what a batch's patches are."""
    arrays = list(batch.arrays.values())
    return [
        (meta.index, meta.case, meta.organ,
         hashlib.sha256(b"".join(array[i].tobytes() for array in arrays) + repr(meta).encode()).hexdigest())
        for i, meta in enumerate(batch.meta)
    ]


def open_stream(url: str, **delivery: Any) -> freetumor.Stream:
    """Opens a stream with the patience of a trainer."""
    settings: dict[str, Any] = {"image": "i16", "patience": 120, "connect_patience": 120, "timeout": 20}
    return freetumor.stream(url, RECIPE, **{**settings, **delivery})


def epoch_of(url: str) -> Epoch:
    """Returns the epoch as one client gets it when nothing goes wrong."""
    return {patch[0]: patch for batch in open_stream(url, batch_size=8) for patch in seen_in(batch)}


def check(seen: Seen, whole: Epoch) -> None:
    """Holds what was consumed against the plan: every index once, every (case, organ) as often as planned, every byte."""
    assert Counter(patch[0] for patch in seen) == Counter(range(RECIPE["patches_per_epoch"]))
    assert Counter(patch[1:3] for patch in seen) == Counter(patch[1:3] for patch in whole.values())
    assert {patch[0]: patch for patch in seen} == whole


class Trainer(threading.Thread):
    """One rank: takes its share of an epoch, and calls `pause` after every batch.

    Attributes:
        seen: what it consumed.
        error: what ended it, if it was not the end of the epoch.
    """

    def __init__(self, url: str, rank: int, world: int, *, pause: Callable[[], object] = lambda: None,
                 **delivery: Any) -> None:
        super().__init__(name=f"rank-{rank}", daemon=True)
        self.seen: Seen = []
        self.error: BaseException | None = None
        self.stream: freetumor.Stream | None = None
        self._url, self._pause = url, pause
        self._delivery = {"rank": rank, "world": world, "batch_size": 1, **delivery}

    def run(self) -> None:
        try:
            self.stream = open_stream(self._url, **self._delivery)
            for batch in self.stream:
                self.seen += seen_in(batch)
                self._pause()
        except BaseException as error:
            self.error = error


def finish(trainers: list[Trainer], seconds: float = 120) -> Seen:
    """Waits for all ranks and returns what they consumed together."""
    deadline = time.monotonic() + seconds
    for trainer in trainers:
        trainer.join(max(0.0, deadline - time.monotonic()))
        assert not trainer.is_alive(), f"{trainer.name} hangs"
        assert trainer.error is None, trainer.error
    return [patch for trainer in trainers for patch in trainer.seen]

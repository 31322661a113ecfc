"""Counts over a stream: what came, how the gate judged it, and how fast."""

from __future__ import annotations

import resource
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .batch import Batch
from .client import Stream
from .meta import PatchMeta


class Tally:
    """Adds up provenance, patch by patch."""

    def __init__(self) -> None:
        self.patches = 0
        self.attempts = 0
        self.outcomes: Counter[str] = Counter()
        self.pools: Counter[str] = Counter()
        self.failed = 0
        #: organ -> outcome -> patches, of those that were to get a lesion
        self.organs: defaultdict[str, Counter[str]] = defaultdict(Counter)
        #: "size/contrast" -> lesions in accepted patches
        self.bins: Counter[str] = Counter()

    def add(self, metas: Iterable[PatchMeta]) -> None:
        """Counts patches in."""
        for meta in metas:
            self.patches += 1
            self.attempts += meta.attempts
            self.failed += meta.failed is not None
            self.outcomes[meta.outcome] += 1
            self.pools[meta.pool] += 1
            if meta.outcome == "real":
                continue
            self.organs[meta.organ][meta.outcome] += 1
            if meta.outcome == "accepted":
                self.bins.update(f"{lesion.size}/{lesion.contrast}" for lesion in meta.lesions)

    def summary(self) -> dict[str, Any]:
        """Returns counts, and the share of patches that were to get a lesion and got one that the gate accepted."""
        hosts = sum(sum(outcomes.values()) for outcomes in self.organs.values())
        accepted = self.outcomes["accepted"]
        return {
            "patches": self.patches,
            "failed": self.failed,
            "outcomes": dict(self.outcomes),
            "pools": dict(self.pools),
            "accepted_share_of_hosts": round(accepted / hosts, 3) if hosts else None,
            "attempts_per_patch": round(self.attempts / self.patches, 2) if self.patches else None,
            "accepted_by_organ": {
                organ: f"{outcomes['accepted']}/{sum(outcomes.values())}" for organ, outcomes in sorted(self.organs.items())
            },
            "accepted_lesions_by_size_and_contrast": dict(sorted(self.bins.items())),
        }


def resident_mib() -> float:
    """Returns this process's resident memory in MiB, where the system tells."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB: the peak, all that this system tells
    return pages * resource.getpagesize() / 2**20


class Rates:
    """Measures a stream while it is read: throughput, waiting time, the client's CPU time and memory."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._cpu = time.process_time()
        self._waits_ms: list[float] = []
        self._bytes = 0
        self._patches = 0
        self._resident_mib = resident_mib()

    def take(self, stream: Stream) -> Batch | None:
        """Returns the stream's next batch, measured, or ``None`` at its end."""
        began = time.perf_counter()
        batch = next(stream, None)
        if batch is not None:
            self._waits_ms.append(1000 * (time.perf_counter() - began))
            self._bytes += sum(array.nbytes for array in batch.arrays.values())
            self._patches += len(batch)
        return batch

    def summary(self) -> dict[str, Any]:
        """Returns rates per second, waits in milliseconds, CPU seconds and MiB."""
        seconds = time.perf_counter() - self._began
        waits = np.array(self._waits_ms or [0.0])
        return {
            "seconds": round(seconds, 3),
            "patches_per_second": round(self._patches / seconds, 2),
            "mib_per_second": round(self._bytes / 2**20 / seconds, 2),
            "wait_ms": {"median": round(float(np.median(waits)), 3), "p99": round(float(np.quantile(waits, 0.99)), 3)},
            "client_cpu_ms_per_patch": round(1000 * (time.process_time() - self._cpu) / max(self._patches, 1), 3),
            "resident_mib": {"before": round(self._resident_mib, 1), "after": round(resident_mib(), 1)},
        }

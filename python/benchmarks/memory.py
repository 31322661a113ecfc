"""Reads 20,000 small patches and prints one line of JSON: the client's memory, its rate, and how long a batch was waited for.

The server's patches need no models, so that the client is what is measured:

    freetumor phantom --store store --labelled 2 --unlabelled 2
    freetumor serve --config configs/demo.toml --store store &
    python python/benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import json
import sys

import freetumor
from freetumor.tally import Rates, resident_mib

RECIPE = {"seed": 1, "synthesizer": "analytic", "gate": {"enabled": False}, "patch": [16, 16, 16], "patches_per_epoch": 1 << 20}
#: Arenas, imports and buffers have their size after this many patches.
WARM_PATCHES = 1000


def run(url: str, patches: int, batch_size: int) -> dict:
    """Returns the figures."""
    samples: list[float] = []
    rates = Rates()
    read = 0
    with freetumor.stream(url, RECIPE, batch_size=batch_size, count=patches // batch_size, image="i16") as stream:
        while (batch := rates.take(stream)) is not None:
            read += len(batch)
            if read >= WARM_PATCHES and read % 500 < batch_size:
                samples.append(resident_mib())
    half = len(samples) // 2
    return {
        "patches": read,
        "resident_mib": {"warm": round(samples[0], 2), "end": round(samples[-1], 2), "most": round(max(samples), 2)},
        "growth_mib_of_second_half": round(max(samples[half:]) - max(samples[:half]), 2),
        **{key: value for key, value in rates.summary().items() if key != "resident_mib"},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--patches", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--most-mib", type=float, help="exit 1 where memory grew by more than this after the start")
    options = parser.parse_args()
    report = run(options.url, options.patches, options.batch_size)
    print(json.dumps(report))
    grown = report["resident_mib"]["most"] - report["resident_mib"]["warm"]
    return int(options.most_mib is not None and grown > options.most_mib)


if __name__ == "__main__":
    sys.exit(main())

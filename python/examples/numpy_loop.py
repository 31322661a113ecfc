"""Plain numpy: counts tumour voxels by organ over a few batches. No framework."""

from __future__ import annotations

import argparse
from collections import Counter

import freetumor


def run(url: str, batches: int) -> dict[str, int]:
    """Returns tumour voxels by class."""
    voxels: Counter[str] = Counter()
    with freetumor.stream(url, {"seed": 7}, batch_size=2, count=batches, image="i16") as stream:
        tumours = {name: number for name, number in stream.header.labels.items() if name.endswith("_tumour")}
        for batch in stream:
            for name, number in tumours.items():
                voxels[name] += int((batch.label == number).sum())
    return dict(voxels)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--batches", type=int, default=8)
    options = parser.parse_args()
    print(run(options.url, options.batches))

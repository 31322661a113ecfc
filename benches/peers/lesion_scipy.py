"""Times the published way of making a lesion's mask, written from its description, with scipy.

A solid ellipsoid in a box of four radii; three 2-D elastic deformations, one per pair of axes, from a 3 x 3 grid of normal
displacements, nearest sampling; a Gaussian blur of the mask on the 96^3 crop. Pasting and clipping, which our figures hold,
are left out. Radii are voxels as published, so at 1.5 mm its large lesions (36 to 60 mm radius) are larger than ours.

    python3 -m venv .venv && .venv/bin/pip install numpy scipy
    cargo bench --bench lesion
    .venv/bin/python benches/peers/lesion_scipy.py --criterion target/criterion

With --criterion it prints the ratio to the means of `benches/lesion.rs`; --json prints numbers alone.
"""

import argparse
import json
import os
import time
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np
from scipy import ndimage

CROP = 96
# Least and greatest radius, and the standard deviations of displacements to draw from, in voxels.
PRESETS = {
    "tiny": ((3, 5), lambda rng: rng.uniform(0.5, 1.0)),
    "small": ((6, 10), lambda rng: rng.integers(1, 3)),
    "medium": ((12, 20), lambda rng: rng.integers(3, 7)),
    "large": ((24, 40), lambda rng: rng.integers(5, 11)),
}
# The default recipe's shares.
SHARES = {"tiny": 0.25, "small": 0.35, "medium": 0.35, "large": 0.05}


def ellipsoid(radii):
    z, y, x = (((np.arange(4 * r) - 2 * r) / r) ** 2 for r in radii)
    return (z[:, None, None] + y[None, :, None] + x[None, None, :] < 1).astype(np.uint8)


def deform(mask, plane, sigma, rng):
    """Deforms every slice along a pair of axes by the same smooth field."""
    shape = [mask.shape[axis] for axis in plane]
    grid = np.meshgrid(*(np.linspace(0, 2, n) for n in shape), indexing="ij")
    shifts = [ndimage.map_coordinates(rng.normal(0, sigma, (3, 3)), grid, order=3, mode="mirror") for _ in plane]
    sources = [own + shift for own, shift in zip(np.indices(shape), shifts)]
    across = ({0, 1, 2} - set(plane)).pop()
    slices = [ndimage.map_coordinates(part, sources, order=0) for part in np.moveaxis(mask, across, 0)]
    return np.stack(slices, across)


def make(radii, sigma, rng):
    """Returns the seconds of shape and blur."""
    start = time.perf_counter()
    mask = ellipsoid(radii)
    for plane in ((0, 1), (1, 2), (0, 2)):
        mask = deform(mask, plane, sigma, rng)
    shaped = time.perf_counter()
    crop = np.zeros((CROP,) * 3)
    room = [min(CROP, n) for n in mask.shape]
    target = tuple(slice((CROP - n) // 2, (CROP - n) // 2 + n) for n in room)
    source = tuple(slice((m - n) // 2, (m - n) // 2 + n) for m, n in zip(mask.shape, room))
    crop[target] = mask[source]
    blurring = time.perf_counter()
    ndimage.gaussian_filter(crop, rng.uniform(1, 2))
    return shaped - start, time.perf_counter() - blurring


def measure(runs):
    rng = np.random.default_rng(1)
    out = {}
    for name, ((low, high), sigma) in PRESETS.items():
        drawn = lambda: (tuple(int(r) for r in rng.integers(low, high + 1, 3)), sigma(rng))
        make(*drawn(), rng)
        shape_s, blur_s = np.mean([make(*drawn(), rng) for _ in range(runs)], axis=0)
        out[name] = {"shape_ms": shape_s * 1e3, "blur_ms": blur_s * 1e3, "mask_ms": (shape_s + blur_s) * 1e3}
    largest = np.mean([sum(make((40, 40, 40), PRESETS["large"][1](rng), rng)) for _ in range(max(2, runs // 4))])
    out["largest"] = {"mask_ms": float(largest) * 1e3}
    out["mix"] = {"mask_ms": sum(share * out[name]["mask_ms"] for name, share in SHARES.items())}
    return out


def criterion_mean_ms(folder, name):
    path = Path(folder) / f"mask 1.5 mm {name}" / "new" / "estimates.json"
    return json.loads(path.read_text())["mean"]["point_estimate"] / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--criterion", metavar="FOLDER", help="criterion's folder, to print ratios")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = measure(arguments.runs)
    for name, row in results.items():
        if arguments.criterion:
            own = {each: criterion_mean_ms(arguments.criterion, each) for each in (SHARES if name == "mix" else [name])}
            row["ours_ms"] = sum(SHARES[each] * own[each] for each in SHARES) if name == "mix" else own[name]
            row["ratio"] = row["ours_ms"] / row["mask_ms"]
    if arguments.json:
        print(json.dumps(results))
        return
    for name, row in results.items():
        print(f"{name:8}", "  ".join(f"{key} {value:9.4f}" for key, value in row.items()))


if __name__ == "__main__":
    main()

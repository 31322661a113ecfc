"""Writes what MONAI and scipy's Gaussian windows make of overlapping windows (sliding_window.json).

    pip install monai torch scipy && python tests/golden/evaluate/make_window.py      # run with MONAI 1.6, scipy 1.17

The network is a formula that depends on where in its window a voxel lies, so that each window's share is seen in the sum.
"""

import json
import pathlib

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from scipy.signal.windows import gaussian

HERE = pathlib.Path(__file__).parent


def network(x):
    """Returns logits of two classes: the image, and the image times a pattern that is fixed to the window."""
    z, y, x_ = np.indices(x.shape[-3:])
    pattern = ((7 * z + 3 * y + 5 * x_) % 11) / 11
    return torch.cat([x, x * torch.from_numpy(pattern)], 1)


def by_monai(image, window, mode):
    return sliding_window_inference(
        torch.from_numpy(image)[None, None], window, 1, network, overlap=0.5, mode=mode, sigma_scale=0.125
    )[0].numpy()


def by_scipy(image, window):
    """Weighs without MONAI's floor: it lifts all weights below a thousandth of the centre's."""
    axes = [gaussian(n, std=n / 8) for n in window]
    weights = axes[0][:, None, None] * axes[1][:, None] * axes[2]
    sums, total = np.zeros((2, *image.shape)), np.zeros(image.shape)
    starts = [range(0, size - n + 1, max(n // 2, 1)) for size, n in zip(image.shape, window)]
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                at = np.s_[z : z + window[0], y : y + window[1], x : x + window[2]]
                sums[(slice(None), *at)] += weights * network(torch.from_numpy(image[at])[None, None])[0].numpy()
                total[at] += weights
    return sums / total


def main():
    rng = np.random.default_rng(5)
    cases = []
    # MONAI's floor is not reached along one axis alone.
    for window, shape, mode in [
        ((8, 6, 10), (12, 9, 15), "constant"),
        ((8, 1, 1), (24, 2, 2), "gaussian"),
        ((1, 6, 1), (2, 15, 2), "gaussian"),
        ((1, 1, 10), (2, 2, 25), "gaussian"),
        ((8, 6, 10), (12, 9, 15), "scipy"),
    ]:
        hu = rng.integers(0, 1001, shape)
        image = hu / 1000
        mean = by_scipy(image, window) if mode == "scipy" else by_monai(image, window, mode)
        chances = np.exp(mean[1]) / np.exp(mean).sum(0)
        cases.append(
            {
                "blending": "constant" if mode == "constant" else "gaussian",
                "by": "scipy" if mode == "scipy" else "MONAI",
                "window": window,
                "shape": shape,
                "hu": hu.ravel().tolist(),
                "second_class": [round(float(p), 7) for p in chances.ravel()],
            }
        )
    (HERE / "sliding_window.json").write_text(json.dumps(cases, separators=(",", ":")) + "\n")


main()

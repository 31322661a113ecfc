"""Augmented random 96^3 pairs from FreeTumor's stream and from MONAI's loader, two threads each, in one run.

    python sampler_monai.py FREETUMOR_BINARY [SECONDS]

Needs monai, torch and nibabel. The volumes are the labelled phantoms that `freetumor bench store` makes and exports.
MONAI's volumes are read and windowed once and kept in memory, which is its fastest way; what is timed is RandCropByPosNegLabeld, flips along each axis, quarter turns, intensity scale and shift, each with probability
1/2, and collation, once with two worker processes and once with none. FreeTumor reads its zstd and its raw store.
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import monai.transforms as mt
import torch
from monai.data import DataLoader, Dataset, list_data_collate

SIDE = 96
KEYS = ["image", "label"]


def volumes(export):
    """Lists the exported volumes in which something is labelled tumour, as FreeTumor's pool does."""
    paths = sorted(path for path in export.glob("*labelled*.nii.gz") if not path.name.endswith("_label.nii.gz"))
    return [{"image": str(path), "label": str(path).replace(".nii.gz", "_label.nii.gz")} for path in paths]


def loader(export, workers):
    load = [
        mt.LoadImaged(KEYS, ensure_channel_first=True),
        mt.ScaleIntensityRanged("image", -175, 250, 0, 1, clip=True),
    ]
    sample = [
        mt.RandCropByPosNegLabeld(KEYS, "label", (SIDE,) * 3, pos=1, neg=1, num_samples=1),
        *[mt.RandFlipd(KEYS, prob=0.5, spatial_axis=axis) for axis in range(3)],
        mt.RandRotate90d(KEYS, prob=0.5, max_k=3),
        mt.RandScaleIntensityd("image", 0.1, prob=0.5),
        mt.RandShiftIntensityd("image", 0.1, prob=0.5),
    ]
    # Read once, and repeated as often as any run asks, so that starting workers is not part of the measurement.
    cached = [mt.Compose(load)(item) for item in volumes(export)]
    data = Dataset(cached * 1000, mt.Compose(sample))
    return DataLoader(data, batch_size=1, num_workers=workers, collate_fn=list_data_collate, shuffle=True)


def rate(batches, seconds):
    batches = iter(batches)
    for _ in range(8):
        next(batches)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        next(batches)
        count += 1
    return count / (time.perf_counter() - begin)


def main():
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 8.0
    torch.set_num_threads(1)
    result = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        command = [sys.argv[1], "bench", "store", "--seconds", "0.1", "--dir", folder, "--export", folder / "export"]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
        for kind in ("raw", "zstd"):
            command = [sys.argv[1], "bench", "sampler", "--store", str(folder / kind), "--threads", "2", "--json"]
            said = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            result[f"freetumor_{kind}_per_s"] = said["patches_per_s"]
        for workers in (2, 0):
            result[f"monai_{workers}_workers_per_s"] = rate(loader(folder / "export", workers), seconds)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

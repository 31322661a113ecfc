"""MONAI: a small SegResNet from the stream, mixed with real cases that MONAI itself loads from files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import CacheDataset, DataLoader
from monai.losses import DiceCELoss, MaskedLoss
from monai.networks.nets import SegResNet
from monai.transforms import (
    Compose, EnsureChannelFirstd, LoadImaged, Orientationd, RandFlipd, RandSpatialCropd, ScaleIntensityRanged,
)
from monai.utils import set_determinism

from freetumor.monai import StreamItems

KEYS = ("image", "label")
IGNORE = 255


def real_loader(files: Sequence[dict[str, str]], patch: int, window_hu: tuple[float, float]) -> DataLoader:
    """Returns MONAI's own loader of NIfTI files, in the stream's orientation, window and patch size."""
    load = Compose([
        LoadImaged(KEYS), EnsureChannelFirstd(KEYS), Orientationd(KEYS, "RAS", labels=None),
        ScaleIntensityRanged("image", *window_hu, 0.0, 1.0, clip=True),
        RandSpatialCropd(KEYS, (patch,) * 3, random_size=False), RandFlipd(KEYS, 0.5, 0),
    ])
    return DataLoader(CacheDataset(files, load, progress=False), batch_size=1, shuffle=True)


def endless(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """Yields the loader's items pass after pass, cropped and flipped anew each time, which ``itertools.cycle`` would not."""
    while True:
        yield from loader


def run(url: str, files: Sequence[dict[str, str]], steps: int, patch: int = 48) -> list[float]:
    """Trains on one real and one streamed patch a step; returns the losses."""
    set_determinism(0)
    recipe = {"seed": 7, "patch": [patch] * 3, "patches_per_epoch": 1_000_000}
    stream = StreamItems(url, recipe, batch_size=1, transform=RandFlipd(KEYS, 0.5, 0))
    classes = max(stream.labels.values()) + 1
    model = SegResNet(spatial_dims=3, init_filters=8, in_channels=1, out_channels=classes)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    loss_of = MaskedLoss(DiceCELoss, to_onehot_y=True, softmax=True)
    losses: list[float] = []
    real = endless(real_loader(files, patch, window_hu=(-175.0, 250.0)))
    for synthetic, case in zip(DataLoader(stream, batch_size=1), real):
        image = torch.cat([case["image"], synthetic["image"]]).as_tensor()
        label = torch.cat([case["label"].to(torch.uint8), synthetic["label"]]).as_tensor()
        known = label != IGNORE
        loss = loss_of(model(image), torch.where(known, label, 0), mask=known)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) == steps:
            break
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--images", type=Path, required=True, help="folder of CT files, NAME_0000.nii.gz")
    parser.add_argument("--labels", type=Path, required=True, help="folder of label files in the stream's ids, NAME.nii.gz")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    names = sorted(file.name.removesuffix(".nii.gz") for file in options.labels.glob("*.nii.gz"))
    pairs = [
        {"image": str(options.images / f"{name}_0000.nii.gz"), "label": str(options.labels / f"{name}.nii.gz")} for name in names
    ]
    print(run(options.url, pairs, options.steps))

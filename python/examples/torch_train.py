"""PyTorch: a small 3D network from the stream, with a checkpoint that goes on exactly, also with other workers.

Stop it at any time and start it again: it sees the patches that it would have seen. Under torchrun each rank takes its part.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from freetumor.torch import StreamDataset, position, to_device
from torchdata.stateful_dataloader import StatefulDataLoader


def network(classes: int) -> nn.Module:
    """Maps ``[B, 1, D, H, W]`` to ``[B, classes, D, H, W]``."""
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1), nn.InstanceNorm3d(8, affine=True), nn.ReLU(),
        nn.Conv3d(8, 16, 3, padding=1), nn.InstanceNorm3d(16, affine=True), nn.ReLU(),
        nn.Conv3d(16, classes, 1),
    )


def run(url: str, steps: int, workers: int, checkpoint: Path | None = None) -> list[tuple[int, float]]:
    """Trains for some steps; returns the first index of each step and its loss."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = StreamDataset(url, {"seed": 7, "patches_per_epoch": 1_000_000}, batch_size=2, with_meta=True)
    torch.manual_seed(0)
    model = network(max(data.labels.values()) + 1).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        data.load_state_dict(saved["position"])
    loader: DataLoader = StatefulDataLoader(data, batch_size=None, num_workers=workers, pin_memory=device == "cuda")
    done: list[tuple[int, float]] = []
    # ahead=0 keeps the loader's position at the batch that was trained on; ahead=1 overlaps the copy on a GPU.
    for item in to_device(loader, device, ahead=0):
        loss = nn.functional.cross_entropy(model(item["image"]), item["label"][:, 0].long(), ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done.append((item["meta"][0].index, loss.item()))
        if len(done) == steps:
            break
    if checkpoint is not None:
        torch.save({
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "position": position(loader.state_dict()),
        }, checkpoint)
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args()
    for index, loss in run(options.url, options.steps, options.workers, options.checkpoint):
        print(f"patch {index}: loss {loss:.4f}")

"""Lightning: a DataModule whose loader goes on exactly from Lightning's own checkpoint.

Lightning saves and restores loaders that have a state; a checkpoint that is written while training holds the place.
"""

from __future__ import annotations

import argparse
from typing import Any

import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from freetumor.torch import StreamDataset


class StreamModule(lightning.LightningDataModule):
    """Patches of a stream."""

    def __init__(self, url: str, recipe: dict[str, Any], batch_size: int = 2, workers: int = 1) -> None:
        super().__init__()
        self.url, self.recipe, self.batch_size, self.workers = url, recipe, batch_size, workers

    def setup(self, stage: str) -> None:
        # Lightning has set torch.distributed up here, so that rank and world are known.
        self.data = StreamDataset(self.url, self.recipe, batch_size=self.batch_size)

    def train_dataloader(self) -> StatefulDataLoader:
        return StatefulDataLoader(self.data, batch_size=None, num_workers=self.workers)


class Segmentor(lightning.LightningModule):
    """A network small enough for a CPU."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, classes, 1))
        self.losses: list[float] = []

    def on_train_epoch_start(self) -> None:
        # Lightning tells samplers of their epoch, not data sets: without it every epoch has the same patches.
        self.trainer.datamodule.data.set_epoch(self.current_epoch)

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(batch["image"]), batch["label"][:, 0].long(), ignore_index=255)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def run(url: str, steps: int, folder: str, checkpoint: str | None = None) -> list[float]:
    """Trains to a number of steps, from a checkpoint where one is given; writes ``last.ckpt``; returns the losses."""
    lightning.seed_everything(0, verbose=False)
    data = StreamModule(url, {"seed": 7, "patches_per_epoch": 1_000_000}, workers=0)
    model = Segmentor(classes=7)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)],
    )
    trainer.fit(model, data, ckpt_path=checkpoint)
    return model.losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", default="lightning-checkpoints")
    parser.add_argument("--resume", metavar="CHECKPOINT")
    options = parser.parse_args()
    print(run(options.url, options.steps, options.folder, options.resume))

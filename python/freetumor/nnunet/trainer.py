"""The trainer."""

# nnU-Net carries few types.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import json
import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from ..client import Stream, stream
from ..errors import FreeTumorError
from ..meta import Cursor, PatchMeta
from .feed import Feed, Mix, Patch
from .fold import check_case, guarded_recipe
from .geometry import Axes, LabelMap, check_spacing, patch_for
from .normalization import Normalization
from .preprocessed import scan_hashes
from .loader import KEY, MixedAugmenter, MixedCases, MixedLoader, MixedSingle
from .settings import Settings

#: Cases whose orientation is looked at.
_CASES_LOOKED_AT = 32
#: Written beside the checkpoints: what a resumed training must find unchanged.
_IDENTITY_FILE = "freetumor_stream.json"
#: More batches than a training takes.
_ENDLESS = 1 << 40


class nnUNetTrainerFreeTumor(nnUNetTrainer):
    """nnU-Net's trainer, fed with its own preprocessed patches and streamed ones in the ratio of ``FREETUMOR_RATIO``.

    Splits, validation, checkpoints, network and loss are nnU-Net's. It refuses to start where a validation case of the
    fold could take part in the stream, or where the stream does not fit the plan: normalization, grid, labels.
    """

    def get_dataloaders(self):
        """Returns nnU-Net's loaders, the training one with streamed patches mixed in."""
        settings = Settings.from_environment()
        with _without_workers():
            single: Any = super().get_dataloaders()
        real, validation = single
        loader, feed = self._mixed(real.data_loader, settings)
        workers = get_allowed_n_proc_DA()
        if workers == 0:
            return MixedSingle(loader, feed), validation
        pin_memory = self.device.type == "cuda"
        validation = NonDetMultiThreadedAugmenter(
            data_loader=validation.data_loader, transform=None, num_processes=max(1, workers // 2),
            num_cached=max(3, workers // 4), seeds=None, pin_memory=pin_memory, wait_time=0.002,
        )
        _ = next(validation)
        train = MixedAugmenter(loader, feed, pin_memory)
        train._start()  # last, because it starts the thread that reads the stream, and forks should come before
        return train, validation

    def train_step(self, batch: dict) -> dict:
        """Trains on a batch and remembers which patches it had."""
        self._seen = [*getattr(self, "_seen", []), *batch["keys"]]
        return super().train_step(batch)

    def on_train_epoch_end(self, train_outputs):
        """Logs which patches of the stream the epoch had."""
        indices = [int(key[len(KEY) :]) for key in self._seen if str(key).startswith(KEY)]
        share = f"{len(indices)} of {len(self._seen)} samples"
        self._seen = []
        self.print_to_log_file(f"FreeTumor: {share} were streamed, patches {indices}" if len(indices) <= 32 else
                               f"FreeTumor: {share} were streamed, patches {indices[0]} to {indices[-1]}")
        super().on_train_epoch_end(train_outputs)

    def on_train_end(self):
        """Leaves the stream before the final validation, which takes long."""
        if isinstance(self.dataloader_train, MixedSingle):
            self.dataloader_train.stop()
        super().on_train_end()

    def _mixed(self, inner: Any, settings: Settings) -> tuple[MixedLoader, Feed]:
        """Checks that the stream fits plan and fold, and opens it at the current epoch's first step."""
        self._check_plan()
        split: Any = self.do_split()
        train_cases, validation_cases = split
        if self.fold == "all":
            validation_cases = []  # nnU-Net validates on the training cases then, and says so
        axes = self._axes(train_cases)
        if self.label_manager.ignore_label is None:
            # This loss cannot leave voxels out: unlabelled hosts count as their labels say, unless the user decides.
            settings = replace(settings, recipe={"unlabelled_negatives": "trust", **settings.recipe})
        is_preprocessed = settings.hosts == "preprocessed"
        hashes = scan_hashes(self.plans_manager.dataset_name, validation_cases) if is_preprocessed else []
        recipe, resolved = guarded_recipe(settings, validation_cases, patch_for(inner.patch_size, axes), hashes)
        held_out = frozenset(recipe["select"]["hold_out"])
        labels = LabelMap(
            resolved["labels"], self.dataset_json["labels"], settings.labels, self.label_manager.ignore_label
        )
        rank, world = self._place()
        mix = Mix.of(settings.ratio, inner.batch_size)
        first_step = self.current_epoch * self.num_iterations_per_epoch
        first_index = mix.before(first_step * inner.batch_size) * world
        cursor = self._cursor(resolved, first_index, settings)

        def open_stream() -> Stream:
            opened = stream(
                settings.url, recipe, rank=rank, world=world, batch_size=1, count=_ENDLESS, image="i16", codec=settings.codec,
                cursor=cursor, api_key=settings.api_key, patience=settings.patience, connect_patience=settings.patience,
                prefetch=2 * inner.batch_size, outputs=("soft_mask",) if is_preprocessed else (),
            )
            check_spacing(opened.header.spacing_mm, self.configuration_manager.spacing, axes)
            return opened

        open_stream().close()  # what does not fit is told here, and not by a thread
        workers = get_allowed_n_proc_DA()
        feed = Feed(
            open_stream, mix, first_step, _thread_queue if workers == 0 else _process_queue, max(1, workers),
            lambda meta: check_case(meta.case, held_out),
        )
        intensities = self.plans_manager.foreground_intensity_properties_per_channel["0"]
        normalization = Normalization(intensities, is_preprocessed)
        cases = MixedCases(inner._data, _prepare(axes, labels, normalization), labels.tumours)
        loader = MixedLoader(
            inner, cases, mix, feed, label_manager=self.label_manager, first_step=first_step, seed=(settings.seed, rank),
            world=world,
        )
        self.print_to_log_file(
            f"FreeTumor: {settings.url}, ratio {mix.ratio}, from patch {first_index}, {len(held_out)} cases held out, "
            f"patch {resolved['patch']}, models {resolved['bundle'][:12]}, store {resolved['snapshot'][:12]}"
        )
        return loader, feed

    def _check_plan(self) -> None:
        schemes = self.configuration_manager.normalization_schemes
        if schemes != ["CTNormalization"]:
            raise FreeTumorError(f"expected one channel with CTNormalization, got {schemes}: streams are CT")
        if self.is_cascaded:
            raise FreeTumorError("expected a configuration without a previous stage: streamed patches have none")

    def _axes(self, cases: list[str]) -> Axes:
        dataset_class: Any = self.dataset_class
        dataset = dataset_class(self.preprocessed_dataset_folder, cases)
        some = cases[:: max(1, len(cases) // _CASES_LOOKED_AT)]
        properties = (dataset.load_case(case)[3] for case in some)
        return Axes.most_common(properties, self.plans_manager.transpose_forward)

    def _place(self) -> tuple[int, int]:
        return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if self.is_ddp else (0, 1)

    def _cursor(self, resolved: dict[str, Any], index: int, settings: Settings) -> Cursor:
        """Returns where to start; a resumed training goes on with the stream that it began with, or not at all."""
        file = Path(str(self.output_folder)) / _IDENTITY_FILE
        now = Cursor(resolved["hash"], resolved["snapshot"], resolved["bundle"], resolved["revision"], index)
        if self.current_epoch == 0:
            if self.local_rank == 0:
                file.parent.mkdir(parents=True, exist_ok=True)
                identity = {"cursor": now.to_dict(), "ratio": settings.ratio, "seed": settings.seed, "recipe": resolved["recipe"]}
                file.write_text(json.dumps(identity, indent=1))
            return now
        before = json.loads(file.read_text())
        for name, got in [("ratio", settings.ratio), ("seed", settings.seed)]:
            if before[name] != got:
                raise FreeTumorError(f"{file}: the training began with {name} {before[name]}, expected the same, got {got}")
        # The server refuses another recipe, store or models, and names the one that changed.
        return Cursor.from_dict({**before["cursor"], "next_index": index})


def _prepare(
    axes: Axes, labels: LabelMap, normalization: Normalization
) -> Callable[[Patch], tuple[np.ndarray, np.ndarray]]:
    """Returns what makes image and labels of a preprocessed case out of a streamed patch."""

    def prepare(patch: Patch) -> tuple[np.ndarray, np.ndarray]:
        image = np.ascontiguousarray(axes.turn(normalization.run(patch.image_hu, patch.soft_mask)))
        return image, np.ascontiguousarray(axes.turn(labels.apply(patch.label, patch.meta)))

    return prepare


def _thread_queue(depth: int) -> Any:
    return queue.Queue(depth)


def _process_queue(depth: int) -> Any:
    one = multiprocessing.Queue(depth)
    # The end of the training does not wait until somebody has taken what is left.
    one.cancel_join_thread()
    return one


@contextmanager
def _without_workers() -> Iterator[None]:
    """Lets nnU-Net build its loaders without starting processes.

    It makes a first batch in this process then. Threads that PyTorch started for it would be missing in the workers that
    are forked afterwards, which would wait for them for ever: one thread does it.
    """
    name = "nnUNet_n_proc_DA"
    before, threads = os.environ.get(name), torch.get_num_threads()
    os.environ[name] = "0"
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

"""nnU-Net's data loader with streamed patches among the preprocessed ones.

Both kinds pass through the same code: a streamed patch is presented as a case that was preprocessed, and cropped and
augmented like one.
"""

# nnU-Net and batchgenerators carry few types.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from .feed import Feed, Mix, Patch

#: What streamed samples are called in a batch's ``keys``, before their global index.
KEY = "freetumor:"


class TumourSlices:
    """Stands where a case's ``class_locations`` do: tells the loader that the patch is streamed, and where tumour is."""

    def __init__(self, seg: np.ndarray, tumours: frozenset[int]) -> None:
        self.slices = np.flatnonzero(np.isin(seg, list(tumours)).any(axis=(1, 2)))


class MixedCases:
    """A data set of preprocessed cases to which the patches of the current step are added."""

    def __init__(self, cases: Any, prepare: Callable[[Patch], tuple[np.ndarray, np.ndarray]], tumours: frozenset[int]) -> None:
        self.identifiers = cases.identifiers
        self.patches: dict[str, Patch] = {}
        self._cases, self._prepare, self._tumours = cases, prepare, tumours

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, dict[str, Any]]:
        """Returns image and labels ``[1, z, y, x]``, no previous stage, and the properties that cropping reads."""
        patch = self.patches.get(identifier)
        if patch is None:
            return self._cases.load_case(identifier)
        image, seg = self._prepare(patch)
        return image[None], seg[None], None, {"class_locations": TumourSlices(seg, self._tumours)}


class MixedLoader(nnUNetDataLoader):
    """Makes the batches of the steps ``first + thread_id``, ``first + thread_id + N``, ...

    All randomness of a step is keyed by seed, rank and step: a resume, with any number of workers, repeats its batches.
    """

    def __init__(
        self, inner: nnUNetDataLoader, cases: MixedCases, mix: Mix, feed: Feed, *, label_manager: Any, first_step: int,
        seed: tuple[int, int], world: int,
    ) -> None:
        """Takes the place of ``inner``; ``seed`` is (seed, rank)."""
        flat = slice(1, None) if inner.patch_size_was_2d else slice(None)
        super().__init__(
            inner._data, inner.batch_size, inner.patch_size[flat], inner.final_patch_size[flat], label_manager,
            oversample_foreground_percent=inner.oversample_foreground_percent,
            sampling_probabilities=inner.sampling_probabilities, transforms=inner.transforms,
        )
        self._data = cases
        self._mix, self._feed, self._seed, self._world = mix, feed, seed, world
        self._step = first_step
        self._is_first, self._is_over = True, False
        self.get_do_oversample = self._oversample_evenly

    def generate_train_batch(self) -> dict[str, Any]:
        """Makes the next batch of this worker; ends where the feed did, whose error the training's process raises."""
        workers = len(self._feed.queues)
        if self._is_first:
            self._step += self.thread_id
            self._is_first = False
        patches = None if self._is_over else self._feed.queues[self.thread_id].get()
        if patches is None:
            self._is_over = True
            raise StopIteration
        with _seeded((*self._seed, self._step)):
            self._data.patches = {f"{KEY}{patch.meta.index}": patch for patch in patches}
            batch = super().generate_train_batch()
        self._step += workers
        return batch

    def get_indices(self) -> list[str]:
        """Draws real cases for the places that are not streamed."""
        streamed = iter(self._data.patches)
        return [
            next(streamed) if is_streamed else str(np.random.choice(self.indices))
            for is_streamed in self._mix.is_streamed(self._step)
        ]

    def get_bbox(self, data_shape, force_fg, class_locations, overwrite_class=None, verbose=False):
        """Crops streamed patches in the middle, where their lesion is; real cases as nnU-Net does."""
        if not isinstance(class_locations, TumourSlices):
            return super().get_bbox(data_shape, force_fg, class_locations, overwrite_class, verbose)
        low = [(have - want) // 2 for have, want in zip(data_shape, self.patch_size)]
        if self.patch_size_was_2d:
            slices = class_locations.slices
            low[0] = int(np.random.choice(slices if len(slices) else data_shape[0]))
        return low, [start + want for start, want in zip(low, self.patch_size)]

    def _oversample_evenly(self, sample_idx: int) -> bool:
        # nnU-Net forces foreground in the last places of a batch; where those are always streamed, real patches would
        # never be. The share is kept over the real samples instead.
        n = self._step * self.batch_size + sample_idx
        real = n - self._mix.before(n)
        share = self.oversample_foreground_percent
        return int((real + 1) * share) > int(real * share)


class MixedAugmenter(MultiThreadedAugmenter):
    """Worker processes with a feed: batches come in the order of their steps."""

    def __init__(self, loader: MixedLoader, feed: Feed, pin_memory: bool) -> None:
        workers = len(feed.queues)
        super().__init__(loader, None, workers, num_cached_per_queue=2, seeds=[0] * workers, pin_memory=pin_memory,
                         wait_time=0.002)
        self._feed = feed

    def _start(self) -> None:
        super()._start()
        self._feed.start()

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except (StopIteration, RuntimeError) as error:
            raise self._feed.error or error from None

    def _finish(self, *arguments: Any, **options: Any) -> None:
        feed = getattr(self, "_feed", None)
        if feed is not None and self.was_initialized:
            feed.stop()
        super()._finish(*arguments, **options)


class MixedSingle(SingleThreadedAugmenter):
    """The same without worker processes (``nnUNet_n_proc_DA=0``)."""

    def __init__(self, loader: MixedLoader, feed: Feed) -> None:
        super().__init__(loader, None)
        self._feed = feed
        feed.start()

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except StopIteration as error:
            raise self._feed.error or error from None

    def stop(self) -> None:
        """Leaves the stream; nnU-Net ends loaders with workers alone."""
        self._feed.stop()


@contextmanager
def _seeded(key: tuple[int, ...]) -> Iterator[None]:
    """Sets every generator that augmentation draws from, and puts them back."""
    seeds = np.random.SeedSequence(key).generate_state(3)
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(int(seeds[0]))
        np.random.seed(seeds[1])
        torch.manual_seed(int(seeds[2]))
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])

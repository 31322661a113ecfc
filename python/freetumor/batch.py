"""One step's patches."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .meta import Cursor, PatchMeta


class Batch:
    """One step's patches of this rank.

    Attributes:
        image: ``[B, 1, D, H, W]``; f32 or f16 windowed to [0, 1], or i16 in HU. Axes (z, y, x) grow towards S, A, R.
        label: ``[B, 1, D, H, W]`` u8 ids of ``Stream.header.labels``; 255 is ignore.
        source: like image: the untouched host. Only where asked for in ``outputs``.
        soft_mask: ``[B, 1, D, H, W]`` u8 in 1/255. Only where asked for.
        lesion_instance: ``[B, 1, D, H, W]`` u8, from 1. Only where asked for.
        arrays: the same by name.
        meta: the patches' provenance, one per patch.
        cursor: where to go on once this batch is consumed.
        step: position in the run.
        reused: places in ``meta`` of patches that the server made once, for another stream of the same recipe as well.

    All arrays are writable and belong to the caller.
    """

    image: NDArray[Any]
    label: NDArray[np.uint8]
    source: NDArray[Any]
    soft_mask: NDArray[np.uint8]
    lesion_instance: NDArray[np.uint8]

    def __init__(
        self, arrays: dict[str, NDArray[Any]], meta: list[PatchMeta], cursor: Cursor, step: int,
        reused: tuple[int, ...] = (),
    ) -> None:
        self.arrays = arrays
        self.meta = meta
        self.cursor = cursor
        self.step = step
        self.reused = reused
        for name, array in arrays.items():
            setattr(self, name, array)

    def __len__(self) -> int:
        return len(self.meta)

    def __repr__(self) -> str:
        arrays = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in self.arrays.items())
        return f"Batch(step={self.step}, {arrays})"

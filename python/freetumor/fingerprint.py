"""What a scan looks like in a few hundred bytes, equal to the server's `Fingerprint::of` (promise P7: no leakage)."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .source_hash import canonical

_MAX_SLABS = 96
_BLOCKS = 64
_PARTS = 16
_LOW_HU, _LOW_TISSUE_HU, _HIGH_HU, _SOFT_HU = -150, -125, 230, -30
_OFFSET_HU = 1024


def fingerprint(array: NDArray[Any], affine: NDArray[Any]) -> str:
    """Returns the fingerprint of a volume as hexadecimal digits; empty where no voxel is soft tissue.

    `array[i, j, k]` holds HU after slope and intercept (with nibabel: `img.get_fdata()`), `affine` maps (i, j, k) to RAS
    millimetres (`img.affine`). `docs/ingest.md` of the server says what the numbers are; all arithmetic is in integers.
    """
    values = canonical(np.asarray(array), affine)
    if values.dtype.kind == "f":
        values = np.rint(values.astype(np.float64, copy=False))
    voxels = np.minimum(np.maximum(values, -32768), 32767).astype(np.int32)
    size = _micrometres(values.shape, array.shape, affine)
    plain = np.count_nonzero((voxels >= -200) & (voxels <= -30))
    shifted = np.count_nonzero((voxels >= 824) & (voxels <= 994))
    if shifted > plain:
        voxels = voxels - _OFFSET_HU
    found = _body_axis(voxels)
    if found is None:
        return ""
    axis, first, last = found
    order = [axis, *(other for other in range(3) if other != axis)]
    stack = np.transpose(voxels, order)[first : last + 1]
    size = [size[axis] for axis in order]
    thickness = -(-len(stack) // _MAX_SLABS)
    out = struct.pack("<BH3I", 1, thickness, *size)
    for slab in range(len(stack) // thickness):
        planes = stack[slab * thickness : (slab + 1) * thickness]
        out += _codes(planes, size[1:])
    return out.hex()


def _micrometres(shape: tuple[int, ...], of: tuple[int, ...], affine: NDArray[Any]) -> list[int]:
    """Returns the voxel size along (z, y, x) of the canonical axes."""
    axes = np.asarray(affine, dtype=np.float64)[:3, :3]
    # Which file axis became which: carried through the same turn as the voxels.
    marks = canonical(np.empty((2, 3, 5), dtype=np.int8), affine).shape
    lengths = [(axes[0, axis] ** 2 + axes[1, axis] ** 2 + axes[2, axis] ** 2) ** 0.5 for axis in range(3)]
    return [int(min(max(np.rint(lengths[(2, 3, 5).index(mark)] * 1000), 1), 1_000_000)) for mark in marks]


def _body_axis(voxels: NDArray[Any]) -> tuple[int, int, int] | None:
    """Returns the axis along which the body lies, and its first and last plane."""
    soft = voxels > _SOFT_HU
    ends: list[tuple[int, int, int, int]] = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        profile = [int(count) for count in np.count_nonzero(soft, axis=others)]
        most = max(profile)
        if most == 0:
            return None
        holds = [plane for plane, count in enumerate(profile) if 20 * count > most]
        ends.append((profile[holds[0]] + profile[holds[-1]], most, holds[0], holds[-1]))

    def blunter(a: int, b: int, by: tuple[int, int]) -> bool:
        return by[1] * ends[a][0] * ends[b][1] > by[0] * ends[b][0] * ends[a][1]

    other = 2 if blunter(2, 1, (1, 1)) else 1
    axis = other if blunter(other, 0, (3, 2)) else 0
    return axis, ends[axis][2], ends[axis][3]


def _ramp(mean: NDArray[Any], low: int, high: int) -> NDArray[Any]:
    return np.minimum(np.maximum(mean - low * _PARTS, 0) * 256 // ((high - low) * _PARTS), 256)


def _codes(planes: NDArray[Any], size: list[int]) -> bytes:
    """Returns the six numbers of a slab."""
    thickness, *shape = planes.shape
    sides = [max((side + _BLOCKS // 2) // _BLOCKS, 1) for side in shape]
    starts: list[NDArray[np.int64]] = [np.arange(0, side, block, dtype=np.int64) for side, block in zip(shape, sides)]
    lengths: list[NDArray[np.int64]] = [np.diff(np.append(start, side)) for start, side in zip(starts, shape)]
    count: NDArray[np.int64] = thickness * np.outer(lengths[0], lengths[1])

    def means(low: int) -> NDArray[Any]:
        flat = (np.maximum(np.minimum(planes, _HIGH_HU) - low, 0)).sum(axis=0, dtype=np.int64)
        sums = np.add.reduceat(np.add.reduceat(flat, starts[0], axis=0), starts[1], axis=1)
        return sums * _PARTS // count + low * _PARTS

    mean, tissue = means(_LOW_HU), means(_LOW_TISSUE_HU)
    soft = _ramp(tissue, -40, 20) * count
    dense = _ramp(tissue, 120, 200) * count
    fat = np.minimum(_ramp(mean, -140, -110), 256 - _ramp(mean, -80, -40)) * count
    pixel = size[0] * size[1]
    areas = [int(weight.sum()) * pixel // (256 * thickness) for weight in (soft, dense, fat)]
    spreads = [[0, 0], [0, 0]]
    total = int(soft.sum())
    for axis in range(2 if total else 0):
        middles = [2 * int(start) + int(length) - 1 for start, length in zip(starts[axis], lengths[axis])]
        rows = [[int(weight) for weight in tissue.sum(axis=1 - axis)] for tissue in (soft, dense)]
        moment = sum(weight * middle for weight, middle in zip(rows[0], middles))
        centre = (16 * moment + total // 2) // total
        for number, weights in enumerate(rows):
            if any(weights):
                away = sum(weight * (16 * middle - centre) ** 2 for weight, middle in zip(weights, middles))
                spreads[number][axis] = away * size[axis] * size[axis] // (1024 * sum(weights))
    (a, b), (c, d) = spreads
    return bytes(
        (
            _code(areas[0], 50_000_000),
            _code(areas[1], 10_000_000),
            _code(areas[2], 50_000_000),
            _code(a + b, 10_000_000),
            _code(c + d, 10_000_000),
            _code(max(a, b) * 1_000_000 // max(min(a, b), 1), 1_000_000),
        )
    )


def _code(value: int, unit: int) -> int:
    if value == 0:
        return 0
    return min(max(((_log2(value) - _log2(unit)) * 20 + 512) // 1024, 0), 255)


def _log2(value: int) -> int:
    """Returns the binary logarithm in parts of 1024, rounded down."""
    parts = value.bit_length() - 1
    mantissa = value >> (parts - 31) if parts >= 31 else value << (31 - parts)
    for _ in range(10):
        mantissa = mantissa * mantissa >> 31
        high = mantissa >> 32 & 1
        parts = 2 * parts + high
        mantissa >>= high
    return parts

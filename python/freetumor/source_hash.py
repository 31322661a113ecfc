"""The identity of a source volume, equal to the server's `ingest::source_hash` (promise P7: no leakage)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def canonical(array: NDArray[Any], affine: NDArray[Any]) -> NDArray[Any]:
    """Returns the voxels of `array[i, j, k]` as (z, y, x) with indices that grow to Superior, Anterior and Right.

    `affine` maps (i, j, k) to RAS millimetres. The patient axes of oblique volumes are found like the server finds
    them: from the rotation nearest to the affine, the file axis nearest to any patient axis chooses first.
    """
    axes = np.asarray(affine, dtype=np.float64)[:3, :3]
    lengths = np.sqrt((axes**2).sum(axis=0))
    left, _, right = np.linalg.svd(axes / lengths)
    rotation = left @ right
    order = np.argsort(-(rotation**2).max(axis=0), kind="stable")
    axis_of = [0, 0, 0]
    for file_axis in order:
        patient_axis = int(np.argmax(np.abs(rotation[:, file_axis])))
        axis_of[patient_axis] = file_axis
        if rotation[patient_axis, file_axis] < 0:
            array = np.flip(array, axis=file_axis)
        rotation[patient_axis, :] = 0
    right_axis, anterior_axis, superior_axis = axis_of
    return np.transpose(array, (superior_axis, anterior_axis, right_axis))


def source_hash(array: NDArray[Any], affine: NDArray[Any]) -> str:
    """Returns the hash of a volume as 64 hexadecimal digits.

    `array[i, j, k]` holds HU after slope and intercept (with nibabel: `img.get_fdata()`), `affine` maps (i, j, k) to
    RAS millimetres (`img.affine`). Values are rounded half to even and clamped to 16 bits; shape and voxels are hashed
    on the canonical axes, before any resampling.
    """
    from blake3 import blake3

    values = canonical(np.asarray(array), affine)
    if values.dtype.kind == "f":
        values = np.rint(values.astype(np.float64, copy=False))
    voxels = np.minimum(np.maximum(values, -32768), 32767).astype("<i2")
    digest = blake3(b"freetumor.source.v1")
    digest.update(np.asarray(voxels.shape, dtype="<u4").tobytes())
    digest.update(np.ascontiguousarray(voxels).tobytes())
    return digest.hexdigest()

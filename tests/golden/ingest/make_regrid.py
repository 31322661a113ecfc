"""Draws label volumes and image grids, oblique to each other, and writes what nibabel resamples (order 0) to regrid.json.

The outermost voxels of the labels are 0, as scipy takes the outer half of a border voxel to lie outside the volume.
Run it in an environment with nibabel, numpy and scipy: python tests/golden/ingest/make_regrid.py
"""
import json
import pathlib

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to

rng = np.random.default_rng(5)


def affine_near(centre, shape, spacing, tilt):
    """An affine of this spacing, turned by about `tilt` radians, that puts the volume's centre there."""
    turn, triangle = np.linalg.qr(np.eye(3) + tilt * rng.normal(size=(3, 3)))
    linear = turn * np.sign(np.diag(triangle)) @ np.diag(spacing)
    linear = linear[:, rng.permutation(3)] * rng.choice([-1, 1], 3)
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = centre - linear @ ((np.array(shape) - 1) / 2)
    return affine


cases = []
for number in range(12):
    shape, target = rng.integers(6, 11, 3), rng.integers(5, 10, 3)
    labels = np.zeros(shape, np.uint8)
    labels[1:-1, 1:-1, 1:-1] = rng.integers(0, 4, shape - 2)
    tilt = 0.0 if number < 3 else 0.3
    given = affine_near(rng.uniform(-50, 50, 3), shape, rng.uniform(0.7, 4, 3), tilt)
    centre = nib.affines.apply_affine(given, (shape - 1) / 2) + rng.uniform(-2, 2, 3)
    wanted = affine_near(centre, target, rng.uniform(0.7, 4, 3), tilt)
    resampled = resample_from_to(nib.Nifti1Image(labels, given), (target, wanted), order=0)
    cases.append(
        {
            "labels_affine": given.tolist(),
            "labels_shape": shape.tolist(),
            "labels": labels.transpose(2, 1, 0).ravel().tolist(),
            "image_affine": wanted.tolist(),
            "image_shape": target.tolist(),
            "expected": np.asarray(resampled.dataobj).transpose(2, 1, 0).ravel().tolist(),
        }
    )
path = pathlib.Path(__file__).parent / "regrid.json"
path.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")

"""Draws 100 oblique affines, every third with shear, and writes what nibabel makes of a small volume under each (affines.json).

Run it in an environment with nibabel and numpy: python tests/golden/ingest/make_affines.py
"""
import json
import pathlib

import nibabel as nib
import numpy as np

rng = np.random.default_rng(2)
voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
cases = []
for number in range(100):
    # A rotation drawn evenly from all, one axis mirrored in half of the cases.
    turn, triangle = np.linalg.qr(rng.normal(size=(3, 3)))
    turn = turn * np.sign(np.diag(triangle))
    linear = turn @ np.diag(rng.uniform(0.4, 6.0, 3))
    if number % 3 == 0:
        linear[:, 2] += rng.uniform(-0.3, 0.3) * linear[:, 1]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = linear, rng.uniform(-500, 500, 3)
    closest = nib.as_closest_canonical(nib.Nifti1Image(voxels, affine))
    cases.append(
        {
            "given": affine.tolist(),
            "affine": closest.affine[:, [2, 1, 0, 3]].tolist(),
            "axcodes": "".join(nib.aff2axcodes(affine)),
            "voxels": np.asarray(closest.dataobj).transpose(2, 1, 0).ravel().tolist(),
        }
    )
path = pathlib.Path(__file__).with_name("affines.json")
path.write_text(json.dumps(cases, separators=(",", ":")) + "\n")
print(len(cases), "affines,", path.stat().st_size, "bytes")

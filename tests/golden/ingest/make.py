"""Writes the NIfTI files of this folder and what nibabel makes of them (expected.json).

Run it in an environment with nibabel, numpy and blake3: python tests/golden/ingest/make.py
"""

import gzip
import itertools
import json
import pathlib
import sys

import nibabel as nib
import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2] / "python"))
from freetumor.source_hash import source_hash  # noqa: E402

rng = np.random.default_rng(1)
expected = {}


def keep(name, image):
    """Saves an image and what nibabel's canonical form of the saved file is."""
    path = HERE / name
    data = image.to_bytes()
    path.write_bytes(gzip.compress(data, 9, mtime=0) if name.endswith(".gz") else data)
    loaded = nib.load(path)
    if loaded.ndim == 4:
        loaded = nib.Nifti1Image(loaded.get_fdata()[..., 0], loaded.affine)
    closest = nib.as_closest_canonical(loaded)
    values = np.clip(np.rint(closest.get_fdata()), -32768, 32767).astype(np.int64)
    values = values.transpose(2, 1, 0)  # (z, y, x)
    zyx = closest.affine[:, [2, 1, 0, 3]]
    expected[name] = {
        "shape": values.shape,
        "affine": zyx.tolist(),
        "axcodes": "".join(nib.aff2axcodes(loaded.affine)),
        "voxels": values.ravel().tolist() if values.size <= 60 else None,
        # A sum that depends on every voxel's place.
        "weighted_sum": int((values.ravel() * np.arange(1, values.size + 1)).sum()),
        # By our own Python function from the file as it is: the Rust hash must equal it.
        "source_hash": source_hash(loaded.get_fdata(), loaded.affine),
    }


voxels = rng.integers(-1024, 1500, (3, 4, 5)).astype(np.int16)
spacing = np.array([0.75, 1.5, 5.0])
number = 0
for order in itertools.permutations(range(3)):
    for signs in itertools.product([1, -1], repeat=3):
        affine = np.eye(4)
        affine[:3, :3] = 0
        for file_axis, (patient_axis, sign) in enumerate(zip(order, signs)):
            affine[patient_axis, file_axis] = sign * spacing[file_axis]
        affine[:3, 3] = [-11.5, 22.25, 300.0]
        keep(f"orient-{number:02}.nii.gz", nib.Nifti1Image(voxels, affine))
        number += 1

turn = nib.eulerangles.euler2mat(0.3, -0.5, 0.9) @ np.diag([0.8, 1.1, 2.5])
oblique = np.eye(4)
oblique[:3, :3] = turn
oblique[:3, 3] = [5, -6, 7]
keep("oblique.nii.gz", nib.Nifti1Image(voxels, oblique))
shear = oblique.copy()
shear[:3, 1] += 0.4 * shear[:3, 0]
keep("shear.nii.gz", nib.Nifti1Image(voxels, shear))

plain = np.diag([-1.5, -1.5, 3.0, 1.0])
plain[:3, 3] = [40, 50, -60]
keep("nifti2.nii.gz", nib.Nifti2Image(voxels, plain))
keep("nifti2-big.nii", nib.Nifti2Image(voxels, plain, nib.Nifti2Header(endianness=">")))
keep("big.nii.gz", nib.Nifti1Image(voxels, plain, nib.Nifti1Header(endianness=">")))
keep("uncompressed.nii", nib.Nifti1Image(voxels, plain))
keep("four.nii.gz", nib.Nifti1Image(voxels[..., None], plain))
for kind in ["u1", "i1", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]:
    low, high = (0, 255) if kind == "u1" else (-128, 127) if kind == "i1" else (0, 3000) if kind[0] == "u" else (-1024, 2000)
    values = rng.uniform(low, high, (3, 4, 5)) if kind[0] == "f" else rng.integers(low, high, (3, 4, 5))
    keep(f"type-{kind}.nii.gz", nib.Nifti1Image(values.astype(kind), plain, dtype=np.dtype(kind)))

class Raw:
    """Bytes that pass for an image."""

    def __init__(self, content):
        self.content = bytes(content)

    def to_bytes(self):
        """Returns the bytes."""
        return self.content


raw_slope = bytearray(nib.Nifti1Image(voxels, plain).to_bytes())
raw_slope[112:120] = np.array([0.5, -1000.0], "<f4").tobytes()
keep("slope.nii.gz", Raw(raw_slope))
raw_slope[112:120] = np.array([np.nan, 7.0], "<f4").tobytes()
keep("slope-nan.nii.gz", Raw(raw_slope))

qform = nib.Nifti1Image(voxels, None)
rotation = np.eye(4)
rotation[:3, :3] = nib.eulerangles.euler2mat(0.1, 0.2, 2.8) @ np.diag([1, 1.5, -2])
rotation[:3, 3] = [1, 2, 3]
qform.set_qform(rotation, code=1)
qform.set_sform(None, code=0)
keep("qform.nii.gz", qform)
pixdim = nib.Nifti1Image(voxels, None)
pixdim.header.set_zooms((1.0, 2.0, 3.0))
pixdim = nib.Nifti1Image(voxels, None, pixdim.header)
keep("pixdim.nii.gz", pixdim)

(HERE / "expected.json").write_text(json.dumps(expected, separators=(",", ":"), sort_keys=True) + "\n")
print(len(expected), "files,", sum(f.stat().st_size for f in HERE.iterdir()), "bytes")

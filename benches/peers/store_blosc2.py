"""Reads of random 96^3 patches (image and label) from FreeTumor's stores and from nnU-Net's, in one run.

    python store_blosc2.py FREETUMOR_BINARY [SECONDS]

Needs nnunetv2, blosc2 and nibabel. The volumes are those that `freetumor bench store` makes and exports. nnU-Net's own
code chooses chunks, blocks, codec and filter; it stores normalised float32, so the same HU as int16 stand beside it, for
the sizes of files. One thread; every file is in the page cache.
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import blosc2
import nibabel
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

SIDE = 96


def convert(volumes, folder, dtype):
    """Writes the volumes as nnU-Net does and returns its data set and the bytes of its files."""
    folder.mkdir()
    for name, (image, label) in volumes.items():
        image = image.astype(dtype) if dtype == np.int16 else ((image - image.mean()) / image.std()).astype(dtype)
        pair = image[None], label.astype(np.int8)[None]
        shapes = [comp_blosc2_params(a.shape, (SIDE,) * 3, a.itemsize) for a in pair]
        (blocks, chunks), (label_blocks, label_chunks) = shapes
        nnUNetDatasetBlosc2.save_case(*pair, {}, str(folder / name), chunks, blocks, label_chunks, label_blocks)
    size = sum(path.stat().st_size for path in folder.glob("*.b2nd"))
    return nnUNetDatasetBlosc2(str(folder), list(volumes)), size


def rate(read, shapes, seconds):
    """Calls read(case, slices) for random boxes and returns calls per second."""
    rng = np.random.default_rng(1)

    def one():
        case = int(rng.integers(len(shapes)))
        start = [int(rng.integers(max(side - SIDE, 0) + 1)) for side in shapes[case]]
        read(case, tuple(slice(s, s + SIDE) for s in start))

    for _ in range(20 * len(shapes)):
        one()
    begin, calls = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        one()
        calls += 1
    return calls / (time.perf_counter() - begin)


def main():
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 4.0
    with tempfile.TemporaryDirectory() as temporary:
        export = Path(temporary) / "export"
        command = [sys.argv[1], "bench", "store", "--json", "--seconds", str(seconds), "--export", str(export)]
        result = {"freetumor": json.loads(subprocess.run(command, check=True, capture_output=True).stdout)}
        volumes = {}
        for path in sorted(export.glob("*.nii.gz")):
            if not path.name.endswith("_label.nii.gz"):
                name = path.name.removesuffix(".nii.gz")
                pair = [np.asarray(nibabel.load(export / f"{name}{end}.nii.gz").dataobj).T for end in ("", "_label")]
                volumes[name] = [np.ascontiguousarray(array) for array in pair]
        shapes = [image.shape for image, _ in volumes.values()]
        voxels = sum(image.size for image, _ in volumes.values())
        for name, dtype in [("nnunet", np.float32), ("nnunet_int16", np.int16)]:
            cases, size = convert(volumes, Path(temporary) / name, dtype)
            names = list(volumes)

            def read(case, box):
                image, label, _, _ = cases.load_case(names[case])
                image[(slice(None), *box)], label[(slice(None), *box)]

            result[name] = {
                "per_s": rate(read, shapes, seconds),
                "bytes_per_case": size // len(volumes),
                "bytes_per_voxel": size / voxels,
            }
        arrays = list(volumes.values())
        buffers = np.empty((SIDE,) * 3, np.int16), np.empty((SIDE,) * 3, np.uint8)

        def copy(case, box):
            for array, buffer in zip(arrays[case], buffers):
                part = array[box]
                np.copyto(buffer[tuple(slice(n) for n in part.shape)], part)

        result["numpy_copy_per_s"] = rate(copy, shapes, seconds)
    print(json.dumps(result, indent=2))


main()

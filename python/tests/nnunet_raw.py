"""A tiny nnU-Net data set: real patches of a phantom store, one for each labelled case, under the store's case names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import freetumor


def real_recipe(side: int) -> dict:
    """Returns the recipe of upright real patches."""
    return {
        "pools": {"labelled_real": 1}, "patch": [side] * 3, "gate": {"enabled": False}, "synthesizer": "analytic",
        "augment": {"flip": [0, 0, 0], "rotate90": 0, "intensity": 0}, "patches_per_epoch": 1000,
    }


def export(url: str, dataset: Path, *, side: int, cases: int) -> list[str]:
    """Writes ``dataset`` in nnU-Net's raw format and returns its case names."""
    import nibabel

    images, labels = dataset / "imagesTr", dataset / "labelsTr"
    for folder in (images, labels):
        folder.mkdir(parents=True)
    names: list[str] = []
    with freetumor.stream(url, real_recipe(side), batch_size=1, image="i16") as stream:
        ids = dict(stream.header.labels)
        ignore = max(ids.values()) + 1
        for batch in stream:
            meta = batch.meta[0]
            if meta.case in names:
                continue
            names.append(meta.case)
            affine = meta.affine[:, [2, 1, 0, 3]]  # of (x, y, z) indices
            label = np.where(batch.label[0, 0] == 255, ignore, batch.label[0, 0]).astype(np.uint8)
            for folder, name, array in [(images, f"{meta.case}_0000", batch.image[0, 0]), (labels, meta.case, label)]:
                file = folder / f"{name}.nii.gz"
                nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(array.transpose(2, 1, 0)), affine), file)
            if len(names) == cases:
                break
    (dataset / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "CT"}, "labels": {**ids, "ignore": ignore}, "numTraining": len(names), "file_ending": ".nii.gz",
    }))
    return sorted(names)


def shrink(plans_file: Path, configuration: str, patch: list[int]) -> None:
    """Makes a plan small enough for a few seconds on a CPU: patch, batch and network."""
    plans = json.loads(plans_file.read_text())
    plan = plans["configurations"][configuration]
    plan["batch_size"], plan["patch_size"] = 2, patch
    kwargs = plan["architecture"]["arch_kwargs"]
    stages = 3
    kwargs["n_stages"] = stages
    kwargs["features_per_stage"] = [8, 16, 32]
    for key in ("kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage"):
        if key in kwargs:
            kwargs[key] = kwargs[key][:stages]
    kwargs["n_conv_per_stage_decoder"] = kwargs["n_conv_per_stage_decoder"][: stages - 1]
    plans_file.write_text(json.dumps(plans))

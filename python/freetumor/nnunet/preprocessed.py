"""nnU-Net's preprocessed cases as scans to ingest, so that hosts went through nnU-Net's own resampling.

A store that ingested the original files resamples them by itself: a network could tell streamed patches from preprocessed
ones by that alone. One that ingested this export holds the preprocessed voxels, rounded to whole HU; only lesions differ.

Its cases have other source hashes than the original scans, so that models are asked about those as well.
"""

# nnU-Net carries few types.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FreeTumorError
from ..source_hash import source_hash
from .geometry import AIR_HU, file_directions, file_origin

_IGNORE = "ignore"


def export(
    dataset: str, out: Path, *, configuration: str = "3d_fullres", plans: str = "nnUNetPlans",
    labels: Mapping[str, str] | None = None,
) -> list[str]:
    """Writes a data set's preprocessed cases as NIfTI, with a datalist and a preset for ``freetumor ingest``.

    Args:
        dataset: nnU-Net's name or number.
        out: a folder, made where it is missing: ``imagesTr``, ``labelsTr``, ``dataset.json``, ``preset.toml``.
        configuration: a 3-D one.
        plans: nnU-Net's name of the plans.
        labels: nnU-Net label to class of the store, where they are called differently, such as ``{"tumor": "liver_tumour"}``.

    Returns:
        The cases' names, nnU-Net's own.

    Raises:
        FreeTumorError: the configuration is 2-D or not normalized as CT, or a label is a region.
    """
    from nnunetv2.paths import nnUNet_preprocessed
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    name = maybe_convert_to_dataset_name(int(dataset) if dataset.isdigit() else dataset)
    folder = Path(str(nnUNet_preprocessed)) / name
    manager = PlansManager(str(folder / f"{plans}.json"))
    config: Any = manager.get_configuration(configuration)
    if len(config.spacing) != 3 or config.normalization_schemes != ["CTNormalization"]:
        raise FreeTumorError(
            f"{configuration}: expected a 3-D configuration of one channel with CTNormalization, got spacing "
            f"{config.spacing} and {config.normalization_schemes}"
        )
    described = json.loads((folder / "dataset.json").read_text())
    preset = _preset(described["labels"], labels or {})
    cases = _cases(folder / config.data_identifier)
    for sub in ("imagesTr", "labelsTr"):
        (out / sub).mkdir(parents=True, exist_ok=True)
    intensities = manager.foreground_intensity_properties_per_channel["0"]
    entries: list[dict[str, str]] = []
    for case in cases.identifiers:
        data, seg, _, properties = cases.load_case(case)
        affine = _affine(properties, manager.transpose_forward, config.spacing)
        hu = np.asarray(data[0]) * max(intensities["std"], 1e-8) + intensities["mean"]
        # The store pads with -1024 HU, which must mean that alone.
        hu = np.maximum(np.rint(hu), AIR_HU + 1)
        # Outside of what nnU-Net took for the scan, -1: background to its loss as well.
        ids = np.maximum(np.asarray(seg[0]), 0)
        entry = {"image": f"imagesTr/{case}_0000.nii.gz", "label": f"labelsTr/{case}.nii.gz", "id": case}
        _save(out / entry["image"], hu.astype(np.int16), affine, manager.transpose_forward)
        _save(out / entry["label"], ids.astype(np.uint8), affine, manager.transpose_forward)
        entries.append(entry)
    (out / "dataset.json").write_text(json.dumps({"training": entries}, indent=1))
    (out / "preset.toml").write_text(preset)
    return [entry["id"] for entry in entries]


def scan_hashes(dataset_name: str, cases: Iterable[str]) -> list[str]:
    """Returns the source hashes of cases' original scans, read from nnU-Net's raw folder.

    Raises:
        FreeTumorError: a scan is not there, or is no NIfTI file.
    """
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nnunetv2.paths import nnUNet_raw
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    wanted = sorted(cases)
    if not wanted:
        return []
    folder = Path(str(nnUNet_raw or "")) / dataset_name
    try:
        files: Any = get_filenames_of_train_images_and_targets(str(folder))
        hashes: list[str] = []
        for case in wanted:
            image: Any = nibabel.load(files[case]["images"][0])
            # One scan at a time is in memory.
            hashes.append(source_hash(image.get_fdata(caching="unchanged"), image.affine))
        return hashes
    except (OSError, KeyError, ImageFileError) as error:
        raise FreeTumorError(
            f"{folder}: expected the fold's validation scans as NIfTI, to make sure that no model was trained on them: {error}"
        ) from error


def _cases(folder: Path) -> Any:
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    if not folder.is_dir():
        raise FreeTumorError(f"{folder}: expected nnU-Net's preprocessed cases; run nnUNetv2_plan_and_preprocess first")
    return infer_dataset_class(str(folder))(str(folder))


def _preset(labels: Mapping[str, Any], renamed: Mapping[str, str]) -> str:
    """Returns what the ids mean, as ``freetumor ingest --preset`` reads it."""
    unknown = sorted(renamed.keys() - labels.keys())
    if unknown:
        raise FreeTumorError(f"--label: expected labels of dataset.json, {sorted(labels)}, got {unknown}")
    regions = sorted(name for name, value in labels.items() if not isinstance(value, int))
    if regions:
        raise FreeTumorError(f"dataset.json: {regions} are regions of several ids, expected one id for each label")
    classes = {value: renamed.get(name, name) for name, value in labels.items()}
    annotated = [name for value, name in sorted(classes.items()) if value != 0 and name != _IGNORE]
    lines = [f"annotated = {json.dumps(annotated)}", "[map]"]
    lines += [f"{value} = {json.dumps(name)}" for value, name in sorted(classes.items())]
    return "\n".join(lines) + "\n"


def _affine(properties: Mapping[str, Any], transpose_forward: Sequence[int], spacing: Sequence[float]) -> NDArray[np.float64]:
    """Returns the affine, RAS, of a preprocessed case's (i, j, k); its grid starts at the outer corner of the crop."""
    directions = file_directions(properties)
    directions /= np.linalg.norm(directions, axis=0)
    new_mm = np.empty(3)
    for axis, mm in zip(transpose_forward, spacing):
        new_mm[2 - axis] = mm  # arrays are (k, j, i) of the file
    old_mm = np.array(properties["spacing"], dtype=np.float64)[::-1]
    first = np.empty(3)
    for axis, (low, _high) in zip(transpose_forward, properties["bbox_used_for_cropping"]):
        first[2 - axis] = low
    affine = np.eye(4)
    affine[:3, :3] = directions * new_mm
    affine[:3, 3] = file_origin(properties) + directions @ ((first - 0.5) * old_mm + 0.5 * new_mm)
    return affine


def _save(path: Path, array: NDArray[Any], affine: NDArray[np.float64], transpose_forward: Sequence[int]) -> None:
    """Writes an array of nnU-Net's axes in its file's."""
    import nibabel

    of_file = array.transpose(np.argsort(transpose_forward)).transpose(2, 1, 0)
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(of_file), affine), path)

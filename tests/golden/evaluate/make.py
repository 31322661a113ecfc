"""Writes random masks and what four evaluators make of them (metrics.json).

    pip install monai nnunetv2 surface-distance panoptica scipy && python tests/golden/evaluate/make.py

Where evaluators compute the same thing, the script refuses to write unless they agree.
"""

import base64
import contextlib
import io
import json
import pathlib
import tempfile

import numpy as np
import scipy.ndimage as ndimage

# surface-distance 0.1 uses names that later versions of numpy and scipy have dropped.
np.Inf = np.inf
ndimage.filters = ndimage.morphology = ndimage

import SimpleITK as sitk  # noqa: E402
import surface_distance as sd  # noqa: E402
import torch  # noqa: E402
from monai.metrics import DiceMetric, compute_surface_dice  # noqa: E402
from nnunetv2.evaluation.evaluate_predictions import compute_metrics  # noqa: E402
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO  # noqa: E402
from panoptica import (  # noqa: E402
    CCABackend,
    ConnectedComponentsInstanceApproximator,
    InputType,
    Metric,
    NaiveThresholdMatching,
    Panoptica_Evaluator,
)
from surface_distance.lookup_tables import create_table_neighbour_code_to_surface_area  # noqa: E402

HERE = pathlib.Path(__file__).parent
rng = np.random.default_rng(20)
CORNERS = np.ones((3, 3, 3))  # 26 neighbours


def blobs(shape, smooth, share):
    """Returns random blobs that fill about a share of the volume."""
    field = ndimage.gaussian_filter(rng.normal(size=shape), smooth)
    return field > np.quantile(field, 1 - share)


def nearby(mask, noise):
    """Returns a mask like another: moved, its border noisy."""
    moved = np.roll(mask, rng.integers(-2, 3, 3), (0, 1, 2))
    field = ndimage.gaussian_filter(rng.normal(size=mask.shape), 1.0)
    field /= field.std()
    away = ndimage.distance_transform_edt(moved) - ndimage.distance_transform_edt(~moved)
    return away + noise * field > 0


def pairs():
    """Lists masks (truth, prediction, spacing): random, single voxels, touching the border, full, empty."""
    out = []
    for n in range(16):
        shape = rng.integers(9, 22, 3)
        truth = blobs(shape, rng.uniform(0.7, 3.0), rng.uniform(0.02, 0.4))
        noise = rng.uniform(0.2, 2.0)
        out.append((truth, nearby(truth, noise) if n % 4 else blobs(shape, 1.0, 0.1), rng.uniform(0.5, 5.0, 3).round(3)))
    noise = rng.random((2, 9, 11, 10)) < 0.5
    out.append((noise[0], noise[1], np.array([1.0, 1.0, 1.0])))
    out.append((rng.random((12, 12, 12)) < 0.01, rng.random((12, 12, 12)) < 0.01, np.array([3.0, 0.8, 0.8])))
    empty, full = np.zeros((7, 8, 9), bool), np.ones((7, 8, 9), bool)
    some = blobs((7, 8, 9), 1.5, 0.2)
    for pair in [(empty, empty), (some, empty), (empty, some), (full, some), (full, full), (some, some)]:
        out.append((*pair, np.array([2.5, 1.0, 0.75])))
    return out


def number(value):
    """Returns a number for JSON: null where it is undefined or infinite."""
    return float(value) if np.isfinite(value) else None


def packed(mask):
    return base64.b64encode(np.packbits(mask.ravel(), bitorder="little").tobytes()).decode()


def dice(truth, prediction):
    """Returns Dice by MONAI and nnU-Net, which must agree but where only the prediction holds anything: MONAI says nan."""
    tensor = lambda mask: torch.from_numpy(mask[None, None].astype(np.float32))  # noqa: E731
    of_monai = float(DiceMetric(ignore_empty=not (prediction.any() and not truth.any()))(tensor(prediction), tensor(truth)))
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{folder}/{name}.nii.gz" for name in ("truth", "prediction")]
        for name, mask in zip(names, (truth, prediction)):
            sitk.WriteImage(sitk.GetImageFromArray(mask.astype(np.uint8)), name)
        found = compute_metrics(*names, SimpleITKIO(), [1])["metrics"][1]
    assert np.isclose(of_monai, found["Dice"], atol=1e-6, equal_nan=True), (of_monai, found)
    return {"dice": number(found["Dice"]), "tp": int(found["TP"]), "fp": int(found["FP"]), "fn": int(found["FN"])}


def surfaces(truth, prediction, spacing):
    """Returns NSD at tolerances and the robust Hausdorff distances by surface-distance; NSD must be MONAI's."""
    distances = sd.compute_surface_distances(truth, prediction, spacing)
    tolerances = [0.0, 0.5, 1.0, 2.0, 3.0, 5.0, float(spacing[0])]
    both_empty = not truth.any() and not prediction.any()
    nsd = [np.nan if both_empty else sd.compute_surface_dice_at_tolerance(distances, t) for t in tolerances]
    tensor = lambda mask: torch.from_numpy(mask[None, None].astype(np.float32))  # noqa: E731
    for tolerance, value in zip(tolerances, nsd):
        arguments = dict(include_background=True, spacing=spacing.tolist(), use_subvoxels=True)
        monai = float(compute_surface_dice(tensor(prediction), tensor(truth), [tolerance], **arguments))
        # Single precision; at a tolerance that is a multiple of the spacing, its distances fall on either side.
        if tolerance not in (spacing[0], 0.0) and not np.isin(spacing, [0.5, 1.0]).any():
            assert np.isclose(monai, value, atol=1e-5, equal_nan=True), (monai, value, tolerance, spacing)
    hd = {str(p): number(np.inf if both_empty else sd.compute_robust_hausdorff(distances, p)) for p in (50, 95, 100)}
    return {"tolerances_mm": tolerances, "nsd": [number(value) for value in nsd], "hd_mm": hd}


def by_panoptica(truth, prediction):
    """Returns counts after one-to-one matching of 26-connected components at IoU 0.1."""
    evaluator = Panoptica_Evaluator(
        expected_input=InputType.SEMANTIC,
        instance_approximator=ConnectedComponentsInstanceApproximator(cca_backend=CCABackend.cc3d),
        instance_matcher=NaiveThresholdMatching(matching_metric=Metric.IOU, matching_threshold=0.1),
        instance_metrics=[Metric.IOU, Metric.DSC],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        (result,) = evaluator.evaluate(prediction.astype(np.uint8), truth.astype(np.uint8)).values()
    counts = {name: int(getattr(result, name)) for name in ("tp", "fp", "fn")}
    return counts | {"f1": number(result.rq), "mean_iou": number(result.sq)}


def by_hand(truth, prediction, spacing):
    """Returns what panoptica does not count, from scipy's components: sizes, any overlap, merges and splits."""
    listed, diameters = [], []
    for mask in (truth, prediction):
        labels, count = ndimage.label(mask, CORNERS)
        voxels = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        listed.append((labels, count))
        diameters.append(np.cbrt(6 * voxels * np.prod(spacing) / np.pi))
    (of_truth, truths), (of_prediction, predictions) = listed
    shared = np.zeros((truths + 1, predictions + 1), int)
    np.add.at(shared, (of_truth.ravel(), of_prediction.ravel()), 1)
    meets = shared[1:, 1:] > 0
    classes = [[int(np.digitize(d, [10, 20, 50.000001])) for d in side] for side in diameters]
    return {
        "truths_by_class": np.bincount(classes[0], minlength=4).tolist(),
        "predictions_by_class": np.bincount(classes[1], minlength=4).tolist(),
        "touched": int(meets.any(1).sum()),
        "false_alarms": int((~meets.any(0)).sum()),
        "merges": int((meets.sum(0) > 1).sum()),
        "splits": int((meets.sum(1) > 1).sum()),
    }


def main():
    masks, lesions, areas = [], [], []
    for truth, prediction, spacing in pairs():
        masks.append(
            {
                "shape": truth.shape,
                "spacing_mm": spacing.tolist(),
                "truth": packed(truth),
                "prediction": packed(prediction),
                **dice(truth, prediction),
                **surfaces(truth, prediction, spacing),
            }
        )
    for n in range(14):
        shape = rng.integers(18, 30, 3)
        truth = blobs(shape, rng.uniform(0.8, 1.8), rng.uniform(0.02, 0.2))
        prediction = nearby(truth, rng.uniform(0.5, 2.5))
        if n >= 11:
            truth, prediction = [(truth & False, prediction), (truth, truth & False), (truth & False, truth & False)][n - 11]
        spacing = rng.uniform(1.0, 5.0, 3).round(2)
        lesions.append(
            {
                "shape": truth.shape,
                "spacing_mm": spacing.tolist(),
                "truth": packed(truth),
                "prediction": packed(prediction),
                "panoptica": by_panoptica(truth, prediction) if truth.any() or prediction.any() else None,
                **by_hand(truth, prediction, spacing),
            }
        )
    for spacing in [(1.0, 1.0, 1.0), (5.0, 0.7, 0.8), (1.0, 2.0, 3.0)]:
        # The published bit order runs from the last of the eight voxels to the first, ours the other way.
        table = create_table_neighbour_code_to_surface_area(spacing)
        turned = [int(f"{code:08b}"[::-1], 2) for code in range(256)]
        areas.append({"spacing_mm": spacing, "areas_mm2": [float(table[code]) for code in turned]})
    out = {"masks": masks, "lesions": lesions, "areas": areas}
    (HERE / "metrics.json").write_text(json.dumps(out, separators=(",", ":")) + "\n")
    print(len(masks), "masks", len(lesions), "lesion cases")


main()

"""Measures what a server streams, with tools that the server does not share: SciPy, nibabel, the source files.

``python -m freetumor.quality --url URL --organs liver,pancreas,kidney --patches 48 --json F --picture F``

For every patch that a synthesizer changed:

- **edge**: distance in mm over which the lesion's intensity change rises from 10 to 90 % of its plateau. The plateau is the
  median change at least 2 mm (or half the radius) inside; distances are signed Euclidean distances to the label's border.
  Not measured where the plateau is under 15 HU or under three times the spread of the change on it: there the lesion's own
  texture is what rises and falls.
- **noise**: spread of the high-pass image (voxel minus the mean of its 3x3x3 neighbourhood, over voxels whose
  neighbourhood lies in the same tissue), inside the lesion over that of the organ within 10 mm around it; beside it the
  same ratio of the untouched source, which differs from 1 too. The spread is the median absolute deviation, so that a stone
  or a vessel in either does not count as noise.
- **HU**: least and greatest intensity inside the lesion.
- **place**: share of lesion voxels whose position, through the patch's affine, falls into the organ in the *source*
  segmentation file (``--labels FILE --ids liver=5,kidney=2+3``): its nearest voxel, or one of them where several are.
- **elsewhere**: voxels that differ from the untouched source where the soft mask is 0. Must be 0.

The picture shows, for each organ, lesions of the middle of the sizes and of at least 15 HU: axially, anterior on top, the
patient's right on the left; before, after, label (organs green, lesion red).

Needs ``pip install 'freetumor[quality]'`` (SciPy; nibabel for ``--labels``).
"""

# SciPy and nibabel carry no types of their own.
# pyright: basic, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import freetumor
from freetumor.png import write_png

#: An edge or plateau cannot be told from noise in weaker lesions, nor a lesion be seen.
MIN_CONTRAST_HU = 15.0
#: Least plateau over the spread of the change on it, for an edge to be one.
MIN_PLATEAU_SPREADS = 3.0
#: A spread has a standard error of a quarter from this few voxels, which a small pancreas does not exceed: read medians.
MIN_NOISE_VOXELS = 20
RING_MM = 10.0
#: Upright and in true HU; hosts without tumours of their own.
BASE_RECIPE = {
    "pools": {"unlabelled_host": 1.0},
    "augment": {"flip": [0, 0, 0], "rotate90": 0, "intensity": 0},
}
#: Positions that lie this near to the middle between two voxels have two nearest ones.
TIE_VOXELS = 1e-3


@dataclass
class Organ:
    """What was measured over one organ's patches."""

    patches: int = 0
    changed: int = 0
    attempts: int = 0
    accepted: int = 0
    outcomes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    changed_elsewhere: int = 0
    edge_mm: list[float] = field(default_factory=list)
    noise_ratio: list[float] = field(default_factory=list)
    noise_ratio_before: list[float] = field(default_factory=list)
    low_hu: list[int] = field(default_factory=list)
    high_hu: list[int] = field(default_factory=list)
    inside_organ: list[float] = field(default_factory=list)
    requested_hu: list[float] = field(default_factory=list)
    realised_hu: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Returns medians, extremes and counts."""

        def spread(values: list[float]) -> dict[str, float] | None:
            if not values:
                return None
            return {
                "n": len(values),
                "median": round(float(np.median(values)), 3),
                "min": round(float(np.min(values)), 3),
                "max": round(float(np.max(values)), 3),
            }

        return {
            "patches": self.patches,
            "changed": self.changed,
            "attempts": self.attempts,
            "outcomes": dict(self.outcomes),
            "accepted_share_of_attempts": round(self.accepted / self.attempts, 3) if self.attempts else None,
            "voxels_changed_elsewhere": self.changed_elsewhere,
            "edge_10_90_mm": spread(self.edge_mm),
            "noise_inside_over_ring": spread(self.noise_ratio),
            "noise_inside_over_ring_before": spread(self.noise_ratio_before),
            "lowest_hu": spread([float(v) for v in self.low_hu]),
            "highest_hu": spread([float(v) for v in self.high_hu]),
            "lesion_voxels_inside_organ": spread(self.inside_organ),
            "realised_minus_requested_hu": spread([b - a for a, b in zip(self.requested_hu, self.realised_hu)]),
        }


def signed_distance_mm(inside: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Returns the distance to the border in mm, negative inside, as seen from voxel centres."""
    from scipy import ndimage

    half = float(np.mean(spacing)) / 2  # the border runs between voxel centres
    outward = ndimage.distance_transform_edt(~inside, sampling=spacing)
    inward = ndimage.distance_transform_edt(inside, sampling=spacing)
    return np.where(inside, half - inward, outward - half)


def edge_width_mm(change: np.ndarray, inside: np.ndarray, free: np.ndarray, spacing: np.ndarray) -> float | None:
    """Returns the 10-90 % width of a lesion's edge, or nothing where it has no plateau to speak of.

    ``free`` marks voxels nearer to this lesion's own border than to an organ border, where the mask may stop abruptly.
    """
    distance = signed_distance_mm(inside, spacing)
    deep = distance < min(-2.0, distance.min() / 2)
    if deep.sum() < 8:
        return None
    plateau = float(np.median(change[deep]))
    if abs(plateau) < max(MIN_CONTRAST_HU, MIN_PLATEAU_SPREADS * float(np.std(change[deep]))):
        return None
    bins = np.arange(-4.0, 4.01, 0.5)
    centres, profile = [], []
    for low, high in zip(bins[:-1], bins[1:]):
        ring = (distance >= low) & (distance < high) & (free | inside)
        if ring.sum() >= 5:
            centres.append(float(distance[ring].mean()))
            profile.append(float(np.mean(change[ring])) / plateau)
    if len(profile) < 4:
        return None
    falling = np.minimum.accumulate(profile)  # from inside to outside
    if falling[0] < 0.9 or falling[-1] > 0.1:
        return None
    at = lambda level: float(np.interp(-level, -falling, centres))  # noqa: E731
    return at(0.1) - at(0.9)


def noise_ratio(image: np.ndarray, lesion: np.ndarray, ring: np.ndarray) -> float | None:
    """Returns high-pass noise inside a lesion over that of the ring, or nothing where either is too thin."""
    from scipy import ndimage

    box = np.ones((3, 3, 3), bool)
    inside, around = ndimage.binary_erosion(lesion, box), ndimage.binary_erosion(ring, box)
    if min(inside.sum(), around.sum()) < MIN_NOISE_VOXELS:
        return None
    high_pass = image - ndimage.uniform_filter(image.astype(np.float64), 3)

    def spread(values: np.ndarray) -> float:
        return float(np.median(np.abs(values - np.median(values))))

    return spread(high_pass[inside]) / max(spread(high_pass[around]), 1e-6)


def inside_organ(mask: np.ndarray, affine_zyx: np.ndarray, labels: Any, ids: set[int]) -> float:
    """Returns the share of lesion voxels that lie in the organ of the source segmentation, a nibabel image."""
    ras = np.argwhere(mask) @ affine_zyx[:3, :3].T + affine_zyx[:3, 3]
    to_voxel = np.linalg.inv(labels.affine)
    position = ras @ to_voxel[:3, :3].T + to_voxel[:3, 3]
    organ = np.isin(np.asarray(labels.dataobj), list(ids))
    found = np.zeros(len(position), bool)
    for tie in itertools.product((-TIE_VOXELS, TIE_VOXELS), repeat=3):
        ijk = np.floor(position + 0.5 + tie).astype(int)
        within = ((ijk >= 0) & (ijk < organ.shape)).all(axis=1)
        found[within] |= organ[tuple(ijk[within].T)]
    return float(found.mean())


def measure(organ: Organ, patch: dict[str, Any], ids: dict[str, int], labels: Any, file_ids: set[int]) -> None:
    """Adds one patch to an organ's measurements."""
    from scipy import ndimage

    meta, image, source = patch["meta"], patch["image"].astype(np.int32), patch["source"].astype(np.int32)
    soft, label = patch["soft_mask"], patch["label"]
    organ.patches += 1
    organ.attempts += meta.attempts
    organ.outcomes[str(meta.outcome)] += 1
    organ.accepted += int(str(meta.outcome) == "accepted")
    organ.changed_elsewhere += int(((image != source) & (soft == 0)).sum())
    lesion = soft >= 128
    if not lesion.any() or not (image != source).any():
        return
    organ.changed += 1
    affine = np.array(meta.affine).reshape(4, 4)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    healthy = (label == ids[meta.organ]) & (soft == 0)
    near = ndimage.distance_transform_edt(soft == 0, sampling=spacing) <= RING_MM
    organ.low_hu.append(int(image[lesion].min()))
    organ.high_hu.append(int(image[lesion].max()))
    in_organ = (label == ids[meta.organ]) | lesion
    width = edge_width_mm(image - source, lesion, in_organ, spacing)
    if width is not None:
        organ.edge_mm.append(width)
    ratio = noise_ratio(image, lesion, healthy & near)
    before = noise_ratio(source, lesion, healthy & near)
    if ratio is not None and before is not None:
        organ.noise_ratio.append(ratio)
        organ.noise_ratio_before.append(before)
    if labels is not None:
        organ.inside_organ.append(inside_organ(lesion, affine, labels, file_ids))
    for one in meta.lesions:
        organ.requested_hu.append(one.requested_hu)
        organ.realised_hu.append(one.realised_hu)


def panel(patch: dict[str, Any], tumour: int, window: tuple[float, float], zoom: int) -> np.ndarray:
    """Draws before, after and label of the axial slice through a lesion's largest section, side by side."""
    from scipy import ndimage

    z = int((patch["soft_mask"] >= 128).sum(axis=(1, 2)).argmax())
    low, high = window

    def upright(volume: np.ndarray) -> np.ndarray:
        # Radiological convention: anterior on top, the patient's right on the viewer's left. Indices grow towards R and A.
        return volume[z][::-1, ::-1]

    def grey(volume: np.ndarray) -> np.ndarray:
        level = np.clip((upright(volume).astype(np.float64) - low) / (high - low), 0, 1) * 255
        smooth = ndimage.zoom(level, zoom, order=1, grid_mode=True, mode="nearest")
        return np.repeat(smooth[..., None], 3, axis=2)

    before, after = grey(patch["source"]), grey(patch["image"])
    label = upright(patch["label"]).repeat(zoom, 0).repeat(zoom, 1)
    labelled = after.copy()
    for mask, colour in [((label > 0) & (label != 255) & (label != tumour), (40, 140, 90)), (label == tumour, (220, 60, 60))]:
        labelled[mask] = 0.6 * labelled[mask] + 0.4 * np.array(colour)
    gap = np.full((before.shape[0], zoom, 3), 255.0)
    return np.concatenate([before, gap, after, gap, labelled], axis=1).astype(np.uint8)


def shown(patches: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Returns the lesions for the picture: those of the middle of the sizes among the visible ones."""
    visible = [patch for patch in patches if any(abs(one.realised_hu) >= MIN_CONTRAST_HU for one in patch["meta"].lesions)]
    visible.sort(key=lambda patch: int((patch["soft_mask"] >= 128).sum()))
    start = max(0, (len(visible) - count) // 2)
    return visible[start : start + count]


def fetch(url: str, organ: str, arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Fetches patches of one organ."""
    recipe = {**BASE_RECIPE, **json.loads(arguments.recipe), "organs": {organ: 1.0}}
    outputs = ("source", "soft_mask")
    stream = freetumor.stream(
        url, recipe=recipe, batch_size=1, count=arguments.patches, image="i16", outputs=outputs, api_key=arguments.api_key
    )
    patches = []
    for batch in stream:
        patches.append({
            "meta": batch.meta[0],
            "image": batch.image[0, 0],
            "source": batch.source[0, 0],
            "label": batch.label[0, 0],
            "soft_mask": batch.soft_mask[0, 0],
        })
    return patches, dict(stream.header.labels)


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="freetumor.quality", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--api-key", default=os.environ.get("FREETUMOR_API_KEY"), help="by default FREETUMOR_API_KEY")
    parser.add_argument("--organs", default="liver,pancreas,kidney")
    parser.add_argument("--patches", type=int, default=16, help="patches per organ")
    parser.add_argument("--recipe", default="{}", help="JSON: what differs from the default recipe, beside organs and no augmentation")
    parser.add_argument("--labels", type=Path, help="the source segmentation (NIfTI)")
    parser.add_argument("--ids", default="", help="its ids, such as liver=5,pancreas=7,kidney=2+3")
    parser.add_argument("--window", default="-100,160", help="HU shown as black and white")
    parser.add_argument("--json", type=Path, dest="json_path")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--rows", type=int, default=2, help="lesions per organ in the picture")
    arguments = parser.parse_args()

    labels = None
    if arguments.labels:
        import nibabel

        labels = nibabel.load(arguments.labels)
    file_ids = {name: {int(i) for i in ids.split("+")} for name, ids in
                (pair.split("=") for pair in arguments.ids.split(",") if pair)}
    low, high = (float(v) for v in arguments.window.split(","))

    report, rows = {}, []
    for name in arguments.organs.split(","):
        patches, ids = fetch(arguments.url, name, arguments)
        organ = Organ()
        for patch in patches:
            measure(organ, patch, ids, labels, file_ids.get(name, set()))
        report[name] = organ.summary()
        rows += [panel(patch, ids[f"{name}_tumour"], (low, high), zoom=4) for patch in shown(patches, arguments.rows)]
    print(json.dumps(report, indent=2))
    if arguments.json_path:
        arguments.json_path.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.picture and rows:
        write_png(arguments.picture, np.concatenate(rows, axis=0))
    return 0


if __name__ == "__main__":
    sys.exit(main())

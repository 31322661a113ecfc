"""Provenance: where patches come from and how they came about."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import freetumor_pb2 as pb


@dataclass(frozen=True)
class Cursor:
    """Where to go on after a stop, and what must not have changed meanwhile. Keep it in your checkpoint."""

    recipe: str
    snapshot: str
    bundle: str
    revision: int
    next_index: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the cursor as plain data, as :func:`freetumor.stream` and JSON take it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cursor:
        """Takes what :meth:`to_dict` returned."""
        return cls(**data)


@dataclass(frozen=True)
class GateScores:
    """The gate's scores of one lesion and the thresholds that applied, each in [0, 1].

    ``realism_threshold``, for ``Lesion.discriminator``, is ``None`` where the recipe does not ask how real a lesion looks.
    """

    recall: float
    precision: float
    before: float
    recall_threshold: float
    precision_threshold: float
    realism_threshold: float | None = None


@dataclass(frozen=True)
class Lesion:
    """One synthesized lesion.

    Lengths in mm, contrasts in HU; ``centre`` in the case's voxels (z, y, x) before augmentation. ``gate`` is ``None``
    where the gate is off, ``discriminator`` where there is none.
    """

    instance: int
    organ: str
    centre: tuple[int, int, int]
    size: str
    contrast: str
    diameter_mm: float
    radii_mm: tuple[float, float, float]
    requested_hu: float
    realised_hu: float
    gate: GateScores | None
    discriminator: float | None


@dataclass(frozen=True)
class PatchMeta:
    """Where a patch comes from and how it came about.

    ``affine`` is 4x4 from the patch's (z, y, x, 1) indices to RAS mm, after augmentation. ``region_start`` and
    ``region_size`` are the crop in the case's voxels, before augmentation. ``outcome`` is one of ``real``,
    ``accepted``, ``healthy_after_k``, ``best_after_k``, ``real_after_k``, ``unplaceable``. ``ignored_voxels`` of an
    unlabelled host were turned into ignore by the recipe's ``unlabelled_negatives``. ``labels_by`` is empty for
    annotators' labels and ``pseudo:`` with a model's hash for a model's. ``failed`` says why a patch
    could not be made; it then holds 0 HU and the label 255 (ignore) everywhere.
    """

    index: int
    case: str
    pool: str
    organ: str
    region_start: tuple[int, int, int]
    region_size: tuple[int, int, int]
    affine: NDArray[np.float64]
    outcome: str
    attempts: int
    host_suspect: int
    borderline: bool
    lesions: list[Lesion]
    failed: str | None
    ignored_voxels: int = 0
    labels_by: str = ""


@dataclass(frozen=True)
class Header:
    """What a stream holds. ``window_hu`` maps to [0, 1] in f16 and f32 images; ``labels`` names the ids, 255 is ignore."""

    protocol: int
    recipe_hash: str
    recipe: dict[str, Any]
    snapshot: str
    bundle: str
    revision: int
    labels: dict[str, int]
    window_hu: tuple[float, float]
    spacing_mm: tuple[float, float, float]
    patch: tuple[int, int, int]
    patches_per_epoch: int
    batches: int
    rank: int
    world: int
    batch_size: int
    numerics: str
    first_index: int

    @property
    def cursor(self) -> Cursor:
        """The cursor before the stream's first batch."""
        return Cursor(self.recipe_hash, self.snapshot, self.bundle, self.revision, self.first_index)


class _Enum(Protocol):
    def Name(self, number: int) -> str: ...


_T = TypeVar("_T")


def _three(values: Sequence[_T]) -> tuple[_T, _T, _T]:
    z, y, x = values
    return z, y, x


def _name(enum: _Enum, number: int, prefix: str) -> str:
    """Returns an enum's word as recipes spell it; numbers of a later version stay visible."""
    try:
        return str(enum.Name(number))[len(prefix) :].lower()
    except ValueError:
        return f"unknown_{number}"


def reason_of(number: int) -> str:
    return _name(pb.EndReason, number, "END_REASON_")


def cursor_of(message: pb.Cursor) -> Cursor:
    return Cursor(message.recipe, message.snapshot, message.bundle, message.revision, message.next_index)


def header_of(message: pb.StreamHeader) -> Header:
    return Header(
        protocol=message.protocol,
        recipe_hash=message.recipe,
        recipe=json.loads(message.recipe_json or "{}"),
        snapshot=message.snapshot,
        bundle=message.bundle,
        revision=message.revision,
        labels=dict(message.labels),
        window_hu=(message.window_low_hu, message.window_high_hu),
        spacing_mm=_three(message.spacing_mm),
        patch=_three(message.patch),
        patches_per_epoch=message.patches_per_epoch,
        batches=message.batches,
        rank=message.rank,
        world=message.world,
        batch_size=message.batch_size,
        numerics=message.numerics,
        first_index=message.first_index,
    )


def _lesion_of(message: pb.Lesion) -> Lesion:
    gate = None
    if message.HasField("gate"):
        scores = message.gate
        gate = GateScores(
            scores.recall,
            scores.precision,
            scores.before,
            scores.recall_threshold,
            scores.precision_threshold,
            scores.realism_threshold if scores.HasField("realism_threshold") else None,
        )
    return Lesion(
        instance=message.instance,
        organ=message.organ,
        centre=_three(message.centre),
        size=_name(pb.SizeClass, message.size, "SIZE_CLASS_"),
        contrast=_name(pb.ContrastBin, message.contrast, "CONTRAST_BIN_"),
        diameter_mm=message.diameter_mm,
        radii_mm=_three(message.radii_mm),
        requested_hu=message.requested_hu,
        realised_hu=message.realised_hu,
        gate=gate,
        discriminator=message.discriminator if message.HasField("discriminator") else None,
    )


def patch_of(message: pb.PatchMeta) -> PatchMeta:
    return PatchMeta(
        index=message.index,
        case=message.case_id,
        pool=_name(pb.Pool, message.pool, "POOL_"),
        organ=message.organ,
        region_start=_three(message.region.start),
        region_size=_three(message.region.size),
        affine=np.array(message.affine, dtype=np.float64).reshape((4, 4)),
        outcome=_name(pb.Outcome, message.outcome, "OUTCOME_"),
        attempts=message.attempts,
        host_suspect=message.host_suspect,
        borderline=message.borderline,
        lesions=[_lesion_of(lesion) for lesion in message.lesions],
        failed=message.failed if message.HasField("failed") else None,
        ignored_voxels=message.ignored_voxels,
        labels_by=message.labels_by,
    )

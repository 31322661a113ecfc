"""From the stream's axes, grid, intensities and labels to those of nnU-Net's preprocessed cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FreeTumorError
from ..meta import PatchMeta

IGNORE = 255
#: What a store pads with.
AIR_HU = -1024
#: A patch's sides are multiples of this many voxels, and at least twice as many.
_GRAIN = 8
#: Spacings that differ by less are the same: files round them.
_SPACING_TOLERANCE = 0.01


@dataclass(frozen=True)
class Axes:
    """How a preprocessed array lies in the patient: axis k runs along the stream's axis ``order[k]``, maybe backwards.

    The stream's axes are (z, y, x) = Superior, Anterior, Right.
    """

    order: tuple[int, int, int]
    backwards: tuple[bool, bool, bool]

    def turn(self, patch: NDArray[Any]) -> NDArray[Any]:
        """Returns a streamed ``[z, y, x]`` array as nnU-Net would have loaded it."""
        turned = patch.transpose(self.order)
        return turned[tuple(slice(None, None, -1 if back else 1) for back in self.backwards)]

    def streamed(self, sides: Sequence[float]) -> tuple[float, float, float]:
        """Returns numbers of nnU-Net's axes in the order of the stream's."""
        of_axis = dict(zip(self.order, sides))
        return of_axis[0], of_axis[1], of_axis[2]

    @classmethod
    def of_case(cls, properties: Mapping[str, Any], transpose_forward: Sequence[int]) -> Axes:
        """Returns the axes of a preprocessed case from its properties.

        Raises:
            FreeTumorError: the file's reader kept no direction.
        """
        columns = file_directions(properties)
        order: list[int] = []
        backwards: list[bool] = []
        for array_axis in transpose_forward:
            column = columns[:, 2 - array_axis]  # arrays are (k, j, i) of the file
            patient_axis = int(np.argmax(np.abs(column)))
            order.append(2 - patient_axis)
            backwards.append(bool(column[patient_axis] < 0))
        if sorted(order) != [0, 1, 2]:
            raise FreeTumorError(f"expected a file whose axes run along the patient's, got directions {columns.tolist()}")
        first, second, third = order
        return cls((first, second, third), (backwards[0], backwards[1], backwards[2]))

    @classmethod
    def most_common(cls, cases: Iterable[Mapping[str, Any]], transpose_forward: Sequence[int]) -> Axes:
        """Returns the axes that most cases have."""
        return Counter(cls.of_case(case, transpose_forward) for case in cases).most_common(1)[0][0]


def file_directions(properties: Mapping[str, Any]) -> NDArray[np.float64]:
    """Returns where the file's axes i, j, k point in RAS, as columns."""
    if "sitk_stuff" in properties:
        lps = np.array(properties["sitk_stuff"]["direction"], dtype=np.float64).reshape((3, 3))
        return np.diag([-1.0, -1.0, 1.0]) @ lps
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        affine = stuff.get("reoriented_affine", stuff.get("original_affine"))
        return np.array(affine, dtype=np.float64)[:3, :3]
    raise FreeTumorError(f"expected SimpleITK's or nibabel's directions in a case's properties, got {sorted(properties)}")


def file_origin(properties: Mapping[str, Any]) -> NDArray[np.float64]:
    """Returns where the middle of the file's first voxel lies, RAS in mm."""
    if "sitk_stuff" in properties:
        return np.array(properties["sitk_stuff"]["origin"], dtype=np.float64) * [-1.0, -1.0, 1.0]
    stuff = properties["nibabel_stuff"]
    affine = stuff.get("reoriented_affine", stuff.get("original_affine"))
    return np.array(affine, dtype=np.float64)[:3, 3]


def patch_for(sides: Sequence[int], axes: Axes) -> tuple[int, int, int]:
    """Returns the (z, y, x) patch that a stream has to send so that nnU-Net's crop of some sides fits into it."""
    z, y, x = (max(2 * _GRAIN, -(-int(side) // _GRAIN) * _GRAIN) for side in axes.streamed(sides))
    return z, y, x


def check_spacing(stream_mm: Sequence[float], plan_mm: Sequence[float], axes: Axes) -> None:
    """Refuses a stream on another grid than the plan's.

    Args:
        stream_mm: (z, y, x).
        plan_mm: of nnU-Net's axes; two numbers for a 2d configuration, which keeps each case's own distance of slices.
        axes: how they correspond.

    Raises:
        FreeTumorError: says both, and how to make a store that fits.
    """
    ours = [stream_mm[axis] for axis in axes.order][-len(plan_mm) :]
    if np.allclose(ours, plan_mm, rtol=_SPACING_TOLERANCE, atol=0):
        return
    wanted = list(stream_mm)
    for axis, mm in zip(axes.order[-len(plan_mm) :], plan_mm):
        wanted[axis] = round(mm, 6)
    raise FreeTumorError(
        f"expected a stream with nnU-Net's voxels of {wanted} mm, got {list(stream_mm)} mm: ingest the data with "
        f"plan.spacing_mm = {wanted}"
    )


class LabelMap:
    """Stream ids to nnU-Net ids.

    Attributes:
        tumours: nnU-Net's ids of the classes that the stream's tumours became.
    """

    def __init__(self, stream: Mapping[str, int], nnunet: Mapping[str, Any], renamed: Mapping[str, str | int], ignore: int | None):
        """Maps classes of the same name, or as ``renamed`` says; classes that the data set does not have are background.

        Args:
            stream: the stream header's labels.
            nnunet: ``labels`` of the data set's dataset.json.
            renamed: stream class to nnU-Net label or id.
            ignore: nnU-Net's ignore label, which takes the place of 255; ``None`` where the data set has none.

        Raises:
            FreeTumorError: no tumour class has a counterpart, or a name is unknown.
        """
        self._ignore = ignore
        self._table = np.zeros(256, dtype=np.int16)
        self._table[IGNORE] = -1 if ignore is None else ignore
        tumours: set[int] = set()
        for name, number in stream.items():
            target = renamed.get(name, name)
            value: Any = target if isinstance(target, int) else nnunet.get(target)
            if value is None and name in renamed:
                raise FreeTumorError(f"FREETUMOR_LABELS: {target!r} is none of dataset.json's labels {sorted(nnunet)}")
            if value is None:
                continue
            if not isinstance(value, int):
                raise FreeTumorError(
                    f"dataset.json's {target!r} is the region {value}: name the id of {name!r} itself in FREETUMOR_LABELS"
                )
            self._table[number] = value
            if name.endswith("_tumour"):
                tumours.add(value)
        if not tumours:
            raise FreeTumorError(
                f"no tumour of the stream ({sorted(name for name in stream if name.endswith('_tumour'))}) is a label of "
                f"dataset.json ({sorted(nnunet)}); name their counterparts in FREETUMOR_LABELS"
            )
        self.tumours = frozenset(tumours)

    def apply(self, label: NDArray[np.uint8], meta: PatchMeta) -> NDArray[np.int16]:
        """Returns a patch's labels in nnU-Net's ids.

        Raises:
            FreeTumorError: voxels that cannot be decided, in a data set without an ignore label.
        """
        mapped = self._table[label]
        if self._ignore is None and (label == IGNORE).any():
            raise FreeTumorError(
                f"patch {meta.index} of case {meta.case!r} has voxels that cannot be decided (255), and dataset.json has no "
                'label for them: add "ignore" with the highest id'
            )
        return mapped

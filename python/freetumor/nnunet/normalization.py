"""From streamed HU to the intensities of nnU-Net's preprocessed cases."""

# nnU-Net carries few types.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization
from numpy.typing import NDArray

from .geometry import AIR_HU

@dataclass(frozen=True)
class Normalization:
    """nnU-Net's CTNormalization: clip at the fingerprint's percentiles, then z-score.

    Attributes:
        intensities: the plan's foreground intensities of the channel.
        is_preprocessed: whether hosts were preprocessed by nnU-Net. It clips before it resamples, which overshoots at edges:
            they were clipped already, and are not again, but for the lesions, which are new. What a patch has beyond its case is
            0 then, as nnU-Net pads.
    """

    intensities: Mapping[str, Any]
    is_preprocessed: bool

    def run(self, image_hu: NDArray[np.int16], soft_mask: NDArray[np.uint8] | None = None) -> NDArray[np.float32]:
        """Returns normalized intensities of a patch; ``soft_mask`` says where its lesions are."""
        clipped = CTNormalization(False, dict(self.intensities)).run(image_hu.astype(np.float32))
        if not self.is_preprocessed:
            return clipped
        unbounded = {**self.intensities, "percentile_00_5": -np.inf, "percentile_99_5": np.inf}
        image = CTNormalization(False, unbounded).run(image_hu.astype(np.float32))
        if soft_mask is not None:
            image = np.where(soft_mask > 0, clipped, image)
        image[image_hu <= AIR_HU] = 0
        return image

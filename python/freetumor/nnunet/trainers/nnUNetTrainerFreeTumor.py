"""Where nnU-Net finds the trainer; the trainer itself is part of the package."""

from freetumor.nnunet.trainer import nnUNetTrainerFreeTumor

__all__ = ["nnUNetTrainerFreeTumor"]

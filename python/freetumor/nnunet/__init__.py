"""nnU-Net v2: ``nnUNetTrainerFreeTumor`` trains on real patches and streamed ones, in nnU-Net's own pipeline.

    export nnUNet_extTrainer=$(freetumor-client nnunet) FREETUMOR_URL=http://127.0.0.1:8080
    nnUNetv2_train 901 3d_fullres 0 -tr nnUNetTrainerFreeTumor

``settings`` reads the environment, ``fold`` keeps validation cases out of the stream, ``geometry`` and ``loader`` bring a
streamed patch into the form of a preprocessed case, ``feed`` hands patches to nnU-Net's workers in an order that a resume
repeats, ``trainer`` is the trainer. ``preprocessed`` exports preprocessed cases for a store of them, ``normalization`` is theirs. docs/trainers.md is the manual.
"""

from __future__ import annotations

from pathlib import Path

#: The folder that ``nnUNet_extTrainer`` has to name.
TRAINERS = Path(__file__).parent / "trainers"

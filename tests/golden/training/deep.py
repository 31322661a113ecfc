"""Writes deep.safetensors: nnU-Net's deep supervision on random logits at four resolutions, with gradients.

    python deep.py

Needs torch, nnunetv2 and safetensors. Labels are made coarser by nnU-Net's own transform, weights are those of its trainer. The
resolutions halve all axes, then two of them, then all.
"""
from pathlib import Path

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from safetensors.torch import save_file

torch.manual_seed(2)
SHAPE = (8, 12, 20)
SCALES = [(1, 1, 1), (1 / 2, 1 / 2, 1 / 2), (1 / 2, 1 / 4, 1 / 4), (1 / 4, 1 / 4, 1 / 4)]
labels = torch.randint(0, 3, (2, 1, *SHAPE))
down = DownsampleSegForDSTransform(SCALES)
targets = [down._apply_to_segmentation(sample, **{}) for sample in labels]
targets = [torch.stack(of_scale) for of_scale in zip(*targets)]
logits = [2 * torch.randn(2, 3, *target.shape[2:], dtype=torch.float64) for target in targets]

weights = np.array([1 / 2**i for i in range(len(SCALES))])
weights[-1] = 0
weights = weights / weights.sum()
dice = {"batch_dice": True, "do_bg": False, "smooth": 1e-5, "ddp": False}
single = DC_and_CE_loss(dice, {}, weight_ce=1, weight_dice=1, ignore_label=None, dice_class=MemoryEfficientSoftDiceLoss)
loss = DeepSupervisionWrapper(single, weights)

logits = [x.float().double().requires_grad_() for x in logits]
value = loss(logits, targets)
value.backward()
out = {"labels": labels.float(), "loss": value.detach().float().reshape(1)}
for i, (x, target) in enumerate(zip(logits, targets)):
    grad = torch.zeros_like(x) if x.grad is None else x.grad
    out |= {f"logits/{i}": x.detach().float(), f"gradient/{i}": grad.float(), f"labels/{i}": target.float()}
save_file({k: v.contiguous() for k, v in out.items()}, Path(__file__).with_name("deep.safetensors"))
print(float(value), [tuple(t.shape) for t in targets])

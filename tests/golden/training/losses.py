"""Writes losses.safetensors: Dice plus cross-entropy of MONAI and of nnU-Net on random logits, with gradients.

    python losses.py

Needs torch, monai, nnunetv2 and safetensors. The second sample holds no class 2, and neither holds class 3: what is absent, from a
sample or from the batch, is where implementations differ.
"""
from pathlib import Path

import torch
from monai.losses import DiceCELoss
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from safetensors.torch import save_file

torch.manual_seed(1)
SHAPE = (6, 7, 8)
LOGITS = 2 * torch.randn(2, 4, *SHAPE, dtype=torch.float64)
LABELS = torch.randint(0, 3, (2, 1, *SHAPE))
LABELS[1][LABELS[1] == 2] = 0


def monai(background, batch):
    settings = {"smooth_nr": 1e-5, "smooth_dr": 1e-5, "include_background": background, "batch": batch}
    return DiceCELoss(softmax=True, to_onehot_y=True, **settings)


def nnunet(batch):
    dice = {"batch_dice": batch, "do_bg": False, "smooth": 1e-5, "ddp": False}
    return DC_and_CE_loss(dice, {}, weight_ce=1, weight_dice=1, ignore_label=None, dice_class=MemoryEfficientSoftDiceLoss)


out = {"logits": LOGITS.float(), "labels": LABELS.float()}
losses = {f"monai_{'background' if bg else 'foreground'}_{'batch' if b else 'sample'}": monai(bg, b)
          for bg in (True, False) for b in (True, False)}
losses |= {f"nnunet_{'batch' if b else 'sample'}": nnunet(b) for b in (True, False)}
for name, loss in losses.items():
    logits = LOGITS.float().double().requires_grad_()
    value = loss(logits, LABELS)
    value.backward()
    out[f"{name}/loss"], out[f"{name}/gradient"] = value.detach().float().reshape(1), logits.grad.float()
save_file(out, Path(__file__).with_name("losses.safetensors"))
print({name: float(out[f"{name}/loss"]) for name in losses})

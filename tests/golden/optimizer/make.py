"""Writes golden.json: what PyTorch's optimizers make of a quadratic, step by step.

    python make.py

Needs torch. The loss is sum(curvature (x - centre)^2) / 2, so that its gradient, curvature (x - centre), is known without
a network. Rates are nnU-Net's polynomial (its PolyLRScheduler: rate (1 - step / steps)^0.9) or constant; gradients are
clipped by `clip_grad_norm_`; the running mean of weights is that of `torch.optim.swa_utils`.
"""
import json
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

STEPS = 12
START = [1.0, -2.0, 0.5, 3.0]
CURVATURE = [1.0, 4.0, 0.25, 2.0]
CENTRE = [0.5, 0.5, -1.0, 0.0]


class Point(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))


def run(make, rate, accumulate=1, decay=None):
    """Returns x after every step, and its running mean where a decay is given."""
    point = Point()
    optimizer = make(point.parameters())
    mean = None
    xs, means = [], []
    for step in range(STEPS):
        curvature, centre = torch.tensor(CURVATURE, dtype=torch.float64), torch.tensor(CENTRE, dtype=torch.float64)
        # Every step asks for another point, so that accumulated gradients differ.
        loss = (curvature * (point.x - centre - 0.1 * (step % 3)) ** 2).sum() / 2
        (loss / accumulate).backward()
        if (step + 1) % accumulate == 0:
            torch.nn.utils.clip_grad_norm_(point.parameters(), 3.0)
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            if decay is not None and mean is None:
                mean = AveragedModel(point, multi_avg_fn=get_ema_multi_avg_fn(decay))
                mean.update_parameters(point)
            optimizer.step()
            optimizer.zero_grad()
            if mean is not None:
                mean.update_parameters(point)
        xs.append(point.x.tolist())
        if mean is not None:
            means.append(mean.module.x.tolist())
    return {"x": xs, "mean": means}


def polynomial(step):
    return 0.05 * (1 - step / STEPS) ** 0.9


def adam(parameters):
    return torch.optim.AdamW(parameters, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.99, nesterov=True, weight_decay=0.01)


golden = {
    "start": START,
    "curvature": CURVATURE,
    "centre": CENTRE,
    "adam": run(adam, lambda step: 0.05),
    "sgd": run(sgd, polynomial),
    "adam_accumulated": run(adam, lambda step: 0.05, accumulate=3),
    "sgd_averaged": run(sgd, polynomial, decay=0.8),
}
Path(__file__).with_name("golden.json").write_text(json.dumps(golden, indent=1) + "\n")

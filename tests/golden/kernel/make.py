"""Writes golden.safetensors: every operator of `src/kernel` with output and gradients, computed by PyTorch in float64.

    python -m venv venv && venv/bin/pip install torch==2.15.0 numpy==2.4.6 safetensors==0.8.0 && venv/bin/python make.py

The committed file was written by PyTorch 2.15.0+cu132 on a CPU. Inputs are drawn as float32, so that both sides start
from the same numbers; outputs and gradients are rounded to float32 when they are stored. Gradients are those of
sum(output x cotangent), by autograd. `../nn/make.py` has what JAX says of some of the operators, and a whole network.
"""
import pathlib

import numpy as np
import torch
from safetensors.numpy import save_file
from torch.nn import functional as F


def conv(x, w, b, stride=1):
    return F.conv3d(x, w, b, stride=stride, padding=w.shape[2] // 2)


def conv_of_pair(x, y, w, b):
    return conv(torch.cat([x, y], 1), w, b)


def transposed(x, w, b):
    return F.conv_transpose3d(x, w, b, stride=2)


def norm(x, gamma, beta, slope):
    y = F.instance_norm(x, eps=1e-5) * gamma[..., None, None, None] + beta[..., None, None, None]
    return F.leaky_relu(y, slope)


def upsample(x, **how):
    return F.interpolate(x, scale_factor=2, **how)


def main():
    rng = np.random.default_rng(3)
    tensors = {}

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    def dump(name, f, *inputs):
        wide = [torch.from_numpy(a).double().requires_grad_() for a in inputs]
        out = f(*wide)
        cotangent = draw(*out.shape)
        grads = torch.autograd.grad((out * torch.from_numpy(cotangent)).sum(), wide)
        named = {"out": out.detach().numpy(), "cotangent": cotangent}
        named |= {f"in{i}": a for i, a in enumerate(inputs)} | {f"grad{i}": g.numpy() for i, g in enumerate(grads)}
        tensors.update({f"{name}.{k}": np.ascontiguousarray(v, np.float32) for k, v in named.items()})

    def dump_conv(name, f, n, ci, co, k, size):
        dump(name, f, draw(n, ci, *size), draw(co, ci, k, k, k), draw(co))

    # Few and many channels of input, which different kernels take; channels off blocks of 8, odd sizes, rows longer than
    # a vector.
    dump_conv("conv3_few", conv, 2, 3, 5, 3, (4, 3, 7))
    dump_conv("conv3_many", conv, 1, 6, 9, 3, (5, 6, 19))
    dump_conv("conv1", conv, 2, 7, 10, 1, (3, 4, 5))
    dump("conv3_pair", conv_of_pair, draw(1, 4, 4, 5, 6), draw(1, 3, 4, 5, 6), draw(5, 7, 3, 3, 3), draw(5))
    dump_conv("conv3_s2_even", lambda *a: conv(*a, stride=2), 2, 3, 5, 3, (4, 6, 8))
    dump_conv("conv3_s2_odd", lambda *a: conv(*a, stride=2), 1, 5, 9, 3, (5, 7, 19))
    dump_conv("conv1_s2", lambda *a: conv(*a, stride=2), 2, 6, 9, 1, (5, 4, 7))
    dump("transposed", transposed, draw(2, 3, 2, 3, 4), draw(3, 5, 2, 2, 2), draw(5))
    for name, slope in (("norm", 0.01), ("norm_steep", 0.2)):
        dump(name, lambda *a: norm(*a, slope), draw(2, 3, 4, 5, 6) + 2.0, draw(2, 3), draw(2, 3))
    dump("max_pool", lambda x: F.max_pool3d(x, 2), draw(2, 3, 4, 6, 10))
    x = draw(2, 2, 3, 4, 5)
    dump("nearest", lambda x: upsample(x, mode="nearest"), x)
    dump("trilinear", lambda x: upsample(x, mode="trilinear", align_corners=False), x)
    dump("trilinear_corners", lambda x: upsample(x, mode="trilinear", align_corners=True), x)
    save_file(tensors, pathlib.Path(__file__).with_name("golden.safetensors"))


main()

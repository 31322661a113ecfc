"""Writes golden.safetensors: operators and a small U-Net with outputs and gradients, computed by JAX in float64.

    python -m venv venv && venv/bin/pip install jax==0.10.2 safetensors && venv/bin/python make.py

JAX and not PyTorch, because its CPU wheel is small; the conventions (weight layouts, epsilon, biased variance) are
those of PyTorch's Conv3d, ConvTranspose3d, InstanceNorm3d, LeakyReLU and MaxPool3d. Nothing here shares code with the
Rust kernels: gradients come from jax.grad.
"""
import pathlib

import jax
import numpy as np
from safetensors.numpy import save_file

jax.config.update("jax_enable_x64", True)
jnp, lax = jax.numpy, jax.lax
LAYOUT = ("NCDHW", "OIDHW", "NCDHW")
SLOPE = 0.01


def conv(x, w, b, stride=1):
    p = w.shape[2] // 2
    y = lax.conv_general_dilated(x, w, (stride,) * 3, [(p, p)] * 3, dimension_numbers=LAYOUT)
    return y + b[None, :, None, None, None]


def conv_transpose(x, w, b):
    flipped = jnp.flip(w, (2, 3, 4)).swapaxes(0, 1)
    y = lax.conv_general_dilated(x, flipped, (1,) * 3, [(1, 1)] * 3, lhs_dilation=(2,) * 3, dimension_numbers=LAYOUT)
    return y + b[None, :, None, None, None]


def norm(x, gamma, beta):
    mean, variance = (f(x, axis=(2, 3, 4), keepdims=True) for f in (jnp.mean, jnp.var))
    y = (x - mean) / jnp.sqrt(variance + 1e-5) * gamma[..., None, None, None] + beta[..., None, None, None]
    return jax.nn.leaky_relu(y, SLOPE)


def pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2, 2), (1, 1, 2, 2, 2), "VALID")


def double_conv(params, x, condition):
    for _ in range(2):
        w, b, gamma, beta, film = (next(params) for _ in range(5))
        scale, shift = jnp.split(condition @ film, 2, axis=1)
        x = norm(conv(x, w, b), gamma + scale, beta + shift)
    return x


def unet(params, x, condition, levels):
    params, skips = iter(params), []
    for level in range(levels):
        x = double_conv(params, pool(x) if level else x, condition)
        skips.append(x)
    skips.pop()
    while skips:
        up = conv_transpose(x, next(params), next(params))
        x = double_conv(params, jnp.concatenate([skips.pop(), up], 1), condition)
    return conv(x, next(params), next(params))


def main():
    rng = np.random.default_rng(20)
    tensors = {}

    def draw(shape, scale=1.0):
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    def dump(name, f, inputs):
        """Stores inputs, output, and the gradients of sum(output x cotangent)."""
        wide = [a.astype(np.float64) for a in inputs]
        out = np.asarray(f(*wide))
        cotangent = draw(out.shape)
        grads = jax.grad(lambda *a: (f(*a) * cotangent).sum(), argnums=tuple(range(len(inputs))))(*wide)
        named = {"out": out, "cotangent": cotangent}
        named |= {f"in{i}": a for i, a in enumerate(inputs)} | {f"grad{i}": g for i, g in enumerate(grads)}
        tensors.update({f"{name}.{k}": np.ascontiguousarray(v, np.float32) for k, v in named.items()})

    x = draw((2, 3, 4, 5, 6))
    dump("conv3", conv, [x, draw((9, 3, 3, 3, 3)), draw(9)])
    dump("conv1", conv, [x, draw((5, 3, 1, 1, 1)), draw(5)])
    dump("conv3s2", lambda *a: conv(*a, stride=2), [draw((2, 3, 4, 6, 8)), draw((5, 3, 3, 3, 3)), draw(5)])
    dump("transpose", conv_transpose, [draw((2, 3, 2, 3, 4)), draw((3, 5, 2, 2, 2)), draw(5)])
    dump("norm", norm, [x + 2.0, draw((2, 3)), draw((2, 3))])
    dump("pool", pool, [draw((2, 3, 4, 6, 2))])

    widths, ci, co, k = [4, 6], 2, 3, 2
    shapes = []

    def block(a, b):
        for i in (a, b):
            shapes.extend([(b, i, 3, 3, 3), (b,), (b,), (b,), (k, 2 * b)])

    block(ci, widths[0])
    block(widths[0], widths[1])
    shapes.extend([(widths[1], widths[0], 2, 2, 2), (widths[0],)])
    block(2 * widths[0], widths[0])
    shapes.extend([(co, widths[0], 1, 1, 1), (co,)])
    params = [draw(s, 0.3) for s in shapes]
    x, condition, labels = draw((2, ci, 6, 8, 10)), draw((2, k)), rng.integers(0, co, (2, 6, 8, 10))
    one_hot = np.moveaxis(np.eye(co)[labels], -1, 1)
    wide = [p.astype(np.float64) for p in params]

    def loss(p):
        logits = unet(p, x.astype(np.float64), condition.astype(np.float64), len(widths))
        return -(jax.nn.log_softmax(logits, axis=1) * one_hot).sum(1).mean()

    tensors.update({"unet.x": x, "unet.condition": condition, "unet.one_hot": np.ascontiguousarray(one_hot, np.float32)})
    tensors["unet.logits"] = np.asarray(unet(wide, x.astype(np.float64), condition.astype(np.float64), 2), np.float32)
    tensors["unet.loss"] = np.array([loss(wide)], np.float32)
    for i, (p, g) in enumerate(zip(params, jax.grad(loss)(wide))):
        tensors[f"unet.param{i:02}"], tensors[f"unet.grad{i:02}"] = p, np.asarray(g, np.float32)
    save_file(tensors, pathlib.Path(__file__).with_name("golden.safetensors"))


main()

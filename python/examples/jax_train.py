"""JAX: fits a small convolutional network to tell tumour from the rest, by plain gradient descent."""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import freetumor

CHANNELS = 8


def initial(key: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Returns two layers of 3x3x3 kernels ``[3, 3, 3, in, out]`` with their biases."""
    layers = []
    for inputs, outputs in [(1, CHANNELS), (CHANNELS, 1)]:
        key, draw = jax.random.split(key)
        layers.append((jax.random.normal(draw, (3, 3, 3, inputs, outputs)) * (2 / (27 * inputs)) ** 0.5, jnp.zeros(outputs)))
    return layers


def logits(layers: list, image: jax.Array) -> jax.Array:
    """Maps ``[B, D, H, W, 1]`` to logits of the same shape."""
    x = image
    for i, (kernel, bias) in enumerate(layers):
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")) + bias
        x = jax.nn.relu(x) if i == 0 else x
    return x


def loss(layers: list, image: jax.Array, tumour: jax.Array, known: jax.Array) -> jax.Array:
    """Cross entropy over the voxels that can be decided."""
    z = logits(layers, image)
    entropy = jnp.maximum(z, 0) - z * tumour + jnp.log1p(jnp.exp(-jnp.abs(z)))
    return (entropy * known).sum() / known.sum()


@jax.jit
def step(layers: list, image: jax.Array, tumour: jax.Array, known: jax.Array, rate: float) -> tuple[list, jax.Array]:
    value, slopes = jax.value_and_grad(loss)(layers, image, tumour, known)
    return jax.tree.map(lambda weight, slope: weight - rate * slope, layers, slopes), value


def run(url: str, batches: int) -> list[float]:
    """Returns the loss of each step."""
    layers, losses = initial(jax.random.key(0)), []
    with freetumor.stream(url, {"seed": 7}, batch_size=2, count=batches) as stream:
        tumours = [number for name, number in stream.header.labels.items() if name.endswith("_tumour")]
        for batch in stream:
            image = jnp.asarray(np.moveaxis(batch.image, 1, -1))
            label = np.moveaxis(batch.label, 1, -1)
            layers, value = step(layers, image, jnp.asarray(np.isin(label, tumours), jnp.float32), label != 255, 0.3)
            losses.append(float(value))
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--batches", type=int, default=40)
    options = parser.parse_args()
    print(run(options.url, options.batches))

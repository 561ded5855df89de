"""Heads: what comes after the trunk, to a descriptor."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from geomatch import config
from geomatch.nn.layers import BatchNorm, Conv, Shared, mean_pool_to, unit


class ConvHead(nn.Module):
    """S1's head: 3x3 convolutions with tanh, flattened to a Dense layer.

    Its convolutions are unpadded at 256 px, and three with a stride at 512 px; at other tile
    sizes they are padded, and the map is pooled to 4x4 so that the Dense layer keeps its size.
    """

    model: config.ModelConfig
    shared: Shared

    @nn.compact
    def __call__(self, x: jax.Array, tile_size: int, train: bool) -> jax.Array:
        """(b, h, w, c) to (b, descriptor)."""
        conv = partial(Conv, size=3, use_bias=True, shared=self.shared)
        if tile_size == 512:
            for filters, stride in ((1024, 2), (512, 1), (256, 1)):
                x = jnp.tanh(conv(filters, stride=stride, edge=0)(x))
        else:
            for filters in (1024, 512):
                x = jnp.tanh(conv(filters, edge=0 if tile_size == 256 else 1)(x))
                x = BatchNorm(train, self.shared)(x)
            x = mean_pool_to(x, 4)
        x = x.reshape(len(x), -1)
        return nn.Dense(self.model.descriptor, dtype=self.shared.dtype)(x)


class DenseHead(nn.Module):
    """One Dense layer."""

    model: config.ModelConfig
    shared: Shared

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(b, r, c) to (b, descriptor)."""
        del train
        return nn.Dense(self.model.descriptor)(x.sum(axis=1))


class BlocksHead(nn.Module):
    """S3's head: Dense, BatchNorm, ReLU and Dropout for each of `model.hidden`, then Dense."""

    model: config.ModelConfig
    shared: Shared

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(b, r, c) to (b, descriptor)."""
        x = x.sum(axis=1)
        for width in self.model.hidden:
            x = nn.relu(BatchNorm(train, self.shared)(nn.Dense(width, use_bias=False)(x)))
            x = nn.Dropout(self.model.dropout, deterministic=not train)(x)
        return nn.Dense(self.model.descriptor)(x)


class WhitenHead(nn.Module):
    """S2's head: unit norm, PCA-whitening, and for regions unit norm and their sum.

    The projection is fitted on training descriptors before a run begins.
    """

    model: config.ModelConfig
    shared: Shared

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(b, r, c) to (b, descriptor)."""
        del train
        x = nn.Dense(self.model.descriptor, name="whiten")(unit(x))
        return x[:, 0] if x.shape[1] == 1 else unit(x).sum(axis=1)


HEADS: dict[str, type[nn.Module]] = {
    "conv": ConvHead,
    "dense": DenseHead,
    "mlp": BlocksHead,
    "pca": WhitenHead,
}
"""By `model.head`; "pool" has none."""

"""Heads: a feature map or pooled features to a descriptor."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from geomatch import config
from geomatch.nn.layers import BatchNorm, Conv, Dropout, SharedSettings, mean_pool_to, unit


class ConvHead(nn.Module):
    """3x3 convolutions with tanh, flattened to a Dense layer, after Khokhlova et al. 2020.

    At 256 px there are two unpadded convolutions, at 512 px three, the first with stride 2. At
    other tile sizes the two are padded. Except at 512 px, the map is pooled to 4x4, so that the
    size of the Dense layer does not depend on that of the tile.
    """

    model: config.ModelConfig
    shared: SharedSettings

    @nn.compact
    def __call__(self, x: jax.Array, tile_size: int, train: bool) -> jax.Array:
        """(b, h, w, c) to (b, descriptor)."""
        conv = partial(Conv, size=3, use_bias=True, shared=self.shared)
        if tile_size == 512:
            for filters, stride in ((1024, 2), (512, 1), (256, 1)):
                x = jnp.tanh(conv(filters, stride=stride, padding=0)(x))
        else:
            for filters in (1024, 512):
                x = jnp.tanh(conv(filters, padding=0 if tile_size == 256 else 1)(x))
                x = BatchNorm(train, self.shared)(x)
            x = mean_pool_to(x, 4)
        x = x.reshape(len(x), -1)
        return nn.Dense(self.model.descriptor, dtype=self.shared.dtype)(x)


class DenseHead(nn.Module):
    """One Dense layer."""

    model: config.ModelConfig
    shared: SharedSettings

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(b, r, c) to (b, descriptor)."""
        del train
        return nn.Dense(self.model.descriptor)(x.sum(axis=1))


class MlpHead(nn.Module):
    """Dense, BatchNorm, ReLU and Dropout for each width in `model.hidden`, then Dense."""

    model: config.ModelConfig
    shared: SharedSettings

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(b, r, c) to (b, descriptor)."""
        x = x.sum(axis=1)
        for width in self.model.hidden:
            x = nn.relu(BatchNorm(train, self.shared)(nn.Dense(width, use_bias=False)(x)))
            x = Dropout(self.model.dropout, self.shared)(x, train)
        return nn.Dense(self.model.descriptor)(x)


class PcaHead(nn.Module):
    """L2 norm and PCA whitening; R-MAC's regions are then normalised again and summed.

    After Tolias et al. 2015 (arXiv 1511.05879). The projection is fitted on training features
    before a run begins.
    """

    model: config.ModelConfig
    shared: SharedSettings

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(b, r, c) to (b, descriptor)."""
        del train
        x = nn.Dense(self.model.descriptor, name="whiten")(unit(x))
        return x[:, 0] if x.shape[1] == 1 else unit(x).sum(axis=1)


HEADS: dict[str, type[nn.Module]] = {
    "conv": ConvHead,
    "dense": DenseHead,
    "mlp": MlpHead,
    "pca": PcaHead,
}
"""By `model.head`; "pool" has no module."""

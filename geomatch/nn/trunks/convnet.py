"""A small network for digits, after the siamese network of Hadsell, Chopra and LeCun 2006."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax

from geomatch.nn.layers import Conv, max_pool_2x2, relu
from geomatch.nn.trunks.network import TrunkNetwork

STAGES = ((32, 7), (64, 5), (128, 3), (256, 1))
"""Filters and kernel size; a fifth stage has as many filters as the descriptor has values."""


class ConvNet(TrunkNetwork):
    """Five convolutions, each with 2x2 max pooling, and a ReLU except after the last."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in range(1, self.stage + 1):
            x = self.run(partial(_stage, i=i), x, train)
        return x


def _stage(trunk: ConvNet, x: jax.Array, i: int) -> jax.Array:
    width, size = (*STAGES, (trunk.outputs, 1))[i - 1]
    x = Conv(width, size, use_bias=True, shared=trunk.shared, name=f"stage{i}")(x)
    return max_pool_2x2(x if i > len(STAGES) else relu(x))

"""VGG16's convolutions, after Simonyan and Zisserman 2014 (arXiv 1409.1556)."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax

from geomatch.nn.layers import Conv, max_pool_2x2, relu
from geomatch.nn.trunks.network import TrunkNetwork

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Filters of each stage's convolutions."""


class VGG(TrunkNetwork):
    """Stages 1 to 5 have total stride 2, 4, 8, 16 and 32; each ends in max pooling."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in range(self.stage):
            x = self.run(partial(_stage, i=i), x, train)
        return x


def _stage(trunk: VGG, x: jax.Array, i: int) -> jax.Array:
    for j, width in enumerate(STAGES[i]):
        name = f"stage{i + 1}_conv{j + 1}"
        x = relu(Conv(width, 3, use_bias=True, shared=trunk.shared, name=name)(x))
    return max_pool_2x2(x)

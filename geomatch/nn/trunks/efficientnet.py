"""EfficientNet-Lite0: EfficientNet-B0 (Tan and Le 2019, arXiv 1905.11946) with ReLU6 and without
squeeze-and-excitation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax

from geomatch.nn.layers import ConvNorm, relu6
from geomatch.nn.trunks.network import TrunkNetwork

STAGES = (
    # blocks, filters, kernel, stride, expansion
    (1, 16, 3, 1, 1),
    (2, 24, 3, 2, 6),
    (2, 40, 5, 2, 6),
    (3, 80, 3, 2, 6),
    (3, 112, 5, 1, 6),
    (4, 192, 5, 2, 6),
    (1, 320, 3, 1, 6),
)


class InvertedBottleneck(nn.Module):
    """Expansion, depthwise convolution, projection; a shortcut where the shape is unchanged."""

    filters: int
    size: int
    stride: int
    expansion: int
    conv: Callable[..., ConvNorm]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        width = x.shape[-1] * self.expansion
        if self.expansion > 1:
            y = relu6(self.conv(width, 1, name="expand")(y))
        y = self.conv(width, self.size, stride=self.stride, depthwise=True, name="depthwise")(y)
        y = self.conv(self.filters, 1, name="project")(relu6(y))
        return x + y if x.shape == y.shape else y


class EfficientNetLite(TrunkNetwork):
    """Stages 1 to 7 have total stride 2, 4, 8, 16, 16, 32, 32; stage 8 is a 1x1 to 1280."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(ConvNorm, train=train, padding="same", shared=self.shared)
        x = relu6(conv(32, 3, stride=2, name="stem")(x))
        for i in range(min(self.stage, len(STAGES))):
            x = self.run(partial(_stage, i=i, conv=conv), x, train)
        if self.stage > len(STAGES):
            x = relu6(conv(1280, 1, name="top")(x))
        return x


def _stage(
    trunk: EfficientNetLite, x: jax.Array, i: int, conv: Callable[..., ConvNorm]
) -> jax.Array:
    del trunk
    count, filters, size, stride, expansion = STAGES[i]
    for j in range(count):
        name = f"stage{i + 1}_block{j + 1}"
        step = stride if j == 0 else 1
        x = InvertedBottleneck(filters, size, step, expansion, conv, name=name)(x)
    return x

"""ResNets, after He et al. 2015 (arXiv 1512.03385)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax

from geomatch.nn.layers import ConvNorm, max_pool_3x3, relu
from geomatch.nn.trunks.network import TrunkNetwork

ConvNormDef = Callable[..., ConvNorm]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    filters: int
    stride: int
    conv: ConvNormDef
    stride_in: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = relu(self.conv(self.filters, 3, stride=self.stride, name="conv1")(x))
        # Scale 0 at first, so that a block starts as its shortcut (Goyal et al., arXiv 1706.02677).
        y = self.conv(self.filters, 3, scale_init=nn.initializers.zeros, name="conv2")(y)
        return relu(_shortcut(self, x, self.filters) + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut.

    Attributes:
        stride_in: the convolution with the stride: "3x3" ("v1.5", as in torchvision) or the first
            "1x1" (as published, and in Keras).
    """

    filters: int
    stride: int
    conv: ConvNormDef
    stride_in: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        first, second = (self.stride, 1) if self.stride_in == "1x1" else (1, self.stride)
        y = relu(self.conv(self.filters, 1, stride=first, name="conv1")(x))
        y = relu(self.conv(self.filters, 3, stride=second, name="conv2")(y))
        outputs = 4 * self.filters
        y = self.conv(outputs, 1, scale_init=nn.initializers.zeros, name="conv3")(y)
        return relu(_shortcut(self, x, outputs) + y)


def _shortcut(block: BasicBlock | Bottleneck, x: jax.Array, filters: int) -> jax.Array:
    if x.shape[-1] == filters and block.stride == 1:
        return x
    return block.conv(filters, 1, stride=block.stride, name="shortcut")(x)


class ResNet(TrunkNetwork):
    """Stages 1 to 4 have total stride 4, 8, 16 and 32.

    Attributes:
        blocks: number of blocks per stage.
        width: channels of the first stage.
    """

    block: type[BasicBlock | Bottleneck]
    blocks: tuple[int, ...]
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(ConvNorm, train=train, shared=self.shared)
        x = max_pool_3x3(relu(conv(self.width, 7, stride=2, name="stem")(x)))
        for i in range(self.stage):
            x = self.run(partial(_stage, i=i, conv=conv), x, train)
        return x


def _stage(trunk: ResNet, x: jax.Array, i: int, conv: ConvNormDef) -> jax.Array:
    for j in range(trunk.blocks[i]):
        stride = 2 if i > 0 and j == 0 else 1
        name = f"stage{i + 1}_block{j + 1}"
        x = trunk.block(trunk.width * 2**i, stride, conv, trunk.stride_in, name=name)(x)
    return x

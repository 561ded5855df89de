"""Convolutional trunks: images to a feature map.

ResNets after He et al. 2015 (arXiv 1512.03385), in the form with the stride in the 3x3
convolution of a bottleneck ("v1.5").
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from geomatch.nn.layers import BatchNorm, Conv, max_pool_3x3

ModuleDef = Callable[..., nn.Module]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    filters: int
    stride: int
    conv: ModuleDef
    norm: ModuleDef
    expansion: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv(self.filters, 3, self.stride)(x)
        y = nn.relu(self.norm()(y))
        y = self.conv(self.filters, 3)(y)
        # The last scale starts at zero, so that a block begins as its shortcut (Goyal et al.).
        y = self.norm(scale_init=nn.initializers.zeros)(y)
        return nn.relu(_shortcut(self, x, self.filters) + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut."""

    filters: int
    stride: int
    conv: ModuleDef
    norm: ModuleDef
    expansion: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm()(self.conv(self.filters, 1)(x)))
        y = nn.relu(self.norm()(self.conv(self.filters, 3, self.stride)(y)))
        y = self.conv(self.filters * self.expansion, 1)(y)
        y = self.norm(scale_init=nn.initializers.zeros)(y)
        return nn.relu(_shortcut(self, x, self.filters * self.expansion) + y)


def _shortcut(block: BasicBlock | Bottleneck, x: jax.Array, filters: int) -> jax.Array:
    if x.shape[-1] == filters and block.stride == 1:
        return x
    projected = block.conv(filters, 1, block.stride, name="shortcut")(x)
    return block.norm(name="shortcut_norm")(projected)


class ResNet(nn.Module):
    """Feature map of stride 32.

    Attributes:
        stages: blocks of each stage.
        width: channels of the first stage.
        axis_name: pmap axis over which BatchNorm sees the global batch.
    """

    block: type[BasicBlock | Bottleneck]
    stages: tuple[int, ...]
    width: int = 64
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(b, h, w, 3) preprocessed images to (b, h/32, w/32, channels)."""
        conv = partial(Conv, dtype=self.dtype)
        norm = partial(BatchNorm, train=train, axis_name=self.axis_name)
        x = conv(self.width, 7, 2, name="stem")(x)
        x = max_pool_3x3(nn.relu(norm(name="stem_norm")(x)))
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                x = self.block(
                    filters=self.width * 2**i,
                    stride=2 if i > 0 and j == 0 else 1,
                    conv=conv,
                    norm=norm,
                    name=f"stage{i + 1}_block{j + 1}",
                )(x)
        return x


TRUNKS: dict[str, Callable[..., nn.Module]] = {
    "resnet10": partial(ResNet, block=BasicBlock, stages=(1, 1, 1, 1), width=24),
    "resnet18": partial(ResNet, block=BasicBlock, stages=(2, 2, 2, 2)),
    "resnet34": partial(ResNet, block=BasicBlock, stages=(3, 4, 6, 3)),
    "resnet50": partial(ResNet, block=Bottleneck, stages=(3, 4, 6, 3)),
    "resnet101": partial(ResNet, block=Bottleneck, stages=(3, 4, 23, 3)),
}

"""The siamese encoder: fusion, trunk, head; tiles to descriptors.

After Khokhlova et al., "Cross-year multi-modal image retrieval using siamese networks"
(ICIP 2020): image and labels are fused early by a trainable 1x1 convolution, ahead of the
preprocessing, so that the trunk sees what it would of an image alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from geomatch.nn.layers import BatchNorm, Conv, mean_pool_to
from geomatch.nn.trunks import TRUNKS

MEAN = np.array([0.485, 0.456, 0.406], np.float32) * 255
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32) * 255


class Encoder(nn.Module):
    """uint8 tiles to descriptors.

    Attributes:
        trunk: a key of `TRUNKS`.
        head: "conv" (S1's convolutional head) or "pool" (global pooling alone).
        pooling: "max" or "mean", of the "pool" head.
        descriptor: size of the "conv" head's descriptor.
        normalise: to unit L2 norm.
        image_channels, label_channels: how a tile's channels divide.
        dtype: of the computation; parameters and descriptors stay float32.
        axis_name: pmap axis over which BatchNorm sees the global batch.
    """

    trunk: str
    head: str
    pooling: str
    descriptor: int
    normalise: bool
    image_channels: int
    label_channels: int
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, tiles: jax.Array, train: bool) -> jax.Array:
        """(b, h, w, c) uint8 to (b, d) float32."""
        x = tiles.astype(jnp.float32)
        if (self.image_channels, self.label_channels) != (3, 0):
            x = nn.Conv(
                3,
                (1, 1),
                kernel_init=fusion_init(self.image_channels, self.label_channels),
                name="fusion",
            )(x)
        x = ((x - MEAN) / DEVIATION).astype(self.dtype)
        trunk = TRUNKS[self.trunk](dtype=self.dtype, axis_name=self.axis_name, name="trunk")
        x = trunk(x, train)
        if self.head == "pool":
            x = x.max(axis=(1, 2)) if self.pooling == "max" else x.mean(axis=(1, 2))
        else:
            x = ConvHead(self.descriptor, tiles.shape[1], self.dtype, self.axis_name, name="head")(
                x, train
            )
        x = x.astype(jnp.float32)
        if self.normalise:
            x /= jnp.sqrt(jnp.maximum((x**2).sum(axis=1, keepdims=True), 1e-12))
        return x


class ConvHead(nn.Module):
    """S1's head: 3x3 convolutions with tanh, flattened to a Dense layer.

    Its convolutions are unpadded at 256 px, and three with a stride at 512 px; at other tile
    sizes they are padded, and the map is pooled to 4x4 so that the Dense layer keeps its size.
    """

    descriptor: int
    tile_size: int
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(b, h, w, c) to (b, descriptor)."""
        conv = partial(Conv, size=3, use_bias=True, dtype=self.dtype)
        if self.tile_size == 512:
            for filters, stride in ((1024, 2), (512, 1), (256, 1)):
                x = jnp.tanh(conv(filters, stride=stride, edge=0)(x))
        else:
            for filters in (1024, 512):
                x = jnp.tanh(conv(filters, edge=0 if self.tile_size == 256 else 1)(x))
                x = BatchNorm(train, self.axis_name)(x)
            x = mean_pool_to(x, 4)
        x = x.reshape(len(x), -1)
        return nn.Dense(self.descriptor, dtype=self.dtype)(x)


class Siamese(nn.Module):
    """The encoder, the pair head sigmoid(Dense(1)(|a - b|)), and the temperature of cosines."""

    encoder: Encoder

    def setup(self) -> None:
        # A pair starts as the more alike the nearer it is, rather than by random signs.
        self.pair_head = nn.Dense(
            1, kernel_init=_near_is_alike, bias_init=nn.initializers.constant(0.5)
        )
        self.log_temperature = self.param("log_temperature", nn.initializers.constant(-2.3), ())

    def __call__(self, tiles: jax.Array, train: bool = False) -> jax.Array:
        """(b, h, w, c) uint8 to (b, d) descriptors."""
        return self.encoder(tiles, train)

    def pair(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Logits (b,) that descriptors `a` and `b`, (b, d) each, are of one place."""
        return self.pair_head(jnp.abs(a - b))[:, 0]

    def temperature(self) -> jax.Array:
        """Scalar that divides cosines in a loss over the whole batch; at least 0.01."""
        return jnp.exp(jnp.maximum(self.log_temperature, -4.6))

    def both(self, tiles: jax.Array) -> jax.Array:
        """All parts at once, to initialise them."""
        x = self(tiles)
        return self.pair(x, x)


def _near_is_alike(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    del key
    return jnp.full(shape, -1.0 / shape[0], dtype)


def fusion_init(image: int, label: int) -> Callable[..., jax.Array]:
    """Initial weights of the 1x1 fusion to three channels.

    S1's, for colour images with a grey label (0.5 from each colour to itself, 0.5 from the label
    to all three) or a colour label (0.5 from each of its colours to the same). Without labels the
    image's share is 1; an image of one band goes to all three, further bands (near infrared)
    begin at 0.
    """
    weights = np.zeros((image + label, 3), np.float32)
    share = 0.5 if label else 1.0
    for channel in range(3):
        weights[channel if image >= 3 else 0, channel] = share
        if label:
            weights[image + (channel if label == 3 else 0), channel] = 0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        del key
        return jnp.asarray(weights.reshape(shape), dtype)

    return init

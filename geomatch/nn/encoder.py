"""The siamese encoder: fusion, preprocessing, trunk, pooling, head; tiles to descriptors.

After Khokhlova et al., "Cross-year multi-modal image retrieval using siamese networks"
(ICIP 2020): a trainable 1x1 convolution fuses image and labels into three channels before the
preprocessing, so that a trunk pretrained on RGB images fits.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from geomatch import config
from geomatch.errors import UsageError
from geomatch.nn.heads import HEADS
from geomatch.nn.layers import SharedSettings, unit
from geomatch.nn.pooling import Pool
from geomatch.nn.trunks import TRUNKS

AXIS = "devices"
"""The axis of `pmap` over which BatchNorm and gradients are averaged."""


@dataclass(frozen=True)
class TileForm:
    """Tile size in pixels and channel counts that a network takes."""

    size: int
    image_channels: int
    label_channels: int

    @property
    def channels(self) -> int:
        return self.image_channels + self.label_channels


class Encoder(nn.Module):
    """uint8 tiles to descriptors.

    Attributes:
        model: the configuration after `resolve`.
        image_channels, label_channels: a tile's channels, in this order.
        shared: settings that all layers share.
    """

    model: config.ModelConfig
    image_channels: int
    label_channels: int
    shared: SharedSettings = SharedSettings()

    def setup(self) -> None:
        model, labels = self.model, self.label_channels
        if model.label_classes:
            labels = _class_values(model.label_classes, model.labels).shape[1]
        if (self.image_channels, labels) != (3, 0):
            init = fusion_init(self.image_channels, labels)
            self.fusion = nn.Dense(3, kernel_init=init)
        self.trunk = TRUNKS[model.trunk].network(
            shared=self.shared,
            stage=model.stage,
            stride_in=model.stride_in,
            outputs=model.descriptor,
        )
        self.pool = Pool(model.pooling, model.bins, model.instance_norm)
        if model.head in HEADS:
            self.head = HEADS[model.head](model, self.shared)

    def __call__(self, tiles: jax.Array, train: bool = False) -> jax.Array:
        """(b, h, w, c) uint8 to (b, d) float32."""
        if self.model.head == "conv":
            x = self.head(self.feature_map(tiles, train), tiles.shape[1], train)
        else:
            x = self.features(tiles, train)
            x = x.sum(axis=1) if self.model.head == "pool" else self.head(x, train)
        x = x.astype(jnp.float32)
        return unit(x) if self.model.normalise else x

    def features(self, tiles: jax.Array, train: bool = False) -> jax.Array:
        """(b, h, w, c) uint8 to the head's input, (b, r, c) float32; r > 1 for R-MAC only."""
        return self.pool(self.feature_map(tiles, train).astype(jnp.float32))

    def feature_map(self, tiles: jax.Array, train: bool = False) -> jax.Array:
        """(b, h, w, c) uint8 to the trunk's feature map (b, h', w', c')."""
        x = tiles.astype(jnp.float32)
        if classes := self.model.label_classes:
            planes = jax.nn.one_hot(tiles[..., -1], classes + 1)[..., 1:]
            if self.model.labels != "one-hot":
                planes = planes @ _class_values(classes, self.model.labels)
            x = jnp.concatenate([x[..., : self.image_channels], 255 * planes], axis=-1)
        if hasattr(self, "fusion"):
            x = self.fusion(x)
        x = PREPROCESSING[self.model.preprocessing](x)
        return self.trunk(x.astype(self.shared.dtype), train)


def _class_values(classes: int, form: str) -> np.ndarray:
    """(classes, channels) values from 0 to 1 of each class, in a form of `model.labels`."""
    if form == "grey":
        return np.arange(1, classes + 1, dtype=np.float32)[:, None] / np.float32(classes)
    return np.eye(classes, dtype=np.float32) if form == "one-hot" else _hues(classes)


def _hues(count: int) -> np.ndarray:
    """(count, 3) colours from 0 to 1, evenly around the colour circle."""
    hues = [colorsys.hsv_to_rgb(i / count, 1, 1) for i in range(count)]
    return np.array(hues, np.float32).reshape(count, 3)


def _standardise(mean: Any, deviation: Any) -> Callable[[jax.Array], jax.Array]:
    mean, deviation = (np.asarray(values, np.float32) for values in (mean, deviation))
    return lambda x: (x - mean) / deviation


PREPROCESSING: dict[str, Callable[[jax.Array], jax.Array]] = {
    "torch": _standardise(
        np.multiply([0.485, 0.456, 0.406], 255), np.multiply([0.229, 0.224, 0.225], 255)
    ),
    "caffe": lambda x: x[..., ::-1] - np.array([103.939, 116.779, 123.68], np.float32),
    "lite": _standardise(127, 128),
    "none": lambda x: x,
}
"""Preprocessing of RGB values from 0 to 255, by the convention that pretrained weights expect."""


def resolve(model: config.ModelConfig) -> config.ModelConfig:
    """`model` with the trunk's defaults in place of "auto" and unset values.

    Raises:
        UsageError: the trunk has no such stage, or the pooling takes no instance norm.
    """
    trunk = TRUNKS[model.trunk]
    if model.instance_norm and model.pooling != "grid":
        raise UsageError(
            f'model.instance_norm with model.pooling = "{model.pooling}"',
            "It needs --set model.pooling=grid: the mean of a normalised map is 0.",
        )
    if model.stage > trunk.stages:
        raise UsageError(
            f"model.stage = {model.stage}", f"{model.trunk} has {trunk.stages} stages."
        )
    return replace(
        model,
        stage=model.stage or trunk.stages,
        stride_in="3x3" if model.stride_in == "auto" else model.stride_in,
        epsilon=model.epsilon or trunk.epsilon,
        preprocessing=trunk.preprocessing if model.preprocessing == "auto" else model.preprocessing,
    )


class Siamese(nn.Module):
    """The encoder, the pair head sigmoid(Dense(1)(|a - b|)), and a learned temperature."""

    encoder: Encoder

    def setup(self) -> None:
        # At first the logit falls with the distance, instead of depending on random signs.
        self.pair_head = nn.Dense(
            1, kernel_init=_negative_mean, bias_init=nn.initializers.constant(0.5)
        )
        self.log_temperature = self.param("log_temperature", nn.initializers.constant(-2.3), ())

    def __call__(self, tiles: jax.Array, train: bool = False) -> jax.Array:
        """(b, h, w, c) uint8 to (b, d) descriptors."""
        return self.encoder(tiles, train)

    def features(self, tiles: jax.Array) -> jax.Array:
        """(b, h, w, c) uint8 to the encoder's pooled features, flattened to (b, r c)."""
        x = self.encoder.features(tiles)
        return x.reshape(len(x), -1)

    def pair(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Logits (b,) that descriptors `a` and `b`, (b, d) each, show the same place."""
        return self.pair_head(jnp.abs(a - b))[:, 0]

    def temperature(self) -> jax.Array:
        """Scalar that divides cosines in whole-batch losses; at least 0.01."""
        return jnp.exp(jnp.maximum(self.log_temperature, -4.6))

    def encode_and_pair(self, tiles: jax.Array) -> jax.Array:
        """Encoder and pair head in one call, to initialise or trace the whole network."""
        x = self(tiles)
        return self.pair(x, x)


def _negative_mean(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    del key
    return jnp.full(shape, -1.0 / shape[0], dtype)


def fusion_init(image: int, label: int) -> Callable[..., jax.Array]:
    """Initial weights (image + label, 3) of the fusion to three channels.

    As in Khokhlova et al. 2020, each colour of the image goes to the same channel with weight 0.5,
    a grey label to all three with 0.5, and a colour label to the same channels with 0.5. With one
    plane per class, each class has a hue of its own, times 0.5. Without labels the image's weight
    is 1. An image of one band goes to all three channels; bands after the third (near infrared)
    start at 0.

    Args:
        image, label: number of image and label channels.
    """
    weights = np.zeros((image + label, 3), np.float32)
    colours = np.arange(3) if image >= 3 else np.zeros(3, int)
    weights[colours, np.arange(3)] = 0.5 if label else 1.0
    if label == 1:
        weights[image:] = 0.5
    else:
        weights[image:] = 0.5 * _hues(label)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        del key
        return jnp.asarray(weights.reshape(shape), dtype)

    return init


def build(settings: config.Config, form: TileForm, frozen: bool = True) -> Siamese:
    """The network of a configuration, for tiles of `form`.

    Args:
        frozen: freeze the parameter groups of `train.freeze`, as in the first
            `train.freeze_epochs`.

    Raises:
        UsageError: the trunk has no such stage, or `model.label_classes` does not fit the tiles.
    """
    model = resolve(settings.model)
    if model.label_classes and form.label_channels != 1:
        raise UsageError(
            f"model.label_classes = {model.label_classes}, but the tiles have "
            f"{form.label_channels} label channels",
            "Label classes need labels of one band.",
        )
    shared = SharedSettings(
        dtype=jnp.dtype(settings.train.dtype),
        axis_name=AXIS,
        epsilon=model.epsilon,
        frozen=settings.train.freeze if frozen else (),
        remat=settings.train.remat,
    )
    return Siamese(Encoder(model, form.image_channels, form.label_channels, shared))


def with_dtype(model: Siamese, dtype: Any) -> Siamese:
    """The same network computing in `dtype`."""
    shared = replace(model.encoder.shared, dtype=jnp.dtype(dtype))
    return model.clone(encoder=model.encoder.clone(shared=shared))

"""Augmentation on the device: one warp for image and labels, light on the image alone."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from geomatch.config import Augment


def augment(
    key: jax.Array,
    tiles: jax.Array,
    image_channels: int,
    settings: Augment,
    pairs: Sequence[tuple[int, int]],
) -> jax.Array:
    """Change tiles at random, those of one place alike.

    Args:
        tiles: (roles, b, h, w, c) uint8.
        pairs: roles of one place, which are flipped and turned alike unless
            `settings.independent`.
        image_channels: how many of the channels are image; the rest are labels.

    Returns:
        The same shape and dtype.
    """
    roles, batch = tiles.shape[:2]
    turn_key, light_key, label_key = jax.random.split(key, 3)
    states = jax.random.randint(turn_key, (roles, batch), 0, 8)
    if not settings.independent:
        for first, second in pairs:
            states = states.at[second].set(states[first])
    flip = (states % 2) * settings.flips
    turn = (states // 2) * settings.turns
    flat = tiles.reshape(-1, *tiles.shape[2:])
    changed = jax.vmap(turned)(flat, flip.reshape(-1), turn.reshape(-1))
    image = changed[..., :image_channels].astype(jnp.float32)
    contrast, brightness = jax.random.uniform(light_key, (2, len(flat), 1, 1, 1), minval=-1)
    mean = image.mean(axis=(1, 2, 3), keepdims=True)
    image = (image - mean) * (1 + settings.contrast * contrast) + mean
    image = image + 255 * settings.brightness * brightness
    # A query without labels must work, so some tiles learn without theirs.
    keep = jax.random.uniform(label_key, (len(flat), 1, 1, 1)) >= settings.label_dropout
    labels = changed[..., image_channels:] * keep
    image = jnp.clip(jnp.rint(image), 0, 255).astype(jnp.uint8)
    return jnp.concatenate([image, labels.astype(jnp.uint8)], axis=-1).reshape(tiles.shape)


def turned(tile: jax.Array, flip: jax.Array, turn: jax.Array) -> jax.Array:
    """One tile (h, h, c), mirrored if `flip` and turned by `turn` quarters."""
    tile = jnp.where(flip == 1, tile[:, ::-1], tile)
    tile = jnp.where(turn % 2 == 1, tile.transpose(1, 0, 2)[::-1], tile)
    return jnp.where(turn >= 2, tile[::-1, ::-1], tile)

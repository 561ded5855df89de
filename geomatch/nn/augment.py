"""Augmentation on the device: geometric for image and labels, photometric for the image alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from geomatch.config import AugmentConfig

YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
"""RGB to YIQ (NTSC): luminance and two chrominance axes."""

QUANTISATION = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    np.float32,
)
"""JPEG's luminance quantisation table at quality 50 (ITU-T T.81, table K.1)."""


def augment(
    key: jax.Array,
    tiles: jax.Array,
    years: jax.Array,
    image_channels: int,
    settings: AugmentConfig,
    pairs: Sequence[tuple[int, int]],
    first: Any = 0,
    whole: int | None = None,
) -> jax.Array:
    """Augment a batch of tiles, with the same geometric changes for tiles of the same place.

    Zoom is drawn log-uniformly, all other amounts uniformly, within the bounds of `settings`.

    Args:
        tiles: (roles, b, h, h, c) uint8.
        years: (roles, b) int32, a code of each tile's year; used with `settings.per_year`.
        image_channels: number of image channels; the remaining channels are labels.
        pairs: (first, second) roles of the same place, first < second; the second gets the flip,
            turn and warp of the first unless `settings.independent`.
        first, whole: these are the tiles from `first` on of `whole` in each role, of which each is
            augmented alike whatever other tiles come with it; by default they are all.

    Returns:
        The same shape and dtype.
    """
    roles, batch = tiles.shape[:2]
    whole = whole or batch
    turn_key, warp_key, light_key, label_key = jax.random.split(key, 4)

    def own(draws: jax.Array) -> jax.Array:
        """(..., whole) as (..., batch)."""
        return jax.lax.dynamic_slice_in_dim(draws, first, batch, -1)

    source = np.arange(roles)  # the role whose geometric draws a role uses
    if not settings.independent:
        for one, other in pairs:
            source[other] = source[one]
    states = own(jax.random.randint(turn_key, (roles, whole), 0, 8))[source].reshape(-1)
    flip = (states % 2) * int(settings.flips)
    turn = (states // 2) * int(settings.turns)
    flat = tiles.reshape(-1, *tiles.shape[2:])
    if settings.rotation or settings.zoom or settings.shift:
        draws = own(jax.random.uniform(warp_key, (4, roles, whole), minval=-1))[:, source]
        draws = draws.reshape(4, -1)
        angle = jnp.radians(90 * turn.astype(jnp.float32) + settings.rotation * draws[0])
        zoom = (1 + settings.zoom) ** draws[1]
        shift = settings.shift * tiles.shape[2] * draws[2:]
        image, labels = warp_tiles(flat, image_channels, flip, angle, zoom, shift)
    else:
        flat = jax.vmap(flip_and_turn)(flat, flip, turn)
        image, labels = flat[..., :image_channels].astype(jnp.float32), flat[..., image_channels:]
    codes = years if settings.per_year else own(jnp.arange(roles * whole).reshape(roles, -1))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(light_key, codes.reshape(-1))
    image = jitter_light(image, keys, settings)
    image = jnp.clip(jnp.rint(image), 0, 255).astype(jnp.uint8)
    if labels.size and settings.label_dropout:
        # Queries without labels must work, so some tiles lose theirs in training.
        keep = own(jax.random.uniform(label_key, (roles, whole))) >= settings.label_dropout
        labels = jnp.where(keep.reshape(-1, 1, 1, 1), labels, 0)
    return jnp.concatenate([image, labels], axis=-1).reshape(tiles.shape)


def flip_and_turn(tile: jax.Array, flip: jax.Array, turn: jax.Array) -> jax.Array:
    """A tile (h, h, c), mirrored if `flip` is 1, then rotated by `turn` quarter turns."""
    tile = jnp.where(flip == 1, tile[:, ::-1], tile)
    tile = jnp.where(turn % 2 == 1, tile.transpose(1, 0, 2)[::-1], tile)
    return jnp.where(turn >= 2, tile[::-1, ::-1], tile)


def warp_tiles(
    tiles: jax.Array,
    image_channels: int,
    flip: jax.Array,
    angle: jax.Array,
    zoom: jax.Array,
    shift: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Tiles mirrored, rotated, zoomed and shifted, in this order, in a single resampling.

    Image channels are sampled bilinearly and labels by nearest neighbour, at the same coordinates.
    Tiles are reflected at their edges.

    Args:
        tiles: (n, h, h, c) uint8.
        flip: (n,) 1 mirrors the tile.
        angle: (n,) radians, anticlockwise.
        zoom: (n,) factor; above 1 enlarges.
        shift: (2, n) pixels, down and to the right.

    Returns:
        Image channels (float32) and labels (uint8), each (n, h, h, channels).
    """
    side = tiles.shape[1]
    from_centre = jnp.arange(side, dtype=jnp.float32) - (side - 1) / 2
    flip, angle, zoom = (value[:, None, None] for value in (flip, angle, zoom))
    down, right = shift[..., None, None]
    y, x = (from_centre[:, None] - down) / zoom, (from_centre - right) / zoom
    row = jnp.cos(angle) * y + jnp.sin(angle) * x
    column = (jnp.cos(angle) * x - jnp.sin(angle) * y) * (1 - 2 * flip.astype(jnp.float32))
    coordinates = row + (side - 1) / 2, column + (side - 1) / 2

    def sample(channels: jax.Array, order: int) -> jax.Array:
        def sample_plane(plane: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
            return map_coordinates(plane, [row, column], order, mode="reflect")

        # Channels are the inner vmap, so that the channels of a pixel are read together.
        sample_planes = jax.vmap(jax.vmap(sample_plane, (-1, None, None), -1))
        return sample_planes(channels.astype(jnp.float32), *coordinates)

    image = sample(tiles[..., :image_channels], 1)
    return image, sample(tiles[..., image_channels:], 0).astype(jnp.uint8)


def jitter_light(image: jax.Array, keys: jax.Array, settings: AugmentConfig) -> jax.Array:
    """Photometric changes of images (n, h, w, c) float32, drawn from each image's key."""
    draws = jax.vmap(lambda key: jax.random.uniform(key, (6,), minval=-1))(keys)
    contrast, brightness, saturation, hue, blur, jpeg = draws.T[..., None, None, None]
    if settings.contrast:
        mean = image.mean(axis=(1, 2, 3), keepdims=True)
        image = (image - mean) * (1 + settings.contrast * contrast) + mean
    if settings.brightness:
        image = image + 255 * settings.brightness * brightness
    if image.shape[-1] >= 3 and (settings.saturation or settings.hue):
        factor, angle = 1 + settings.saturation * saturation, 2 * math.pi * settings.hue * hue
        colours = adjust_colour(image[..., :3], factor, angle)
        image = jnp.concatenate([colours, image[..., 3:]], axis=-1)
    if settings.blur:
        image = gaussian_blur(image, settings.blur * jnp.abs(blur), math.ceil(3 * settings.blur))
    if settings.jpeg:
        image = jpeg_compress(image, settings.jpeg * jnp.abs(jpeg))
    return image


def adjust_colour(image: jax.Array, factor: jax.Array, angle: jax.Array) -> jax.Array:
    """Images (n, h, w, 3) with scaled and rotated chrominance, and unchanged luminance.

    Args:
        factor: (n, 1, 1, 1) saturation factor; 0 is grey.
        angle: (n, 1, 1, 1) hue rotation in radians.
    """
    to_rgb = np.linalg.inv(YIQ)
    luminance = to_rgb[:, :1] @ YIQ[:1]
    quarter = to_rgb[:, 1:] @ [[0, -1], [1, 0]] @ YIQ[1:]
    along, across = factor * jnp.cos(angle), factor * jnp.sin(angle)
    mixed = luminance + along[..., None] * (np.eye(3) - luminance) + across[..., None] * quarter
    # XLA fuses three terms; a product of such small matrices takes four times as long.
    red, green, blue = (mixed[..., band] * image[..., band : band + 1] for band in range(3))
    return red + green + blue


def gaussian_blur(image: jax.Array, deviation: jax.Array, radius: int) -> jax.Array:
    """Images (n, h, w, c) after a Gaussian blur; edges are reflected, which keeps the mean.

    Args:
        deviation: (n, 1, 1, 1) standard deviation in pixels.
        radius: of the kernel, in pixels.
    """
    steps = jnp.arange(-radius, radius + 1, dtype=jnp.float32)
    weights = jax.nn.softmax(-0.5 * (steps / jnp.maximum(deviation, 1e-3)) ** 2)
    for axis in (1, 2):
        padding = [(0, 0)] * image.ndim
        padding[axis] = (radius, radius)
        # The barrier makes XLA pad once, instead of again for each term.
        padded = jax.lax.optimization_barrier(jnp.pad(image, padding, mode="symmetric"))
        size = image.shape[axis]
        image = jnp.zeros_like(image)
        for i in range(len(steps)):
            window = jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
            image = image + weights[..., i : i + 1] * window
    return image


def jpeg_compress(image: jax.Array, strength: jax.Array) -> jax.Array:
    """Images (n, h, w, c), 0 to 255, with JPEG's quantisation of 8 x 8 blocks.

    All channels use the luminance table, without subsampling.

    Args:
        strength: (n, 1, 1, 1) multiples of quality 10's quantisation; 0 changes nothing.
    """
    height, width = image.shape[1:3]
    padding = ((0, 0), (0, -height % 8), (0, -width % 8), (0, 0))
    padded = jnp.pad(image, padding, mode="edge")
    count, high, wide, channels = padded.shape
    blocks = padded.reshape(count, high // 8, 8, wide // 8, 8, channels) - 128
    frequency = np.arange(8)[:, None]
    cosines = np.cos(np.pi * (2 * np.arange(8) + 1) * frequency / 16)
    cosines = cosines * np.sqrt((1 + (frequency > 0)) / 8)
    # Quality 10 has five times the steps of quality 50, at most 255.
    step = jnp.clip(5 * strength[..., None, None] * QUANTISATION[:, None, :, None], 1e-2, 255)
    dct = jnp.einsum("ui,nyixjc,vj->nyuxvc", cosines, blocks, cosines, precision="highest")
    dct = jnp.rint(dct / step) * step
    decoded = jnp.einsum("ui,nyuxvc,vj->nyixjc", cosines, dct, cosines, precision="highest")
    return decoded.reshape(padded.shape)[:, :height, :width] + 128

"""Queries that are turned, since descriptors of aerial imagery know where north is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from geomatch.errors import UsageError

Pixels = NDArray[np.uint8]

LEAST = 5.0
"""Degrees; smaller steps gain nothing that resampling does not lose."""


def angles(step: float | None) -> tuple[float, ...]:
    """Every so many degrees of a full turn, from 0 on; 0 alone without a step.

    Raises:
        UsageError: the step is not one of a full turn.
    """
    if step is None:
        return (0.0,)
    if not LEAST <= step <= 180:
        raise UsageError(
            f"--rotate {step:g}: must be from {LEAST:g} to 180 degrees", "For example: --rotate 30"
        )
    return tuple(np.arange(0, 360 - step / 2, step).tolist())


def turned(
    pixels: Pixels,
    degrees: float,
    size: int,
    image_channels: int,
    off: tuple[float, float] = (0.0, 0.0),
    zoom: float = 1.0,
) -> Pixels:
    """The centre (size, size, c) of an image that is turned counter-clockwise.

    Quarter turns move pixels as they are. Otherwise images are resampled bilinearly and labels by
    nearest neighbour, and what lies beyond is mirrored.

    Args:
        pixels: (h, w, c).
        image_channels: channels before those of labels.
        off: pixels of the result from the centre to its own, to the right and up after the turn.
        zoom: pixels of the result to one of the image, at least 1.
    """
    if degrees % 90 == 0 and off == (0.0, 0.0) and zoom == 1:
        quarter = np.rot90(pixels, int(degrees // 90))
        top, left = ((side - size) // 2 for side in quarter.shape[:2])
        return quarter[top : top + size, left : left + size]
    # Imported here, since most queries are not turned.
    from scipy.ndimage import affine_transform

    angle = np.radians(degrees)
    # From rows and columns of the result to those of the image; rows run downward.
    back = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / zoom
    middle = (np.array(pixels.shape[:2]) - 1) / 2
    first = np.array([-off[1], off[0]]) - (size - 1) / 2
    planes = [
        affine_transform(
            plane,
            back,
            middle + back @ first,
            output_shape=(size, size),
            order=1 if channel < image_channels else 0,
            mode="mirror",
        )
        for channel, plane in enumerate(np.moveaxis(pixels, -1, 0))
    ]
    return np.stack(planes, axis=-1)

"""The kinds of local features that answers are looked at by.

Those of XFeat (see `nn.xfeat`) know where north is. An image that may be turned is turned by them
step by step, and what is found in it has the direction of its step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from geomatch.config import LocalFeatures
from geomatch.querying.turns import angles, turned
from geomatch.search.local_features import BORDER, SIFT, Detector, Features

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Pixels = NDArray[np.uint8]

MOST = 4096
"""Features of XFeat in an image at most, the most reliable: as many as in the original."""
STEP = 30.0
"""Degrees between the turns of an image."""
LEAST = 0.7
"""Cosine of a pair at least; the original has 0.82, for images of the same day."""


@cache
def detector_of(name: LocalFeatures) -> Detector:
    """The kind of features of a name.

    Raises:
        GeomatchError: the weights of XFeat are not installed, or damaged.
    """
    if name == "sift":
        return SIFT
    from geomatch.nn.xfeat import XFeat

    network = XFeat()
    steps = angles(STEP)

    def detect(image: Pixels, valid: Bools | None, turns: Sequence[float]) -> Features:
        grey = image if image.ndim == 2 else np.rint(image.mean(axis=-1)).astype(np.uint8)
        shown = np.ones(grey.shape, bool) if valid is None else valid
        # The network looks far, so that black where nothing is shown would count.
        grey = np.where(shown, grey, grey[shown].mean() if shown.any() else 0).astype(np.uint8)
        corner = np.zeros(2, np.int64)
        views = grey[None]
        if len(turns) > 1:
            corner, square = _squared(grey)
            views = np.stack([turned(square, turn, len(square), 1)[..., 0] for turn in turns])
        inner = _inner(shown)
        middle = np.array(views.shape[:0:-1]) / 2
        found = []
        for turn, (pixels, descriptors) in zip(turns, network.detect(views, MOST), strict=True):
            direction = np.exp(1j * np.radians(turn))
            back = np.array([[direction.real, direction.imag], [-direction.imag, direction.real]])
            at = (pixels + 0.5 - middle) @ back + middle - corner
            x, y = np.floor(at).astype(np.int64).T
            inside = (x >= 0) & (x < grey.shape[1]) & (y >= 0) & (y < grey.shape[0])
            inside[inside] = inner[y[inside], x[inside]]
            frames = np.full(int(inside.sum()), direction)
            found.append((at[inside], frames, descriptors[inside]))
        points, frames, descriptors = map(np.concatenate, zip(*found, strict=True))
        return Features(points, frames, descriptors, LEAST)

    return Detector(
        any_turn=lambda image, valid: detect(image, valid, steps),
        upright=lambda image, valid: detect(image, valid, (0.0,)),
    )


def _squared(grey: Pixels) -> tuple[Ints, Pixels]:
    """An image (h, w) within a square (s, s, 1) as wide as its diagonal, mirrored beyond it.

    Returns:
        How far its corner is from that of the square, x before y, and the square.
    """
    h, w = grey.shape
    side = int(np.ceil(np.hypot(h, w)))
    left, top = (side - w) // 2, (side - h) // 2
    around = (top, side - h - top), (left, side - w - left)
    return np.array([left, top]), np.pad(grey, around, mode="symmetric")[..., None]


def _inner(shown: Bools) -> Bools:
    """Where features are taken: `BORDER` pixels from what is not shown and from the edges."""
    from scipy.ndimage import binary_erosion

    square = np.ones((2 * BORDER + 1, 2 * BORDER + 1), bool)
    inner: Bools = binary_erosion(shown, square)
    return inner

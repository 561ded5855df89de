"""A scan of unknown turn and scale, cut into windows as large as a tile.

The scan is resampled to the ground sample distance of the tiles for every scale, and turned by
every angle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomatch.querying.turns import turned

Pixels = NDArray[np.uint8]
Float64Array = NDArray[np.float64]

WINDOWS = 64
"""Windows of a pose at most, drawn at random, but alike each time."""
OVERLAP = 4
"""Windows are so many to a tile's side."""
INSIDE = 0.4
"""Least distance of a window's centre from the scan's edges, in tiles. What lies beyond is
mirrored, so that a turned scan has as many windows as an upright one."""
BLANK = 3.0
"""Standard deviation of the grey of a window, of 255, below which it is not searched."""


@dataclass(frozen=True)
class Pose:
    """How a scan may be looked at.

    Attributes:
        turn: degrees by which it is turned counter-clockwise, so that north is up.
        gsd: metres per pixel of the scan.
    """

    turn: float
    gsd: float


@dataclass(frozen=True)
class Windows:
    """The windows of a scan in one pose.

    Attributes:
        pixels: (n, size, size, c) uint8.
        offsets: (n, 2) metres from the scan's centre to theirs, east and north.
    """

    pose: Pose
    pixels: Pixels
    offsets: Float64Array


def windows(scan: Pixels, poses: Sequence[Pose], size: int, gsd: float) -> Iterator[Windows]:
    """Cut the windows of each pose in which the scan is at least as large as a tile.

    Args:
        scan: (h, w, c).
        size, gsd: side in pixels and metres per pixel of a tile.
    """
    at, zoom, scaled = 0.0, 1.0, scan
    for pose in sorted(poses, key=lambda pose: pose.gsd):
        if pose.gsd != at:
            # Larger than it is, a scan may not fit in memory: windows alone are magnified.
            at, zoom = pose.gsd, max(1.0, pose.gsd / gsd)
            scaled = _resized(scan, min(1.0, pose.gsd / gsd))
        height, width = (round(side * zoom) for side in scaled.shape[:2])
        offsets = _lattice(height, width, pose.turn, size)
        cut = [
            turned(scaled, pose.turn, size, scan.shape[2], (float(east), float(north)), zoom)
            for east, north in offsets
        ]
        seen = [i for i, pixels in enumerate(cut) if pixels.std(axis=(0, 1)).max() > BLANK]
        if seen:
            yield Windows(pose, np.stack([cut[i] for i in seen]), offsets[seen] * gsd)


def _resized(scan: Pixels, factor: float) -> Pixels:
    from PIL import Image

    if factor == 1:
        return scan
    height, width = (max(1, round(side * factor)) for side in scan.shape[:2])
    planes = [
        np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR))
        for plane in np.moveaxis(scan, -1, 0)
    ]
    return np.stack(planes, axis=-1)


def _lattice(height: int, width: int, turn: float, size: int) -> Float64Array:
    """Centres (n, 2) of windows, in pixels right of and above the centre of a scan once turned.

    Most of each window is in the scan. There is none if the scan is smaller than a tile.
    """
    if min(height, width) < size:
        return np.empty((0, 2))
    angle, between = np.radians(turn), size / OVERLAP
    reach = np.hypot(height, width) / 2
    line = np.arange(-(reach // between), reach // between + 1) * between
    centres = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    # As in the scan before it was turned.
    back = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    edges = np.array([width, height]) / 2 - INSIDE * size
    kept = centres[(np.abs(centres @ back.T) <= edges + 1e-6).all(axis=1)]
    drawn = np.random.default_rng(0).permutation(len(kept))[:WINDOWS]
    return kept[np.sort(drawn)]

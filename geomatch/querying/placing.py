"""The place of a whole image on the ground, from coarse to fine around a place that is near.

As in EarthMatch (Berton et al., "EarthMatch: Iterative coregistration for fine-grained
localization of astronaut photography", 2024), each match says where the image lies, for the ground
there to be matched again with the image warped onto it. The first matches are of few pixels, since
what is large changes least.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from geomatch.data.mosaic import Ground
from geomatch.geo.georeferencing import Scan
from geomatch.geo.grid import Float64Array
from geomatch.search import local_features
from geomatch.search.local_features import Sought, scale_of, transformed

LEVELS = 384, 768, 1536, 2048
"""Pixels along a side of the ground, in each match."""
ROOM = 1.6, 1.15, 1.1, 1.1
"""Sides of the ground, in those of the image."""
SURE = 4.0
"""Least score of a match: an image has more ways to lie by chance than a tile has."""
FEW = 20
"""Points fewer than these are too few to trust."""
LEAST_SHARE = 0.05
"""Share of the points that a quarter of the image has at least."""
QUARTERS = "upper left", "upper right", "lower left", "lower right"


@dataclass(frozen=True)
class Placed:
    """The place of an image.

    Attributes:
        scan: the image.
        epsg: code of the CRS of x and y.
        matrix: (2, 3) from points of the image to x, y.
        at, to: (n, 2) points of the image, and where they lie: x, y.
        score: of the last match, see `local_features.Finding`.
    """

    scan: Scan
    epsg: int
    matrix: Float64Array
    at: Float64Array
    to: Float64Array
    score: float

    @property
    def residuals(self) -> Float64Array:
        """(n, 2) metres, from where the transform has a point to where it lies."""
        return self.to - transformed(self.at, self.matrix)

    @property
    def rmse(self) -> float:
        """Root of the mean squared length of the residuals, in metres."""
        return float(np.sqrt((self.residuals**2).sum(axis=1).mean()))

    @property
    def gsd(self) -> float:
        """Metres per pixel of the image."""
        return scale_of(self.matrix)

    def concern(self) -> str | None:
        """Why the place may be worse than its residuals say, or None."""
        middle = np.array([self.scan.width, self.scan.height]) / 2
        right, below = (self.at > middle).T
        counts = np.bincount(right + 2 * below, minlength=4)
        empty = [
            name
            for name, count in zip(QUARTERS, counts.tolist(), strict=True)
            if count < LEAST_SHARE * len(self.at)
        ]
        if len(self.at) < FEW:
            return f"only {len(self.at)} points"
        if empty:
            return f"hardly any points in the {' and '.join(empty)} quarter of the image"
        return None


def place(
    scan: Scan, ground: Ground, epsg: int, start: Float64Array, year: str
) -> Placed | None:
    """Find where an image lies.

    Args:
        epsg: code of the CRS of x and y.
        start: (2, 3) from points of the image to x, y, if only roughly: its centre within half
            of the image's side, its scale within a factor of 4, any turn.
        year: of the tiles that it is compared with.

    Returns:
        None if it is not confirmed anywhere.
    """
    best: Placed | None = None
    for level, room in zip(LEVELS, ROOM, strict=True):
        matrix = start if best is None else best.matrix
        refined = _match(scan, ground, epsg, matrix, year, level, room, is_first=best is None)
        if refined is None and (best is not None or level == LEVELS[1]):
            break
        best = refined or best
    return best


def _match(
    scan: Scan,
    ground: Ground,
    epsg: int,
    start: Float64Array,
    year: str,
    level: int,
    room: float,
    is_first: bool,
) -> Placed | None:
    corners = transformed(scan.corners, start)
    low, high = corners.min(axis=0), corners.max(axis=0)
    centre, half = (low + high) / 2, room * float((high - low).max()) / 2
    mosaic = ground.mosaic(epsg, (centre[0], centre[1]), half, year)
    coarsest = max(mosaic.valid.shape[0] / level, scale_of(start) / ground.grid.gsd)
    mosaic = mosaic.reduced(max(round(coarsest), 1))
    image, valid = scan.read(max(mosaic.gsd / scale_of(start), 1.0))
    shape = np.array(image.shape[1::-1])
    to_scan = np.diag(np.array([scan.width, scan.height]) / shape)
    to_scan = np.column_stack([to_scan, np.zeros(2)])
    guess = _after(_inverse(mosaic.to_ground()), _after(start, to_scan))
    if not is_first:
        image, valid = local_features.warped(image, valid, guess, mosaic.valid.shape)
        to_scan, guess = _after(to_scan, _inverse(guess)), np.eye(2, 3)
    finding = local_features.find(
        Sought.of(image, valid),
        local_features.features(mosaic.pixels, mosaic.valid),
        [guess],
        (1 / 4, 4.0) if is_first else (0.8, 1.25),
    )
    if finding.alignment is None or finding.score < SURE:
        return None
    found = local_features.affine(finding.alignment)
    at = transformed(found.query, to_scan)
    to = transformed(found.reference, mosaic.to_ground())
    matrix = _after(mosaic.to_ground(), _after(found.matrix, _inverse(to_scan)))
    return Placed(scan, epsg, matrix, at, to, finding.score)


def _after(second: Float64Array, first: Float64Array) -> Float64Array:
    """The transform (2, 3) that is `first`, then `second`."""
    return np.column_stack(
        [second[:, :2] @ first[:, :2], second[:, :2] @ first[:, 2] + second[:, 2]]
    )


def _inverse(matrix: Float64Array) -> Float64Array:
    back = np.linalg.inv(matrix[:, :2])
    return np.column_stack([back, -back @ matrix[:, 2]])

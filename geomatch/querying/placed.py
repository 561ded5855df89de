"""The place of a whole image on the ground."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomatch.geo.georeferencing import Scan
from geomatch.geo.grid import Float64Array

FEW = 20
"""Points fewer than these are too few to trust."""
LEAST_SHARE = 0.05
"""Share of the points that a quarter of the image has at least."""
SIDE = 800
"""Pixels along the longer side of a picture."""
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
        return self.to - (self.at @ self.matrix[:, :2].T + self.matrix[:, 2])

    @property
    def rmse(self) -> float:
        """Root of the mean squared length of the residuals, in metres."""
        return float(np.sqrt((self.residuals**2).sum(axis=1).mean()))

    @property
    def gsd(self) -> float:
        """Metres per pixel of the image."""
        return float(np.sqrt(abs(np.linalg.det(self.matrix[:, :2]))))

    @property
    def turn(self) -> float:
        """Degrees by which the image is turned counter-clockwise so that north is up, 0 to 360."""
        (a, b), (c, d) = self.matrix[:, :2].tolist()
        return float(np.degrees(np.arctan2(b + c, a - d)) % 360)

    @property
    def centre(self) -> Float64Array:
        """(1, 2) where its centre lies."""
        middle = np.array([[self.scan.width, self.scan.height]]) / 2
        return middle @ self.matrix[:, :2].T + self.matrix[:, 2]

    def __str__(self) -> str:
        return (
            f"{len(self.at)} points, RMSE {self.rmse:.2f} m, {self.gsd:.3g} m per pixel, turned by "
            f"{self.turn:.1f} degrees, EPSG:{self.epsg}"
        )

    def picture(self) -> tuple[NDArray[np.uint8], Float64Array, Float64Array]:
        """The image reduced to `SIDE` pixels, and points (n, 2) with their residuals on it.

        Points are shares of its width and height, residuals are metres along its x and y.
        """
        size = np.array([self.scan.width, self.scan.height])
        image, _ = self.scan.read(max(float(size.max()) / SIDE, 1.0))
        back = np.linalg.inv(self.matrix[:, :2]) * self.gsd
        return image, self.at / size, self.residuals @ back.T

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

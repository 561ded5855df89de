"""The ground grid: integer cells of a projected CRS, as pure arithmetic.

Column and row are floor(coordinate / step) from the origin of the CRS, so that tiles of any
year, extent or source share keys. Rows increase northward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Float64Array = NDArray[np.float64]

CRS84 = "OGC:CRS84"
"""Longitude and latitude, in this order."""
EARTH_RADIUS = 6_371_008.8
"""Of the mean sphere, in metres."""


@dataclass(frozen=True)
class Grid:
    """Tiles of `size` px at `gsd` metres per pixel, every `stride` px.

    `crs` is "EPSG:n", or "utm" where each place is in its own UTM zone and cells carry its code.
    """

    crs: str
    size: int
    gsd: float
    stride: int

    @property
    def step(self) -> float:
        """Metres between neighbouring tiles."""
        return self.stride * self.gsd

    @property
    def side(self) -> float:
        """Metres along a tile's side."""
        return self.size * self.gsd

    @property
    def id(self) -> str:
        text = f"{self.crs}/{self.side:g}m/{self.size}px"
        return text if self.stride == self.size else f"{text}/stride{self.stride}px"

    @property
    def reach(self) -> int:
        """How many columns or rows apart two cells can be and still overlap."""
        return -(-self.size // self.stride) - 1

    def bounds(self, col: Ints, row: Ints) -> Float64Array:
        """(n, 4) left, bottom, right, top in metres."""
        left, bottom = col * self.step, row * self.step
        return np.stack([left, bottom, left + self.side, bottom + self.side], axis=-1)

    def centres(self, col: Ints, row: Ints) -> Float64Array:
        """(n, 2) x, y in metres."""
        return np.stack([col * self.step, row * self.step], axis=-1) + self.side / 2

    def cell_at(self, x: float, y: float) -> tuple[int, int]:
        """The (col, row) whose centre is nearest to a point."""
        half = (self.side - self.step) / 2
        return math.floor((x - half) / self.step), math.floor((y - half) / self.step)

    def touching(self, bounds: tuple[float, float, float, float]) -> tuple[Ints, Ints]:
        """Columns and rows of every cell that shares area with `bounds`."""
        first_col, first_row, last_col, last_row = self.span(bounds)
        cols = np.arange(first_col, last_col + 1, dtype=np.int64)
        rows = np.arange(first_row, last_row + 1, dtype=np.int64)
        grid_rows, grid_cols = np.meshgrid(rows, cols, indexing="ij")
        return grid_cols.ravel(), grid_rows.ravel()

    def span(self, bounds: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
        """First column and row, last column and row of the cells that share area with `bounds`."""
        left, bottom, right, top = bounds
        tolerance = self.gsd * 1e-3  # a common edge is not a common area
        first = [math.floor((v + tolerance - self.side) / self.step) + 1 for v in (left, bottom)]
        last = [math.ceil((v - tolerance) / self.step) - 1 for v in (right, top)]
        return first[0], first[1], last[0], last[1]


def utm_epsg(lon: Float64Array, lat: Float64Array) -> Ints:
    """EPSG code of the WGS 84 UTM zone of each point in degrees; longitudes wrap past 180."""
    lon = np.asarray(lon, np.float64)
    lon = np.where(np.abs(lon) > 180, (lon + 180) % 360 - 180, lon)
    zone = np.minimum(np.floor((lon + 180) / 6) + 1, 60).astype(np.int64)
    return np.where(np.asarray(lat) >= 0, 32600, 32700) + zone


def great_circle(a: Float64Array, b: Float64Array) -> Float64Array:
    """Metres (n,) between points (n, 2) in degrees on the mean sphere."""
    a, b = np.radians(a), np.radians(b)
    h = (
        np.sin((b[:, 1] - a[:, 1]) / 2) ** 2
        + np.cos(a[:, 1]) * np.cos(b[:, 1]) * np.sin((b[:, 0] - a[:, 0]) / 2) ** 2
    )
    return 2 * EARTH_RADIUS * np.arcsin(np.sqrt(h))


ROW_BITS = 27
HALF = 2 ** (ROW_BITS - 1)
"""Even at one metre per step, |col| and |row| stay far below it."""


def cell_keys(epsg: Ints, col: Ints, row: Ints) -> Ints:
    """One integer (n,) per cell, which order as (epsg, col, row) do.

    A key plus `(dcol << ROW_BITS) + drow` is that of the cell so many columns and rows away.
    """
    zone = np.unique(epsg, return_inverse=True)[1].reshape(-1).astype(np.int64)
    keys: Ints = (zone << 2 * ROW_BITS) + ((col + HALF) << ROW_BITS) + (row + HALF)
    return keys


def cells_of(keys: Ints) -> tuple[Ints, Ints, Ints]:
    """Rank of the zone, column and row of keys."""
    col, row = (keys >> ROW_BITS) & (2 * HALF - 1), keys & (2 * HALF - 1)
    return keys >> 2 * ROW_BITS, col - HALF, row - HALF

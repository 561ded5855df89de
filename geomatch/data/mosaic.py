"""The ground around a place, put together from the tiles of one year."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomatch.data.index_rows import Rows
from geomatch.data.store import TileStore
from geomatch.geo.grid import Float64Array, Grid

MOST = 6144
"""Pixels along a side at most: 113 MB of colours."""
BATCH = 64
"""Tiles that are read at a time."""


@dataclass(frozen=True)
class Mosaic:
    """Tiles side by side.

    Attributes:
        pixels: (h, w, channels) uint8, 0 where no tile lies.
        valid: (h, w), where tiles lie.
        left, top: of its upper left corner, in metres of the CRS of the tiles.
        gsd: metres per pixel.
    """

    pixels: NDArray[np.uint8]
    valid: NDArray[np.bool_]
    left: float
    top: float
    gsd: float

    def reduced(self, factor: int) -> Mosaic:
        """Means of factor x factor pixels, which are valid where all of these are."""
        h, w = (side // factor for side in self.valid.shape)
        blocks = (h, factor, w, factor)
        pixels = self.pixels[: h * factor, : w * factor].reshape(*blocks, -1)
        valid = self.valid[: h * factor, : w * factor].reshape(blocks)
        means = np.rint(pixels.mean(axis=(1, 3), dtype=np.float32)).astype(np.uint8)
        whole: NDArray[np.bool_] = np.all(valid, axis=(1, 3))
        return Mosaic(means, whole, self.left, self.top, self.gsd * factor)

    def to_ground(self) -> Float64Array:
        """The transform (2, 3) from points of its pixels, x before y, to x, y in its CRS."""
        return np.array([[self.gsd, 0, self.left], [0, -self.gsd, self.top]])


@dataclass(frozen=True)
class Ground:
    """Reads mosaics of the tiles of an index; only those of the place are read.

    Attributes:
        channels: number of image channels, which come before the label channels.
    """

    rows: Rows
    store: TileStore
    grid: Grid
    channels: int

    def mosaic(self, epsg: int, centre: tuple[float, float], half: float, year: str) -> Mosaic:
        """The tiles of a year in a square, at most `MOST` pixels wide, on their own pixels.

        Args:
            epsg: code of the CRS of the tiles and of the centre (x, y).
            half: metres from the centre to a side.
        """
        gsd, size = self.grid.gsd, self.grid.size
        side = min(2 * int(np.ceil(half / gsd)), MOST)
        left, top = round(centre[0] / gsd) - side // 2, round(centre[1] / gsd) + side // 2
        pixels = np.zeros((side, side, self.channels), np.uint8)
        valid = np.zeros((side, side), bool)

        def point(code: int) -> tuple[float, float]:
            return centre if code == epsg else (np.inf, np.inf)

        near = self.rows.within(point, (side + size) / 2 * gsd)
        tiles = [row for row in self.rows.take(near) if (row["year"] or "") == year]
        for start in range(0, len(tiles), BATCH):
            part = tiles[start : start + BATCH]
            read = self.store.read(np.array([row["store_row"] for row in part]))
            for row, tile in zip(part, read, strict=True):
                x = round(row["x"] / gsd - size / 2) - left
                y = top - round(row["y"] / gsd + size / 2)
                inside = tuple(slice(max(at, 0), max(at + size, 0)) for at in (y, x))
                cut = tuple(slice(max(-at, 0), max(min(size, side - at), 0)) for at in (y, x))
                pixels[inside] = tile[cut][..., : self.channels]
                valid[inside] = True
        return Mosaic(pixels, valid, left * gsd, top * gsd, gsd)

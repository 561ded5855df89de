"""Windowed reading of rasters on the ground grid: never a whole image in memory."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.transform import Affine, from_origin
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from geomatch.errors import BadFileError
from geomatch.geo.coordinates import Bounds
from geomatch.geo.grid import Grid
from geomatch.geo.placement import bounds_in, turns
from geomatch.geo.rasters import Pixels, Raster, guarded, has_alpha, open_view
from geomatch.geo.stretch import Stretch

MAX_OPEN = 16
"""Rasters that a reader keeps open. A process has up to three readers (images, labels, changed
ground), and GDAL keeps 100 sources of VRTs open; macOS allows a process 256 files."""

Opened = tuple[Any, WarpedVRT, int, int]
"""A raster warped onto the grid: (dataset, WarpedVRT, its first column, its last row)."""


def _close(opened: Opened) -> None:
    opened[1].close()
    opened[0].close()


class GridReader:
    """Reads cells of a grid, in one CRS, from the rasters of one year.

    Rasters are read in the order given, or those whose centre is nearer to the cell's first; each
    fills the pixels that earlier ones left invalid.

    Args:
        rasters: all of the same bands and dtype.
        crs: of the cells, "EPSG:n".
        nearest: resample by nearest neighbour (labels) instead of bilinearly (images).
        stretch: to uint8, for rasters of another dtype.
        unreadable: takes the paths of rasters that cannot be read, with the reason, and reading
            goes on without them; None makes them an error.
        by_centre: read rasters in the order of their distance.
    """

    def __init__(
        self,
        rasters: Sequence[Raster],
        grid: Grid,
        crs: str,
        *,
        nearest: bool = False,
        stretch: Callable[[NDArray[Any]], Pixels] | None = None,
        unreadable: dict[str, str] | None = None,
        by_centre: bool = False,
    ) -> None:
        self._unreadable = unreadable
        self._by_centre = by_centre
        self._grid = grid
        self._crs = crs
        self._resampling = Resampling.nearest if nearest else Resampling.bilinear
        self._stretch = stretch
        turned = [(raster, turn) for raster in rasters for turn in turns(raster)]
        self._rasters = [raster for raster, _ in turned]
        self._turns = [turn for _, turn in turned]
        self._bounds = [bounds_in(raster, crs) for raster, _ in turned]
        self._open: OrderedDict[int, Opened] = OrderedDict()  # the last used at the end

    def __enter__(self) -> GridReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all rasters; they are opened again when they are read."""
        for opened in self._open.values():
            _close(opened)
        self._open.clear()

    def read(self, col: int, row: int) -> tuple[Pixels, NDArray[np.bool_], list[Raster]]:
        """One cell: pixels (size, size, bands), valid (size, size), the rasters seen, in order.

        Raises:
            GeomatchError: a raster is damaged.
        """
        size, bands = self._grid.size, self._rasters[0].bands
        pixels = np.zeros((size, size, bands), np.uint8)
        valid = np.zeros((size, size), bool)
        seen: list[Raster] = []
        for i in self._touching(col, row):
            try:
                values, mask = self._window(i, col, row)
            except BadFileError as error:
                if self._unreadable is None:
                    raise
                self._unreadable[error.path] = error.reason
                continue
            fill = mask & ~valid
            if fill.any():
                pixels[fill] = values[fill]
                valid |= mask
                seen.append(self._rasters[i])
            if valid.all():
                break
        return pixels, valid, seen

    def _touching(self, col: int, row: int) -> list[int]:
        """Indices of the rasters that share ground with a cell, in the order of reading."""
        left, bottom, right, top = self._grid.bounds(np.asarray(col), np.asarray(row)).tolist()
        found = [
            i
            for i, box in enumerate(self._bounds)
            if box[0] < right and box[2] > left and box[1] < top and box[3] > bottom
        ]
        if self._by_centre:
            x, y = left + right, bottom + top
            centres = {i: np.add(self._bounds[i][:2], self._bounds[i][2:]) for i in found}
            found.sort(key=lambda i: math.hypot(centres[i][0] - x, centres[i][1] - y))
        return found

    def _window(self, i: int, col: int, row: int) -> tuple[Pixels, NDArray[np.bool_]]:
        raster, grid = self._rasters[i], self._grid
        with guarded(raster.path):
            if i not in self._open:
                if len(self._open) == MAX_OPEN:
                    _close(self._open.popitem(last=False)[1])
                self._open[i] = self._warp(i)
            self._open.move_to_end(i)
            _, vrt, first_col, last_row = self._open[i]
            offset_x = (col - first_col) * grid.stride
            offset_y = (last_row - row) * grid.stride
            values = vrt.read(window=Window(offset_x, offset_y, grid.size, grid.size))
        return _pixels(values, raster, vrt.nodata, self._stretch)

    def _warp(self, i: int) -> Opened:
        grid, raster = self._grid, self._rasters[i]
        first_col, first_row, last_col, last_row = grid.span(self._bounds[i])
        source = open_view(raster)
        at = source.transform
        vrt = WarpedVRT(
            source,
            crs=self._crs,
            src_transform=Affine(at.a, at.b, at.c + self._turns[i], at.d, at.e, at.f),
            resampling=self._resampling,
            transform=from_origin(
                first_col * grid.step, last_row * grid.step + grid.side, grid.gsd, grid.gsd
            ),
            width=(last_col - first_col) * grid.stride + grid.size,
            height=(last_row - first_row) * grid.stride + grid.size,
            add_alpha=not has_alpha(source),
        )
        return source, vrt, first_col, last_row


def read_extent(
    raster: Raster, crs: str, bounds: Bounds, gsd: float, stretch: Stretch | None = None
) -> Pixels:
    """A raster over `bounds` of `crs` at `gsd`, read as `GridReader` does: (h, w, bands).

    Raises:
        GeomatchError: it is damaged.
    """
    left, bottom, right, top = bounds
    with (
        guarded(raster.path),
        open_view(raster) as source,
        WarpedVRT(
            source,
            crs=crs,
            resampling=Resampling.bilinear,
            transform=from_origin(left, top, gsd, gsd),
            width=round((right - left) / gsd),
            height=round((top - bottom) / gsd),
            add_alpha=not has_alpha(source),
        ) as vrt,
    ):
        pixels, valid = _pixels(vrt.read(), raster, vrt.nodata, stretch)
    return np.where(valid[..., None], pixels, np.uint8(0))


def _pixels(
    values: NDArray[Any],
    raster: Raster,
    nodata: float | None,
    stretch: Callable[[NDArray[Any]], Pixels] | None,
) -> tuple[Pixels, NDArray[np.bool_]]:
    """Pixels (h, w, bands) and where they are valid (h, w).

    Args:
        values: (bands, h, w) as warped, with alpha as the last band.
        nodata: as the warped dataset declares it.
    """
    data, mask = values[: raster.bands], values[raster.bands] > 0
    if nodata is not None:  # declared beside an alpha band, which alone is in the mask
        mask &= (data != nodata).any(axis=0)
    if data.dtype.kind == "f":
        mask &= np.isfinite(data).all(axis=0)
    return np.moveaxis(data if stretch is None else stretch(data), 0, -1), mask

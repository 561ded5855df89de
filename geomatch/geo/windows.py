"""Windowed reading of rasters on the ground grid: never a whole image in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import MaskFlags, Resampling
from rasterio.transform import Affine, from_origin
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from geomatch.errors import BadFileError
from geomatch.geo import views
from geomatch.geo.coordinates import Bounds, is_same
from geomatch.geo.grid import Grid
from geomatch.geo.placement import bounds_in, turns
from geomatch.geo.rasters import Pixels, Raster, guarded, has_alpha, open_view
from geomatch.geo.stretch import Stretch
from geomatch.geo.warping import moved, open_for_grid

MAX_OPEN = 16
"""Rasters that a reader keeps open. A process has up to three readers (images, labels, changed
ground), and GDAL keeps 100 sources of VRTs open; macOS allows a process 256 files."""

LATTICE = 0.01
"""Pixels that a raster may lie off the grid's lattice and still be copied instead of warped."""

Valid = NDArray[np.bool_]
Cell = tuple[Pixels, Valid, list[Raster]]
"""Pixels (size, size, bands), valid (size, size), and the rasters that are seen, in order."""


class _Warped:
    """A raster as GDAL warps it onto the grid. Pixels count from the CRS's origin, east and south.

    Attributes:
        nodata: value of invalid pixels, beside the mask.
    """

    def __init__(
        self,
        view: Any,
        raster: Raster,
        at: Affine,
        grid: Grid,
        crs: str,
        box: Bounds,
        resampling: Resampling,
        kernel: dict[str, float],
    ) -> None:
        first_col, first_row, last_col, last_row = grid.span(box)
        self._view = view
        self._bands = raster.bands
        self._left, self._top = first_col * grid.stride, -last_row * grid.stride - grid.size
        self._vrt = WarpedVRT(
            view,
            crs=crs,
            src_transform=at,
            resampling=resampling,
            transform=from_origin(
                first_col * grid.step, last_row * grid.step + grid.side, grid.gsd, grid.gsd
            ),
            width=(last_col - first_col) * grid.stride + grid.size,
            height=(last_row - first_row) * grid.stride + grid.size,
            add_alpha=not has_alpha(view),
            **kernel,
        )
        self.nodata = self._vrt.nodata

    def close(self) -> None:
        self._vrt.close()
        self._view.close()

    def read(self, x: int, y: int, width: int, height: int) -> tuple[NDArray[Any], Valid]:
        """Values (bands, height, width), and where they are valid (height, width)."""
        values = self._vrt.read(window=Window(x - self._left, y - self._top, width, height))
        return values[: self._bands], values[self._bands] > 0


class _Copied:
    """A raster on the grid's own lattice, which is read as it is; otherwise like `_Warped`."""

    def __init__(self, view: Any, raster: Raster, left: int, top: int) -> None:
        self._view = view
        self._left, self._top = left, top
        self._bands = list(range(1, raster.bands + 1))
        self._alpha = raster.bands + 1 if has_alpha(view) else None
        self._has_mask = MaskFlags.per_dataset in view.mask_flag_enums[0]
        self.nodata = view.nodata

    def close(self) -> None:
        self._view.close()

    def read(self, x: int, y: int, width: int, height: int) -> tuple[NDArray[Any], Valid]:
        view = self._view
        left, top = max(x, self._left), max(y, self._top)
        right = min(x + width, self._left + view.width)
        bottom = min(y + height, self._top + view.height)
        # In the order of the store: pixel by pixel.
        values = np.zeros((height, width, len(self._bands)), view.dtypes[0])
        valid = np.zeros((height, width), bool)
        if left < right and top < bottom:
            window = Window(left - self._left, top - self._top, right - left, bottom - top)
            inside = slice(top - y, bottom - y), slice(left - x, right - x)
            view.read(self._bands, window=window, out=np.moveaxis(values[inside], -1, 0))
            if self._alpha is not None:
                valid[inside] = view.read(self._alpha, window=window) > 0
            elif self._has_mask:
                valid[inside] = view.read_masks(1, window=window) > 0
            else:
                valid[inside] = True
        return np.moveaxis(values, -1, 0), valid


def _corner(view: Any, at: Affine, gsd: float) -> tuple[int, int] | None:
    """The upper left pixel of a raster that lies on a grid's lattice, else None.

    Pixels count from the origin of the CRS, east and south.
    """
    if at.b or at.d:
        return None
    left, top = at.c / gsd, -at.f / gsd
    x, y = round(left), round(top)
    right, bottom = left + at.a / gsd * view.width, top - at.e / gsd * view.height
    off = (left - x, top - y, right - x - view.width, bottom - y - view.height)
    return (x, y) if max(map(abs, off)) <= LATTICE else None


def _is_plain(view: Any, raster: Raster) -> bool:
    """Whether it can be told without GDAL's warper which pixels of a raster are valid."""
    first, *others = view.mask_flag_enums[: raster.bands]
    if any(flags != first for flags in others):
        return False
    if first == [MaskFlags.nodata]:
        value, *values = view.nodatavals[: raster.bands]
        return values.count(value) == len(values) and views.can_hold(view.dtypes[0], value)
    return has_alpha(view) or first in ([MaskFlags.all_valid], [MaskFlags.per_dataset])


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
        boxes = [bounds_in(raster, crs) for raster, _ in turned]
        self._boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        self._open: OrderedDict[int, _Warped | _Copied] = OrderedDict()  # the last used at the end

    def __enter__(self) -> GridReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all rasters; they are opened again when they are read."""
        for opened in self._open.values():
            opened.close()
        self._open.clear()

    def read(self, col: int, row: int) -> Cell:
        """Read one cell.

        Raises:
            GeomatchError: a raster is damaged.
        """
        return next(self.read_run(col, row, 1))

    def read_run(self, col: int, row: int, count: int) -> Iterator[Cell]:
        """Read `count` cells eastward; a raster that is copied is read once for all of them.

        Raises:
            GeomatchError: a raster is damaged.
        """
        strips: dict[int, tuple[int, Pixels, Valid]] = {}  # first column, pixels, valid
        for each, touching in enumerate(self._touching(col, row, count), col):
            yield self._cell(each, row, col + count, touching, strips)

    def _cell(
        self,
        col: int,
        row: int,
        end: int,
        touching: list[int],
        strips: dict[int, tuple[int, Pixels, Valid]],
    ) -> Cell:
        size, bands = self._grid.size, self._rasters[0].bands
        pixels = np.zeros((size, size, bands), np.uint8)
        valid = np.zeros((size, size), bool)
        seen: list[Raster] = []
        for i in touching:
            try:
                values, mask = self._part(i, col, row, end, strips)
            except BadFileError as error:
                if self._unreadable is None:
                    raise
                self._unreadable[error.path] = error.reason
                continue
            if not seen and mask.all():
                return values, mask, [self._rasters[i]]
            fill = mask & ~valid
            if not fill.any():
                continue
            np.copyto(pixels, values, where=fill[..., None])
            valid |= fill
            seen.append(self._rasters[i])
            if valid.all():
                break
        return pixels, valid, seen

    def _part(
        self, i: int, col: int, row: int, end: int, strips: dict[int, tuple[int, Pixels, Valid]]
    ) -> tuple[Pixels, Valid]:
        """What a raster has in a cell; if it is copied, it is read up to column `end`."""
        size, stride = self._grid.size, self._grid.stride
        if i not in strips:
            with guarded(self._rasters[i].path):
                sheet = self._sheet(i)
            if isinstance(sheet, _Warped):
                return self._window(i, col, row, 1)
            try:
                strips[i] = (col, *self._window(i, col, row, end - col))
            except BadFileError:  # but this cell may be whole
                if end == col + 1:
                    raise
                return self._window(i, col, row, 1)
        first, pixels, valid = strips[i]
        part = slice((col - first) * stride, (col - first) * stride + size)
        return pixels[:, part], valid[:, part]

    def _touching(self, col: int, row: int, count: int) -> Iterator[list[int]]:
        """The rasters that share ground with each cell of a run, in the order of reading."""
        cols = np.arange(col, col + count)
        cells = self._grid.bounds(cols, np.full(count, row))
        low, high = self._boxes[:, :2], self._boxes[:, 2:]
        near = np.all((low < cells[:, None, 2:]) & (high > cells[:, None, :2]), axis=2)
        for number, cell in enumerate(cells):
            found = np.flatnonzero(near[number])
            if self._by_centre:
                away = np.hypot(*(low[found] + high[found] - cell[:2] - cell[2:]).T)
                found = found[np.argsort(away, kind="stable")]
            yield found.tolist()

    def _window(self, i: int, col: int, row: int, count: int) -> tuple[Pixels, Valid]:
        """What a raster has in `count` cells from `col` on."""
        raster, size, stride = self._rasters[i], self._grid.size, self._grid.stride
        with guarded(raster.path):
            sheet = self._sheet(i)
            x, y = col * stride, -row * stride - size
            values, mask = sheet.read(x, y, (count - 1) * stride + size, size)
        return _pixels(values, mask, sheet.nodata, self._stretch)

    def _sheet(self, i: int) -> _Warped | _Copied:
        """A raster, open."""
        if i not in self._open:
            if len(self._open) == MAX_OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[i] = self._opened(i)
        self._open.move_to_end(i)
        return self._open[i]

    def _opened(self, i: int) -> _Warped | _Copied:
        raster, grid = self._rasters[i], self._grid
        left, bottom, right, top = self._boxes[i].tolist()
        box, turn = (left, bottom, right, top), self._turns[i]
        if self._resampling == Resampling.nearest:  # overviews of labels may hold blends of classes
            view, kernel = open_view(raster), dict[str, float]()
            at = moved(view, turn)
        else:
            view, at, kernel = open_for_grid(raster, self._crs, box, grid.gsd, turn)
        corner = _corner(view, at, grid.gsd)
        if corner and is_same(raster.crs, self._crs) and _is_plain(view, raster):
            return _Copied(view, raster, *corner)
        return _Warped(view, raster, at, grid, self._crs, box, self._resampling, kernel)


def read_extent(
    raster: Raster, crs: str, bounds: Bounds, gsd: float, stretch: Stretch | None = None
) -> Pixels:
    """A raster over `bounds` of `crs` at `gsd`, read as `GridReader` does: (h, w, bands).

    Raises:
        GeomatchError: it is damaged.
    """
    left, bottom, right, top = bounds
    with guarded(raster.path):
        view, at, kernel = open_for_grid(raster, crs, bounds, gsd)
        with (
            view,
            WarpedVRT(
                view,
                crs=crs,
                src_transform=at,
                resampling=Resampling.bilinear,
                transform=from_origin(left, top, gsd, gsd),
                width=round((right - left) / gsd),
                height=round((top - bottom) / gsd),
                add_alpha=not has_alpha(view),
                **kernel,
            ) as vrt,
        ):
            values = vrt.read()
        mask = values[raster.bands] > 0
        pixels, valid = _pixels(values[: raster.bands], mask, vrt.nodata, stretch)
    return np.where(valid[..., None], pixels, np.uint8(0))


def _pixels(
    values: NDArray[Any],
    valid: Valid,
    nodata: float | None,
    stretch: Callable[[NDArray[Any]], Pixels] | None,
) -> tuple[Pixels, Valid]:
    """Pixels (h, w, bands) and where they are valid (h, w).

    Args:
        values: (bands, h, w).
        valid: (h, w), by the mask alone.
        nodata: as the dataset declares it.
    """
    if nodata is not None:  # declared beside an alpha band, which alone is in the mask
        valid &= (values != nodata).any(axis=0)
    if values.dtype.kind == "f":
        valid &= np.isfinite(values).all(axis=0)
    return np.moveaxis(values if stretch is None else stretch(values), 0, -1), valid

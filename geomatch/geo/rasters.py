"""Windowed reading of rasters on the ground grid: never a whole image in memory."""

from __future__ import annotations

import contextlib
import glob
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.transform import from_origin, xy
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform, transform_bounds
from rasterio.windows import Window

from geomatch.errors import GeomatchError, UsageError
from geomatch.geo.grid import Grid, utm_epsg

Bounds = tuple[float, float, float, float]
Pixels = NDArray[np.uint8]

RASTER_SUFFIXES = {".tif", ".tiff", ".jp2", ".vrt", ".img", ".png", ".jpg", ".jpeg", ".gti"}
STRETCH_FILES, STRETCH_SIDE = 256, 256
"""A percentile stretch samples at most 256 files, each reduced to at most 256 pixels a side."""


@dataclass(frozen=True)
class Raster:
    """What the header of a georeferenced raster says.

    Attributes:
        crs: WKT.
        bounds: left, bottom, right, top in `crs`.
        bands: without an alpha band.
        palette: whether values are indices of a colour table, which cannot be interpolated.
        stamp: size in bytes and modification time in nanoseconds of the file.
    """

    path: str
    crs: str
    bounds: Bounds
    bands: int
    dtype: str
    alpha: bool
    palette: bool
    stamp: tuple[int, int]

    @property
    def name(self) -> str:
        return Path(self.path).name


@dataclass(frozen=True)
class Stretch:
    """Linear scaling of each band from low..high to 0..255."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __call__(self, values: NDArray[Any]) -> Pixels:
        """Scale (bands, h, w) of any dtype to uint8."""
        low = np.asarray(self.low, np.float32)[:, None, None]
        span = np.maximum(np.asarray(self.high, np.float32)[:, None, None] - low, 1e-12)
        scaled = (values.astype(np.float32) - low) / span * 255
        return np.clip(np.rint(np.nan_to_num(scaled)), 0, 255).astype(np.uint8)


def find(pattern: str, what: str) -> list[str]:
    """Files of a folder, a glob or a single path, sorted by name.

    Raises:
        GeomatchError: no file matches.
    """
    path = Path(pattern).expanduser()
    if path.is_file():  # before globs: a name may contain brackets
        found = [str(path)]
    elif path.is_dir():
        found = [str(p) for p in path.iterdir() if p.suffix.lower() in RASTER_SUFFIXES]
    else:
        found = [p for p in glob.glob(str(path), recursive=True) if os.path.isfile(p)]
    if not found:
        raise GeomatchError(
            f"{what}: no file matches {pattern}",
            "Give a folder of rasters, a file, or a quoted glob such as 'ortho/*.tif'.",
        )
    return [os.path.abspath(p) for p in sorted(found)]


def inspect(path: str) -> Raster:
    """Read a raster's header.

    Raises:
        GeomatchError: it cannot be opened or has no CRS.
    """
    with _open(path) as source:
        if source.crs is None:
            raise GeomatchError(
                f"{path} has no CRS",
                "Assign the one it is in, for example: gdal_edit.py -a_srs EPSG:2154 FILE",
            )
        alpha = ColorInterp.alpha in source.colorinterp
        rows, cols = (0, 0, source.height, source.height), (0, source.width, 0, source.width)
        xs, ys = xy(source.transform, rows, cols, offset="ul")
        stat = os.stat(path)
        return Raster(
            path=path,
            crs=source.crs.to_wkt(),
            bounds=(float(min(xs)), float(min(ys)), float(max(xs)), float(max(ys))),
            bands=source.count - alpha,
            dtype=source.dtypes[0],
            alpha=alpha,
            palette=source.colorinterp[0] == ColorInterp.palette,
            stamp=(stat.st_size, stat.st_mtime_ns),
        )


def is_georeferenced(path: str) -> bool:
    """Whether a file is a raster with a CRS."""
    try:
        with _open(path) as source:
            return source.crs is not None
    except GeomatchError:
        return False


def _open(path: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            return rasterio.open(path)
    except RasterioError as error:
        raise GeomatchError(
            f"{path} cannot be opened as a raster: {error}",
            "Check the file with gdalinfo; leave it out or replace it.",
        ) from error


def project_bounds(crs: str, bounds: Bounds, target: str) -> Bounds:
    """The box in `target` that encloses `bounds` of `crs`; any CRS string of rasterio."""
    left, bottom, right, top = transform_bounds(
        CRS.from_user_input(crs), CRS.from_user_input(target), *bounds, densify_pts=21
    )
    return float(left), float(bottom), float(right), float(top)


def project_points(
    crs: str, x: NDArray[np.float64], y: NDArray[np.float64], target: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Transform points from `crs` to `target`."""
    xs, ys = transform(CRS.from_user_input(crs), CRS.from_user_input(target), x, y)
    return np.asarray(xs, np.float64), np.asarray(ys, np.float64)


def metric_crs(raster: Raster) -> str:
    """ "EPSG:n" of a raster's own CRS where tiles can be cut in it, else of its UTM zone.

    The UTM zone of the raster's centre replaces a geographic CRS, units other than the metre, Web
    Mercator (whose metres are not true on the ground) and a CRS without an EPSG code.
    """
    crs = CRS.from_user_input(raster.crs)
    code = crs.to_epsg()
    if code and code != 3857 and _is_metric(crs):
        return f"EPSG:{code}"
    return utm_crs(raster)


def utm_crs(raster: Raster) -> str:
    """ "EPSG:n" of the UTM zone of a raster's centre."""
    lon, lat = _centre_lonlat(raster)
    return f"EPSG:{int(utm_epsg(np.asarray(lon), np.asarray(lat)))}"


def check_grid_crs(text: str) -> str:
    """ "EPSG:n" of a configured code.

    Raises:
        UsageError: it is unknown, or not projected in metres.
    """
    try:
        crs = CRS.from_user_input(int(text) if text.isdigit() else text)
    except rasterio.errors.CRSError as error:
        raise UsageError(f"grid.crs = {text!r} is not a CRS", "Give an EPSG code.") from error
    if not _is_metric(crs) or crs.to_epsg() is None:
        raise UsageError(
            f"grid.crs = {text!r} is not a projected CRS in metres with an EPSG code",
            'Give a national grid or a UTM zone, or "auto" or "utm".',
        )
    return f"EPSG:{crs.to_epsg()}"


def _is_metric(crs: CRS) -> bool:
    return bool(crs.is_projected and abs(crs.linear_units_factor[1] - 1) < 1e-9)


def _centre_lonlat(raster: Raster) -> tuple[float, float]:
    left, bottom, right, top = raster.bounds
    x, y = np.asarray([(left + right) / 2]), np.asarray([(bottom + top) / 2])
    lon, lat = project_points(raster.crs, x, y, "OGC:CRS84")
    return float(lon[0]), float(lat[0])


def check_zone(raster: Raster, crs: str) -> None:
    """Refuse a raster far outside the area of use of a fixed grid CRS.

    Raises:
        GeomatchError: its centre is more than 6 degrees away from that area.
    """
    described = CRS.from_user_input(crs).to_dict(projjson=True)
    area = described.get("bbox")
    if area is None:
        return
    lon, lat = _centre_lonlat(raster)
    width = (area["east_longitude"] - area["west_longitude"]) % 360
    past_west = (lon - area["west_longitude"]) % 360
    outside = min(past_west - width, 360 - past_west) if past_west > width else 0.0
    outside = max(outside, area["south_latitude"] - lat, lat - area["north_latitude"])
    if outside > 6:
        raise GeomatchError(
            f"{raster.path} is {outside:.0f} degrees from the area of use of the grid's {crs}",
            "Use the UTM zone of each place: --crs utm",
        )


def ground_sample_distance(raster: Raster, crs: str) -> float:
    """A raster's pixel size in metres of `crs`, to three significant digits."""
    with rasterio.open(raster.path) as source:
        pixels = source.width * source.height
    left, bottom, right, top = project_bounds(raster.crs, raster.bounds, crs)
    return float(f"{((right - left) * (top - bottom) / pixels) ** 0.5:.3g}")


def measure_stretch(rasters: Sequence[Raster], text: str) -> Stretch:
    """The stretch given as "MIN,MAX", or as percentiles "2%,98%" over all rasters.

    Raises:
        UsageError: `text` has another form.
    """
    parts = [part.strip() for part in text.split(",")]
    percent = [part.endswith("%") for part in parts]
    try:
        low, high = (float(part.removesuffix("%")) for part in parts)
    except ValueError:
        low, high = math.nan, math.nan
    is_valid = low < high < math.inf and low > -math.inf
    if any(percent):
        is_valid = all(percent) and 0 <= low < high <= 100
    if not is_valid:
        raise UsageError(f"--stretch {text} is neither MIN,MAX nor percentiles such as 2%,98%")
    bands = rasters[0].bands
    if not any(percent):
        return Stretch((low,) * bands, (high,) * bands)
    chosen = np.unique(np.linspace(0, len(rasters) - 1, STRETCH_FILES).astype(int))
    samples: list[list[NDArray[Any]]] = [[] for _ in range(bands)]
    for raster in (rasters[i] for i in chosen):
        with _open(raster.path) as source, _read_errors(raster):
            shape = (min(source.height, STRETCH_SIDE), min(source.width, STRETCH_SIDE))
            for band in range(bands):
                values = source.read(band + 1, out_shape=shape, masked=True).compressed()
                samples[band].append(values[np.isfinite(values)])
    limits = [np.percentile(np.concatenate(band), [low, high]) for band in samples]
    return Stretch(tuple(float(v[0]) for v in limits), tuple(float(v[1]) for v in limits))


@contextlib.contextmanager
def _read_errors(raster: Raster) -> Iterator[None]:
    """Name the raster in errors of reading it."""
    try:
        yield
    except RasterioError as error:
        raise GeomatchError(
            f"{raster.path} is damaged: {error.__cause__ or error}",
            "Replace the file or leave it out, then run the same command again.",
        ) from error


class GridReader:
    """Reads cells of a grid, in one CRS, from the rasters of one year.

    Rasters are read in the order given, or those whose centre is nearer to the cell's first; each
    fills the pixels that earlier ones left invalid.

    Args:
        rasters: all of the same bands and dtype.
        crs: of the cells, "EPSG:n".
        nearest: resample by nearest neighbour (labels) instead of bilinearly (images).
        stretch: to uint8, for rasters of another dtype.
        by_centre: read rasters in the order of their distance.
    """

    def __init__(
        self,
        rasters: Sequence[Raster],
        grid: Grid,
        crs: str,
        *,
        nearest: bool = False,
        stretch: Stretch | None = None,
        by_centre: bool = False,
    ) -> None:
        self._grid = grid
        self._crs = crs
        self._resampling = Resampling.nearest if nearest else Resampling.bilinear
        self._stretch = stretch
        self._by_centre = by_centre
        self._rasters = rasters
        self._bounds = [project_bounds(r.crs, r.bounds, crs) for r in rasters]
        self._open: dict[int, tuple[Any, WarpedVRT, int, int]] = {}

    def __enter__(self) -> GridReader:
        return self

    def __exit__(self, *error: object) -> None:
        for opened in self._open.values():
            opened[1].close()
            opened[0].close()
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
            values, mask = self._window(i, col, row)
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
        with _read_errors(raster):
            if i not in self._open:
                self._open[i] = self._warp(i)
            _, vrt, first_col, last_row = self._open[i]
            offset_x = (col - first_col) * grid.stride
            offset_y = (last_row - row) * grid.stride
            values = vrt.read(window=Window(offset_x, offset_y, grid.size, grid.size))
        mask = values[raster.bands] > 0
        data = values[: raster.bands]
        if self._stretch is not None:
            data = self._stretch(data)
        return np.moveaxis(data, 0, -1), mask

    def _warp(self, i: int) -> tuple[Any, WarpedVRT, int, int]:
        """A raster warped onto the grid: (dataset, WarpedVRT, its first column, its last row)."""
        grid, raster = self._grid, self._rasters[i]
        cols, rows = grid.touching(self._bounds[i])
        first_col, last_row = int(cols.min()), int(rows.max())
        source = _open(raster.path)
        vrt = WarpedVRT(
            source,
            crs=self._crs,
            resampling=self._resampling,
            transform=from_origin(
                first_col * grid.step, last_row * grid.step + grid.side, grid.gsd, grid.gsd
            ),
            width=int(cols.max() - first_col) * grid.stride + grid.size,
            height=int(last_row - rows.min()) * grid.stride + grid.size,
            add_alpha=not raster.alpha,
        )
        return source, vrt, first_col, last_row


def read_extent(path: str, crs: str, bounds: Bounds, gsd: float) -> NDArray[Any]:
    """A raster (bands, h, w) over `bounds` of `crs` at `gsd`: bilinear, in its own dtype."""
    left, bottom, right, top = bounds
    with (
        _open(path) as source,
        WarpedVRT(
            source,
            crs=crs,
            resampling=Resampling.bilinear,
            transform=from_origin(left, top, gsd, gsd),
            width=round((right - left) / gsd),
            height=round((top - bottom) / gsd),
        ) as vrt,
    ):
        values: NDArray[Any] = vrt.read()
        return values


def common_format(rasters: Iterable[Raster], what: str) -> tuple[int, str]:
    """The bands and dtype that all rasters have.

    Args:
        what: names the rasters in the error.

    Raises:
        GeomatchError: they differ.
    """
    formats: dict[tuple[int, str], Raster] = {}
    for raster in rasters:
        formats.setdefault((raster.bands, raster.dtype), raster)
    if len(formats) > 1:
        a, b = list(formats.values())[:2]
        raise GeomatchError(
            f"{what}: {a.name} has {a.bands} bands of {a.dtype}, "
            f"but {b.name} has {b.bands} of {b.dtype}",
            "Convert them alike with gdal_translate, or narrow the glob.",
        )
    return next(iter(formats))

"""Windowed reading of rasters on the ground grid: never a whole image in memory."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import math
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from geomatch.geo import collars, views
from geomatch.geo.grid import Grid, utm_epsg
from geomatch.geo.views import Layout, Reading

Bounds = tuple[float, float, float, float]
Pixels = NDArray[np.uint8]

RASTER_SUFFIXES = {".tif", ".tiff", ".jp2", ".vrt", ".img", ".png", ".jpg", ".jpeg", ".gti"}
STRETCH_FILES, STRETCH_SIDE = 256, 256
"""A percentile stretch samples at most 256 files, each reduced to at most 256 pixels a side."""

NAMES_SHOWN = 5
"""How many files an error lists."""

_WARNINGS = threading.Lock()
"""Filters of warnings are those of all threads."""


@dataclass(frozen=True)
class Raster:
    """What the header of a raster says.

    Attributes:
        crs: WKT; "" of an image without georeference.
        bounds: left, bottom, right, top in `crs`, or in pixels without one.
        layout: how its bands are read.
        stamp: size in bytes and modification time in nanoseconds of the file.
        collar: path of the raster that masks its collar, made when it is first read; "" for none.
    """

    path: str
    crs: str
    bounds: Bounds
    layout: Layout
    stamp: tuple[int, int]
    collar: str = ""

    @property
    def bands(self) -> int:
        """Number of image bands, without an alpha band."""
        return len(self.layout.bands)

    @property
    def dtype(self) -> str:
        return self.layout.dtype

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


def inspect(path: str, reading: Reading | None = None, masks: Path | None = None) -> Raster:
    """Read a raster's header.

    Args:
        reading: how imagery is read; None for labels and masks.
        masks: folder for masks of collars, where the reading asks for them.

    Raises:
        GeomatchError: it cannot be opened or has no CRS, or as for `views.layout`.
    """
    with _open(path) as source, _reading(path):
        if source.crs is None:
            raise GeomatchError(
                f"{path} has no CRS",
                "Assign the one it is in, for example: gdal_edit.py -a_srs EPSG:2154 FILE",
            )
        rows, cols = (0, 0, source.height, source.height), (0, source.width, 0, source.width)
        xs, ys = xy(source.transform, rows, cols, offset="ul")
        stat = os.stat(path)
        stamp = (stat.st_size, stat.st_mtime_ns)
        chosen = views.layout(source, path, reading)
        collar = ""
        if masks and chosen.collar:
            key = repr((path, stamp, chosen)).encode(errors="surrogateescape")
            collar = str(masks / f"{hashlib.sha256(key).hexdigest()[:32]}.tif")
        return Raster(
            path=path,
            crs=source.crs.to_wkt(),
            bounds=(float(min(xs)), float(min(ys)), float(max(xs)), float(max(ys))),
            layout=chosen,
            stamp=stamp,
            collar=collar,
        )


def is_georeferenced(path: str) -> bool:
    """Whether a file is a raster with a CRS and a place in it."""
    try:
        with _open(path) as source:
            return source.crs is not None and not source.transform.is_identity
    except GeomatchError:
        return False


def _open(path: str) -> Any:
    try:
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            return rasterio.open(path)
    except RasterioError as error:
        raise GeomatchError(
            f"{path} cannot be opened as a raster: {error}",
            "Check the file with gdalinfo; leave it out or replace it.",
        ) from error


def _open_view(raster: Raster) -> Any:
    """A raster as a dataset of its image bands, then its alpha band if it has one."""
    source = _open(raster.path)
    if raster.layout.as_stored:
        return source
    with source:
        if raster.collar and not os.path.exists(raster.collar):
            _write_collar(raster, collars.LOSSY_TOLERANCE if collars.is_lossy(source) else 0)
        return rasterio.open(views.vrt(source, raster.layout, raster.collar))


def _write_collar(raster: Raster, tolerance: int) -> None:
    with _open_view(replace(raster, collar="")) as view:

        def read(window: Window) -> tuple[NDArray[Any], NDArray[np.bool_]]:
            bands = list(range(1, raster.bands + 1))
            values = view.read(bands, window=window)
            valid = view.read_masks(bands, window=window).any(axis=0)
            if _has_alpha(view):
                valid &= view.read(raster.bands + 1, window=window) > 0
            if values.dtype.kind == "f":
                valid &= np.isfinite(values).all(axis=0)
            return values, valid

        is_byte = raster.dtype == "uint8"
        collars.write_mask(view, raster.collar, read, tolerance if is_byte else 0)


def _has_alpha(view: Any) -> bool:
    return bool(view.colorinterp[-1] == ColorInterp.alpha)


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
        GeomatchError: percentiles are of a band that has no valid pixel.
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
        with _reading(raster.path), _open_view(raster) as source:
            shape = (min(source.height, STRETCH_SIDE), min(source.width, STRETCH_SIDE))
            for band in range(bands):
                values = source.read(band + 1, out_shape=shape, masked=True)
                if _has_alpha(source):  # GDAL's mask has it only beside one or three bands
                    values[source.read(bands + 1, out_shape=shape) == 0] = np.ma.masked
                valid = values.compressed()
                samples[band].append(valid[np.isfinite(valid)])
    found = [np.concatenate(band) for band in samples]
    for values, number in zip(found, rasters[0].layout.bands, strict=True):
        if not len(values):
            more = f" and {len(rasters) - 1} more" if len(rasters) > 1 else ""
            raise GeomatchError(
                f"band {number} of {rasters[0].path}{more} has no valid pixel to measure "
                f"--stretch {text} by",
                "Leave the year out, correct its nodata value, or give --stretch MIN,MAX.",
            )
    limits = [np.percentile(band, [low, high]) for band in found]
    return Stretch(tuple(float(v[0]) for v in limits), tuple(float(v[1]) for v in limits))


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Name the raster in errors of reading it."""
    try:
        yield
    except RasterioError as error:
        raise GeomatchError(
            f"{path} is damaged: {error.__cause__ or error}",
            "Replace the file or leave it out, then run the same command again.",
        ) from error


class GridReader:
    """Reads cells of a grid, in one CRS, from the rasters of one year.

    Rasters are read in the order given; each fills the pixels that earlier ones left invalid.

    Args:
        rasters: all of the same bands and dtype.
        crs: of the cells, "EPSG:n".
        nearest: resample by nearest neighbour (labels) instead of bilinearly (images).
        stretch: to uint8, for rasters of another dtype.
    """

    def __init__(
        self,
        rasters: Sequence[Raster],
        grid: Grid,
        crs: str,
        *,
        nearest: bool = False,
        stretch: Stretch | None = None,
    ) -> None:
        self._grid = grid
        self._crs = crs
        self._resampling = Resampling.nearest if nearest else Resampling.bilinear
        self._stretch = stretch
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

    def read(self, col: int, row: int) -> tuple[Pixels, NDArray[np.bool_], str]:
        """One cell: pixels (size, size, bands), valid (size, size), name of its first raster.

        Raises:
            GeomatchError: a raster is damaged.
        """
        size, bands = self._grid.size, self._rasters[0].bands
        pixels = np.zeros((size, size, bands), np.uint8)
        valid = np.zeros((size, size), bool)
        first = ""
        left, bottom, right, top = self._grid.bounds(np.asarray(col), np.asarray(row))
        for i, box in enumerate(self._bounds):
            if box[0] >= right or box[2] <= left or box[1] >= top or box[3] <= bottom:
                continue
            values, mask = self._window(i, col, row)
            fill = mask & ~valid
            if fill.any():
                pixels[fill] = values[fill]
                valid |= mask
                first = first or self._rasters[i].name
            if valid.all():
                break
        return pixels, valid, first

    def _window(self, i: int, col: int, row: int) -> tuple[Pixels, NDArray[np.bool_]]:
        raster, grid = self._rasters[i], self._grid
        with _reading(raster.path):
            if i not in self._open:
                self._open[i] = self._warp(i)
            _, vrt, first_col, last_row = self._open[i]
            offset_x = (col - first_col) * grid.stride
            offset_y = (last_row - row) * grid.stride
            values = vrt.read(window=Window(offset_x, offset_y, grid.size, grid.size))
        return _pixels(values, raster, vrt.nodata, self._stretch)

    def _warp(self, i: int) -> tuple[Any, WarpedVRT, int, int]:
        """A raster warped onto the grid: (dataset, WarpedVRT, its first column, its last row)."""
        grid, raster = self._grid, self._rasters[i]
        cols, rows = grid.touching(self._bounds[i])
        first_col, last_row = int(cols.min()), int(rows.max())
        source = _open_view(raster)
        vrt = WarpedVRT(
            source,
            crs=self._crs,
            resampling=self._resampling,
            transform=from_origin(
                first_col * grid.step, last_row * grid.step + grid.side, grid.gsd, grid.gsd
            ),
            width=int(cols.max() - first_col) * grid.stride + grid.size,
            height=int(last_row - rows.min()) * grid.stride + grid.size,
            add_alpha=not _has_alpha(source),
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
        _reading(raster.path),
        _open_view(raster) as source,
        WarpedVRT(
            source,
            crs=crs,
            resampling=Resampling.bilinear,
            transform=from_origin(left, top, gsd, gsd),
            width=round((right - left) / gsd),
            height=round((top - bottom) / gsd),
            add_alpha=not _has_alpha(source),
        ) as vrt,
    ):
        pixels, valid = _pixels(vrt.read(), raster, vrt.nodata, stretch)
    return np.where(valid[..., None], pixels, np.uint8(0))


def _pixels(
    values: NDArray[Any], raster: Raster, nodata: float | None, stretch: Stretch | None
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


def inspect_plain(path: str, reading: Reading, channels: int = 3) -> Raster:
    """Read the header of a raster as an image without a place: no CRS, bounds in pixels.

    Args:
        channels: unless the reading names bands, the first so many are read, if there are so many;
            else the first three, or the first.

    Raises:
        GeomatchError: it cannot be opened, or as for `views.layout`.
    """
    with _open(path) as source, _reading(path):
        kinds = source.colorinterp
        if not reading.bands and kinds[0] != ColorInterp.palette:
            image = [n for n, kind in enumerate(kinds, 1) if kind != ColorInterp.alpha]
            count = next(n for n in (channels, 3, 1) if n <= len(image))
            reading = replace(reading, bands=tuple(image[:count]))
        stat = os.stat(path)
        return Raster(
            path=path,
            crs="",
            bounds=(0.0, 0.0, float(source.width), float(source.height)),
            layout=views.layout(source, path, reading),
            stamp=(stat.st_size, stat.st_mtime_ns),
        )


def read_plain(raster: Raster) -> NDArray[Any]:
    """All of a raster's image bands (bands, h, w) in their own dtype.

    Raises:
        GeomatchError: it is damaged.
    """
    with _reading(raster.path), _open_view(raster) as source:
        values: NDArray[Any] = source.read(list(range(1, raster.bands + 1)))
    return values


def common_format(rasters: Iterable[Raster], what: str) -> tuple[int, str]:
    """The bands and dtype that all rasters have.

    Args:
        what: names the rasters in the error.

    Raises:
        GeomatchError: they differ.
    """
    formats: dict[tuple[int, str], list[str]] = {}
    for raster in rasters:
        formats.setdefault((raster.bands, raster.dtype), []).append(raster.name)
    if len(formats) > 1:
        by_number = sorted(formats.items(), key=lambda item: -len(item[1]))
        texts = [
            f"{bands} band{'s'[: bands > 1]} of {dtype} in {listed(names)}"
            for (bands, dtype), names in by_number
        ]
        raise GeomatchError(
            f"{what}: " + ", but ".join(texts),
            "Choose bands that all have (--bands), convert them alike with gdal_translate, or "
            "narrow the glob.",
        )
    return next(iter(formats))


def listed(names: Sequence[str]) -> str:
    """The first few names."""
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"

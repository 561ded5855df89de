"""Windowed reading of rasters on the ground grid: never a whole image in memory."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import math
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError, CPLE_NotSupportedError
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.transform import Affine, from_origin, xy
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform, transform_bounds
from rasterio.windows import Window

from geomatch.errors import BadFileError, GeomatchError, UsageError, listed
from geomatch.geo import collars, files, views
from geomatch.geo.grid import CRS84, Grid, utm_epsg
from geomatch.geo.views import Layout, Reading

Bounds = tuple[float, float, float, float]
Pixels = NDArray[np.uint8]

GDAL_ERRORS = (RasterioError, CRSError, CPLE_BaseError)
"""What rasterio raises: its own errors, and GDAL's, which it hands on."""

MAX_OPEN = 16
"""Rasters that a reader keeps open. A process has up to three readers (images, labels, changed
ground), and GDAL keeps 100 sources of VRTs open; macOS allows a process 256 files."""
NOWHERE: Bounds = (math.inf, math.inf, -math.inf, -math.inf)
"""A box that meets no other."""
REACH = 6.0
"""Degrees around the area of use of a grid's CRS that may be gridded in it."""
FARTHEST = 1e9
"""Largest coordinate in any unit; PROJ takes for ever to wrap much larger ones."""
ASSIGN = "Assign the one it is in, for example: gdal_edit.py -a_srs EPSG:2154 FILE"
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
        lonlat: west, south, east, north of a box around it in degrees; east is more than 180 if
            the box crosses that meridian.
        layout: how its bands are read.
        stamp: see `files.stamp`; of the file, then of the others that it is read from.
        collar: path of the raster that masks its collar, made when it is first read; "" for none.
    """

    path: str
    crs: str
    bounds: Bounds
    lonlat: Bounds
    layout: Layout
    stamp: tuple[int, ...]
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
        return os.fsencode(os.path.basename(self.path)).decode(errors="backslashreplace")


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
        found = [str(p) for p in path.iterdir() if _is_named_raster(p)]
    else:
        found = [p for p in glob.glob(str(path), recursive=True) if os.path.isfile(p)]
    if not found:
        deeper = next((p for p in path.rglob("*") if _is_named_raster(p)), None)
        raise GeomatchError(
            f"{what}: no file matches {pattern}",
            f"Its folders hold rasters: '{path}/**/*{deeper.suffix}'"
            if deeper
            else "Give a folder of rasters, a file, or a quoted glob such as 'ortho/*.tif'.",
        )
    return [os.path.abspath(p) for p in sorted(found)]


def _is_named_raster(path: Path) -> bool:
    """Whether a file of a folder is taken; hidden ones are companions (._NAME) of Macs' files."""
    return path.suffix.lower() in RASTER_SUFFIXES and not path.name.startswith(".")


def inspect(path: str, reading: Reading | None = None, masks: Path | None = None) -> Raster:
    """Read a raster's header.

    Args:
        reading: how imagery is read; None for labels and masks.
        masks: folder for masks of collars, where the reading asks for them.

    Raises:
        BadFileError: it cannot be opened, or does not say where on the Earth it lies, or as for
            `views.layout`.
    """
    with _open(path) as source, _reading(path):
        _check_georeference(path, source)
        rows, cols = (0, 0, source.height, source.height), (0, source.width, 0, source.width)
        xs, ys = xy(source.transform, rows, cols, offset="ul")
        bounds = (float(min(xs)), float(min(ys)), float(max(xs)), float(max(ys)))
        crs = source.crs.to_wkt()
        times = files.stamp(path, *files.behind(source))
        chosen = views.layout(source, path, reading)
        collar = ""
        if masks and chosen.collar:
            key = repr((path, times, chosen)).encode(errors="surrogateescape")
            collar = str(masks / f"{hashlib.sha256(key).hexdigest()[:32]}.tif")
        return Raster(
            path=path,
            crs=crs,
            bounds=bounds,
            lonlat=_lonlat(path, crs, bounds),
            layout=chosen,
            stamp=times,
            collar=collar,
        )


def is_georeferenced(path: str) -> bool:
    """Whether a file is a raster with a CRS and a geotransform."""
    try:
        with _open(path) as source:
            return source.crs is not None and _has_geotransform(source)
    except GeomatchError:
        return False


def opens(path: str) -> bool:
    """Whether GDAL opens a file as a raster."""
    try:
        _open(path).close()
    except GeomatchError:
        return False
    return True


def _has_geotransform(source: Any) -> bool:
    """Whether pixels have a place.

    Where a file gives none, GDAL has rows and columns, which it does not warp in either direction.
    """
    at = source.transform
    is_unset = (at.a, at.b, at.c, at.d, abs(at.e), at.f) == (1, 0, 0, 0, 1, 0)
    return not is_unset and 0 < abs(at.determinant) < math.inf


def _check_georeference(path: str, source: Any) -> None:
    is_placed, (points, points_crs) = _has_geotransform(source), source.gcps
    if not is_placed and (points or source.rpcs):
        how = f"{len(points)} ground control points" if points else "RPCs"
        code = points_crs.to_epsg() if points_crs else None
        options = "" if points else " -rpc -to RPC_DEM=DEM.tif"
        raise BadFileError(
            path,
            f"is placed by {how}, without a geotransform",
            f"Rectify it first: gdalwarp -r bilinear{options} -t_srs EPSG:{code or 'n'} IN OUT",
        )
    if source.crs is None and not is_placed:
        raise BadFileError(
            path,
            "has no CRS and no geotransform",
            "Georeference it first; for images without a place: geomatch tile --folders or --pairs",
        )
    if source.crs is None:
        raise BadFileError(path, "has no CRS", ASSIGN)
    if not is_placed:
        raise BadFileError(
            path,
            "has a CRS, but no geotransform, so that its place is unknown",
            "Add a world file, or: gdal_edit.py -a_ullr LEFT TOP RIGHT BOTTOM FILE",
        )
    check_crs(path, source.crs.to_wkt(), ASSIGN)


def _lonlat(path: str, crs: str, bounds: Bounds) -> Bounds:
    """`Raster.lonlat`; the whole Earth where PROJ cannot convert the edges."""
    lon = lat = math.inf
    if max(map(abs, bounds)) < FARTHEST:
        with contextlib.suppress(GeomatchError):
            lon, lat = _centre_lonlat(crs, bounds)
    if not (abs(lon) <= 540 and abs(lat) <= 90):
        x, y = (bounds[0] + bounds[2]) / 2, (bounds[1] + bounds[3]) / 2
        raise BadFileError(
            path, f'has its centre at {x:g}, {y:g}, outside of its CRS "{crs_name(crs)}"', ASSIGN
        )
    west, south, east, north = project_bounds(crs, bounds, CRS84)
    if not np.isfinite([west, south, east, north]).all():
        return -180.0, -90.0, 180.0, 90.0
    return west, south, east + 360 * (east < west), north


def _open(path: str) -> Any:
    check_proj()
    try:
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            return rasterio.open(files.gdal_path(path))
    except GDAL_ERRORS as error:
        _check_limits(error)
        reason = str(error).replace(files.gdal_path(path), path)
        raise BadFileError(
            path,
            f"cannot be opened as a raster: {reason}",
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


def _check_limits(error: BaseException) -> None:
    """Tell a limit of this process from the defect of a file.

    Raises:
        GeomatchError: GDAL says that too many files are open.
    """
    reason = os.strerror(errno.EMFILE)
    if reason in f"{error} {error.__cause__}":
        raise GeomatchError(
            f"{reason.lower()}: the system's limit for a process is very low",
            "Raise it, then run the same command: ulimit -n 1024",
        ) from error


# Coordinate reference systems


@functools.cache
def check_proj() -> None:
    """Check that PROJ can use its database.

    Raises:
        GeomatchError: it cannot, most likely because the environment names another program's.
    """
    try:
        with rasterio.Env():  # without it, GDAL prints its errors as well
            CRS.from_epsg(4326)
    except CRSError as error:
        named = [name for name in ("PROJ_DATA", "PROJ_LIB") if name in os.environ]
        where = "".join(f"{name}={os.environ[name]}: " for name in named)
        raise GeomatchError(
            f"{where}PROJ cannot use this database of CRSs: {str(error).rpartition('PROJ: ')[2]}",
            f"This is not rasterio's own database. Run: unset {' '.join(named)}"
            if named
            else "Install rasterio again: pip install --force-reinstall rasterio",
        ) from error


def check_crs(path: str, crs: str, hint: str) -> None:
    """Check that coordinates in the CRS of a file have a place on the Earth.

    Raises:
        BadFileError: the CRS is local (an engineering CRS), vertical or of another planet.
    """
    known = CRS.from_user_input(crs)
    has_place = known.is_projected or known.is_geographic
    try:
        project_points(crs, np.zeros(1), np.zeros(1), CRS84)
    except GeomatchError as error:  # else the point alone has none
        has_place = has_place and not isinstance(error.__cause__, CPLE_NotSupportedError)
    if not has_place:
        raise BadFileError(path, f'is in "{crs_name(crs)}", which has no place on the Earth', hint)


def crs_name(crs: str) -> str:
    """The name of a CRS, such as "RGF93 v1 / Lambert-93"."""
    described: dict[str, Any] = CRS.from_user_input(crs).to_dict(projjson=True)
    return str(described.get("name", crs))


def project_bounds(crs: str, bounds: Bounds, target: str) -> Bounds:
    """The box in `target` that encloses `bounds` of `crs`; any CRS string of rasterio.

    In degrees, left is greater than right where the box crosses 180. What PROJ cannot convert is
    infinite.

    Raises:
        GeomatchError: the CRSs have nothing in common.
    """
    with _projecting(crs, target):
        left, bottom, right, top = transform_bounds(
            CRS.from_user_input(crs), CRS.from_user_input(target), *bounds, densify_pts=21
        )
    return float(left), float(bottom), float(right), float(top)


def project_points(
    crs: str, x: NDArray[np.float64], y: NDArray[np.float64], target: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Transform points from `crs` to `target`.

    Raises:
        GeomatchError: the CRSs have nothing in common, or a point lies outside of one.
    """
    with _projecting(crs, target):
        xs, ys = transform(CRS.from_user_input(crs), CRS.from_user_input(target), x, y)
    return np.asarray(xs, np.float64), np.asarray(ys, np.float64)


def is_geographic(crs: str) -> bool:
    """Whether coordinates are longitudes and latitudes."""
    return bool(CRS.from_user_input(crs).is_geographic)


@contextlib.contextmanager
def _projecting(crs: str, target: str) -> Iterator[None]:
    check_proj()
    try:
        with rasterio.Env():  # without it, GDAL prints its errors as well
            yield
    except GDAL_ERRORS as error:
        raise GeomatchError(
            f"coordinates cannot be converted from {crs_name(crs)} to {crs_name(target)}",
            "Check the CRS of the files with gdalinfo or ogrinfo.",
        ) from error


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
    lon, lat = _centre_lonlat(raster.crs, raster.bounds)
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


def _centre_lonlat(crs: str, bounds: Bounds) -> tuple[float, float]:
    left, bottom, right, top = bounds
    x, y = np.asarray([(left + right) / 2]), np.asarray([(bottom + top) / 2])
    lon, lat = project_points(crs, x, y, CRS84)
    return float(lon[0]), float(lat[0])


@functools.cache
def _area_of_use(crs: str) -> Bounds | None:
    """West, south, east, north in degrees, with east more than 180 where it crosses that meridian.

    None where PROJ does not know.
    """
    area = CRS.from_user_input(crs).to_dict(projjson=True).get("bbox")
    if area is None:
        return None
    west, south, east, north = (
        float(area[f"{side}_{kind}"])
        for side, kind in (
            ("west", "longitude"),
            ("south", "latitude"),
            ("east", "longitude"),
            ("north", "latitude"),
        )
    )
    return west, south, east + 360 * (east <= west), north


def check_zone(raster: Raster, crs: str) -> None:
    """Refuse a raster far outside the area of use of a fixed grid CRS.

    Raises:
        GeomatchError: its centre is more than `REACH` degrees away from that area.
    """
    area = _area_of_use(crs)
    if area is None:
        return
    west, south, east, north = area
    lon, lat = _centre_lonlat(raster.crs, raster.bounds)
    past_west = (lon - west) % 360
    outside = max(0.0, min(past_west - (east - west), 360 - past_west), south - lat, lat - north)
    if outside > REACH:
        raise GeomatchError(
            f"{raster.path} is {outside:.0f} degrees from the area of use of the grid's {crs}",
            "Use the UTM zone of each place: --crs utm",
        )


def bounds_in(raster: Raster, crs: str) -> Bounds:
    """The box in a projected CRS that encloses a raster.

    Projections fold over far from their area of use: what is more than `REACH` degrees from it is
    not there, and of a raster wider than that, the rest is not enclosed.

    Raises:
        GeomatchError: the raster cannot be converted to that CRS.
    """
    area = _area_of_use(crs)
    if area is None or CRS.from_user_input(raster.crs) == CRS.from_user_input(crs):
        return _finite(raster, crs, raster.crs, raster.bounds)
    west, south, east, north = raster.lonlat
    reach = min(REACH, (360 - area[2] + area[0]) / 2)
    bottom, top = max(south, area[1] - REACH), min(north, area[3] + REACH)
    spans = [
        (max(west + turn, area[0] - reach), min(east + turn, area[2] + reach))
        for turn in (-360, 0, 360)
    ]
    spans = [(left, right) for left, right in spans if left < right]
    if not spans or bottom >= top:
        return NOWHERE
    if east - west <= 2 * REACH:
        return _finite(raster, crs, raster.crs, raster.bounds)
    left, right = min(span[0] for span in spans), max(span[1] for span in spans)
    return _finite(raster, crs, CRS84, (left, bottom, right, top))


def _finite(raster: Raster, crs: str, bounds_crs: str, bounds: Bounds) -> Bounds:
    with _converting(raster, crs):
        box = project_bounds(bounds_crs, bounds, crs)
        if not np.isfinite(box).all():
            raise GeomatchError("infinite")
    return box


@contextlib.contextmanager
def _converting(raster: Raster, crs: str) -> Iterator[None]:
    """Name the raster in errors of converting its coordinates."""
    try:
        yield
    except GeomatchError as error:
        raise BadFileError(
            raster.path,
            f"cannot be converted from {crs_name(raster.crs)} to {crs}, {crs_name(crs)}",
            "Check its CRS with gdalinfo, or choose that of the grid: --crs utm, or an EPSG code.",
        ) from error


def _turns(raster: Raster) -> list[float]:
    """Distances in x by which a raster is to be moved for GDAL to find all of it.

    Where x jumps at 180 degrees of longitude, GDAL looks for ground past them on the other side
    alone. That is so in degrees and in cylindrical projections, but not in a UTM zone.
    """
    (west, _, east, _), (left, _, right, _) = raster.lonlat, raster.bounds
    if west >= -180 and east <= 180:
        return [0.0]
    first, last = -180.0, 180.0
    if not CRS.from_user_input(raster.crs).is_geographic:
        _, lat = _centre_lonlat(raster.crs, raster.bounds)
        edges, _ = project_points(CRS84, np.array([first, last]), np.full(2, lat), raster.crs)
        first, last = edges
    around = float(last - first)
    if around < 1:
        return [0.0]
    return [0.0, *([around] if left < first else []), *([-around] if right > last else [])]


def ground_sample_distance(raster: Raster, crs: str) -> float:
    """Side in metres of `crs` of a square as large as a raster's central pixel.

    Three significant digits.
    """
    with _open(raster.path) as source:
        col, row = source.width / 2, source.height / 2
        xs, ys = xy(source.transform, [row, row, row + 1], [col, col + 1, col], offset="ul")
    with _converting(raster, crs):
        x, y = project_points(raster.crs, np.asarray(xs), np.asarray(ys), crs)
    area = (x[1] - x[0]) * (y[2] - y[0]) - (x[2] - x[0]) * (y[1] - y[0])
    return float(f"{abs(area) ** 0.5:.3g}")


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


def blocks(raster: Raster) -> Iterator[NDArray[Any]]:
    """The valid values of the first band, block by block.

    Raises:
        GeomatchError: the raster is damaged.
    """
    with _reading(raster.path), _open_view(raster) as source:
        for _, window in source.block_windows(1):
            yield source.read(1, window=window, masked=True).compressed()


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Read with one thread, and name the raster in errors.

    With more threads, GDAL before 3.12 reads some VRTs a pixel off (its issue 13464); and there
    already is a process for each core.
    """
    try:
        with rasterio.Env(GDAL_NUM_THREADS="1"):
            yield
    except GDAL_ERRORS as error:
        _check_limits(error)
        raise BadFileError(
            path,
            f"is damaged: {error.__cause__ or error}",
            "Replace the file or leave it out, then run the same command again.",
        ) from error


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
        turned = [(raster, turn) for raster in rasters for turn in _turns(raster)]
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
        with _reading(raster.path):
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
        source = _open_view(raster)
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
        return Raster(
            path=path,
            crs="",
            bounds=(0.0, 0.0, float(source.width), float(source.height)),
            lonlat=NOWHERE,
            layout=views.layout(source, path, reading),
            stamp=files.stamp(path),
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
            f"{bands} band{'s'[: bands > 1]} of {dtype} in {listed(names, NAMES_SHOWN)}"
            for (bands, dtype), names in by_number
        ]
        raise GeomatchError(
            f"{what}: " + ", but ".join(texts),
            "Choose bands that all have (--bands), convert them alike with gdal_translate, or "
            "narrow the glob.",
        )
    return next(iter(formats))

"""Raster files: finding and opening them, and what their headers say."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import math
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import xy
from rasterio.windows import Window

from geomatch.errors import BadFileError, GeomatchError, listed
from geomatch.geo import files, views
from geomatch.geo.coordinates import (
    FARTHEST,
    GDAL_ERRORS,
    NOWHERE,
    Bounds,
    centre_lonlat,
    check_crs,
    check_proj,
    crs_name,
    project_bounds,
)
from geomatch.geo.grid import CRS84
from geomatch.geo.views import Layout, Reading

Pixels = NDArray[np.uint8]

ASSIGN = "Assign the one it is in, for example: gdal_edit.py -a_srs EPSG:2154 FILE"
RASTER_SUFFIXES = {".tif", ".tiff", ".jp2", ".vrt", ".img", ".png", ".jpg", ".jpeg", ".gti"}

NAMES_SHOWN = 5
"""How many files an error lists."""


class _Unwarned:
    """Within, a raster without georeference gives no warning; filters are those of all threads."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._filters = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._filters.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._filters.close()


_unwarned = _Unwarned()


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
        behind: paths of all files that `stamp` is of, or would be of if they were there.
    """

    path: str
    crs: str
    bounds: Bounds
    lonlat: Bounds
    layout: Layout
    stamp: tuple[int, ...]
    collar: str = ""
    behind: tuple[str, ...] = ()

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


def find(pattern: str, what: str) -> list[str]:
    """Files of a folder, a glob or a single path, sorted by name.

    A glob that names no suffix, such as `ortho/*`, takes what a folder would, if there is any:
    world files and `.aux.xml` lie beside rasters.

    Raises:
        GeomatchError: no file matches.
    """
    path = Path(pattern).expanduser()
    if pattern.startswith("/vsi"):  # a file in an archive, which GDAL alone sees
        return [pattern]
    if path.is_file():  # before globs: a name may contain brackets
        found = [str(path)]
    elif path.is_dir():
        found = [str(p) for p in path.iterdir() if _is_named_raster(p)]
    else:
        found = [p for p in glob.glob(str(path), recursive=True) if os.path.isfile(p)]
        if "*" in path.suffix or not path.suffix:
            found = [p for p in found if _is_named_raster(Path(p))] or found
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
    found = placed(read_header(path, reading))
    return replace(found, collar=collar_of(found, masks))


def read_header(path: str, reading: Reading | None = None) -> Raster:
    """What `inspect` reads of a file; `placed` does the rest, without opening it.

    Any thread may call it, but PROJ transforms coordinates in the main thread alone: GDAL keeps its
    transformations, which outlive the thread that they were made in, and crashes.
    """
    with open_raster(path) as source, guarded(path):
        _check_georeference(path, source)
        rows, cols = (0, 0, source.height, source.height), (0, source.width, 0, source.width)
        xs, ys = xy(source.transform, rows, cols, offset="ul")
        behind = tuple(dict.fromkeys((path, *files.behind(source))))
        return Raster(
            path=path,
            crs=source.crs.to_wkt(),
            bounds=(float(min(xs)), float(min(ys)), float(max(xs)), float(max(ys))),
            lonlat=NOWHERE,
            layout=views.layout(source, path, reading),
            stamp=files.stamp(*behind),
            behind=behind,
        )


def placed(raster: Raster) -> Raster:
    """A raster with `lonlat`.

    Raises:
        BadFileError: its CRS or its bounds have no place on the Earth.
    """
    if raster.lonlat != NOWHERE:
        return raster
    check_crs(raster.path, raster.crs, ASSIGN)
    return replace(raster, lonlat=_lonlat(raster.path, raster.crs, raster.bounds))


def collar_of(raster: Raster, masks: Path | None) -> str:
    """`Raster.collar` in a folder for masks of collars."""
    if masks is None or not raster.layout.collar:
        return ""
    key = repr((raster.path, raster.stamp, raster.layout)).encode(errors="surrogateescape")
    return str(masks / f"{hashlib.sha256(key).hexdigest()[:32]}.tif")


def inspect_plain(path: str, reading: Reading, channels: int = 3) -> Raster:
    """Read the header of a raster as an image without a place: no CRS, bounds in pixels.

    Args:
        channels: unless the reading names bands, the first so many are read, if there are so many;
            else the first three, or the first.

    Raises:
        GeomatchError: it cannot be opened, or as for `views.layout`.
    """
    with open_raster(path) as source, guarded(path):
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


def is_georeferenced(path: str) -> bool:
    """Whether a file is a raster with a CRS and a geotransform."""
    try:
        with open_raster(path) as source:
            return source.crs is not None and _has_geotransform(source)
    except GeomatchError:
        return False


def opens(path: str) -> bool:
    """Whether GDAL opens a file as a raster."""
    try:
        open_raster(path).close()
    except GeomatchError:
        return False
    return True


def _has_geotransform(source: Any) -> bool:
    """Whether pixels have a place.

    Where a file gives none, GDAL has rows and columns, which it does not warp in either direction.
    """
    at = source.transform
    is_unset = (at.a, at.b, at.c, at.d, abs(at.e), at.f) == (1, 0, 0, 0, 1, 0)
    is_finite = all(map(math.isfinite, at)) and abs(at.determinant) < math.inf
    return not is_unset and is_finite and at.determinant != 0


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


def _lonlat(path: str, crs: str, bounds: Bounds) -> Bounds:
    """`Raster.lonlat`; the whole Earth where PROJ cannot convert the edges."""
    lon = lat = math.inf
    if max(map(abs, bounds)) < FARTHEST:
        with contextlib.suppress(GeomatchError):
            lon, lat = centre_lonlat(crs, bounds)
    if not (abs(lon) <= 540 and abs(lat) <= 90):
        x, y = (bounds[0] + bounds[2]) / 2, (bounds[1] + bounds[3]) / 2
        raise BadFileError(
            path, f'has its centre at {x:g}, {y:g}, outside of its CRS "{crs_name(crs)}"', ASSIGN
        )
    west, south, east, north = project_bounds(crs, bounds, CRS84)
    if not np.isfinite([west, south, east, north]).all():
        return -180.0, -90.0, 180.0, 90.0
    return west, south, east + 360 * (east < west), north


def open_raster(path: str, mode: str = "r", overview: int | None = None) -> Any:
    """Open a raster, or one of its overviews, numbered from 0.

    Raises:
        BadFileError: GDAL cannot.
    """
    options = {} if overview is None else {"OVERVIEW_LEVEL": overview}
    check_proj()
    try:
        with _unwarned:
            return rasterio.open(files.gdal_path(path), mode, **options)
    except GDAL_ERRORS as error:
        _check_limits(error)
        reason = str(error).replace(files.gdal_path(path), path)
        raise BadFileError(
            path,
            f"cannot be opened as a raster: {reason}",
            "Check the file with gdalinfo; leave it out or replace it.",
        ) from error


def open_view(raster: Raster, overview: int | None = None) -> Any:
    """A raster as a dataset of its image bands, then its alpha band if it has one.

    Args:
        overview: number of the overview, from 0, that takes its place; only without a collar.
    """
    source = open_raster(raster.path, overview=overview)
    if raster.layout.as_stored:
        return source
    with source:
        if raster.collar and not os.path.exists(raster.collar):
            _write_collar(raster, source)
        return rasterio.open(views.vrt(source, raster.layout, raster.collar, overview))


def _write_collar(raster: Raster, source: Any) -> None:
    from geomatch.geo import collars  # here, for it imports scipy

    tolerance = collars.LOSSY_TOLERANCE if collars.is_lossy(source) else 0
    with open_view(replace(raster, collar="")) as view:

        def read(window: Window) -> tuple[NDArray[Any], NDArray[np.bool_]]:
            bands = list(range(1, raster.bands + 1))
            values = view.read(bands, window=window)
            valid = view.read_masks(bands, window=window).any(axis=0)
            if has_alpha(view):
                valid &= view.read(raster.bands + 1, window=window) > 0
            if values.dtype.kind == "f":
                valid &= np.isfinite(values).all(axis=0)
            return values, valid

        is_byte = raster.dtype == "uint8"
        collars.write_mask(view, raster.collar, read, tolerance if is_byte else 0)


def has_alpha(view: Any) -> bool:
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


@contextlib.contextmanager
def guarded(path: str) -> Iterator[None]:
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


def read_plain(raster: Raster) -> NDArray[Any]:
    """All of a raster's image bands (bands, h, w) in their own dtype.

    Raises:
        GeomatchError: it is damaged.
    """
    with guarded(raster.path), open_view(raster) as source:
        values: NDArray[Any] = source.read(list(range(1, raster.bands + 1)))
    return values


def blocks(raster: Raster) -> Iterator[NDArray[Any]]:
    """The valid values of the first band, block by block.

    Raises:
        GeomatchError: the raster is damaged.
    """
    with guarded(raster.path), open_view(raster) as source:
        for _, window in source.block_windows(1):
            yield source.read(1, window=window, masked=True).compressed()


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

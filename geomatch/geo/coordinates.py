"""Coordinate reference systems: checks, and the conversion of boxes and points."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError, CPLE_NotSupportedError
from rasterio.crs import CRS
from rasterio.env import Env
from rasterio.errors import CRSError, RasterioError
from rasterio.warp import transform, transform_bounds

from geomatch.errors import BadFileError, GeomatchError, UsageError
from geomatch.geo.grid import CRS84

Bounds = tuple[float, float, float, float]

GDAL_ERRORS = (RasterioError, CRSError, CPLE_BaseError)
"""What rasterio raises: its own errors, and GDAL's, which it hands on."""
NOWHERE: Bounds = (math.inf, math.inf, -math.inf, -math.inf)
"""A box that meets no other."""
FARTHEST = 1e9
"""Largest coordinate in any unit; PROJ takes for ever to wrap much larger ones."""


@functools.cache
def check_proj() -> None:
    """Check that PROJ can use its database.

    Raises:
        GeomatchError: it cannot, most likely because the environment names another program's.
    """
    try:
        with Env():  # without it, GDAL prints its errors as well
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
    if not _has_place(crs):
        raise BadFileError(path, f'is in "{crs_name(crs)}", which has no place on the Earth', hint)


@functools.cache
def _has_place(crs: str) -> bool:
    known = CRS.from_user_input(crs)
    try:
        project_points(crs, np.zeros(1), np.zeros(1), CRS84)
    except GeomatchError as error:  # else the point alone has none
        if isinstance(error.__cause__, CPLE_NotSupportedError):
            return False
    return bool(known.is_projected or known.is_geographic)


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


@functools.cache
def is_same(crs: str, other: str) -> bool:
    """Whether coordinates in two CRSs are the same, as GDAL sees it."""
    return bool(CRS.from_user_input(crs) == CRS.from_user_input(other))


@contextlib.contextmanager
def _projecting(crs: str, target: str) -> Iterator[None]:
    check_proj()
    try:
        with Env():  # without it, GDAL prints its errors as well
            yield
    except GDAL_ERRORS as error:
        raise GeomatchError(
            f"coordinates cannot be converted from {crs_name(crs)} to {crs_name(target)}",
            "Check the CRS of the files with gdalinfo or ogrinfo.",
        ) from error


def check_grid_crs(text: str) -> str:
    """ "EPSG:n" of a configured code.

    Raises:
        UsageError: it is unknown, or not projected in metres.
    """
    try:
        crs = CRS.from_user_input(int(text) if text.isdigit() else text)
    except CRSError as error:
        raise UsageError(f"grid.crs = {text!r} is not a CRS", "Give an EPSG code.") from error
    if not is_metric(crs) or crs.to_epsg() is None:
        raise UsageError(
            f"grid.crs = {text!r} is not a projected CRS in metres with an EPSG code",
            'Give a national grid or a UTM zone, or "auto" or "utm".',
        )
    return f"EPSG:{crs.to_epsg()}"


def is_metric(crs: CRS) -> bool:
    return bool(crs.is_projected and abs(crs.linear_units_factor[1] - 1) < 1e-9)


def centre_lonlat(crs: str, bounds: Bounds) -> tuple[float, float]:
    left, bottom, right, top = bounds
    x, y = np.asarray([(left + right) / 2]), np.asarray([(bottom + top) / 2])
    lon, lat = project_points(crs, x, y, CRS84)
    return float(lon[0]), float(lat[0])


@functools.cache
def area_of_use(crs: str) -> Bounds | None:
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

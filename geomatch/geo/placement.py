"""Where rasters lie on a grid: the CRS that suits one, its box in another, its pixel size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from rasterio.crs import CRS
from rasterio.transform import xy

from geomatch.errors import BadFileError, GeomatchError
from geomatch.geo.coordinates import (
    NOWHERE,
    Bounds,
    area_of_use,
    centre_lonlat,
    crs_name,
    is_metric,
    is_same,
    project_bounds,
    project_points,
)
from geomatch.geo.grid import CRS84, utm_epsg
from geomatch.geo.rasters import Raster, open_raster

REACH = 6.0
"""Degrees around the area of use of a grid's CRS that may be gridded in it."""


def metric_crs(raster: Raster) -> str:
    """ "EPSG:n" of a raster's own CRS where tiles can be cut in it, else of its UTM zone.

    The UTM zone of the raster's centre replaces a geographic CRS, units other than the metre, Web
    Mercator (whose metres are not true on the ground) and a CRS without an EPSG code.
    """
    crs = CRS.from_user_input(raster.crs)
    code = crs.to_epsg()
    if code and code != 3857 and is_metric(crs):
        return f"EPSG:{code}"
    return utm_crs(raster)


def utm_crs(raster: Raster) -> str:
    """ "EPSG:n" of the UTM zone of a raster's centre."""
    lon, lat = centre_lonlat(raster.crs, raster.bounds)
    return f"EPSG:{int(utm_epsg(np.asarray(lon), np.asarray(lat)))}"


def check_zone(raster: Raster, crs: str) -> None:
    """Refuse a raster far outside the area of use of a fixed grid CRS.

    Raises:
        GeomatchError: its centre is more than `REACH` degrees away from that area.
    """
    area = area_of_use(crs)
    if area is None:
        return
    west, south, east, north = area
    lon, lat = centre_lonlat(raster.crs, raster.bounds)
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
    if is_same(raster.crs, crs):
        return raster.bounds
    area = area_of_use(crs)
    if area is None:
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


def turns(raster: Raster) -> list[float]:
    """Distances in x by which a raster is to be moved for GDAL to find all of it.

    Where x jumps at 180 degrees of longitude, GDAL looks for ground past them on the other side
    alone. That is so in degrees and in cylindrical projections, but not in a UTM zone.
    """
    (west, _, east, _), (left, _, right, _) = raster.lonlat, raster.bounds
    if west >= -180 and east <= 180:
        return [0.0]
    first, last = -180.0, 180.0
    if not CRS.from_user_input(raster.crs).is_geographic:
        _, lat = centre_lonlat(raster.crs, raster.bounds)
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
    with open_raster(raster.path) as source:
        col, row = source.width / 2, source.height / 2
        xs, ys = xy(source.transform, [row, row, row + 1], [col, col + 1, col], offset="ul")
    with _converting(raster, crs):
        x, y = project_points(raster.crs, np.asarray(xs), np.asarray(ys), crs)
    area = (x[1] - x[0]) * (y[2] - y[0]) - (x[2] - x[0]) * (y[1] - y[0])
    return float(f"{abs(area) ** 0.5:.3g}")

"""Footprints and centres of tiles in any CRS, and distances between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch.geo.grid import CRS84, Float64Array, Grid, Ints, great_circle


def rings(epsg: Ints, bounds: Float64Array, target: str) -> Float64Array:
    """Footprints of tiles as closed rings in `target`.

    Args:
        epsg: (n,) code of each tile's CRS.
        bounds: (n, 4) left, bottom, right, top in that CRS.

    Returns:
        (n, 5, 2), counter-clockwise.
    """
    left, bottom, right, top = bounds.T
    corners = np.stack(
        [
            np.stack([left, right, right, left, left], axis=1),
            np.stack([bottom, bottom, top, top, bottom], axis=1),
        ],
        axis=-1,
    )
    return in_crs(epsg, corners, target)


def unbroken(degrees: Float64Array) -> Float64Array:
    """Coordinates (n, k, 2) with longitudes past 180 where a shape crosses that meridian."""
    lon = degrees[..., 0]
    crosses = np.ptp(lon, axis=1, keepdims=True) > 180 if lon.size else np.zeros((0, 1), bool)
    return np.stack([np.where(crosses, lon % 360, lon), degrees[..., 1]], axis=-1)


def lonlat(epsg: Ints, centres: Float64Array) -> Float64Array:
    """(n, 2) longitude and latitude of points (n, 2), each in its own CRS."""
    return in_crs(epsg, centres, CRS84)


def in_crs(epsg: Ints, points: Float64Array, target: str) -> Float64Array:
    """Points (n, ..., 2), each in the CRS of its code (n,), in `target`."""
    # Late, since most queries are answered without: it takes as long as their search.
    from geomatch.geo import coordinates

    result = np.array(points, np.float64)
    for code in np.unique(epsg):
        if f"EPSG:{code}" == target:
            continue
        in_zone = epsg == code
        flat = points[in_zone].reshape(-1, 2)
        x, y = coordinates.project_points(f"EPSG:{code}", flat[:, 0], flat[:, 1], target)
        result[in_zone] = np.stack([x, y], axis=1).reshape(points[in_zone].shape)
    return result


def file_geometry(
    grid: Grid | None,
) -> tuple[Callable[[Ints, Float64Array], Float64Array] | None, dict[str, Any] | None]:
    """How a GeoParquet file stores the footprints of tiles of a grid.

    Returns:
        A function from EPSG codes (n,) and bounds (n, 4) to footprints (n, 5, 2), and the PROJJSON
        of their CRS, None for OGC:CRS84 (a "utm" grid). Both are None without a grid.
    """
    if grid is None:
        return None, None
    from rasterio.crs import CRS

    crs = file_crs(grid)
    projjson = None if crs == CRS84 else CRS.from_user_input(crs).to_dict(projjson=True)
    return lambda epsg, bounds: rings(epsg, bounds, crs), projjson


def file_crs(grid: Grid) -> str:
    """The CRS in which footprints of a grid's tiles are stored."""
    return CRS84 if grid.crs == "utm" else grid.crs


def distance(
    epsg_a: Ints, points_a: Float64Array, epsg_b: Ints, points_b: Float64Array
) -> NDArray[np.float64]:
    """Metres between points (n, 2), each in the CRS of its code.

    Planar where both have the same CRS, else along a great circle of the mean sphere.
    """
    metres: NDArray[np.float64] = np.hypot(*(points_a - points_b).T)
    apart = epsg_a != epsg_b
    if apart.any():
        metres[apart] = great_circle(
            lonlat(epsg_a[apart], points_a[apart]), lonlat(epsg_b[apart], points_b[apart])
        )
    return metres

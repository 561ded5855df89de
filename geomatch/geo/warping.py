"""Rasters on a grid as GDAL warps them: from an overview where the grid is coarser, and with one
kernel for all of a raster."""

from __future__ import annotations

from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import MaskFlags
from rasterio.transform import Affine

from geomatch.errors import GeomatchError
from geomatch.geo import views
from geomatch.geo.coordinates import Bounds, is_geographic, project_points
from geomatch.geo.rasters import Raster, open_raster, open_view

NEARLY = 0.1
"""What an overview's factor may exceed the grid's by, as in `gdalwarp -ovr AUTO`."""
EVEN = 1.1
"""A raster has one kernel if its pixels differ by less than this factor in their size on a grid."""


def open_for_grid(
    raster: Raster, crs: str, box: Bounds, gsd: float, turn: float = 0.0
) -> tuple[Any, Affine, dict[str, float]]:
    """Open an image to be read on a grid: its coarsest overview that is not coarser than that.

    Overviews blend invalid pixels with others unless the file says which are invalid. So they are
    not used where nodata or a collar is the user's word.

    Args:
        crs: of the grid.
        box: of the raster in `crs`.
        gsd: of the grid.
        turn: distance in x by which the raster is moved.

    Returns:
        The view, its transform, and options for GDAL's warper.
    """
    view = open_view(raster)
    steps = _steps(raster.crs, moved(view, turn), crs, box, gsd)
    finest = float(steps.min()) if np.isfinite(steps).all() else 0.0
    if finest + NEARLY > 2 and raster.layout.nodata is None and not raster.layout.collar:
        factors = _overviews(raster)
        levels = [n for n, factor in enumerate(factors) if factor < finest + NEARLY]
        if levels:
            width = view.width
            view.close()
            view = open_view(raster, max(levels, key=factors.__getitem__))
            steps *= view.width / width
    return view, moved(view, turn), _kernel(steps)


def _overviews(raster: Raster) -> list[int]:
    """Factors of a raster's overviews; none if it has a mask without them.

    GDAL takes all of an overview for valid where a mask was written later.
    """
    with open_raster(raster.path) as source:
        factors: list[int] = source.overviews(1)
        flags = source.mask_flag_enums[0]
        if factors and MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags:
            with rasterio.open(views.mask_vrt(source)) as mask:
                return factors if mask.overviews(1) else []
    return factors


def moved(view: Any, turn: float) -> Affine:
    """The transform of a dataset that is moved in x."""
    at = view.transform
    return Affine(at.a, at.b, at.c + turn, at.d, at.e, at.f)


def _steps(crs: str, at: Affine, grid_crs: str, box: Bounds, gsd: float) -> NDArray[np.float64]:
    """How many pixels of a raster, in its x and y, a pixel of a grid spans.

    Returns:
        (9, 2) at places spread over the box; infinite if one of them is not on the raster's map.
    """
    left, bottom, right, top = box
    places = np.meshgrid(np.linspace(left, right, 5)[1:4], np.linspace(bottom, top, 5)[1:4])
    x, y = (each.ravel() for each in places)
    try:
        to_x, to_y = project_points(
            grid_crs,
            np.concatenate([x, x + gsd, x]),
            np.concatenate([y, y, y + gsd]),
            crs,
        )
    except GeomatchError:
        return np.full((9, 2), np.inf)
    moves = np.stack([to_x, to_y]).reshape(2, 3, 9)
    moves = moves[:, 1:] - moves[:, :1]  # (x and y, east and north, place)
    if is_geographic(crs):
        moves[0] = (moves[0] + 180) % 360 - 180
    back = ~at
    linear = np.array([[back.a, back.b], [back.d, back.e]])
    spans: NDArray[np.float64] = np.hypot(*np.einsum("ij,jkn->kni", linear, moves))
    return spans


def _kernel(steps: NDArray[np.float64]) -> dict[str, float]:
    """Options by which GDAL's kernel is as wide as a pixel of the grid.

    By itself GDAL takes the ratio of each block's sides to those of the box around it in the
    raster. A flat block of a raster that is turned has a high box, and is blurred.
    """
    if not np.isfinite(steps).all() or (steps.max(axis=0) > EVEN * steps.min(axis=0)).any():
        return {}
    x, y = (1 / steps.mean(axis=0)).tolist()
    return {"XSCALE": x, "YSCALE": y}

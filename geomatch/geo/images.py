"""A single image file as a query tile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from geomatch.errors import GeomatchError
from geomatch.geo import rasters
from geomatch.geo.grid import Grid


@dataclass(frozen=True)
class Cut:
    """A tile cut from an image.

    Attributes:
        pixels: (size, size, channels) uint8.
        epsg: of the CRS that `x` and `y`, its centre, are in; None without a place.
        remark: how it was cut, for people.
    """

    pixels: NDArray[np.uint8]
    epsg: int | None
    x: float
    y: float
    remark: str


def read(path: str, grid: Grid, channels: int) -> Cut:
    """The centre tile of an image.

    Where it is georeferenced, that is the cell of `grid` over its centre, or, where the image
    does not cover that cell, as much ground around its centre. Of another image it is the centre
    square, resized.

    Raises:
        GeomatchError: it cannot be read, or has other bands or dtype.
    """
    if rasters.is_georeferenced(path):
        return _georeferenced(path, grid, channels)
    return _plain(path, grid.size, channels)


def _georeferenced(path: str, grid: Grid, channels: int) -> Cut:
    raster = rasters.inspect(path)
    if raster.bands != channels or raster.dtype != "uint8":
        raise GeomatchError(
            f"{path} has {raster.bands} bands of {raster.dtype}, the model takes {channels} of "
            "uint8",
            "Convert it with gdal_translate (-b, -ot Byte -scale).",
        )
    crs = rasters.utm_crs(raster) if grid.crs == "utm" else grid.crs
    left, bottom, right, top = rasters.project_bounds(raster.crs, raster.bounds, crs)
    if right - left < grid.side or top - bottom < grid.side:
        raise GeomatchError(
            f"{path} covers {right - left:.0f} x {top - bottom:.0f} m, a tile {grid.side:.0f} m",
            "Give an image that covers a tile.",
        )
    x, y = (left + right) / 2, (bottom + top) / 2
    col, row = (np.array([value]) for value in grid.cell_at(x, y))
    box = grid.bounds(col, row)[0]
    where = "the cell over its centre"
    if box[0] < left or box[1] < bottom or box[2] > right or box[3] > top:
        half = grid.side / 2
        box = np.array([x - half, y - half, x + half, y + half])
        where = "the ground around its centre, off the grid"
    values = rasters.read_extent(path, crs, (box[0], box[1], box[2], box[3]), grid.gsd)
    return Cut(
        pixels=np.moveaxis(values[:channels], 0, -1),
        epsg=int(crs.removeprefix("EPSG:")),
        x=(box[0] + box[2]) / 2,
        y=(box[1] + box[3]) / 2,
        remark=f"{path}: {where}, {grid.side:g} m at {grid.gsd:g} m a pixel",
    )


def _plain(path: str, size: int, channels: int) -> Cut:
    if channels not in (1, 3):
        raise GeomatchError(
            f"{path} has no place on the ground, and the model takes {channels} bands",
            "Give a georeferenced image with those bands.",
        )
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB" if channels == 3 else "L")
    except (UnidentifiedImageError, OSError) as error:
        raise GeomatchError(f"{path} cannot be read as an image: {error}") from error
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    pixels = np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))
    remark = f"{path} has no place on the ground: its centre square, resized to {size} px"
    return Cut(pixels.reshape(size, size, channels), None, 0.0, 0.0, remark)

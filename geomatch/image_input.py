"""Image files as tiles, described by the encoder that made some embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomatch.errors import GeomatchError, StaleError
from geomatch.geo import rasters
from geomatch.geo.grid import Grid
from geomatch.manifests import DescriptorManifest, TileManifest
from geomatch.nn import backend
from geomatch.nn.describe import describe
from geomatch.project import Project
from geomatch.runs import Encoding, load_encoder
from geomatch.tiling import image_files


@dataclass(frozen=True)
class Cut:
    """A tile cut from an image.

    Attributes:
        pixels: (size, size, channels) uint8.
        epsg: code of the CRS of its centre (`x`, `y`); None for an image without georeference.
        remark: a message for the user that says how it was cut.
    """

    pixels: NDArray[np.uint8]
    epsg: int | None
    x: float
    y: float
    remark: str


def encoder_of(
    project: Project, manifest: DescriptorManifest, tiles: TileManifest, then: str
) -> Encoding:
    """Load the encoder that made some descriptors.

    Args:
        manifest: of embeddings or of an index.
        then: the stage to run after `embed`.

    Raises:
        StaleError: the weights of the run have changed.
        GeomatchError: the run does not exist, or was trained on tiles of another form.
    """
    backend.prepare()
    encoding = load_encoder(project, None, project.root / manifest.run, manifest.step)
    if encoding.fingerprint != manifest.model:
        raise StaleError(
            f"the checkpoint {encoding.name} changed since it was embedded",
            f"Run: geomatch embed, then geomatch {then}",
        )
    encoding.check_tiles(tiles)
    return encoding


def cut(path: str, encoding: Encoding, tiles: TileManifest) -> Cut:
    """Cut a tile from an image file.

    From a georeferenced image, the grid cell at its centre; if the image does not cover that cell,
    a square of the same size around its centre. From any other image, and if the project's tiles
    have no georeference, the centre square, resized.

    Raises:
        GeomatchError: the image cannot be read, or has other bands or another dtype than the tiles.
    """
    channels = encoding.form.image_channels
    if tiles.crs is None or tiles.gsd is None or tiles.stride is None:
        return _centre_square(path, encoding.form.size, channels, "like all tiles")
    grid = Grid(tiles.crs, tiles.size, tiles.gsd, tiles.stride)
    if rasters.is_georeferenced(path):
        return _georeferenced(path, grid, channels)
    if channels not in (1, 3):
        raise GeomatchError(
            f"{path} is not georeferenced, and the model takes {channels} bands",
            "Give a georeferenced image with those bands.",
        )
    return _centre_square(path, grid.size, channels, "because it has no georeference")


def describe_cuts(
    encoding: Encoding, cuts: Sequence[Cut], manifest: DescriptorManifest, year: int | None = None
) -> NDArray[np.float32]:
    """Descriptors (n, d) of images; their label channels are 0, unknown.

    Args:
        manifest: of the descriptors that they will be compared with.
        year: code of their year; None if it is unknown.
    """
    form = encoding.form
    tiles = np.zeros((len(cuts), form.size, form.size, form.channels), np.uint8)
    tiles[..., : form.image_channels] = [image.pixels for image in cuts]
    vectors = next(iter(describe(encoding.model, encoding.variables, [tiles], len(cuts))))
    if manifest.centres is None:
        return vectors
    centres = np.asarray(manifest.centres, np.float32)
    return vectors - (centres.mean(axis=0) if year is None else centres[year])


def _centre_square(path: str, size: int, channels: int, why: str) -> Cut:
    pixels = image_files.read(Path(path), size, channels)
    remark = f"{path}: centre square, resized to {size} px, {why}"
    return Cut(pixels, None, 0.0, 0.0, remark)


def _georeferenced(path: str, grid: Grid, channels: int) -> Cut:
    raster = rasters.inspect(path)
    if raster.bands != channels or raster.dtype != "uint8":
        raise GeomatchError(
            f"{path} has {raster.bands} bands of {raster.dtype}, but the model takes {channels} of "
            "uint8",
            "Convert it with gdal_translate (-b, -ot Byte -scale).",
        )
    crs = rasters.utm_crs(raster) if grid.crs == "utm" else grid.crs
    left, bottom, right, top = rasters.project_bounds(raster.crs, raster.bounds, crs)
    if right - left < grid.side or top - bottom < grid.side:
        raise GeomatchError(
            f"{path} covers {right - left:.0f} x {top - bottom:.0f} m, a tile is {grid.side:.0f} m",
            "Give an image that covers at least one tile.",
        )
    x, y = (left + right) / 2, (bottom + top) / 2
    col, row = (np.array([value]) for value in grid.cell_at(x, y))
    box = grid.bounds(col, row)[0]
    where = "the grid cell at its centre"
    if box[0] < left or box[1] < bottom or box[2] > right or box[3] > top:
        half = grid.side / 2
        box = np.array([x - half, y - half, x + half, y + half])
        where = "a square around its centre, off the grid"
    values = rasters.read_extent(path, crs, (box[0], box[1], box[2], box[3]), grid.gsd)
    return Cut(
        pixels=np.moveaxis(values[:channels], 0, -1),
        epsg=int(crs.removeprefix("EPSG:")),
        x=(box[0] + box[2]) / 2,
        y=(box[1] + box[3]) / 2,
        remark=f"{path}: {where}, {grid.side:g} m at {grid.gsd:g} m per pixel",
    )

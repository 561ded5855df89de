"""Image files as tiles, described by the encoder that made some embeddings."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from geomatch.errors import GeomatchError, StaleError
from geomatch.geo import coordinates, in_memory, placement, rasters, windows
from geomatch.geo.grid import Grid
from geomatch.geo.rasters import Raster
from geomatch.geo.stretch import Stretch
from geomatch.geo.views import Reading
from geomatch.manifests import DescriptorManifest, TileManifest
from geomatch.project import Project
from geomatch.tiling import image_files

if TYPE_CHECKING:  # images are also read where none is described, without JAX
    from geomatch.runs import Encoding

BATCH = 32
"""Images that are described at a time."""


@dataclass(frozen=True)
class Cut:
    """A tile cut from an image.

    Attributes:
        pixels: (size, size, channels) uint8.
        around: (h, w, channels) uint8, the same with more of the image on all sides.
        epsg: code of the CRS of its centre (`x`, `y`); None for an image without georeference.
        remark: a message for the user that says how it was cut.
    """

    pixels: NDArray[np.uint8]
    around: NDArray[np.uint8]
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
    from geomatch.nn import backend
    from geomatch.runs import load_encoder

    backend.prepare()
    encoding = load_encoder(project, None, project.run_of(manifest), manifest.step)
    if encoding.fingerprint != manifest.model:
        raise StaleError(
            f"the checkpoint {encoding.name} changed since it was embedded",
            f"Run: geomatch embed, then geomatch {then}",
        )
    encoding.check_tiles(tiles)
    return encoding


def cut(path: str, tiles: TileManifest, year: str | None = None, reach: float = 1.0) -> Cut:
    """Cut a tile from an image file, read as the imagery of the tiles was.

    From a georeferenced image, the grid cell at its centre; if the image does not cover that cell,
    a square of the same size around its centre. From any other image, and if the project's tiles
    have no georeference, the centre square, resized.

    Args:
        year: whose stretch to uint8 is used for an image of another dtype; by default that of the
            newest year that has one.
        reach: how much larger than the tile `Cut.around` is, where a georeferenced image goes so
            far.

    Raises:
        GeomatchError: the image cannot be read, or has other bands than the tiles, or another dtype
            and no year has a stretch.
    """
    channels, reading = tiles.channels.image, _reading(tiles)
    if tiles.crs is None or tiles.gsd is None or tiles.stride is None:
        why = "like all tiles"
    elif rasters.is_georeferenced(path):
        grid = Grid(tiles.crs, tiles.size, tiles.gsd, tiles.stride)
        # What is held in memory leaves nothing on a disk, not even the mask of its collar.
        is_file = in_memory.content(Path(path)) is None
        with tempfile.TemporaryDirectory() if is_file else contextlib.nullcontext() as masks:
            raster = rasters.inspect(path, reading, Path(masks) if masks else None)
            return _georeferenced(raster, grid, channels, tiles, year, reach)
    else:
        why = "because it has no georeference"
    dtype = image_files.inspect(Path(path), reading).dtype
    stretch, how = _stretch(path, dtype, tiles, year)
    pixels = image_files.read(Path(path), tiles.size, channels, reading, stretch)
    remark = f"{path}: centre square, resized to {tiles.size} px, {why}{how}"
    return Cut(pixels, pixels, None, 0.0, 0.0, remark)


def read_scan(
    path: str, tiles: TileManifest, year: str | None = None
) -> tuple[NDArray[np.uint8], str]:
    """All pixels (h, w, channels) of an image, wherever it lies, and a remark of how it was read.

    Arguments and errors as for `cut`.
    """
    reading = _reading(tiles)
    dtype = image_files.inspect(Path(path), reading).dtype
    stretch, how = _stretch(path, dtype, tiles, year)
    pixels = image_files.read_whole(Path(path), tiles.channels.image, reading, stretch)
    return pixels, f"{path}: a scan of {pixels.shape[1]} x {pixels.shape[0]} px{how}"


def _reading(tiles: TileManifest) -> Reading:
    """How the imagery of tiles was read."""
    recorded = tiles.reading or {}
    return Reading(
        tuple(recorded.get("bands", ())), recorded.get("nodata"), recorded.get("collar", False)
    )


def _stretch(
    path: str, dtype: str, tiles: TileManifest, year: str | None
) -> tuple[Stretch | None, str]:
    """The stretch of an image to uint8, and the end of the remark that tells of it.

    Raises:
        GeomatchError: the image needs one, but all imagery of the tiles was uint8.
    """
    recorded = {label: of_year.stretch for label, of_year in tiles.years.items()}
    recorded = recorded or {"": tiles.stretch}
    used = {label: stretch for label, stretch in recorded.items() if stretch}
    if dtype == "uint8":
        is_like_tiles = not all(recorded.values())
        return None, "" if is_like_tiles else "; 8 bits as they are, the tiles were stretched"
    if not used:
        raise GeomatchError(
            f"{path} has values of {dtype}, but the tiles are of 8-bit imagery",
            "Convert it as that was: gdal_translate -ot Byte -scale MIN MAX 0 255 IN OUT",
        )
    label = year if year in used else list(used)[-1]
    chosen = used[label]
    text = f"; {dtype} stretched as the tiles{label and f' of {label}'}"
    return Stretch(tuple(chosen["low"]), tuple(chosen["high"])), text


def describe_cuts(
    encoding: Encoding, cuts: Sequence[Cut], manifest: DescriptorManifest
) -> NDArray[np.float32]:
    """Descriptors (n, d) of images of an unknown year; see `describe_pixels`."""
    pixels = np.stack([cut.pixels for cut in cuts])
    return describe_pixels(encoding, pixels, manifest, [None] * len(cuts))


def describe_pixels(
    encoding: Encoding,
    pixels: NDArray[np.uint8],
    manifest: DescriptorManifest,
    years: Sequence[int | None],
) -> NDArray[np.float32]:
    """Descriptors (n, d) of tiles.

    Args:
        pixels: (n, size, size, c) image channels, with or without label channels after them, which
            are 0, unknown, by default.
        manifest: of the descriptors that they will be compared with.
        years: code of the year of each tile; None if it is unknown.
    """
    from geomatch.nn.describe import describe

    missing = encoding.form.channels - pixels.shape[3]
    tiles = np.pad(pixels, ((0, 0), (0, 0), (0, 0), (0, missing)))
    size = min(len(tiles), BATCH)
    batches = (tiles[start : start + size] for start in range(0, len(tiles), size))
    vectors = np.concatenate([*describe(encoding.model, encoding.variables, batches, size)])
    if manifest.centres is None:
        return vectors
    centres = np.asarray(manifest.centres, np.float32)
    mean = centres.mean(axis=0)
    return vectors - np.stack([mean if year is None else centres[year] for year in years])


def _georeferenced(
    raster: Raster,
    grid: Grid,
    channels: int,
    tiles: TileManifest,
    year: str | None,
    reach: float,
) -> Cut:
    path = raster.path
    if raster.bands != channels:
        raise GeomatchError(
            f"{path} has {raster.bands} bands, but the model takes {channels}",
            "Give an image with those bands: gdal_translate -b",
        )
    stretch, how = _stretch(path, raster.dtype, tiles, year)
    crs = placement.utm_crs(raster) if grid.crs == "utm" else grid.crs
    left, bottom, right, top = coordinates.project_bounds(raster.crs, raster.bounds, crs)
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
    room = min(box[0] - left, box[1] - bottom, right - box[2], top - box[3])
    margin = int(min(room, (reach - 1) * grid.side / 2) / grid.gsd)
    more = margin * grid.gsd
    extent = (box[0] - more, box[1] - more, box[2] + more, box[3] + more)
    around = windows.read_extent(raster, crs, extent, grid.gsd, stretch)
    inside = slice(margin, margin + grid.size)
    return Cut(
        pixels=around[inside, inside],
        around=around,
        epsg=int(crs.removeprefix("EPSG:")),
        x=(box[0] + box[2]) / 2,
        y=(box[1] + box[3]) / 2,
        remark=f"{path}: {where}, {grid.side:g} m at {grid.gsd:g} m per pixel{how}",
    )

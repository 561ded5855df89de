"""Label layers as grid-aligned channels: rasters by nearest neighbour, vectors rasterised."""

from __future__ import annotations

import contextlib
import glob
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyogrio
import shapely
from pyogrio.errors import DataSourceError
from rasterio.features import rasterize
from rasterio.transform import from_origin

from geomatch.errors import GeomatchError
from geomatch.geo import files, rasters
from geomatch.geo.grid import Grid
from geomatch.geo.rasters import Bounds, Pixels, Raster

PARTS = {".shp", ".shx", ".dbf", ".prj", ".cpg", ".dat", ".map", ".id", ".mid", ".csvt", ".xsd"}
"""Suffixes of files that belong to a vector file of the same name."""
VECTOR_SUFFIXES = {".geojson", ".json", ".gpkg", ".shp", ".fgb", ".gml", ".kml", ".sqlite"}


def is_vector(path: str) -> bool:
    """Whether a file is a vector file, judged by its suffix."""
    return Path(path).suffix.lower() in VECTOR_SUFFIXES


def stamp(path: str) -> tuple[int, ...]:
    """As `files.stamp`, of a vector file and its parts, or of the files in a folder (.gdb)."""
    file = Path(path)
    if file.is_dir():
        return files.stamp(path, *sorted(str(part) for part in file.rglob("*")))
    parts = (part for part in file.parent.glob(f"{glob.escape(file.stem)}.*"))
    return files.stamp(path, *sorted(str(p) for p in parts if p.suffix.lower() in PARTS))


def inspect_raster(path: str) -> Raster:
    """Read a label raster's header.

    Raises:
        GeomatchError: it is not uint8, or has neither one (grey) nor three (colour) bands.
    """
    raster = rasters.inspect(path)
    if raster.dtype != "uint8" or raster.bands not in (1, 3):
        raise GeomatchError(
            f"{path} has {raster.bands} bands of {raster.dtype}; a label raster has one (grey) "
            "or three (colour) of uint8, 0 meaning unknown",
            "Convert it with gdal_translate -ot Byte.",
        )
    return raster


@contextlib.contextmanager
def _without_measures() -> Iterator[None]:
    """Ignore that pyogrio drops measures (M), as heights are dropped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Measured")
        yield


@_without_measures()
def check_vector(path: str) -> None:
    """Check that a vector file can be used.

    Raises:
        GeomatchError: it cannot be read, has no geometries, or a layer has no CRS.
    """
    layers = _layers(path)
    if not layers:
        raise GeomatchError(f"{path} has no layer with geometries", "Check the file with ogrinfo.")
    for layer in layers:
        crs = pyogrio.read_info(files.gdal_path(path), layer=layer)["crs"]
        if crs is None:
            raise GeomatchError(
                f"{path} (layer {layer}) has no CRS", "Assign one with: ogr2ogr -a_srs EPSG:n"
            )
        rasters.check_crs(
            path, crs, f"Assign the one that layer {layer} is in: ogr2ogr -a_srs EPSG:n OUT IN"
        )


@_without_measures()
def read_geometries(path: str, layer: str, crs: str, bounds: Bounds | None) -> np.ndarray:
    """Geometries of a vector layer in `crs`; with `bounds` (in `crs`), only those that touch it."""
    path = files.gdal_path(path)
    layer_crs = pyogrio.read_info(path, layer=layer)["crs"]
    box = None if bounds is None else rasters.project_bounds(crs, bounds, layer_crs)
    _, _, wkb, _ = pyogrio.raw.read(path, layer=layer, columns=[], bbox=box)
    shapes = shapely.from_wkb(wkb)
    shapes = shapes[~(shapely.is_missing(shapes) | shapely.is_empty(shapes))]
    return np.asarray(
        shapely.transform(
            shapely.force_2d(shapes),
            lambda xy: np.column_stack(rasters.project_points(layer_crs, xy[:, 0], xy[:, 1], crs)),
        )
    )


def read_areas(paths: Sequence[str], crs: str) -> shapely.Geometry:
    """The union of all polygons of vector files, in `crs`.

    Raises:
        GeomatchError: as `check_vector`.
    """
    for path in paths:
        check_vector(path)
    shapes = [read_geometries(path, layer, crs, None) for path in paths for layer in _layers(path)]
    return shapely.union_all(np.concatenate([np.empty(0, object), *shapes]))


@_without_measures()
def _layers(path: str) -> list[str]:
    try:
        return [
            str(name)
            for name, kind in pyogrio.list_layers(files.gdal_path(path))
            if kind is not None
        ]
    except DataSourceError as error:
        raise GeomatchError(
            f"{path} cannot be opened as a vector file: {error}",
            "Check the file with ogrinfo; leave it out or replace it.",
        ) from error


class VectorReader:
    """Rasterises a vector file onto cells, as one grey channel.

    Each layer has its own grey value, evenly spaced up to 255; later layers cover earlier ones, and
    ground without a geometry is 0.

    Args:
        bounds: of all cells to be read, in `crs`; geometries outside are not loaded.
    """

    def __init__(self, path: str, grid: Grid, crs: str, bounds: Bounds) -> None:
        self._grid = grid
        layers = _layers(path)
        shapes = [read_geometries(path, layer, crs, bounds) for layer in layers]
        self._geometries = np.concatenate(shapes)
        self._values = np.repeat(
            [round(255 * (i + 1) / len(layers)) for i in range(len(layers))],
            [len(s) for s in shapes],
        )
        self._tree = shapely.STRtree(self._geometries)

    def read(self, col: int, row: int) -> Pixels:
        """The labels (size, size, 1) of one cell."""
        size, gsd = self._grid.size, self._grid.gsd
        left, bottom, right, top = self._grid.bounds(np.asarray(col), np.asarray(row))
        canvas = np.zeros((size, size), np.uint8)
        found = np.sort(self._tree.query(shapely.box(left, bottom, right, top)))
        if len(found):
            rasterize(
                zip(self._geometries[found], self._values[found].tolist(), strict=True),
                out=canvas,
                transform=from_origin(left, top, gsd, gsd),
            )
        return canvas[..., None]

"""Label layers as grid-aligned channels: rasters by nearest neighbour, vectors rasterised."""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from rasterio.features import rasterize
from rasterio.transform import from_origin
from shapely.errors import GEOSException

from geomatch.errors import BadFileError, GeomatchError
from geomatch.geo import coordinates, files, geoparquet, rasters
from geomatch.geo.coordinates import Bounds
from geomatch.geo.grid import Grid
from geomatch.geo.rasters import Pixels, Raster
from geomatch.geo.windows import GridReader

POLYGON, MULTIPOLYGON, POLYHEDRAL, TIN = 3, 6, 15, 16
"""Types of geometry in WKB; 1000 more with Z, 2000 with M, 3000 with both."""
FEW, SHARE_OF_BROKEN = 10, 0.01
"""A layer with more features that GDAL cannot read is damaged as a whole."""
PARTS = {".shp", ".shx", ".dbf", ".prj", ".cpg", ".dat", ".map", ".id", ".mid", ".csvt", ".xsd"}
"""Suffixes of files that belong to a vector file of the same name."""
CHORDS = 32
"""Straight edges are projected in at least so many pieces per side of the ground that is read."""


@dataclass(frozen=True)
class VectorLayer:
    """A layer of a vector file, and how it is drawn.

    Attributes:
        path: anything that GDAL opens.
        layer: its name.
        value: of the pixels that its shapes cover, from 1 to 255.
        where: condition on attributes in OGR SQL; "" for all features.
        buffer: metres around each shape.
        stamp: see `stamp`.
        opened: what GDAL opens, which another process can open, too.
    """

    path: str
    layer: str
    value: int
    where: str = ""
    buffer: float = 0.0
    stamp: tuple[int, ...] = ()
    opened: str = field(default="", compare=False)


@dataclass(frozen=True)
class ClassMap:
    """The classes of pixel values; a value without a class is 0, unknown.

    Attributes:
        low, high: first and last value of each class, in ascending order and apart from each
            other. A colour counts as 65536 red + 256 green + blue.
        value: classes from 1 to 255.
    """

    low: tuple[int, ...]
    high: tuple[int, ...]
    value: tuple[int, ...]

    def __call__(self, pixels: NDArray[Any]) -> Pixels:
        """(bands, h, w) integers of one band or three to (bands, h, w): the class in each band."""
        values = pixels.astype(np.int64)
        if len(values) == 3:
            values = values[:1] * 65536 + values[1:2] * 256 + values[2:]
        nearest = np.maximum(np.searchsorted(self.low, values, side="right") - 1, 0)
        inside = (np.asarray(self.low)[nearest] <= values) & (
            values <= np.asarray(self.high)[nearest]
        )
        classes = np.where(inside, np.asarray(self.value)[nearest], 0).astype(np.uint8)
        return np.broadcast_to(classes, pixels.shape)


@dataclass(frozen=True)
class RasterLayer:
    """Rasters of classes, all of one format."""

    rasters: tuple[Raster, ...]
    classes: ClassMap


Layer = VectorLayer | RasterLayer


def find(pattern: str, what: str) -> list[str]:
    """Label files: what `rasters.find` finds, else what GDAL opens under that name.

    So file geodatabases and folders of shapefiles are found, archives, subdatasets and databases.

    Args:
        pattern: an absolute path or glob, or a name that only GDAL understands.

    Raises:
        GeomatchError: nothing matches.
    """
    if pattern.startswith("/vsi") or not os.path.isabs(pattern):
        return [pattern]
    try:
        return rasters.find(pattern, what)
    except GeomatchError as error:
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        found = [path for path in matches if os.path.isdir(path) and is_vector(path)]
        if not found:
            raise GeomatchError(
                error.message,
                "Give a raster, a vector file such as a GeoPackage, a folder of rasters or of "
                "shapefiles, or a quoted glob such as 'landcover/*.tif'.",
            ) from error
        return found


@functools.cache
def _unreadable() -> tuple[type[Exception], ...]:
    """What pyogrio raises for a file, a layer or a condition that GDAL does not read.

    pyogrio is imported where it is used: with it comes pandas, if that is installed, and most
    worker processes need neither.
    """
    from pyogrio import errors

    return (
        errors.DataSourceError,
        errors.DataLayerError,
        errors.FeatureError,
        errors.GeometryError,
        ValueError,
    )


def is_vector(path: str) -> bool:
    """Whether GDAL reads a file as vectors."""
    try:
        return bool(len(_list(path)))
    except _unreadable():
        return False


def _opened(path: str) -> str:
    """What GDAL opens: the file, or a copy of GeoParquet that this GDAL does not read."""
    if geoparquet.is_geoparquet(path) and "Parquet" not in _drivers() and os.path.isfile(path):
        return geoparquet.as_geopackage(path, files.stamp(path))
    return files.gdal_path(path)


def _list(path: str) -> NDArray[np.object_]:
    """(n, 2) name and type of geometry, None without one, of the layers of a file."""
    import pyogrio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(pyogrio.list_layers(_opened(path)))


def _unopened(path: str, error: Exception) -> GeomatchError:
    if path.lower().startswith(("pg:", "postgresql:")) and "PostgreSQL" not in _drivers():
        return GeomatchError(
            f"{path} is a database, and this GDAL has no driver for PostgreSQL",
            "Install pyogrio from conda-forge (pyogrio libgdal-pg), or export the tables with "
            "ogr2ogr to a GeoPackage.",
        )
    return BadFileError(
        path,
        f"cannot be opened as a vector file: {error}",
        "Check the file with ogrinfo (a raster with gdalinfo); leave it out or replace it.",
    )


@functools.cache
def _drivers() -> frozenset[str]:
    import pyogrio

    return frozenset(pyogrio.list_drivers())


def stamp(path: str) -> tuple[int, ...]:
    """As `files.stamp`, of a vector file and its parts, or of the files in a folder (.gdb)."""
    file = Path(path)
    if file.is_dir():
        return files.stamp(path, *sorted(str(part) for part in file.rglob("*")))
    parts = (part for part in file.parent.glob(f"{glob.escape(file.stem)}.*"))
    return files.stamp(path, *sorted(str(p) for p in parts if p.suffix.lower() in PARTS))


def read_header(path: str) -> Raster:
    """Read a label raster's header; see `rasters.read_header`.

    Raises:
        GeomatchError: it cannot be opened, or has neither one band of integers nor three of uint8.
    """
    if not rasters.opens(path):
        layer_names(path)  # says why it is no vector file either
    raster = rasters.read_header(path)
    classes = raster.bands == 1 and np.issubdtype(raster.dtype, np.integer)
    if not classes and (raster.bands, raster.dtype) != (3, "uint8"):
        raise GeomatchError(
            f"{path} has {raster.bands} bands of {raster.dtype}; a label raster has one of "
            "integers (grey or classes) or three of uint8 (colour), 0 meaning unknown",
            "Convert it with gdal_translate -ot Byte, or -b 1 -ot Int32.",
        )
    return raster


def values_of(layers: Sequence[Raster]) -> list[int]:
    """The values of one-band rasters in ascending order, without nodata and 0.

    Raises:
        GeomatchError: a raster is damaged.
    """
    found = [np.unique(block[block != 0]) for raster in layers for block in rasters.blocks(raster)]
    return np.unique(np.concatenate([np.empty(0, np.int64), *found])).astype(np.int64).tolist()


def layer_names(path: str) -> list[str]:
    """Names of the layers of a vector file that have geometries.

    Raises:
        GeomatchError: it cannot be opened.
    """
    try:
        return [str(name) for name, kind in _list(path) if kind is not None]
    except _unreadable() as error:
        raise _unopened(path, error) from error


def fields(path: str, layer: str) -> dict[str, str]:
    """The numpy dtypes of a layer's attributes by name, "object" for text."""
    about = _info(path, layer, _opened(path))
    return dict(zip(map(str, about["fields"]), map(str, about["dtypes"]), strict=True))


def attribute_values(layer: VectorLayer, attribute: str) -> list[Any]:
    """The values of an attribute but for null and empty text; whole numbers as int."""
    about = _info(layer.path, layer.layer, layer.opened)
    column = _read(layer, about, columns=[attribute], read_geometry=False)[2][0]
    values = {value for value in column.tolist() if value not in (None, "") and value == value}
    return [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]


def vector_layers(
    path: str, value: int, layer: str = "", where: str = "", buffer: float = 0.0
) -> list[VectorLayer]:
    """A layer of a vector file, or all that have geometries.

    Args:
        value, where, buffer: see `VectorLayer`.

    Raises:
        GeomatchError: the file cannot be read, has no such layer or none with geometries, a layer
            has no CRS or one without a place, or the condition is not one.
    """
    names = layer_names(path)
    if not names:
        raise GeomatchError(f"{path} has no layer with geometries", "Check the file with ogrinfo.")
    if layer and layer not in names:
        raise GeomatchError(f"{path} has no layer {layer!r}", f"It has: {', '.join(names)}.")
    found = [
        VectorLayer(path, name, value, where, buffer, stamp(path), _opened(path))
        for name in ([layer] if layer else names)
    ]
    for each in found:
        about = _info(path, each.layer, each.opened)
        if about["crs"] is not None:
            hint = f"Assign the one that layer {each.layer} is in: ogr2ogr -a_srs EPSG:n OUT IN"
            coordinates.check_crs(path, about["crs"], hint)
        elif about["features"] != 0:
            raise GeomatchError(
                f"{path} (layer {each.layer}) has no CRS", "Assign one with: ogr2ogr -a_srs EPSG:n"
            )
        if where:
            _read(each, about, max_features=1, read_geometry=False)
    return found


def _info(path: str, layer: str, opened: str) -> dict[str, Any]:
    import pyogrio

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            about: dict[str, Any] = pyogrio.read_info(opened, layer=layer)
    except _unreadable() as error:
        raise _unopened(path, error) from error
    return about


def _read(
    layer: VectorLayer, about: dict[str, Any], columns: Sequence[str] = (), **options: Any
) -> Any:
    """Feature ids, geometries (WKB) and columns of a layer; options as for `pyogrio.raw.read`.

    Raises:
        GeomatchError: they cannot be read, or the condition is not one.
    """
    import pyogrio

    # GDAL would compare attributes that are not read as if they were null.
    named = [str(f) for f in about["fields"] if str(f).lower() in layer.where.lower()]
    try:
        with warnings.catch_warnings():
            # About measures, which are dropped as heights are, and shapes that are mended here.
            warnings.simplefilter("ignore")
            _, ids, shapes, values = pyogrio.raw.read(
                layer.opened,
                layer=layer.layer,
                columns=[*columns, *named],
                return_fids=True,
                **({"where": layer.where or None} | options),
            )
    except _unreadable() as error:
        if layer.where and options.get("read_geometry") is False:
            raise GeomatchError(
                f"{layer.path} (layer {layer.layer}): where = {layer.where!r} cannot be used: "
                f"{error}",
                f"Its attributes: {', '.join(map(str, about['fields']))}.",
            ) from error
        raise GeomatchError(
            f"{layer.path} (layer {layer.layer}) is damaged: {error}",
            "Replace the file or leave it out, then run the same command again.",
        ) from error
    return ids, shapes, values


def _geometries(
    layer: VectorLayer, about: dict[str, Any], box: Bounds
) -> tuple[NDArray[np.int64], NDArray[np.object_], list[int]]:
    """Features that touch a box: ids and geometries (WKB); and ids of those that GDAL cannot read.

    Raises:
        GeomatchError: more than a few cannot be read, so that the file is damaged.
    """
    try:
        ids, wkb, _ = _read(layer, about, bbox=box)
        return ids, wkb, []
    except GeomatchError as error:
        # GDAL stops at the first one, but not where features are named: then of the whole layer.
        ids, _, _ = _read(layer, about, read_geometry=False)
        ids, wkb, _ = _read(layer, about, where=None, fids=ids)
        unread = ids[[each is None for each in wkb]].tolist()
        if len(unread) in (0, len(ids)) or len(unread) > max(FEW, SHARE_OF_BROKEN * len(ids)):
            raise error
        return ids, wkb, unread


def read_shapes(
    layer: VectorLayer, crs: str, bounds: Bounds
) -> tuple[NDArray[np.object_], list[int]]:
    """Points, lines and polygons of a layer, where they touch `bounds`.

    Shapes are cut to a box around the bounds before they are projected, since a wide one has no
    image in `crs`. Broken polygons are mended.

    Args:
        crs: of `bounds` and of the result.

    Returns:
        The shapes, valid and not empty, and the ids of features that could not be mended.

    Raises:
        GeomatchError: the layer cannot be read.
    """
    about = _info(layer.path, layer.layer, layer.opened)
    if about["crs"] is None:  # of an empty layer
        return np.empty(0, object), []
    shapes, broken = [], []
    for box in _boxes(layer, about, crs, bounds):
        ids, wkb, unread = _geometries(layer, about, box)
        found, failed = _sound(wkb)
        with np.errstate(all="ignore"):  # of coordinates beyond all bounds
            found = _cut(found, box)
        x_y = functools.partial(_projected, about["crs"], crs)
        found = np.asarray(shapely.transform(found, x_y))
        found = found[np.isfinite(shapely.bounds(found)).all(axis=1)]
        if layer.buffer:
            found = shapely.buffer(found, layer.buffer)
        shapes.append(found)
        broken += [*unread, *ids[failed].tolist()]
    return np.concatenate([np.empty(0, object), *shapes]), broken


def _projected(crs: str, target: str, xy: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.column_stack(coordinates.project_points(crs, xy[:, 0], xy[:, 1], target))


def _boxes(layer: VectorLayer, about: dict[str, Any], crs: str, bounds: Bounds) -> Iterator[Bounds]:
    """What to read of a layer, in its own CRS; two boxes where longitudes wrap between."""
    left, bottom, right, top = bounds
    margin = layer.buffer + 0.05 * max(right - left, top - bottom)
    grown = left - margin, bottom - margin, right + margin, top + margin
    box = coordinates.project_bounds(crs, grown, about["crs"])
    if not np.isfinite(box).all():
        return  # these places have no coordinates in the CRS of the layer
    if not coordinates.is_geographic(about["crs"]):
        yield box
        return
    west, south, east, north = box
    spans = [(west, east)] if west <= east else [(west, 180.0), (-180.0, east)]
    # Some layers count longitudes from 0 to 360, or on beyond 180 degrees.
    around = about["total_bounds"]
    turns = (0, 360, -360) if around and max(abs(around[0]), abs(around[2])) > 180 else (0,)
    for turn in turns:
        for low, high in spans:
            yield low + turn, max(south, -90.0), high + turn, min(north, 90.0)


def _sound(wkb: NDArray[np.object_]) -> tuple[NDArray[np.object_], NDArray[np.intp]]:
    """Simple, valid, two-dimensional shapes, and the indices of geometries that yield none.

    Collections are taken apart. Geometries that are null or empty are not counted: they say that
    nothing is there. One with a part that can be drawn is not counted either: seen from above, the
    walls of a building in three dimensions have no area.
    """
    faces = np.array([_faces(each) for each in wkb], object)
    shapes = shapely.force_2d(shapely.from_wkb(faces, on_invalid="fix"))
    unread = shapely.is_missing(shapes) & np.asarray([each is not None for each in wkb], bool)
    parts, owner = _parts(shapes)
    finite = np.ones(len(parts), bool)
    coordinates, index = shapely.get_coordinates(parts, return_index=True)
    finite[index[~np.isfinite(coordinates).all(axis=1)]] = False
    parts[~finite] = None
    areas = shapely.get_type_id(parts) == shapely.GeometryType.POLYGON
    for i in np.flatnonzero(areas & ~shapely.is_valid(parts)):
        parts[i] = _mended(parts[i])
    lost = shapely.is_missing(parts) | shapely.is_empty(parts)
    failed = np.union1d(np.flatnonzero(unread), np.setdiff1d(owner[lost], owner[~lost]))
    return _parts(parts[~lost])[0], failed


def _faces(wkb: bytes | None) -> bytes | None:
    """WKB of a surface in three dimensions (TIN, polyhedral) as a multipolygon, which GEOS reads.

    Other geometries, and surfaces that are not whole, stay as they are.
    """
    if wkb is None or len(wkb) < 9 or wkb[0] != 1:
        return wkb
    kind, count = struct.unpack_from("<II", wkb, 1)
    dimension, base = divmod(kind, 1000)
    if base not in (POLYHEDRAL, TIN):
        return wkb
    point = 8 * (2, 3, 3, 4)[dimension]
    parts, start = [struct.pack("<BII", 1, kind - base + MULTIPOLYGON, count)], 9
    try:
        for _ in range(count):
            (rings,) = struct.unpack_from("<I", wkb, start + 5)
            stop = start + 9
            for _ in range(rings):
                (points,) = struct.unpack_from("<I", wkb, stop)
                stop += 4 + points * point
            parts += [struct.pack("<BI", 1, kind - base + POLYGON), wkb[start + 5 : stop]]
            start = stop
    except struct.error:
        return wkb
    return b"".join(parts)


def _parts(shapes: NDArray[np.object_]) -> tuple[NDArray[np.object_], NDArray[np.intp]]:
    """The points, lines and polygons within geometries, and which geometry each is from."""
    owner = np.flatnonzero(~(shapely.is_missing(shapes) | shapely.is_empty(shapes)))
    parts = shapes[owner]
    while (shapely.get_type_id(parts) > shapely.GeometryType.POLYGON).any():
        parts, index = shapely.get_parts(parts, return_index=True)
        kept = ~shapely.is_empty(parts)
        parts, owner = parts[kept], owner[index[kept]]
    return parts, owner


def _mended(shape: Any) -> Any:
    """The ground that a broken polygon covers; None if it covers none."""
    try:
        return shapely.make_valid(shape, method="structure", keep_collapsed=False)
    except GEOSException:
        return None


def _cut(shapes: NDArray[np.object_], box: Bounds) -> NDArray[np.object_]:
    """Shapes within a box, with edges short enough to be projected."""
    frame = shapely.box(*box)
    across = ~shapely.contains_properly(frame, shapes)
    inside = shapes.copy()
    inside[across] = shapely.intersection(shapes[across], frame)
    inside, _ = _parts(inside)
    longest = max(box[2] - box[0], box[3] - box[1]) / CHORDS
    long = shapely.length(inside) > longest
    inside[long] = shapely.segmentize(inside[long], longest)
    return inside


def read_areas(paths: Sequence[str], crs: str, bounds: Bounds) -> shapely.Geometry:
    """The union of all polygons of vector files, in `crs`, where they touch `bounds`.

    Raises:
        GeomatchError: as `vector_layers`, or a polygon is broken beyond mending.
    """
    shapes = []
    for layer in (layer for path in paths for layer in vector_layers(path, 1)):
        found, broken = read_shapes(layer, crs, bounds)
        if broken:
            raise GeomatchError(
                f"{layer.path} (layer {layer.layer}): feature {broken[0]} is broken and cannot "
                "be mended, so that its area is unknown",
                "Draw it again, or delete it.",
            )
        shapes.append(found)
    return shapely.union_all(np.concatenate([np.empty(0, object), *shapes]))


class LayerReader:
    """Draws layers onto cells as one channel; later layers cover earlier ones.

    Ground without a label is 0.

    Args:
        bounds: of all cells to be read, in `crs`; shapes outside are not loaded.
        unreadable: of rasters; see `windows.GridReader`.

    Attributes:
        broken: ids of features that could not be drawn, by layer: "PATH (layer NAME)".
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        grid: Grid,
        crs: str,
        bounds: Bounds,
        unreadable: dict[str, str] | None = None,
    ) -> None:
        self._unreadable = unreadable
        self._grid = grid
        self._crs = crs
        self._bounds = bounds
        self._open = contextlib.ExitStack()
        self.broken: dict[str, list[int]] = {}
        self._painters = [
            self._vectors(layer) if isinstance(layer, VectorLayer) else self._classes(layer)
            for layer in layers
        ]

    def __enter__(self) -> LayerReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def read(self, col: int, row: int) -> Pixels:
        """The labels (size, size, 1) of one cell.

        Raises:
            GeomatchError: a raster is damaged.
        """
        canvas = np.zeros((self._grid.size, self._grid.size), np.uint8)
        for paint in self._painters:
            paint(canvas, col, row)
        return canvas[..., None]

    def _vectors(self, layer: VectorLayer) -> Callable[[Pixels, int, int], None]:
        shapes, broken = read_shapes(layer, self._crs, self._bounds)
        if broken:
            name = f"{layer.path} (layer {layer.layer})"
            self.broken[name] = sorted({*self.broken.get(name, ()), *broken})
        tree = shapely.STRtree(shapes)

        def paint(canvas: Pixels, col: int, row: int) -> None:
            left, bottom, right, top = self._grid.bounds(np.asarray(col), np.asarray(row))
            found = np.sort(tree.query(shapely.box(left, bottom, right, top)))
            if len(found):
                rasterize(
                    shapes[found],
                    out=canvas,
                    transform=from_origin(left, top, self._grid.gsd, self._grid.gsd),
                    default_value=layer.value,
                )

        return paint

    def _classes(self, layer: RasterLayer) -> Callable[[Pixels, int, int], None]:
        reader = self._open.enter_context(
            GridReader(
                layer.rasters,
                self._grid,
                self._crs,
                nearest=True,
                stretch=layer.classes,
                unreadable=self._unreadable,
            )
        )

        def paint(canvas: Pixels, col: int, row: int) -> None:
            classes = reader.read(col, row)[0][..., 0]
            np.copyto(canvas, classes, where=classes > 0)

        return paint

"""Label layers: further channels of a tile, nearest or drawn, 0 where nothing is known."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import struct
import warnings
import zipfile

import geopandas
import numpy as np
import pyogrio
import pytest
import shapely
from rasterio.warp import transform
from small_project import tile_sources

from geomatch.data.store import TileStore
from geomatch.errors import GeomatchError
from geomatch.manifests import Channels

LEFT, TOP = 500_000, 5_000_000
COL, ROW = LEFT // 32, TOP // 32 - 1  # the cell at the upper left corner


@pytest.fixture
def image(write_raster):
    """2 x 2 cells of one band."""
    return write_raster("image.tif", np.full((1, 64, 64), 90, np.uint8), origin=(LEFT, TOP))


def tile_with_labels(project, image, labels, **options):
    return tile_sources(project, dict.fromkeys(labels, image), labels=labels, **options)


def drawn(project, table, year):
    """(64, 64, channels) of a year's label channels, its four tiles put together."""
    rows = []
    for row in (ROW, ROW - 1):
        parts = []
        for col in (COL, COL + 1):
            at = table.store_row[table.ids().index(f"{col}_{row}@{year}")]
            pixels = TileStore.open(project.pixels).read(np.array([at]))[0]
            assert (pixels[..., 0] == 90).all()
            parts.append(pixels[..., 1:])
        rows.append(np.concatenate(parts, axis=1))
    return np.concatenate(rows)


@pytest.mark.parametrize("bands", [1, 3])
def test_raster_labels_are_channels_after_the_image(write_raster, project, image, bands):
    values = np.random.default_rng(0).integers(1, 200, (bands, 64, 64)).astype(np.uint8)
    labels = write_raster("labels.tif", values, origin=(LEFT, TOP))
    table = tile_with_labels(project, image, {"2010": labels, "2020": ""})
    assert project.tile_manifest().channels == Channels(1, bands)
    np.testing.assert_array_equal(drawn(project, table, "2010"), np.moveaxis(values, 0, -1))
    assert (drawn(project, table, "2020") == 0).all(), "a year without labels knows nothing"


def test_raster_labels_are_read_by_nearest_neighbour(write_raster, project, image):
    """Coarser and off the grid, two classes stay two: a mean would be a third."""
    values = np.where(np.random.default_rng(1).random((1, 30, 30)) < 0.5, 10, 200).astype(np.uint8)
    labels = write_raster("labels.tif", values, origin=(LEFT - 1.3, TOP + 2.1), gsd=2.37)
    got = drawn(project, tile_with_labels(project, image, {"2010": labels}), "2010")[..., 0]
    assert set(np.unique(got).tolist()) == {10, 200}
    column = ((np.arange(64) + 0.5 + 1.3) / 2.37).astype(int)
    row = ((np.arange(64) + 0.5 + 2.1) / 2.37).astype(int)
    assert (got == values[0][np.ix_(row, column)]).mean() > 0.99


def test_land_cover_of_a_continent(write_raster, project, image):
    """In its own CRS; of the millions of tiles that it would cover, none is listed."""
    values = np.full((1, 460, 650), 7, np.uint8)
    cover = write_raster("cover.tif", values, crs="EPSG:3035", origin=(9e5, 5.5e6), gsd=1e4)
    got = drawn(project, tile_with_labels(project, image, {"2010": cover}), "2010")
    assert (got == 7).all()


def test_ground_beyond_the_labels_is_unknown(write_raster, project, image):
    """Neither labels that end within a tile nor their nodata make a tile invalid."""
    values = np.full((1, 20, 40), 170, np.uint8)
    values[:, :5] = 9
    labels = write_raster("labels.tif", values, origin=(LEFT, TOP), nodata=9)
    got = drawn(project, tile_with_labels(project, image, {"2010": labels}), "2010")[..., 0]
    expected = np.zeros((64, 64), int)
    expected[5:20, :40] = 170
    np.testing.assert_array_equal(got, expected)


def test_labels_of_several_sheets(write_raster, project, image):
    for i in range(4):
        write_raster(
            f"labels/{i}.tif", np.full((1, 64, 16), 50 + i, np.uint8), origin=(LEFT + 16 * i, TOP)
        )
    folder = project.root.parent / "labels"
    got = drawn(project, tile_with_labels(project, image, {"2010": folder}), "2010")[..., 0]
    np.testing.assert_array_equal(got, np.tile(50 + np.arange(64) // 16, (64, 1)))


def boxes(*sides):
    """Boxes given by x and y from LEFT and TOP, y downward."""
    shapes = [shapely.box(LEFT + a, TOP - d, LEFT + c, TOP - b) for a, b, c, d in sides]
    return geopandas.GeoDataFrame(geometry=shapes, crs="EPSG:32631")


def test_vector_labels_are_drawn_where_they_are(project, image, tmp_path):
    """Buildings in degrees on a grid in metres: each pixel inside, and none outside."""
    path = tmp_path / "buildings.geojson"
    boxes((10, 10, 20, 18), (28, 40, 36, 44)).to_crs(4326).to_file(path)
    table = tile_with_labels(project, image, {"2010": path, "2020": ""})
    got = drawn(project, table, "2010")[..., 0]
    expected = np.zeros((64, 64), int)
    expected[10:18, 10:20] = 255
    expected[40:44, 28:36] = 255  # across two tiles
    np.testing.assert_array_equal(got, expected)
    assert (drawn(project, table, "2020") == 0).all()


def test_vector_labels_keep_their_holes(project, image, tmp_path):
    outer, inner = boxes((4, 4, 40, 40), (10, 10, 30, 30)).geometry
    path = tmp_path / "court.gpkg"
    geopandas.GeoDataFrame(geometry=[outer - inner], crs="EPSG:32631").to_file(path)
    got = drawn(project, tile_with_labels(project, image, {"2010": path}), "2010")[..., 0]
    assert got[7, 7] == 255
    assert (got[10:30, 10:30] == 0).all()
    assert (got > 0).sum() == 36 * 36 - 20 * 20


def test_layers_of_a_geopackage_have_greys_of_their_own(project, image, tmp_path):
    """In a CRS other than the grid's, too; a later layer lies over an earlier."""
    path = tmp_path / "land.gpkg"
    boxes((0, 0, 30, 30)).to_crs(2154).to_file(path, layer="woods")
    boxes((20, 0, 50, 30)).to_file(path, layer="water")
    boxes((0, 40, 10, 50)).to_crs(4326).to_file(path, layer="roads")
    got = drawn(project, tile_with_labels(project, image, {"2010": path}), "2010")[..., 0].astype(
        int
    )
    woods, water, roads = got[10, 10], got[10, 40], got[45, 5]
    assert len({0, woods, water, roads}) == 4
    assert got[10, 25] == water
    assert got[60, 60] == 0


def test_points_and_lines_and_empty_shapes_do_no_harm(project, image, tmp_path):
    path = tmp_path / "mixed.gpkg"
    shapes = [
        shapely.LineString([(LEFT + 2.5, TOP - 5.5), (LEFT + 40.5, TOP - 5.5)]),
        shapely.Polygon(),
        None,
        shapely.Point(LEFT + 50.5, TOP - 50.5),
    ]
    geopandas.GeoDataFrame(geometry=shapes, crs="EPSG:32631").to_file(path)
    got = drawn(project, tile_with_labels(project, image, {"2010": path}), "2010")[..., 0]
    assert got[5, 20] == 255
    assert got[50, 50] == 255
    assert got[30, 30] == 0


def test_a_vector_file_without_any_shape_is_all_unknown(project, image, tmp_path):
    """A year in which nothing was built yet."""
    path = tmp_path / "none.geojson"
    path.write_text('{"type": "FeatureCollection", "features": []}')
    got = drawn(project, tile_with_labels(project, image, {"2010": path}), "2010")
    assert (got == 0).all()


# Broken shapes


def square(left, top, right, bottom):
    """A ring, closed, from LEFT and TOP, y downward."""
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    return [(LEFT + x, TOP - y) for x, y in corners]


def wkb(kind, *rings):
    """A geometry of type `kind` that holds rings, as WKB that no library checked."""
    parts = [struct.pack("<BII", 1, kind, len(rings))]
    for ring in rings:
        coordinates = struct.pack(f"<{sum(map(len, ring))}d", *(x for point in ring for x in point))
        parts.append(struct.pack("<I", len(ring)) + coordinates)
    return b"".join(parts)


def collection(kind, *members):
    return struct.pack("<BII", 1, kind, len(members)) + b"".join(members)


def raised(ring):
    return [(*point, 7.0) for point in ring]


SOUND = wkb(3, square(40, 40, 50, 50))
BOWTIE = [(LEFT + x, TOP - y) for x, y in [(4, 4), (20, 20), (20, 4), (4, 20), (4, 4)]]
HALVES = (0, 1, 2, 0), (0, 2, 3, 0)
"""Corners of the two triangles of a square."""
NAN = float("nan")


def write_shapes(path, *shapes, **options):
    """A layer of WKB geometries in the grid's CRS."""
    usual = {"driver": "GPKG", "layer": "lab", "geometry_type": "Unknown", "crs": "EPSG:32631"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # about what is uncommon
        pyogrio.raw.write(path, np.array(shapes, object), [], [], **{**usual, **options})
    return path


@pytest.mark.parametrize(
    ("shape", "pixels"),
    [
        pytest.param(wkb(3, square(4, 4, 20, 20)[:4]), 16 * 16, id="open ring"),
        pytest.param(wkb(3, BOWTIE), 16 * 16 / 2, id="bow tie"),
        pytest.param(wkb(3, square(4, 4, 20, 20), square(8, 8, 12, 12)[:4]), 240, id="open hole"),
        pytest.param(
            collection(6, wkb(3, square(4, 4, 20, 20)), wkb(3, square(12, 4, 28, 20))),
            24 * 16,
            id="parts that overlap",
        ),
        pytest.param(
            wkb(3, square(4, 4, 20, 20), square(8, 8, 30, 12)), 16 * 16 - 12 * 4, id="hole across"
        ),
    ],
)
def test_broken_polygons_are_mended(project, image, tmp_path, shape, pixels):
    path = write_shapes(tmp_path / "broken.gpkg", shape, SOUND)
    got = drawn(project, tile_with_labels(project, image, {"2010": path}), "2010")[..., 0]
    assert (got[40:50, 40:50] == 255).all()
    got[40:50, 40:50] = 0
    assert (got > 0).sum() == pytest.approx(pixels, abs=16)  # a diagonal goes through pixels
    assert project.tile_manifest().broken is None


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(wkb(3, square(4, 4, 20, 20)[:1] * 2), id="ring of two points"),
        pytest.param(wkb(3, square(4, 4, 4, 4)), id="no area"),
        pytest.param(struct.pack("<BIIdd", 1, 2, 1, LEFT + 9, TOP - 9), id="line of one point"),
    ],
)
def test_shapes_beyond_mending_are_left_out_and_counted(project, image, tmp_path, shape):
    """Once each, though they touch all four tiles and two years."""
    path = write_shapes(tmp_path / "broken.gpkg", shape, SOUND, shape)
    seen = []
    table = tile_with_labels(
        project, image, {"2010": path, "2020": path}, progress=lambda text, *_: seen.append(text)
    )
    for year in ("2010", "2020"):
        got = drawn(project, table, year)[..., 0]
        assert (got[40:50, 40:50] == 255).all()
        assert (got > 0).sum() == 100
    name = f"{path} (layer lab)"
    assert project.tile_manifest().broken == {name: 2}
    assert f"labels: 2 broken shapes left out of {name}" in seen


def spoil(path, *rows):
    """Cut the geometries of rows of a GeoPackage short."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        triggers = database.execute("select name from sqlite_master where type = 'trigger'")
        for (name,) in triggers.fetchall():
            database.execute(f'drop trigger "{name}"')
        for row in rows:
            database.execute("update lab set geom = substr(geom, 1, 60) where fid = ?", (row,))
        database.commit()


def test_features_that_cannot_be_read_are_left_out_and_counted(project, image, tmp_path):
    """GDAL stops at the first; all others are drawn."""
    shapes = [wkb(3, square(i, 0, i + 1, 20)) for i in range(40)]
    path = write_shapes(tmp_path / "spoilt.gpkg", *shapes)
    spoil(path, 1, 8, 40)
    got = drawn(project, tile_with_labels(project, image, {"2010": path}), "2010")[..., 0]
    expected = np.zeros((64, 64), int)
    expected[:20, 1:39] = 255
    expected[:20, 7] = 0
    np.testing.assert_array_equal(got, expected)
    assert project.tile_manifest().broken == {f"{path} (layer lab)": 3}


def test_a_feature_of_geojson_without_coordinates(project, image, tmp_path):
    path = tmp_path / "some.geojson"
    boxes((40, 40, 50, 50)).to_crs(4326).to_file(path)
    whole = json.loads(path.read_text())
    lame = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon"}}
    whole["features"].insert(0, lame)
    path.write_text(json.dumps(whole))
    got = drawn(project, tile_with_labels(project, image, {"2010": path}), "2010")[..., 0]
    assert (got[40:50, 40:50] == 255).all()
    assert list(project.tile_manifest().broken.values()) == [1]


@pytest.mark.parametrize(("shapes", "spoilt"), [(2, 2), (40, 11)])
def test_a_layer_of_which_much_cannot_be_read_is_damaged(project, image, tmp_path, shapes, spoilt):
    path = write_shapes(tmp_path / "spoilt.gpkg", *[SOUND] * shapes)
    spoil(path, *range(1, spoilt + 1))
    with pytest.raises(GeomatchError, match=r"spoilt.gpkg \(layer lab\) is damaged") as caught:
        tile_with_labels(project, image, {"2010": path})
    assert "Replace the file" in caught.value.hint


@pytest.mark.parametrize("kind", ["TIN", "polyhedral surface"])
def test_surfaces_in_three_dimensions_are_drawn(project, image, tmp_path, kind):
    """As their faces, which GEOS has no type for."""
    first, second = square(4, 4, 20, 20), square(30, 4, 38, 12)
    if kind == "TIN":
        halves = [[ring[i] for i in corners] for ring in (first, second) for corners in HALVES]
        shape = collection(1016, *[wkb(1017, raised(half)) for half in halves])
    else:
        shape = collection(1015, wkb(1003, raised(first)), wkb(1003, raised(second)))
    path = write_shapes(tmp_path / "surface.gpkg", shape)
    got = drawn(project, tile_with_labels(project, image, {"2010": path}), "2010")[..., 0]
    assert (got[4:20, 4:20] == 255).all()
    assert (got[4:12, 30:38] == 255).all()
    assert (got > 0).sum() == 16 * 16 + 8 * 8
    assert project.tile_manifest().broken is None


def test_a_building_in_three_dimensions_is_its_roof(project, image, tmp_path):
    """Walls have no area from above; they are no defect."""
    left, top = square(4, 4, 20, 20)[0]
    wall = [(left, top, 0.0), (left, top - 16, 0.0), (left, top - 16, 9.0), (left, top, 9.0)]
    shape = collection(1006, wkb(1003, raised(square(4, 4, 20, 20))), wkb(1003, [*wall, wall[0]]))
    path = write_shapes(tmp_path / "building.gpkg", shape)
    got = drawn(project, tile_with_labels(project, image, {"2010": path}), "2010")[..., 0]
    assert (got[4:20, 4:20] == 255).all()
    assert project.tile_manifest().broken is None


def test_a_shape_without_a_place_is_left_out(project, image, tmp_path):
    path = write_shapes(tmp_path / "nan.gpkg", wkb(3, [(NAN, NAN)] * 4), SOUND)
    got = drawn(project, tile_with_labels(project, image, {"2010": path}), "2010")[..., 0]
    assert (got > 0).sum() == 100


# Wide shapes


def latitudes(crs="EPSG:32631", left=LEFT):
    """Longitude and latitude of the centres of 64 x 64 pixels, on their own."""
    x, y = np.meshgrid(left + 0.5 + np.arange(64), TOP - 0.5 - np.arange(64))
    lon, lat = transform(crs, "EPSG:4326", x.ravel(), y.ravel())
    return np.reshape(lon, (64, 64)), np.reshape(lat, (64, 64))


@pytest.mark.parametrize("sides", [(-30, 60), (-100, 100), (-180, 180)])
def test_the_edge_of_a_wide_polygon_is_where_it_is(project, image, tmp_path, sides):
    """A parallel is no straight line in the grid's CRS, and few vertices say where it runs."""
    _, lat = latitudes()
    edge = float(np.median(lat))
    path = tmp_path / "wide.gpkg"
    shape = shapely.box(sides[0], -90, sides[1], edge)
    geopandas.GeoDataFrame(geometry=[shape], crs="EPSG:4326").to_file(path)
    got = drawn(project, tile_with_labels(project, image, {"2010": path}), "2010")[..., 0]
    assert ((got > 0) == (lat < edge)).mean() > 0.99


def test_a_wide_polygon_in_mercator(project, image, tmp_path):
    path = tmp_path / "world.gpkg"
    shape = shapely.box(-2.0037e7, -2.0037e7, 2.0037e7, 2.0037e7)
    geopandas.GeoDataFrame(geometry=[shape], crs="EPSG:3857").to_file(path)
    got = drawn(project, tile_with_labels(project, image, {"2010": path}), "2010")
    assert (got == 255).all()


def test_a_line_across_continents(project, image, tmp_path):
    _, lat = latitudes()
    line = shapely.LineString([(-100, lat[32, 32]), (100, lat[32, 32])])
    path = tmp_path / "line.gpkg"
    geopandas.GeoDataFrame(geometry=[line], crs="EPSG:4326").to_file(path)
    got = drawn(project, tile_with_labels(project, image, {"2010": path}), "2010")[..., 0]
    assert set(np.flatnonzero((got > 0).any(axis=1))) <= {31, 32, 33}
    assert (got > 0).any(axis=0).all()


@pytest.mark.parametrize(
    ("west", "east"), [((178, 180), (-180, -178)), ((178, 180), (180, 182)), ((-182, -180), None)]
)
def test_both_sides_of_the_180th_meridian(write_raster, project, tmp_path, west, east):
    """Labels in longitudes from -180 to 180, from 0 to 360, or beyond -180."""
    left = 739_008  # of UTM zone 60, a bit west of the meridian at 45 degrees north
    while latitudes(crs="EPSG:32660", left=left)[0][32, 32] > 0:
        left += 32
    image = write_raster(
        "at180.tif", np.full((1, 64, 64), 90, np.uint8), crs="EPSG:32660", origin=(left, TOP)
    )
    shapes = [shapely.box(side[0], 40, side[1], 50) for side in (west, east) if side]
    path = tmp_path / "sides.gpkg"
    geopandas.GeoDataFrame(geometry=shapes, crs="EPSG:4326").to_file(path)
    table = tile_with_labels(project, image, {"2010": path})
    rows = TileStore.open(project.pixels).read(table.store_row)[..., 1]
    lon, _ = latitudes(crs="EPSG:32660", left=left)
    inside = np.ones_like(lon, bool) if east else lon > 0
    assert (rows > 0).sum() == pytest.approx(inside.sum(), abs=64)


# Kinds of shapes, and of files


WKT = {
    "curve": "CURVEPOLYGON (CIRCULARSTRING (2 12, 12 22, 22 12, 12 2, 2 12))",
    "z and m": "MULTIPOLYGON ZM (((4 4 1 2, 20 4 1 2, 20 20 1 2, 4 20 1 2, 4 4 1 2)))",
    "collection": "GEOMETRYCOLLECTION (POLYGON ((4 4, 20 4, 20 20, 4 20, 4 4)), POINT (30.5 30.5), "
    "GEOMETRYCOLLECTION (LINESTRING (40.5 2.5, 40.5 7.5), POLYGON EMPTY))",
    "compound": "COMPOUNDCURVE ((1.5 30.5, 11.5 30.5), "
    "CIRCULARSTRING (11.5 30.5, 16.5 35.5, 21.5 30.5))",
}


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("curve", 300, 328), ("z and m", 256, 256), ("collection", 262, 263), ("compound", 20, 40)],
)
def test_every_kind_of_geometry(project, image, tmp_path, name, least, most):
    """Read through a virtual layer, whose ending rasters have too."""
    placed = re.sub(
        r"(?<=[(,])( ?)([\d.]+) ([\d.]+)",
        lambda m: f"{m[1]}{LEFT + float(m[2])} {TOP - float(m[3])}",
        WKT[name],
    )
    (tmp_path / "shapes.csv").write_text(f'id,WKT\n1,"{placed}"\n')
    path = tmp_path / "shapes.vrt"
    path.write_text(
        f"""<OGRVRTDataSource><OGRVRTLayer name="shapes">
        <SrcDataSource>{tmp_path}/shapes.csv</SrcDataSource><LayerSRS>EPSG:32631</LayerSRS>
        <GeometryType>{"wkbMultiPolygonZM" if name == "z and m" else "wkbUnknown"}</GeometryType>
        </OGRVRTLayer></OGRVRTDataSource>"""
    )
    rows = drawn(project, tile_with_labels(project, image, {"2010": path}), "2010")[..., 0]
    assert least <= (rows > 0).sum() <= most
    assert project.tile_manifest().broken is None


def as_zip(path, *files):
    with zipfile.ZipFile(path, "w") as archive:
        for file in files:
            archive.write(file, file.name)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "roads.gdb",
        "roads.shp.zip",
        "/vsizip/{}/roads.shp.zip/roads.shp",
        "folder",
        "roads.dat",
        "*.gdb",
        "roads.zip",
    ],
)
def test_gdal_says_what_is_a_vector_file(project, image, tmp_path, name):
    """A file geodatabase, archives, a folder of shapefiles, a GeoPackage of another ending."""
    shape = wkb(3, square(40, 40, 50, 50))
    write_shapes(tmp_path / "roads.gdb", shape, driver="OpenFileGDB", geometry_type="Polygon")
    esri = {"driver": "ESRI Shapefile", "geometry_type": "Polygon"}
    (tmp_path / "folder").mkdir()
    for part in "ab":
        write_shapes(tmp_path / f"folder/{part}.shp", shape, layer=part, **esri)
    write_shapes(tmp_path / "roads.shp", shape, layer="roads", **esri)
    parts = [tmp_path / f"roads.{ending}" for ending in ("shp", "shx", "dbf", "prj")]
    as_zip(tmp_path / "roads.shp.zip", *parts)
    as_zip(tmp_path / "roads.zip", *parts)
    write_shapes(tmp_path / "roads.gpkg", shape).rename(tmp_path / "roads.dat")
    labels = name.format(tmp_path) if "{}" in name else tmp_path / name
    got = drawn(project, tile_with_labels(project, image, {"2010": labels}), "2010")[..., 0]
    assert (got[40:50, 40:50] == 255).all()
    assert (got > 0).sum() == 100


@pytest.mark.parametrize("name", ["/vsizip/{}/labels.zip/labels.tif", "GTIFF_DIR:1:{}/labels.tif"])
def test_rasters_that_only_gdal_finds(write_raster, project, image, tmp_path, name):
    values = np.random.default_rng(0).integers(1, 200, (1, 64, 64)).astype(np.uint8)
    as_zip(tmp_path / "labels.zip", write_raster("labels.tif", values, origin=(LEFT, TOP)))
    table = tile_with_labels(project, image, {"2010": name.format(tmp_path)})
    np.testing.assert_array_equal(drawn(project, table, "2010")[..., 0], values[0])


def test_changed_labels_are_drawn_again(project, image, tmp_path):
    path = tmp_path / "buildings.gpkg"
    boxes((0, 0, 8, 8)).to_file(path)
    tile_with_labels(project, image, {"2010": path})
    path.unlink()
    boxes((16, 16, 24, 24)).to_file(path)
    got = drawn(project, tile_with_labels(project, image, {"2010": path}), "2010")[..., 0]
    assert got[20, 20] == 255
    assert got[4, 4] == 0

"""Label layers: further channels of a tile, nearest or drawn, 0 where nothing is known."""

from __future__ import annotations

import geopandas
import numpy as np
import pytest
import shapely
from small_project import tile_sources

from geomatch.data.store import TileStore
from geomatch.manifests import Channels

LEFT, TOP = 500_000, 5_000_000
COL, ROW = LEFT // 32, TOP // 32 - 1  # the cell at the upper left corner


@pytest.fixture
def image(write_raster):
    """2 x 2 cells of one band."""
    return write_raster("image.tif", np.full((1, 64, 64), 90, np.uint8), origin=(LEFT, TOP))


def tile_with_labels(project, image, labels):
    return tile_sources(project, dict.fromkeys(labels, image), labels=labels)


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


def test_changed_labels_are_drawn_again(project, image, tmp_path):
    path = tmp_path / "buildings.gpkg"
    boxes((0, 0, 8, 8)).to_file(path)
    tile_with_labels(project, image, {"2010": path})
    path.unlink()
    boxes((16, 16, 24, 24)).to_file(path)
    got = drawn(project, tile_with_labels(project, image, {"2010": path}), "2010")[..., 0]
    assert got[20, 20] == 255
    assert got[4, 4] == 0

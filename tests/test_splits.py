"""Splits: what is trained on shares no ground, nor its surroundings, with what is tested on."""

from __future__ import annotations

import itertools
import json
import os

import geopandas
import numpy as np
import pytest
import shapely
from command_line import run_command
from small_project import tile_sources

from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import GeomatchError, UsageError

LEFT, TOP = 500_000, 5_000_000


def tile_in_splits(project, images, *overrides):
    """Tiles of 8 px at 1 m, of two years that are the same imagery."""
    years = dict.fromkeys(("before", "after"), images)
    return tile_sources(project, years, "grid.size=8", "split.by=blocks", *overrides)


def plain(width, height):
    return np.full((1, height, width), 90, np.uint8)


def gaps(bounds, a, b):
    """(a, b) metres between boxes, along the axis on which they lie further apart."""
    low, high = bounds[:, :2], bounds[:, 2:]
    apart = np.maximum(low[a][:, None] - high[b][None], low[b][None] - high[a][:, None])
    return apart.max(axis=-1)


def nearest_of_other_splits(table):
    bounds = table.bounds()
    members = [np.flatnonzero(table.split == code) for code in range(3)]
    pairs = itertools.combinations(members, 2)
    return min(float(gaps(bounds, a, b).min()) for a, b in pairs)


@pytest.fixture
def field(write_raster):
    """20 x 20 cells."""
    return write_raster("field.tif", plain(160, 160), origin=(LEFT, TOP))


@pytest.mark.parametrize(
    ("settings", "buffer"),
    [
        ((), 8),
        (("split.buffer=0",), 0),
        (("split.buffer=20",), 20),
        (("grid.stride=4",), 8),
        (("grid.stride=4", "split.buffer=0"), 0),
        (("grid.stride=3", "split.buffer=5", "split.block=30"), 5),
        (("split.block=50", "split.seed=3"), 8),
    ],
)
def test_blocks_leave_a_buffer_between_splits(project, field, settings, buffer):
    table = tile_in_splits(project, field, *settings)
    assert nearest_of_other_splits(table) >= buffer
    counts = np.bincount(table.split, minlength=3)
    assert (counts > 0).all(), dict(zip(SPLITS, counts, strict=True))


def test_places_that_would_leak_are_the_only_ones_dropped(project, field):
    """Without a buffer and without overlap nothing leaks, so nothing is dropped."""
    assert len(tile_in_splits(project, field, "split.buffer=0")) == 2 * 400
    assert 2 * 150 < len(tile_in_splits(project, field)) < 2 * 400


def test_all_years_of_a_place_are_in_one_split(project, field):
    table = tile_in_splits(project, field)
    for place in np.unique(table.places()):
        assert len(set(table.split[table.places() == place].tolist())) == 1


def test_blocks_are_seeded(project, field):
    first = dict(
        zip(*(lambda t: (t.ids(), t.split.tolist()))(tile_in_splits(project, field)), strict=True)
    )
    other = tile_in_splits(project, field, "split.seed=1")
    assert dict(zip(other.ids(), other.split.tolist(), strict=True)) != first
    again = tile_in_splits(project, field, "split.seed=0")
    assert dict(zip(again.ids(), again.split.tolist(), strict=True)) == first


def test_validation_and_test_get_about_a_seventh_each(project, field):
    share = np.bincount(tile_in_splits(project, field, "split.buffer=0").split, minlength=3) / 800
    assert 0.12 < share[1] < 0.25
    assert 0.12 < share[2] < 0.25


def test_a_block_smaller_than_a_tile_is_refused(project, field):
    with pytest.raises(UsageError, match=r"split\.block"):
        tile_in_splits(project, field, "split.block=4")


def test_splits_share_no_ground_across_a_border_of_zones(write_raster, project):
    """Cells of two UTM zones lie askew to each other where the zones meet."""
    path = write_raster("a.tif", plain(200, 200), crs="EPSG:4326", origin=(5.999, 45.0), gsd=1e-5)
    table = tile_in_splits(project, path, "grid.crs=utm", "split.block=24", "split.buffer=0")
    assert len(set(table.epsg.tolist())) == 2
    outlines = geopandas.read_parquet(project.catalogue).to_crs(32631).geometry.to_numpy()
    worst = 0.0
    for a, b in ((0, 1), (0, 2), (1, 2)):
        one, other = outlines[table.split == a], outlines[table.split == b]
        tree = shapely.STRtree(other)
        i, j = tree.query(one, predicate="intersects")
        worst = max(
            worst, float(shapely.area(shapely.intersection(one[i], other[j])).max(initial=0))
        )
    assert worst < 0.5, f"a training tile shares {worst:.0f} m2 of ground with a test tile"


@pytest.fixture
def sheets(write_raster, tmp_path):
    """Four sheets of 4.5 x 4 cells in a row."""
    for i, name in enumerate("abcd"):
        write_raster(f"sheets/{name}.tif", plain(36, 32), origin=(LEFT + i * 36, TOP))
    return tmp_path / "sheets"


def test_whole_files_are_in_one_split(project, sheets):
    table = tile_in_splits(
        project, sheets, "split.by=source", "split.validation=c*.tif", 'split.test=["d.tif"]'
    )
    left = table.bounds()[:, 0] - LEFT
    # A cell that spans b and c (at 72, on the grid) or c and d (at 108) would leak.
    wanted = np.select([left + 8 <= 72, left + 8 <= 108], [0, 1], 2)
    np.testing.assert_array_equal(table.split, wanted)
    assert sorted(set(left.tolist())) == [x for x in range(0, 144, 8) if x != 104]


def test_files_can_be_named_by_their_path(project, sheets):
    table = tile_in_splits(project, sheets, "split.by=source", "split.test=*/sheets/[ab].tif")
    assert (table.split[table.bounds()[:, 2] <= LEFT + 72] == 2).all()
    assert (table.split[table.bounds()[:, 0] >= LEFT + 72] == 0).all()


def test_a_glob_that_matches_no_source_is_an_error(project, sheets):
    with pytest.raises(UsageError, match="x\\*"):
        tile_in_splits(project, sheets, "split.by=source", "split.test=x*.tif")
    assert not project.catalogue.exists()


def test_strided_tiles_do_not_reach_into_a_file_of_another_split(project, sheets):
    table = tile_in_splits(project, sheets, "split.by=source", "split.test=d.tif", "grid.stride=2")
    bounds = table.bounds()
    assert bounds[table.split == 0, 2].max() <= LEFT + 108
    assert bounds[table.split == 2, 0].min() >= LEFT + 108
    assert (table.split == 2).sum() > 10


def polygons(path, boxes, crs):
    """Boxes (x and y from LEFT and TOP, y downward) written in `crs`."""
    shapes = [shapely.box(LEFT + a, TOP - d, LEFT + c, TOP - b) for a, b, c, d in boxes]
    frame = geopandas.GeoDataFrame(geometry=shapes, crs="EPSG:32631").to_crs(crs)
    frame.to_file(path)
    return path


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3035"])
def test_polygons_of_a_file_set_regions_apart(project, field, tmp_path, crs):
    """Cells wholly inside belong to the split, partly covered ones to none."""
    kind = "geojson" if crs == "EPSG:4326" else "gpkg"
    validation = polygons(tmp_path / f"v.{kind}", [(3, 3, 61, 45), (3, 99, 29, 125)], crs)
    test = polygons(tmp_path / f"t.{kind}", [(99, 3, 157, 157)], crs)
    table = tile_in_splits(
        project, field, "split.by=file", f"split.validation={validation}", f"split.test={test}"
    )
    left, _, _, top = (table.bounds() - [LEFT, TOP, LEFT, TOP]).T
    got = {
        (int(x) // 8, int(-y) // 8): SPLITS[s]
        for x, y, s in zip(left, top, table.split, strict=True)
    }
    expected = {}
    for c in range(20):
        for r in range(20):
            cell = shapely.box(c * 8, r * 8, c * 8 + 8, r * 8 + 8)
            areas = {
                "validation": shapely.union(shapely.box(3, 3, 61, 45), shapely.box(3, 99, 29, 125)),
                "test": shapely.box(99, 3, 157, 157),
            }
            inside = [name for name, area in areas.items() if area.covers(cell)]
            apart = all(area.disjoint(cell) for area in areas.values())
            if inside or apart:
                expected[c, r] = inside[0] if inside else "train"
    assert got == expected


def test_a_polygon_around_the_world_sets_all_apart(project, field, tmp_path):
    """Most of it has no place in the grid's CRS; it is cut before it is projected."""
    path = tmp_path / "world.gpkg"
    geopandas.GeoDataFrame(geometry=[shapely.box(-180, -90, 180, 90)], crs=4326).to_file(path)
    table = tile_in_splits(project, field, "split.by=file", f"split.test={path}")
    assert len(table) == 2 * 20 * 20
    assert (table.split == 2).all()


def test_a_polygon_that_crosses_itself_is_mended(project, field, tmp_path):
    """Two triangles that meet in the middle: the cells at its left and right sides."""
    corners = [(0, 0), (160, 160), (160, 0), (0, 160)]
    shape = shapely.Polygon([(LEFT + x, TOP - y) for x, y in corners])
    path = tmp_path / "bowtie.gpkg"
    geopandas.GeoDataFrame(geometry=[shape], crs="EPSG:32631").to_file(path)
    table = tile_in_splits(project, field, "split.by=file", f"split.test={path}")
    x, y = ((table.bounds()[:, [0, 3]] - [LEFT, TOP]) * [1, -1] + [4, 4]).T
    away = np.abs(x - 80) - np.abs(y - 80)  # of a centre, in what the diagonals bound
    np.testing.assert_array_equal(table.split[away > 8], 2)
    np.testing.assert_array_equal(table.split[away < -8], 0)
    assert not (np.abs(away) < 8).any(), "the diagonals go through these"


def test_a_polygon_beyond_mending_is_an_error(project, field, tmp_path):
    """Left out, it would let test ground into the training split."""
    path = tmp_path / "flat.gpkg"
    flat = shapely.Polygon([(LEFT, TOP - 9), (LEFT + 90, TOP - 9), (LEFT + 30, TOP - 9)])
    geopandas.GeoDataFrame(geometry=[flat], crs="EPSG:32631").to_file(path)
    with pytest.raises(GeomatchError, match=r"flat\.gpkg .*feature 1 is broken") as caught:
        tile_in_splits(project, field, "split.by=file", f"split.test={path}")
    assert "Draw it again" in caught.value.hint


def test_a_file_split_may_have_no_validation(project, field, tmp_path):
    test = polygons(tmp_path / "t.geojson", [(99, 3, 157, 157)], "EPSG:4326")
    table = tile_in_splits(project, field, "split.by=file", f"split.test={test}")
    assert set(table.split.tolist()) == {0, 2}


def test_changed_polygons_split_again(project, field, tmp_path):
    """Not "up to date": the file's name is the same, its polygons are not."""
    both = (f"split.validation={tmp_path}/v.geojson", f"split.test={tmp_path}/t.geojson")
    polygons(tmp_path / "v.geojson", [(0, 0, 40, 40)], "EPSG:4326")
    path = polygons(tmp_path / "t.geojson", [(96, 0, 160, 160)], "EPSG:4326")
    before = tile_in_splits(project, field, "split.by=file", *both)
    path.unlink()
    polygons(path, [(128, 0, 160, 160)], "EPSG:4326")
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000_000))
    after = tile_in_splits(project, field, "split.by=file", *both)
    assert 0 < (after.split == 2).sum() < (before.split == 2).sum()


@pytest.mark.parametrize("where", ["toml", "repeated"])
def test_polygon_files_are_found_from_any_folder(project, field, tmp_path, monkeypatch, where):
    """As imagery is: from the project in its toml, from where the command was first given."""
    root = project.root
    monkeypatch.chdir(tmp_path)
    (root / "areas").mkdir()
    (tmp_path / "areas").mkdir()
    for name, box in (("v", (0, 0, 40, 40)), ("t", (96, 0, 160, 160))):
        folder = root if where == "toml" else tmp_path
        polygons(folder / "areas" / f"{name}.geojson", [box], "EPSG:4326")
    command = ["tile", "-p", str(root), "--workers", "1"]
    if where == "toml":
        project.config.write_text(
            f'[[source]]\nyear = "a"\nimages = {json.dumps(str(field))}\n[grid]\nsize = 8\n'
            '[split]\nby = "file"\nvalidation = ["areas/v.geojson"]\ntest = ["areas/t.geojson"]\n'
        )
    else:
        options = ["--size", "8", "--split", "file", "--validation", "areas/v.geojson"]
        first = run_command(*command, f"a={field}", *options, "--test", "areas/t.geojson")
        assert first.exit_code == 0, first.stderr
    monkeypatch.chdir("/")
    result = run_command(*command)
    assert result.exit_code == 0, result.stderr
    assert set(TileTable.load(project.catalogue).split.tolist()) == {0, 1, 2}


def test_splits_in_the_catalogue_are_named(project, field):
    table = tile_in_splits(project, field)
    frame = geopandas.read_parquet(project.catalogue)
    counts = frame["split"].value_counts().to_dict()
    assert counts == project.tile_manifest().splits
    assert counts == {name: int((table.split == i).sum()) for i, name in enumerate(SPLITS)}

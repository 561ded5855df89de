"""Answers as files, and many queries at once."""

from __future__ import annotations

import json

import geopandas
import numpy as np
import pandas as pd
import pytest
import shapely
from command_line import run_command
from PIL import Image
from rasterio.warp import transform
from small_project import CRS, SIZE

from geomatch.data.filters import Filter
from geomatch.data.store import TileStore
from geomatch.errors import GeomatchError, UsageError
from geomatch.geo import footprints
from geomatch.query import query, query_each
from geomatch.querying.answers import Unanswered
from geomatch.querying.opened import OpenIndex
from geomatch.querying.options import Options

DEGREES = "EPSG:4326"


def ask(indexed, *targets, **options):
    return list(query_each(indexed.project, targets, Options(**options)))


def photos(indexed, folder, rows):
    """Tiles as image files without a place."""
    folder.mkdir()
    for row in rows:
        pixels = TileStore.open(indexed.project.pixels).read(np.array([row]))[0, ..., :3]
        Image.fromarray(pixels).save(folder / f"{row:02}.png")
    return folder


@pytest.fixture(scope="module")
def written(indexed, tmp_path_factory):
    """Two tiles and a photo, asked for at once and written in every form."""
    root = tmp_path_factory.mktemp("written")
    names = [indexed.tiles.ids()[i] for i in (0, 50)]
    photo = photos(indexed, root / "photos", [7]) / "07.png"
    paths = {form: root / "made" / f"answers.{form}" for form in ("csv", "geojson", "gpkg")}
    found = ask(indexed, *names, str(photo), top=3, **paths)
    return found, paths


def test_csv_has_a_row_for_each_answer(written):
    found, paths = written
    table = pd.read_csv(paths["csv"], dtype={"query_year": str, "year": str})
    wanted = [
        {"query": each.query.name, "query_year": each.query.year, **row}
        for each in found
        for row in each.as_json()
    ]
    wanted = pd.DataFrame(wanted).astype(table.dtypes.to_dict())  # an empty column has numbers
    pd.testing.assert_frame_equal(table, wanted)
    assert set(table["query_year"].dropna()) == {"2010", "2020"}


def test_geopackage_has_footprints_and_lines_in_the_crs_of_the_grid(written, indexed):
    found, paths = written
    tiles, ids = indexed.tiles, indexed.tiles.ids()
    answers, links, queries = (
        geopandas.read_file(paths["gpkg"], layer=name) for name in ("answers", "links", "queries")
    )
    assert all(layer.crs == CRS for layer in (answers, links, queries))
    assert list(answers["tile"]) == [match.tile for each in found for match in each.matches]
    boxes = shapely.box(*tiles.bounds()[[ids.index(name) for name in answers["tile"]]].T)
    assert shapely.equals(answers.geometry.values, boxes).all()
    # A photo has no place to draw a line from.
    assert [type(rank) for rank in links["rank"][:2]] == [int, int]
    assert list(links["query"]) == [name for name in queries["query"] for _ in range(3)]
    centres = tiles.centres()
    for line, row in zip(links.geometry, links.itertuples(), strict=True):
        ends = [centres[ids.index(name)] for name in (row.query, row.tile)]
        np.testing.assert_allclose(np.array(line.coords), ends)
        assert line.length == pytest.approx(row.distance_m)
    assert list(queries["query_year"]) == ["2010", "2020"]
    np.testing.assert_allclose(
        queries.geometry.bounds, tiles.bounds()[[ids.index(name) for name in queries["query"]]]
    )


def test_geojson_is_the_same_in_degrees(written, indexed):
    found, paths = written
    collection = json.loads(paths["geojson"].read_text())
    assert "crs" not in collection  # RFC 7946
    shown = geopandas.read_file(paths["geojson"])
    assert shown.crs == DEGREES
    answers = shown[shown["layer"] == "answers"]
    assert list(answers["score"]) == pytest.approx(
        [match.score for each in found for match in each.matches]
    )
    ranks = [each["properties"]["rank"] for each in collection["features"]]
    assert ranks[:2] + ranks[-1:] == [1, 2, None]
    assert isinstance(ranks[0], int)
    lonlat = footprints.lonlat(indexed.tiles.epsg, indexed.tiles.centres())
    at = [indexed.tiles.ids().index(name) for name in answers["tile"]]
    middle = shapely.get_coordinates(shapely.centroid(answers.geometry.values))
    np.testing.assert_allclose(middle, lonlat[at], atol=1e-6)
    kinds = shown.groupby("layer").geometry.apply(lambda g: set(g.geom_type)).to_dict()
    assert kinds == {"answers": {"Polygon"}, "links": {"LineString"}, "queries": {"Polygon"}}


def test_files_replace_earlier_ones_and_leave_nothing_beside(written, indexed):
    _, paths = written
    ask(indexed, indexed.tiles.ids()[3], top=2, **paths)
    assert len(pd.read_csv(paths["csv"])) == 2
    assert len(geopandas.read_file(paths["gpkg"], layer="answers")) == 2
    assert len(geopandas.read_file(paths["geojson"])) == 2 + 2 + 1
    assert {path.name for path in paths["csv"].parent.iterdir()} == {
        path.name for path in paths.values()
    }


def test_a_shape_across_180_degrees_stays_in_one_piece():
    rings = np.array([[[179.9, 1], [-179.9, 1], [179.9, 1]], [[-9.0, 1], [-8, 2], [-9, 1]]])
    expected = [[[179.9, 1], [180.1, 1], [179.9, 1]], [[-9.0, 1], [-8, 2], [-9, 1]]]
    np.testing.assert_allclose(footprints.unbroken(rings), expected)


# Many at once


def test_many_targets_are_answered_as_each_alone(indexed, tmp_path):
    folder = photos(indexed, tmp_path / "photos", [5, 40])
    ids = indexed.tiles.ids()
    found = ask(indexed, ids[0], str(folder), ids[60], f"{folder}/*5.png")
    asked = [ids[0], str(folder / "05.png"), str(folder / "40.png"), ids[60]]
    asked.append(str(folder / "05.png"))
    assert [each.query.name for each in found] == asked
    for each, name in zip(found, asked, strict=True):
        alone = query(indexed.project, name)
        assert [m.tile for m in each.matches] == [m.tile for m in alone.matches]
        np.testing.assert_allclose(
            [m.score for m in each.matches], [m.score for m in alone.matches], atol=1e-5
        )


def box_around(tiles, i, metres):
    """W,S,E,N of a square around the centre of a tile."""
    x, y = tiles.centres()[i]
    lon, lat = transform(CRS, "OGC:CRS84", [x - metres, x + metres], [y - metres, y + metres])
    return f"{lon[0]},{lat[0]},{lon[1]},{lat[1]}"


@pytest.mark.parametrize("year", [None, "2010"])
def test_a_box_stands_for_the_tiles_whose_centres_are_in_it(indexed, year):
    tiles = indexed.tiles
    i = int(np.argmin(tiles.col) + 5)
    away = np.abs(tiles.centres() - tiles.centres()[i]).max(axis=1)
    inside = np.flatnonzero((away < 1.2 * SIZE) & (tiles.year == (0 if year else 1)))
    assert len(inside) > 3
    found = ask(indexed, box_around(tiles, i, 1.2 * SIZE), from_year=year)
    assert {each.query.name for each in found} == {tiles.ids()[j] for j in inside}


def test_a_box_across_180_degrees(indexed):
    rows = OpenIndex.open(indexed.project, None).rows
    everywhere = rows.passing(Filter(box=(-180, -90, 180, 90)))
    assert everywhere == list(range(88))
    assert rows.passing(Filter(box=(170, -90, 0, 90))) == everywhere
    assert rows.passing(Filter(box=(170, -90, -170, 90))) == []


def test_what_a_list_has_wrong_is_told_and_the_rest_answered(indexed, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    tile = indexed.tiles.ids()[0]
    wrong = [
        "n" * 5000,
        "no\0where",
        "nowhere",
        str(tmp_path / "empty"),
        str(tmp_path / "torn.png"),
        "0,0,1,1",
        "*.none",
    ]
    found = ask(indexed, *wrong, tile)
    assert [isinstance(each, Unanswered) for each in found] == [True] * 7 + [False]
    assert [each.target for each in found[:7]] == wrong
    messages = [
        *["neither a tile"] * 3,
        "no image files",
        "cannot be read",
        "its centre in",
        "no image",
    ]
    for each, message in zip(found, messages, strict=False):
        assert message in each.error.message


def test_one_query_is_one_target(indexed):
    with pytest.raises(UsageError, match="several queries"):
        query(indexed.project, "0,0,1,1")


# The command


def test_json_lines_of_a_list_on_stdin(indexed):
    ids = indexed.tiles.ids()
    lines = f"{ids[0]}\n\n  {ids[1]}  \nnowhere\n{ids[2]}"
    done = run_command("query", "-p", indexed.root, "-", "--json", "--top", "2", stdin=lines)
    assert done.exit_code == 1
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["query"] for each in found] == [ids[0], ids[1], "nowhere", ids[2]]
    assert found[2]["error"].startswith("nowhere is neither a tile")
    alone = run_command("query", "-p", indexed.root, ids[1], "--json", "--top", "2")
    assert found[1]["matches"] == json.loads(alone.stdout)
    assert "1 of 4 queries have no answer" in done.stderr


def test_a_table_and_a_file_for_several(indexed, tmp_path):
    ids = indexed.tiles.ids()
    path = tmp_path / "answers.csv"
    done = run_command("query", "-p", indexed.root, *ids[:2], "--csv", path, "-q", "--top", "1")
    assert done.exit_code == 0, done.output
    assert all(f"{name}: nearest tiles" in done.stdout for name in ids[:2])
    assert str(path) in done.stderr
    assert len(pd.read_csv(path)) == 2


def test_footprints_need_a_place(indexed, copied):
    project = copied(indexed)
    manifest = json.loads(project.tiles_manifest.read_text())
    project.tiles_manifest.write_text(json.dumps({**manifest, "placement": "none"}))
    (failed,) = query_each(project, ["0,0,1,1"], Options())
    assert "is a box, but the images have no georeference" in failed.error.message
    for option in ("gpkg", "geojson"):
        with pytest.raises(GeomatchError, match=f"--{option} needs footprints"):
            query(project, indexed.tiles.ids()[0], **{option: project.root / "answers"})

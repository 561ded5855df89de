"""Filters of a query: years, a split, a box, an area and a distance."""

from __future__ import annotations

import json

import neighbourhood
import numpy as np
import pytest
import shapely
from command_line import run_command
from hand_made import hand_made_project

from geomatch.config import IndexConfig
from geomatch.errors import GeomatchError, UsageError
from geomatch.geo import footprints
from geomatch.index import index
from geomatch.project import read_json, write_json
from geomatch.query import query

TILES, VECTORS = neighbourhood.tiles(), neighbourhood.descriptors().astype(np.float32)
ASKED = 820
DEGREES = footprints.lonlat(TILES.epsg, TILES.centres())


@pytest.fixture(scope="module", params=["exact", "ivfpq"])
def project(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("filters") / request.param
    project = hand_made_project(root, TILES, VECTORS)
    index(project, settings=IndexConfig(engine=request.param))
    return project


def answers(project, *options):
    """Rows of the tiles that the command finds, in order, and what it printed."""
    result = run_command(
        "query", "-p", project.root, TILES.ids()[ASKED], "--json", "--top", "20", *options
    )
    assert result.exit_code == 0, result.output
    ids = {name: i for i, name in enumerate(TILES.ids())}
    return np.array([ids[answer["tile"]] for answer in json.loads(result.stdout)])


def assert_best_of(found, passed):
    """Most of the answers are the best of those that pass, and as many as there are."""
    assert np.isin(found, passed).all()
    assert len(found) == min(20, len(passed))
    true = neighbourhood.scores(VECTORS, VECTORS[ASKED], "cosine")
    best = passed[np.argsort(-true[passed])[: len(found)]]
    assert len(np.intersect1d(best, found)) >= 0.9 * len(found)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_split(project, split):
    code = ("train", "validation", "test").index(split)
    passed = np.flatnonzero((TILES.split == code) & (TILES.year == 1))
    assert_best_of(answers(project, "--split", split), passed)


def test_a_box(project):
    lon, lat = DEGREES[ASKED]
    west, south, east, north = lon - 0.002, lat - 0.001, lon + 0.0004, lat + 0.001
    inside = ([west, south] <= DEGREES).all(axis=1) & ([east, north] >= DEGREES).all(axis=1)
    found = answers(project, "--bbox", f"{west},{south},{east},{north}", "--year", "2000")
    passed = np.flatnonzero(inside & (TILES.year == 0))
    assert_best_of(found, passed[passed != ASKED])
    assert west < 0  # so that an option's value begins with a minus


def test_the_polygons_of_a_file(project, tmp_path):
    area = shapely.union_all([shapely.Point(DEGREES[i]).buffer(0.0006) for i in (ASKED, 100)])
    features = {"type": "Feature", "properties": {}, "geometry": shapely.geometry.mapping(area)}
    (tmp_path / "area.geojson").write_text(json.dumps(features))
    inside = shapely.contains_xy(area, DEGREES)
    assert_best_of(
        answers(project, "--within", tmp_path / "area.geojson"),
        np.flatnonzero(inside & (TILES.year == 1)),
    )


def test_a_distance(project):
    centres = TILES.centres()
    away = footprints.distance(
        np.full(len(TILES), TILES.epsg[ASKED]),
        np.broadcast_to(centres[ASKED], centres.shape),
        TILES.epsg,
        centres,
    )
    passed = np.flatnonzero((away >= 60) & (TILES.year == 1))
    assert 1000 < len(passed) < 1600
    assert_best_of(answers(project, "--exclude-radius", "60"), passed)
    assert len(answers(project, "--exclude-radius", "1e7")) == 0


def test_all_together(project):
    lon, lat = DEGREES[ASKED]
    found = answers(
        project,
        *("--split", "test", "--bbox", f"{lon - 0.001},{lat - 0.001},{lon + 0.001},{lat + 0.001}"),
        *("--exclude-radius", "30", "--same-year"),
    )
    inside = (np.abs(DEGREES - DEGREES[ASKED]) <= 0.001).all(axis=1)
    away = np.hypot(*(TILES.centres() - TILES.centres()[ASKED]).T) >= 30
    assert_best_of(found, np.flatnonzero(inside & away & (TILES.split == 2)))


@pytest.mark.parametrize(
    "options",
    [
        ["--bbox", "1,2,3"],
        ["--bbox", "a,b,c,d"],
        ["--bbox", "0,50,1,40"],
        ["--bbox", "-200,0,1,1"],
        ["--exclude-radius", "-1"],
        ["--exclude-radius", "nan"],
        ["--split", "all"],
    ],
)
def test_a_filter_that_makes_no_sense_is_refused(project, options):
    result = run_command("query", "-p", project.root, TILES.ids()[ASKED], *options)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_an_area_that_cannot_be_read_is_one_line(project, tmp_path):
    (tmp_path / "notes.txt").write_text("no layer")
    for path in (tmp_path / "notes.txt", tmp_path / "missing.gpkg"):
        with pytest.raises(GeomatchError) as failed:
            query(project, TILES.ids()[ASKED], within=path)
        assert path.name in failed.value.message


def test_filters_by_place_need_one(tmp_path):
    project = hand_made_project(tmp_path / "project", TILES, VECTORS)
    tile = TILES.ids()[ASKED]
    values = read_json(project.tiles_manifest, "geomatch tile")
    del values["format"]
    write_json(project.tiles_manifest, values | {"placement": "fictitious"})
    assert query(project, tile, box=(-180.0, -90.0, 180.0, 90.0)).matches
    with pytest.raises(UsageError, match="--exclude-radius needs metres"):
        query(project, tile, exclude_radius=50.0)
    write_json(project.tiles_manifest, values | {"placement": "none"})
    with pytest.raises(UsageError, match="--bbox needs a place"):
        query(project, tile, box=(-180.0, -90.0, 180.0, 90.0))


def test_a_filtered_query_has_no_probability(project):
    """For it is about a search among all tiles."""
    tile = TILES.ids()[ASKED]
    assert query(project, tile).matches[0].probability is not None
    assert query(project, tile, split="test").matches[0].probability is None

"""query --verify and --georeference: what is looked at, and in which order answers come."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from command_line import run_command
from hand_made import describe_by_hand
from PIL import Image
from textures import EPSG, GSD, LEFT, TOP, scan_of_ground, texture, textured_project

from geomatch.errors import GeomatchError, UsageError
from geomatch.geo.coordinates import project_points
from geomatch.index import index
from geomatch.query import query
from geomatch.querying.answers import Match, Matches
from geomatch.querying.confirming import confirm
from geomatch.querying.opened import OpenIndex
from geomatch.querying.placing import georeference
from geomatch.querying.targets import Query


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Tiles described so that a query finds another place first, and its own second."""
    project, tiles = textured_project(tmp_path_factory.mktemp("confirming") / "here")
    places = tiles.places()
    count = places.max() + 1
    # Neighbours on the circle are not neighbours on the ground.
    angle = 2 * np.pi / count * (places * 25 % count + 0.6 * tiles.year)
    describe_by_hand(project, np.stack([np.cos(angle), np.sin(angle)], axis=1))
    index(project)
    return project


@pytest.fixture(scope="module")
def tile(project):
    """A tile of 2020 in the middle of the ground, whose own place comes second."""
    opened = OpenIndex.open(project, None)
    col, row = int((LEFT + 96) / 32), int((TOP - 128) / 32)
    at = opened.rows.find(f"{col}_{row}@2020")
    assert at is not None
    return opened.rows.take([at])[0]


def metres_from(match, x, y):
    """Metres from where an answer puts the query to a point."""
    lon, lat = np.array([match.query_lon]), np.array([match.query_lat])
    px, py = project_points("OGC:CRS84", lon, lat, f"EPSG:{EPSG}")
    return float(np.hypot(px[0] - x, py[0] - y))


def test_a_confirmed_answer_comes_first(project, tile, tmp_path):
    before = query(project, tile["id"], top=3)
    assert all(match.confirmed is None for match in before.matches)
    assert "confirmed" not in before.as_json()[0]
    found = query(project, tile["id"], top=3, verify=2, sheet=tmp_path / "sheet.png")
    own = tile["id"].replace("2020", "2010")
    place = [match.tile for match in before.matches].index(own)
    assert place == 1
    first, second, third = found.matches
    assert (first.tile, first.confirmed, first.rank) == (own, True, 1)
    assert first.inliers > 20
    assert (first.turn + 180) % 360 - 180 == pytest.approx(0, abs=1)
    assert metres_from(first, tile["x"], tile["y"]) < 0.3
    assert (second.tile, second.confirmed) == (before.matches[0].tile, False)
    assert (second.rank, second.query_lon) == (2, None)
    assert third == before.matches[2]
    assert found.rows == (before.rows[1], before.rows[0], before.rows[2])
    # Both answers that were looked at are drawn, lines in the first only.
    with Image.open(tmp_path / "sheet.png") as drawn:
        assert drawn.height > 2 * 360
        between = np.asarray(drawn)[:, 373:382]  # of a pair's two images
    assert (between[12:372].min(axis=(1, 2)) < 255).any()
    assert (between[404:764] == 255).all()


def test_the_table_and_json_have_it(project, tile):
    shown = run_command("query", "-p", project.root, tile["id"], "--verify", "1", "--json")
    (first, *_) = json.loads(shown.stdout)
    assert first["confirmed"] is False
    assert first["inliers"] >= 0
    shown = run_command("query", "-p", project.root, tile["id"], "--verify", "2")
    assert "confirmed" in shown.stdout
    assert "inliers" in shown.stdout


def answers(name, *places, gsd=None, turn=None, **options):
    """Answers at centres (x, y), as to a scan or to an image that was taken for a tile."""
    size = np.asarray(Image.open(name)).shape
    asked = Query(str(name), pixels=np.asarray(Image.open(name)).reshape(size), **options)
    matches = [
        Match(str(name), rank, "tile", "2010", 0.5, 0.0, 0.0, None, turn=turn, gsd=gsd)
        for rank in range(1, len(places) + 1)
    ]
    centres = tuple((EPSG, x, y) for x, y in places)
    return Matches(asked, tuple(matches), (0,) * len(places), centres)


FAR, NEAR = (LEFT + 230, TOP - 30), (LEFT + 128, TOP - 120)


def test_a_scan_is_confirmed_where_it_lies(project, tmp_path):
    scan_of_ground(tmp_path / "scan.png")
    opened = OpenIndex.open(project, None)
    found = answers(tmp_path / "scan.png", NEAR, gsd=0.5, turn=30.0, is_scan=True)
    (match,) = confirm(opened, found, 1).matches
    assert match.confirmed
    assert match.gsd == pytest.approx(0.6, rel=0.02)
    assert match.turn == pytest.approx(37, abs=1)
    assert metres_from(match, LEFT + 120, TOP - 130) < GSD


def test_an_image_is_written_where_it_lies(project, tmp_path):
    scan_of_ground(tmp_path / "scan.png")
    opened = OpenIndex.open(project, None)
    found = answers(tmp_path / "scan.png", NEAR, gsd=0.6)
    placed = georeference(opened, found, tmp_path / "out.tif")
    assert np.hypot(*(placed.centre[0] - [LEFT + 120, TOP - 130])) < GSD
    assert {p.name for p in tmp_path.glob("out.*")} == {"out.tif", "out.points", "out.vrt"}


def test_what_cannot_be_georeferenced_is_told(project, tile, tmp_path):
    opened, out = OpenIndex.open(project, None), tmp_path / "out.tif"
    with pytest.raises(UsageError, match="is a tile"):
        query(project, tile["id"], georeference=out)
    with pytest.raises(UsageError, match=r"out\.png: a GeoTIFF is written"):
        query(project, tile["id"], georeference=tmp_path / "out.png")
    Image.fromarray(texture(100, 100, 7)).save(tmp_path / "other.png")
    found = answers(tmp_path / "other.png", NEAR, gsd=0.6)
    with pytest.raises(GeomatchError, match="not confirmed at any of 1 answers"):
        georeference(opened, found, out)
    with pytest.raises(UsageError, match="is georeferenced"):
        georeference(opened, replace(found, query=replace(found.query, epsg=EPSG)), out)
    scan_of_ground(tmp_path / "scan.tif")
    with pytest.raises(UsageError, match="is the image itself"):
        georeference(opened, answers(tmp_path / "scan.tif", NEAR), tmp_path / "scan.tif")
    assert not out.exists()

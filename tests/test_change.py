"""Change: places ranked by how far their descriptors moved, by hand-written descriptors."""

from __future__ import annotations

import csv
import json
import warnings

import geopandas
import numpy as np
import pytest
from command_line import run_command
from hand_made import describe_by_hand
from image_sets import class_folders, tile_folders
from PIL import Image
from small_project import SIZE, new_project

from geomatch import change as module
from geomatch.change import change
from geomatch.data.tiles import TileTable
from geomatch.errors import GeomatchError, UsageError

YEARS = ("2010", "2020")
SPREAD = np.array([5.0, 0.1, 1.0, 1.0, 1.0, 0.0])
"""By how much light and season move each value of a descriptor from place to place."""


def describe(project, moved):
    """Descriptors of a tiled project whose later year differs by `moved` (n, d), by place."""
    tiles = TileTable.load(project.catalogue)
    place, rng = tiles.places(), np.random.default_rng(1)
    ground = rng.normal(size=(place.max() + 1, moved.shape[1]))
    vectors = ground[place] + np.where(tiles.year[:, None] == 1, moved[place], 0)
    describe_by_hand(project, vectors)
    return tiles


def season(places):
    """Differences (n, 6) between two years of places where nothing changed but the season."""
    return 3 + np.random.default_rng(2).normal(size=(places, 6)) * SPREAD


def width(path):
    with Image.open(path) as picture:
        return picture.size[0]


@pytest.fixture
def moved(copied, tiled):
    """A project in which place 5 changed, and how its places moved."""
    project = copied(tiled)
    moves = season(tiled.tiles.places().max() + 1)
    # Less than season moves the first value, but in one that it hardly moves.
    moves[5, 1] += 2
    return project, describe(project, moves), moves


def test_what_moved_beyond_the_usual_is_first(moved):
    project, tiles, moves = moved
    found = change(project, *YEARS)
    assert tiles.places()[found.before[0]] == tiles.places()[found.after[0]] == 5
    assert len(found) == len(moves)
    assert (np.diff(found.score) <= 0).all()
    assert np.median(found.score) == pytest.approx(1)
    # The raw length of the difference is another ranking.
    assert np.linalg.norm(moves, axis=1).argmax() != 5


def test_scores_are_those_of_a_plain_loop(moved):
    project, tiles, moves = moved
    mean, spread = np.median(moves, axis=0), [1.0] * 6
    for _ in range(3):
        length = [
            sum(((x - m) / s) ** 2 for x, m, s in zip(move, mean, spread, strict=True))
            for move in moves
        ]
        calm = [move for move, each in zip(moves, length, strict=True) if each <= np.median(length)]
        mean = [sum(column) / len(calm) for column in zip(*calm, strict=True)]
        spread = [np.std(column) for column in zip(*calm, strict=True)]
        spread = [max(each, max(spread) / 1000) for each in spread]
    length = np.array([np.linalg.norm((move - mean) / np.array(spread)) for move in moves])
    found = change(project, *YEARS)
    expected = length[tiles.places()[found.before]] / np.median(length)
    np.testing.assert_allclose(found.score, expected, rtol=1e-4)


def test_the_order_of_years_and_the_size_of_blocks_change_nothing(moved, monkeypatch):
    project, _, _ = moved
    found, back = change(project, *YEARS), change(project, *YEARS[::-1])
    np.testing.assert_array_equal(found.before, back.after)
    monkeypatch.setattr(module, "BLOCK", 7)
    np.testing.assert_array_equal(change(project, *YEARS).score, found.score)


def test_what_is_usual_is_told_by_a_sample(moved, monkeypatch):
    project, tiles, _ = moved
    monkeypatch.setattr(module, "SAMPLE", 20)
    assert tiles.places()[change(project, *YEARS).before[0]] == 5


def test_years_without_difference_have_no_scores(copied, tiled):
    project = copied(tiled)
    places = tiled.tiles.places().max() + 1
    describe(project, np.zeros((places, 3)))
    assert not change(project, *YEARS).score.any()


def test_files_have_all_places_in_order(moved, tmp_path, monkeypatch):
    project, tiles, _ = moved
    monkeypatch.setattr(module, "BLOCK", 10)
    paths = {name: tmp_path / name for name in ("c.gpkg", "c.csv", "c.png")}
    options = ["-p", str(project.root), "--top", "3", "-q"]
    files = ["--gpkg", "c.gpkg", "--csv", "c.csv", "--map", "c.png"]
    monkeypatch.chdir(tmp_path)
    result = run_command("change", *YEARS, *options, *files, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert [place["rank"] for place in printed] == [1, 2, 3]
    with paths["c.csv"].open() as handle:
        rows = list(csv.DictReader(handle))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = geopandas.read_file(paths["c.gpkg"], layer="places")
    assert len(rows) == len(layer) == len(tiles) // 2
    for name, kind in {"rank": int, "score": float, "before": str, "after": str}.items():
        column = [kind(row[name]) for row in rows]
        assert column[:3] == [place[name] for place in printed]
        assert layer[name].tolist() == column
    # Footprints are those of the tiles.
    ids, bounds = tiles.ids(), tiles.bounds()
    expected = bounds[[ids.index(name) for name in layer["after"]]]
    np.testing.assert_allclose(layer.geometry.bounds.to_numpy(), expected)
    assert layer.crs.to_epsg() == int(tiles.epsg[0])
    assert width(paths["c.png"]) > 8 * SIZE
    result = run_command("change", *YEARS, *options)
    assert result.exit_code == 0, result.output
    assert printed[2]["after"] in result.stdout
    assert rows[3]["after"] not in result.stdout


def test_images_without_georeference_are_ranked_too(tmp_path):
    project = new_project(tmp_path / "p")
    folders = [class_folders(tmp_path / name, {"x": 8}) / "x" for name in "ab"]
    tiles = tile_folders(project, pairs=folders)
    describe(project, season(tiles.places().max() + 1))
    found = change(project, *tiles.years, picture=tmp_path / "c.png", csv=tmp_path / "c.csv")
    assert found.places()[0].lon is None
    assert width(tmp_path / "c.png") > 0
    with pytest.raises(UsageError, match="--gpkg needs footprints"):
        change(project, *tiles.years, gpkg=tmp_path / "c.gpkg")


@pytest.mark.parametrize(
    ("years", "message"),
    [
        (("2010", "1999"), r"no tiles of 1999"),
        (("2010", "2010"), r"2010 and 2010 are one year"),
    ],
)
def test_years_that_make_no_sense_are_refused(moved, years, message):
    project, _, _ = moved
    with pytest.raises(UsageError, match=message):
        change(project, *years)
    with pytest.raises(UsageError, match="--top 0"):
        change(project, *YEARS, top=0)


def test_without_embeddings_the_remedy_is_embed(tiled):
    with pytest.raises(GeomatchError) as failed:
        change(tiled.project, *YEARS)
    assert failed.value.hint == "Run: geomatch embed"

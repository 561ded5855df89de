"""Queries that are searched turned."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from command_line import run_command
from PIL import Image
from scipy.ndimage import gaussian_filter
from small_project import SIZE, write_tiff

from geomatch.data.store import TileStore
from geomatch.errors import UsageError
from geomatch.query import query
from geomatch.querying.turns import angles, turned


def texture(size, channels=3, seed=0):
    noise = np.random.default_rng(seed).uniform(0, 255, (size, size, channels))
    return gaussian_filter(noise, (2, 2, 0)).astype(np.uint8)


def test_a_full_turn_is_cut_into_steps():
    assert angles(None) == (0,)
    assert angles(90) == (0, 90, 180, 270)
    assert angles(30) == tuple(range(0, 360, 30))
    assert angles(50) == (0, 50, 100, 150, 200, 250, 300)
    for step in (0, 4, 181, -90, float("nan")):
        with pytest.raises(UsageError, match="--rotate"):
            angles(step)


def test_quarter_turns_are_exact_and_counter_clockwise():
    pixels = texture(16, 4)
    for quarters in range(4):
        np.testing.assert_array_equal(
            turned(pixels, 90.0 * quarters, 16, 3), np.rot90(pixels, quarters)
        )
    np.testing.assert_array_equal(turned(pixels, 90, 8, 3), np.rot90(pixels[4:12, 4:12]))


@pytest.mark.parametrize("degrees", [37, -100.5])
def test_a_turn_is_that_of_another_library(degrees):
    pixels = texture(33)
    other = Image.fromarray(pixels).rotate(degrees, Image.Resampling.BILINEAR)
    inner = slice(8, 25)  # without corners
    difference = turned(pixels, degrees, 33, 3).astype(int) - np.asarray(other)
    assert np.abs(difference[inner, inner]).max() <= 1


def test_labels_keep_their_values_and_corners_are_filled():
    pixels = np.where(texture(20, 4) > 128, 200, 60).astype(np.uint8)
    there = turned(pixels, 30, 20, 3)
    assert set(np.unique(there[..., 3])) == {60, 200}
    assert len(np.unique(there[..., :3])) > 2
    assert there.min() >= 60


def test_surroundings_fill_the_corners():
    """Turned there and back, ground comes back to its place."""
    ground = texture(80)
    around = turned(ground, 40, 46, 3)
    back = turned(around, -40, 32, 3).astype(float)
    np.testing.assert_allclose(back, ground[24:56, 24:56], atol=12)


@pytest.fixture(scope="module")
def photo(indexed, tmp_path_factory):
    """A function that writes a tile, turned by so many quarters, as an image without a place."""
    folder = tmp_path_factory.mktemp("photos")

    def write(row, quarters):
        pixels = TileStore.open(indexed.project.pixels).read(np.array([row]))[0, ..., :3]
        path = folder / f"{row}-{quarters}.png"
        Image.fromarray(np.rot90(pixels, quarters)).save(path)
        return str(path)

    return write


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_turned_image_is_found_with_its_turn(indexed, photo, quarters):
    row = 5
    found = query(indexed.project, photo(row, quarters), rotate=90).matches
    assert found[0].tile == indexed.tiles.ids()[row]
    assert found[0].score == pytest.approx(1, abs=1e-4)
    assert found[0].turn == 360 - 90 * quarters
    assert len({match.tile for match in found}) == 5
    assert [match.score for match in found] == sorted([m.score for m in found], reverse=True)


def test_each_answer_has_its_best_turn(indexed, photo):
    """The same as asking for every turn by itself."""
    best: dict[str, tuple[float, float]] = {}
    for quarters in range(4):
        for match in query(indexed.project, photo(9, quarters), top=88).matches:
            best[match.tile] = max(best.get(match.tile, (-2, 0)), (match.score, 90.0 * quarters))
    found = query(indexed.project, photo(9, 0), rotate=90, top=88).matches
    assert {match.tile: (match.score, match.turn) for match in found} == {
        tile: (pytest.approx(score, abs=1e-5), turn) for tile, (score, turn) in best.items()
    }


def test_a_tile_is_turned_as_its_pixels_are(indexed, photo):
    """Never found itself; upright, its answers are those without turns."""
    name = indexed.tiles.ids()[12]
    found = query(indexed.project, name, rotate=45, top=44, years=("2020",)).matches
    upright = {m.tile: m.score for m in query(indexed.project, name, top=44).matches}
    assert name not in {match.tile for match in found}
    for match in found:
        if match.turn == 0:
            assert match.score == pytest.approx(upright[match.tile], abs=1e-5)
        else:
            assert match.score > upright[match.tile]
    assert len({match.turn for match in found}) > 2


def test_a_larger_image_brings_its_surroundings(indexed, tmp_path):
    """A tile of 2010 within an image, which a turn by 45 degrees and back does not lose."""
    from geomatch import image_input
    from geomatch.querying.opened import OpenIndex

    index = OpenIndex.open(indexed.project, None)
    ground = np.moveaxis(texture(64), -1, 0)
    write_tiff(tmp_path / "large.tif", ground, (500_000 - 16, 5_000_000 + 48))
    cut = image_input.cut(str(tmp_path / "large.tif"), index.tiles, reach=2**0.5)
    np.testing.assert_array_equal(cut.pixels, np.moveaxis(ground[:, 16:48, 16:48], 0, -1))
    assert cut.around.shape == (SIZE + 12, SIZE + 12, 3)
    np.testing.assert_array_equal(cut.around, np.moveaxis(ground[:, 10:54, 10:54], 0, -1))


@pytest.mark.parametrize(
    ("arguments", "turns"),
    [(["--rotate", "TILE"], angles(90)), (["TILE", "--rotate", "60"], angles(60))],
)
def test_the_option_takes_degrees_or_none(indexed, arguments, turns):
    arguments = [indexed.tiles.ids()[0] if each == "TILE" else each for each in arguments]
    done = run_command("query", "-p", indexed.root, *arguments, "--top", "40", "--json")
    assert done.exit_code == 0, done.output
    found = {answer["turn"] for answer in json.loads(done.stdout)}
    assert found <= set(turns)
    assert len(found) > 1


def test_the_turn_is_in_tables_and_files(indexed, tmp_path, photo):
    path = tmp_path / "answers.csv"
    done = run_command("query", "-p", indexed.root, photo(5, 1), "--rotate", "--csv", path)
    assert done.exit_code == 0, done.output
    assert "turn" in done.stdout
    assert pd.read_csv(path)["turn"][0] == 270
    assert "turn" not in run_command("query", "-p", indexed.root, indexed.tiles.ids()[0]).stdout
    done = run_command("query", "-p", indexed.root, photo(5, 1), "--rotate", "2")
    assert (done.exit_code, done.stdout) == (2, "")

"""Pictures of matches: frames and pixels where they must be."""

from __future__ import annotations

import numpy as np
import pytest
from command_line import run_command
from PIL import Image, ImageColor, ImageFont
from small_project import make_project

from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.query import query
from geomatch.report import contact_sheet
from geomatch.report.contact_sheet import Thumbnail, answers, sheet

SIDE = 128
CELL = SIDE + 2 * contact_sheet.EDGE + contact_sheet.GAP


def grey(value, channels=3):
    return np.full((SIDE, SIDE, channels), value, np.uint8)


def corner(column, row=0):
    """Left and top of a thumbnail's frame."""
    return contact_sheet.GAP + column * CELL, contact_sheet.GAP + row * (CELL + contact_sheet.LINES)


def frames(path, columns):
    """Colour of the frame of each thumbnail in the first row."""
    with Image.open(path) as drawn:
        return [drawn.getpixel(corner(column)) for column in range(columns)]


def inside(path, column, row=0):
    """(SIDE, SIDE, 3) the picture within a frame."""
    left, top = (at + contact_sheet.EDGE for at in corner(column, row))
    with Image.open(path) as drawn:
        return np.asarray(drawn)[top : top + SIDE, left : left + SIDE]


def colours(*names):
    return [ImageColor.getrgb(getattr(contact_sheet, name)) for name in names]


def test_frames_tell_right_from_wrong(tmp_path):
    path = tmp_path / "sheet.png"
    row = [
        Thumbnail(grey(value), ("a", "b"), right)
        for value, right in ((10, None), (60, True), (110, False), (160, None))
    ]
    sheet([row, row[:2]], path)
    assert frames(path, 4) == colours("QUERY", "RIGHT", "WRONG", "UNKNOWN")
    for column, value in enumerate((10, 60, 110, 160)):
        assert (inside(path, column) == value).all()
    assert (inside(path, 1, row=1) == 60).all()
    # A shorter row leaves paper.
    assert (inside(path, 3, row=1) == 255).all()


def test_captions_stay_below_their_own_thumbnail(tmp_path):
    path = tmp_path / "sheet.png"
    sheet([[Thumbnail(grey(0), ("W" * 200, "x")), Thumbnail(grey(0), ())]], path)
    top = corner(0)[1] + SIDE + 2 * contact_sheet.EDGE
    with Image.open(path) as drawn:
        text = np.asarray(drawn.convert("L"))[top:]
    assert (text[:, : CELL + contact_sheet.GAP - 1] < 128).any()
    assert (text[:, CELL + contact_sheet.GAP :] == 255).all()


def test_a_long_name_keeps_its_end():
    font = ImageFont.load_default(12)
    assert contact_sheet._fitting("short.png", font, 128) == "short.png"
    long = contact_sheet._fitting("a_very_long_name_of_a_file_0042.png", font, 128)
    assert long.startswith("…")
    assert long.endswith("_0042.png")
    assert font.getlength(long) <= 128


@pytest.mark.parametrize("channels", [1, 2])
def test_one_channel_is_grey(tmp_path, channels):
    pixels = grey(200, channels)
    pixels[..., 1:] = 7
    sheet([[Thumbnail(pixels, ())]], tmp_path / "grey.png")
    assert (inside(tmp_path / "grey.png", 0) == 200).all()


def test_small_tiles_show_whole_pixels(tmp_path):
    pixels = np.zeros((8, 8, 1), np.uint8)
    pixels[2, 5] = 255
    sheet([[Thumbnail(pixels, ())]], tmp_path / "small.png")
    drawn = inside(tmp_path / "small.png", 0)[..., 0]
    np.testing.assert_array_equal(drawn, np.kron(pixels[..., 0], np.ones((16, 16), np.uint8)))


def test_captions_say_what_is_known():
    def told(year, distance, here="3_4", place="3_4"):
        match = {"rank": 2, "score": 0.5, "year": year, "distance_m": distance}
        return answers([match], grey(0)[None], [here], place)[0]

    assert told("2010", 41.6).caption == ("2: 0.500", "2010, 42 m")
    assert told("2010", 12_345.0).caption == ("2: 0.500", "2010, 12 km")
    assert told("2010", None).caption == ("2: 0.500", "2010")
    assert told(None, None, "oak", "elm").caption == ("2: 0.500", "oak")
    assert told(None, None, "oak", "elm").right is False
    assert told("2010", 0.0).right is True
    assert told("2010", 0.0, place="").right is None


def test_a_query_is_drawn_with_its_answers(indexed, tmp_path):
    path = tmp_path / "sheet.png"
    asked = indexed.tiles.ids()[7]
    arguments = ["query", asked, "-p", str(indexed.root), "--top", "4", "--sheet", str(path), "-q"]
    result = run_command(*arguments)
    assert result.exit_code == 0, result.output
    assert str(path) in result.stderr
    found = query(indexed.project, asked, top=4)
    cell = asked.partition("@")[0]
    right = ["RIGHT" if m.tile.partition("@")[0] == cell else "WRONG" for m in found.matches]
    assert frames(path, 5) == colours("QUERY", *right)
    assert {"RIGHT", "WRONG"} == set(right)
    store = TileStore.open(indexed.project.pixels)
    for column, row in enumerate([found.query.store_row, *found.rows]):
        pixels = Image.fromarray(store.read(np.array([row]))[0, ..., :3])
        wanted = np.asarray(pixels.resize((SIDE, SIDE), Image.Resampling.NEAREST))
        np.testing.assert_array_equal(inside(path, column), wanted)


def test_an_image_as_a_query_has_no_right_answers(indexed, tmp_path):
    pixels = TileStore.open(indexed.project.pixels).read(np.array([5]))[0, ..., :3]
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    path = tmp_path / "sheet.png"
    arguments = ["query", str(tmp_path / "photo.png"), "-p", str(indexed.root), "--top", "2"]
    result = run_command(*arguments, "--sheet", str(path), "--json")
    assert result.exit_code == 0, result.output
    assert frames(path, 3) == colours("QUERY", "UNKNOWN", "UNKNOWN")
    wanted = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(inside(path, 0), np.asarray(wanted))


def test_labels_are_no_part_of_the_picture(tmp_path, tiled):
    from geomatch.report.matches import match_sheet

    project = make_project(tmp_path / "labelled", tiled.imagery, labels=True)
    tiles = TileTable.load(project.catalogue)
    match = {"rank": 1, "score": 0.5, "year": "2010", "distance_m": 3.0}
    match_sheet(project, [([match], [4], 3, tiles.ids()[3])], tmp_path / "sheet.png")
    pixels = TileStore.open(project.pixels).read(np.array([4]))[0]
    assert pixels.shape[-1] == 4
    wanted = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    wanted = np.asarray(wanted.resize((SIDE, SIDE), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(inside(tmp_path / "sheet.png", 1), wanted)

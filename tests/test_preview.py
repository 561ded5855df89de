"""`tile --preview`: the years of a place side by side, labels over them, and what colours mean."""

from __future__ import annotations

import numpy as np
import pytest
from command_line import run_command
from image_sets import class_folders
from PIL import Image
from small_project import tile_sources

from geomatch.report import contact_sheet
from geomatch.report.preview import SIDE

LEFT, TOP = 500_000, 5_000_000
CELL = SIDE + 2 * contact_sheet.EDGE + contact_sheet.GAP


@pytest.fixture
def images(write_raster):
    """Two years of 2 x 2 cells, dark and light; a third year has one cell."""
    return {
        year: write_raster(f"{year}.tif", np.full((3, side, side), grey, np.uint8))
        for year, side, grey in (("2010", 64, 40), ("2020", 64, 120), ("2030", 32, 200))
    }


def shown(path, column, row=0):
    """(SIDE, SIDE, 3) the picture at a column and row of the sheet."""
    left = contact_sheet.GAP + column * CELL + contact_sheet.EDGE
    top = contact_sheet.GAP + row * (CELL + contact_sheet.LINES) + contact_sheet.EDGE
    with Image.open(path) as drawn:
        return np.asarray(drawn)[top : top + SIDE, left : left + SIDE].astype(int)


def legend(path, rows, entries):
    """Colours of the marks below the rows."""
    top = contact_sheet.GAP + rows * (CELL + contact_sheet.LINES) + 5
    with Image.open(path) as drawn:
        return [
            drawn.getpixel((contact_sheet.GAP + i * contact_sheet.ENTRY + 5, top))
            for i in range(entries)
        ]


def size(path):
    with Image.open(path) as drawn:
        return drawn.size


def test_classes_are_laid_over_the_years(write_raster, project, images):
    """Red, then cyan, as they are evenly around the circle; the image where nothing is known."""
    values = np.zeros((1, 64, 64), np.uint8)
    values[:, :, :8], values[:, :, 8:16], values[:, :, 32:40], values[:, :, 40:48] = 1, 2, 1, 2
    cover = write_raster("cover.tif", values)
    tables = [{"file": str(cover), "classes": ["1=road", "2=sea"], "year": "2020"}]
    both = {year: images[year] for year in ("2010", "2020")}
    tile_sources(project, both, tables=tables, preview=3)
    path = project.preview
    assert size(path)[0] == 4 * CELL + contact_sheet.GAP  # two years, bare and with labels
    for row in range(3):
        for column, grey in ((0, 40), (1, 40), (2, 120)):
            assert (shown(path, column, row) == grey).all()
        over = shown(path, 3, row)
        quarter = SIDE // 4
        assert (over[:, : quarter - 6] == [(120 + 255) // 2, 60, 60]).all()
        assert (over[:, quarter + 6 : 2 * quarter - 6] == [60, 187, 187]).all()
        assert (over[:, 2 * quarter + 6 :] == 120).all()
    assert legend(path, 3, 2) == [(255, 0, 0), (0, 255, 255)]


def test_places_are_those_of_the_most_years(project, images):
    tile_sources(project, images, preview=9)
    assert size(project.preview) == (
        3 * CELL + contact_sheet.GAP,
        CELL + contact_sheet.LINES + contact_sheet.GAP,
    )
    assert [int(shown(project.preview, i).mean()) for i in range(3)] == [40, 120, 200]


def test_a_few_greys_are_shown_as_classes(write_raster, project, images):
    labels = write_raster("labels.tif", np.full((1, 64, 64), 77, np.uint8))
    tile_sources(project, {"2010": images["2010"]}, labels={"2010": labels}, preview=1)
    assert (shown(project.preview, 1) == [(40 + 255) // 2, 20, 20]).all()
    assert legend(project.preview, 1, 1) == [(255, 0, 0)]


@pytest.mark.parametrize("bands", [1, 3])
def test_other_labels_are_laid_over_as_they_are(write_raster, project, images, bands):
    values = np.arange(64 * 64).reshape(64, 64) % 100 + 100
    values = np.broadcast_to(values.astype(np.uint8), (bands, 64, 64))
    labels = write_raster("labels.tif", values)
    tile_sources(project, {"2010": images["2010"]}, labels={"2010": labels}, preview=1)
    over = shown(project.preview, 1)
    assert over.mean() == pytest.approx((40 + 150) / 2, abs=3)
    assert (over[..., 0] == over[..., 2]).all()
    assert size(project.preview)[1] == CELL + contact_sheet.LINES + contact_sheet.GAP


def test_the_command_says_where_it_is(project, images):
    """Also where tiles are up to date, of which it is no part."""
    options = ["-p", project.root, "--size", 32, "--gsd", 1, "--split", "source", "--workers", 1]
    arguments = list(map(str, ["tile", f"2010={images['2010']}", *options]))
    assert run_command(*arguments).exit_code == 0
    assert not project.preview.exists()
    result = run_command(*arguments, "--preview", "2")
    assert "up to date" in result.stderr
    assert str(project.preview) in result.stderr
    assert (shown(project.preview, 0, 1) == 40).all()


def test_images_in_class_folders(project, tmp_path):
    folder = class_folders(tmp_path / "set", {"a": 9, "b": 8, "c": 7})
    arguments = ["tile", "-p", project.root, "--folders", folder, "--preview", 2]
    result = run_command(*map(str, arguments))
    assert result.exit_code == 0, result.stderr
    across, down = 6 * CELL, 2 * (CELL + contact_sheet.LINES)
    assert size(project.preview) == (across + contact_sheet.GAP, down + contact_sheet.GAP)

"""Masks of changed ground: the share of each tile, kept in the catalogue."""

from __future__ import annotations

import numpy as np
import pytest
from command_line import run_command
from small_project import new_project, tile_sources

from geomatch.data.tiles import TileTable
from geomatch.errors import GeomatchError
from geomatch.project import Project
from geomatch.tiling.request import last_request

LEFT, TOP = 500_000, 5_000_000
SETTINGS = ("grid.size=32", "grid.gsd=1.0", "split.by=source")


@pytest.fixture
def image(write_raster):
    """2 x 2 cells of one band."""
    return write_raster("image.tif", np.full((1, 64, 64), 90, np.uint8), origin=(LEFT, TOP))


def tile_with_masks(project, image, masks):
    return tile_sources(project, dict.fromkeys(masks, image), changed=masks)


def shares(table, year):
    """Of a year's four tiles: upper left, upper right, lower left, lower right."""
    mine = table.year == table.years.index(year)
    order = np.lexsort([table.col[mine], -table.row[mine]])
    return table.changed[mine][order].tolist()


@pytest.mark.parametrize("nodata", [None, 0])
def test_shares_are_of_a_tile_s_pixels(write_raster, project, image, nodata):
    values = np.zeros((1, 64, 64), np.uint8)
    values[0, :32, :32] = 1
    values[0, :8, 32:] = 255
    values[0, 63, 0] = 1
    mask = write_raster("mask.tif", values, origin=(LEFT, TOP), nodata=nodata)
    table = tile_with_masks(project, image, {"2010": "", "2020": mask})
    assert shares(table, "2020") == [1, 0.25, pytest.approx(1 / 1024), 0]
    assert np.isnan(shares(table, "2010")).all()


def test_ground_beyond_the_masks_is_unknown(write_raster, project, image):
    left = write_raster("masks/a.tif", np.ones((1, 64, 32), np.uint8), origin=(LEFT, TOP))
    found = shares(tile_with_masks(project, image, {"2010": left.parent}), "2010")
    np.testing.assert_array_equal(found, [1, np.nan, 1, np.nan])
    write_raster("masks/b.tif", np.zeros((1, 32, 32), np.uint8), origin=(LEFT + 32, TOP))
    # The files of the folder are others now: shares are read again.
    found = shares(tile_with_masks(project, image, {"2010": left.parent}), "2010")
    np.testing.assert_array_equal(found, [1, 0, 1, np.nan])


def test_without_masks_nothing_is_known(project, image):
    assert tile_with_masks(project, image, {"2010": "", "2020": ""}).changed is None
    assert TileTable.load(project.catalogue).changed is None


def test_masks_change_no_pixel(write_raster, project, image):
    tile_with_masks(project, image, {"2010": ""})
    before = project.tile_manifest().fingerprint
    tile_with_masks(
        project, image, {"2010": write_raster("mask.tif", np.ones((1, 64, 64), np.uint8))}
    )
    assert project.tile_manifest().fingerprint == before
    assert TileTable.load(project.catalogue).changed.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("form", [(3, np.uint8), (1, np.int16)])
def test_a_file_that_is_not_a_mask_is_reported(write_raster, project, image, form):
    bands, dtype = form
    mask = write_raster("mask.tif", np.ones((bands, 64, 64), dtype))
    with pytest.raises(GeomatchError, match=r"mask\.tif has . bands of"):
        tile_with_masks(project, image, {"2010": mask})


def test_masks_are_named_on_the_command_line_and_in_the_file(tmp_path, write_raster, image):
    mask = write_raster("mask.tif", np.ones((1, 64, 64), np.uint8), origin=(LEFT, TOP))
    project = new_project(tmp_path / "p")
    named = [f"2010={image}", f"2020={image}", f"2020:changed={mask}"]
    options = ["-p", str(project.root), "--size", "32", "--gsd", "1", "--split", "source", "-q"]
    result = run_command("tile", *named, *options)
    assert result.exit_code == 0, result.output
    assert shares(TileTable.load(project.catalogue), "2020") == [1, 1, 1, 1]
    assert [s["changed"] for s in last_request(project).source] == ["", str(mask)]
    # Repeated without sources, the mask is asked for again.
    result = run_command("tile", "-p", str(project.root), "--force", "-q")
    assert result.exit_code == 0, result.output
    assert shares(TileTable.load(project.catalogue), "2020") == [1, 1, 1, 1]

    project.config.write_text(
        '[[source]]\nyear = "2010"\nimages = "../image.tif"\nchanged = "../mask.tif"\n'
    )
    result = run_command("tile", *options)
    assert result.exit_code == 0, result.output
    assert shares(TileTable.load(project.catalogue), "2010") == [1, 1, 1, 1]
    assert Project.open(project.root).tile_manifest().tiles == 4

"""`tile`: every tile holds exactly the ground of its cell, and the catalogue says so."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import zipfile

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import rasterio.shutil
import shapely
from affine import Affine
from command_line import run_command
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning, RasterioIOError
from rasterio.transform import from_origin
from rasterio.warp import Resampling, reproject, transform, transform_bounds
from small_project import new_project, tile_sources

from geomatch import config
from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.errors import GeomatchError
from geomatch.geo import rasters
from geomatch.manifests import Channels
from geomatch.tile import tile

LEFT, TOP = 500_000, 5_000_000  # both multiples of 32
COL, ROW = LEFT // 32, TOP // 32  # the cell whose lower left corner that is


def pixels(project, table, name):
    row = table.store_row[table.ids().index(name)]
    return TileStore.open(project.pixels).read(np.array([row]))[0]


def ground(left, top, width, height):
    """(3, height, width) whose values tell the ground pixel: east, north, and which kilometre."""
    east = left + np.arange(width)[None, :] + np.zeros((height, 1), int)
    north = top - 1 - np.arange(height)[:, None] + np.zeros((1, width), int)
    return np.stack([east % 256, north % 256, (east // 256 + north // 256) % 256]).astype(np.uint8)


def expected(col, row, size=32, step=32):
    """(size, size, 3) of what `ground` encodes in a cell."""
    return np.moveaxis(ground(col * step, row * step + size, size, size), 0, -1)


def smooth(rng, shape):
    """Noise of a few pixels' wavelength, so that bilinear reading has something to interpolate."""
    bands, h, w = shape
    y, x = np.mgrid[:h, :w]
    waves = [
        sum(
            np.sin(x * fx + y * fy + phase)
            for fx, fy, phase in rng.uniform([-0.6, -0.6, 0], [0.6, 0.6, 6.3], (5, 3))
        )
        for _ in range(bands)
    ]
    return np.clip(127 + 25 * np.stack(waves), 0, 255).astype(np.uint8)


def test_tiles_hold_exactly_the_ground_of_their_cell(write_raster, project):
    """Years of other extents and origins share keys, and each is right to the pixel."""
    write_raster("2010/a.tif", ground(LEFT, TOP, 160, 128), origin=(LEFT, TOP))
    left, top = LEFT + 45, TOP - 19
    write_raster("2020/a.tif", ground(left, top, 150, 140), origin=(left, top))
    root = project.root.parent
    table = tile_sources(project, {"2010": root / "2010", "2020": root / "2020"})
    of_2010 = {(COL + c, ROW - 1 - r) for c in range(5) for r in range(4)}
    of_2020 = {(COL + c, ROW - 1 - r) for c in (2, 3, 4, 5) for r in (1, 2, 3)}
    of_2020 = {(c, r) for c, r in of_2020 if (c + 1) * 32 <= left + 150}
    assert set(table.ids()) == {f"{c}_{r}@2010" for c, r in of_2010} | {
        f"{c}_{r}@2020" for c, r in of_2020
    }
    assert len(of_2010 & of_2020) >= 9
    for name in table.ids():
        cell, _ = name.split("@")
        col, row = map(int, cell.split("_"))
        np.testing.assert_array_equal(pixels(project, table, name), expected(col, row), name)


def test_cells_in_negative_coordinates(write_raster, project):
    path = write_raster("b.tif", ground(-64, 32, 128, 96), crs="EPSG:5070", origin=(-64, 32))
    table = tile_sources(project, {"2010": path})
    assert set(table.cells()) == {f"{c}_{r}" for c in range(-2, 2) for r in range(-2, 1)}
    np.testing.assert_array_equal(pixels(project, table, "-2_-1@2010"), expected(-2, -1))


def test_a_cell_over_several_sheets_is_filled_from_all(write_raster, project):
    """Four sheets that meet within cells give the same tiles as one."""
    for i, (dx, dy) in enumerate([(0, 0), (50, 0), (0, 50), (50, 50)]):
        write_raster(
            f"2010/s{i}.tif",
            ground(LEFT + dx, TOP - dy, 50, 50),
            origin=(LEFT + dx, TOP - dy),
        )
    table = tile_sources(project, {"2010": project.root.parent / "2010"})
    assert set(table.cells()) == {f"{COL + c}_{ROW - 1 - r}" for c in range(3) for r in range(3)}
    for c in range(3):
        for r in range(3):
            col, row = COL + c, ROW - 1 - r
            np.testing.assert_array_equal(
                pixels(project, table, f"{col}_{row}@2010"), expected(col, row)
            )


def test_where_sheets_overlap_the_first_by_name_wins(write_raster, project):
    """Written in the other order; "a" ends in the middle of the cell, "b" has all of it."""
    write_raster("2010/b.tif", np.full((3, 32, 32), 20, np.uint8), origin=(LEFT, TOP))
    write_raster("2010/a.tif", np.full((3, 32, 10), 10, np.uint8), origin=(LEFT, TOP))
    table = tile_sources(project, {"2010": project.root.parent / "2010"})
    tile = pixels(project, table, f"{COL}_{ROW - 1}@2010")
    assert (tile[:, :10] == 10).all()
    assert (tile[:, 10:] == 20).all()


GREY = {"west": 10, "middle": 20, "east": 30}


def overlapping_sheets(write_raster, names):
    """Three sheets of 48 px, named from west to east, each 24 px east of the one before."""
    for i, (name, grey) in enumerate(zip(names, GREY.values(), strict=True)):
        values = np.full((3, 32, 48), grey, np.uint8)
        write_raster(f"2010/{name}.tif", values, origin=(LEFT + 24 * i, TOP))


@pytest.mark.parametrize(
    ("overlap", "names", "greys", "seams"),
    [
        # From west to east, what each of three tiles of 32 px shows at its 4th, 16th and 28th px.
        ("first", ["a", "b", "c"], "10 10 10, 10 20 20, 20 30 30", 2),
        ("first", ["c", "b", "a"], "10 10 20, 20 30 30, 30 30 30", 2),
        ("newest", ["a_2012", "b_2014", "c_2013"], "10 10 20, 20 20 20, 20 30 30", 2),
        ("newest", ["x_201406", "b_20140607", "a_2014-06-09"], "10 10 20, 20 30 30, 30 30 30", 2),
        # Centres at 24, 48 and 72 px; of the tiles at 16, 48 and 80.
        ("nearest-centre", ["b", "c", "a"], "10 10 10, 20 20 20, 30 30 30", 0),
    ],
)
def test_which_sheet_is_seen_where_several_overlap(
    write_raster, project, overlap, names, greys, seams
):
    overlapping_sheets(write_raster, names)
    root = project.root.parent
    table = tile_sources(project, {"2010": root / "2010"}, f"grid.overlap={overlap}")
    seen = ", ".join(
        " ".join(str(pixels(project, table, name)[0, x, 0]) for x in (4, 16, 28))
        for name in sorted(table.ids())
    )
    assert seen == greys
    (year,) = project.tile_manifest().years.values()
    assert (year.overlap, year.seams) == (overlap, seams)


def test_the_newest_sheet_needs_dates(write_raster, project):
    overlapping_sheets(write_raster, ["a_2012", "b_42014", "c_2013"])
    year = {"2010": project.root.parent / "2010"}
    with pytest.raises(GeomatchError, match=r"b_42014\.tif tells no date") as caught:
        tile_sources(project, year, "grid.overlap=newest")
    assert "nearest-centre" in caught.value.hint


def test_the_rule_of_overlaps_decides_whether_tiles_are_up_to_date(write_raster, project):
    overlapping_sheets(write_raster, ["a", "b", "c"])
    year = {"2010": project.root.parent / "2010"}
    prints = []
    for overlap in ("first", "nearest-centre", "first"):
        tile_sources(project, year, f"grid.overlap={overlap}")
        prints.append(project.tile_manifest().fingerprint)
    assert prints[0] == prints[2] != prints[1]


@pytest.mark.parametrize("bands", [[], [3, 1, 2]])
@pytest.mark.parametrize("how", ["nodata", "alpha", "mask"])
def test_invalid_ground_is_left_out(write_raster, tmp_path, project, how, bands):
    """Of three cells one is whole, one lacks 1 of 32 columns, one is half empty."""
    chosen = f"grid.bands={bands}"
    values = np.full((3, 32, 96), 90, np.uint8)
    hole = np.zeros((32, 96), bool)
    hole[:, 40] = True
    hole[:, 64:80] = True
    path = tmp_path / "a.tif"
    if how == "nodata":
        values[:, hole] = 7
        write_raster("a.tif", values, origin=(LEFT, TOP), nodata=7)
    elif how == "alpha":
        alpha = np.where(hole, 0, 255).astype(np.uint8)
        write_raster("a.tif", np.concatenate([values, alpha[None]]), origin=(LEFT, TOP))
        with rasterio.open(path, "r+") as target:
            target.colorinterp = (
                ColorInterp.red,
                ColorInterp.green,
                ColorInterp.blue,
                ColorInterp.alpha,
            )
    else:
        write_raster("a.tif", values, origin=(LEFT, TOP))
        with (
            rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
            rasterio.open(path, "r+") as target,
        ):
            target.write_mask(~hole)
    row = ROW - 1
    table = tile_sources(project, {"2010": path}, chosen)
    assert table.cells() == [f"{COL}_{row}"]
    assert project.tile_manifest().channels.image == 3
    table = tile_sources(project, {"2010": path}, chosen, "grid.min_valid=0.5")
    assert table.cells() == [f"{COL}_{row}", f"{COL + 1}_{row}", f"{COL + 2}_{row}"]
    assert table.valid.tolist() == pytest.approx([1, 31 / 32, 0.5])
    assert (
        tile_sources(project, {"2010": path}, chosen, "grid.min_valid=0.6").cells()
        == table.cells()[:2]
    )


def tagged(path, *names):
    """A raster whose bands are tagged with colour interpretations."""
    with rasterio.open(path, "r+") as target:
        target.colorinterp = tuple(ColorInterp[name] for name in names)
    return path


HALVES = np.arange(64) >= 32
"""Columns of two cells: the left one is to be invalid, the right one valid."""
RIGHT_CELL = f"{COL + 1}_{ROW - 1}"


@pytest.mark.parametrize("position", [0, 2, 3, 4])
def test_alpha_is_the_band_that_is_tagged(write_raster, project, position):
    """Wherever it is: the others are image bands, in their order."""
    kept = ["red", "green", "blue", "undefined"]
    values = np.broadcast_to(np.array([90, 120, 150, 60])[:, None, None], (4, 32, 64))
    values = np.insert(values, position, np.where(HALVES, 255, 0), axis=0).astype(np.uint8)
    path = write_raster("a.tif", values, origin=(LEFT, TOP))
    kept.insert(position, "alpha")
    table = tile_sources(project, {"2010": tagged(path, *kept)})
    assert table.cells() == [RIGHT_CELL]
    assert project.tile_manifest().channels.image == 4
    assert (pixels(project, table, f"{RIGHT_CELL}@2010") == [90, 120, 150, 60]).all()


@pytest.mark.parametrize(
    ("dtype", "opaque"),
    [("uint16", 65535), ("uint16", 255), ("uint16", 1), ("int16", 1), ("float32", 1),
     ("float32", 255), ("float64", 0.01)],
)  # fmt: skip
@pytest.mark.parametrize("bands", [1, 3, 5])
def test_alpha_of_any_width_is_a_mask(write_raster, project, dtype, opaque, bands):
    """Whatever value stands for opaque; a percentile stretch is of opaque pixels alone."""
    values = np.full((bands + 1, 32, 64), 100.0)
    values[:bands, :, 48:] = 200
    values[:bands, :, :32] = 7
    values[-1] = np.where(HALVES, opaque, 0)
    path = write_raster("a.tif", values.astype(dtype), origin=(LEFT, TOP))
    tagged(path, *["undefined"] * bands, "alpha")
    table = tile_sources(project, {"2010": path}, "grid.stretch=0%,100%")
    assert table.cells() == [RIGHT_CELL]
    assert project.tile_manifest().years["2010"].stretch == {
        "low": [100] * bands,
        "high": [200] * bands,
    }
    tile = pixels(project, table, f"{RIGHT_CELL}@2010")
    assert tile.shape[-1] == bands
    assert (tile[:, :16] == 0).all()
    assert (tile[:, 16:] == 255).all()


def test_nodata_beside_alpha_is_invalid_too(write_raster, project):
    values = np.full((4, 32, 96), 90, np.uint8)
    values[3] = 255
    values[3, :, :32] = 0  # transparent
    values[:3, :, 32:64] = 7  # opaque, but nodata
    path = write_raster("a.tif", values, origin=(LEFT, TOP), nodata=7)
    tagged(path, "red", "green", "blue", "alpha")
    assert tile_sources(project, {"2010": path}).cells() == [f"{COL + 2}_{ROW - 1}"]


@pytest.mark.parametrize("declared", [None, -9999, np.nan])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_invalid(write_raster, project, declared, value):
    """In any band, whatever the file declares as nodata."""
    values = np.full((3, 32, 96), 90, np.float32)
    values[:, :, :32] = value
    values[1, :16, 32:64] = value
    values[:, 16:, 32:64] = -9999 if declared == -9999 else 90
    path = write_raster("a.tif", values, origin=(LEFT, TOP), nodata=declared)
    table = tile_sources(project, {"2010": path}, "grid.stretch=0,255", "grid.min_valid=0.3")
    row = ROW - 1
    if declared == -9999:
        assert table.cells() == [f"{COL + 2}_{row}"]
    else:
        assert table.cells() == [f"{COL + 1}_{row}", f"{COL + 2}_{row}"]
        assert table.valid.tolist() == [pytest.approx(0.5, abs=1 / 32), 1]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_nodata_where_files_declare_none(write_raster, project, dtype):
    """A pixel is invalid where all of its bands have the value; what a file declares is kept."""
    values = np.full((3, 32, 96), 90, dtype)
    values[:, :, :32] = 7
    values[0, :, 32:64] = 7
    write_raster("y/a.tif", values, origin=(LEFT, TOP))
    other = np.full((3, 32, 64), 7, dtype)
    other[:, :, 32:] = 90
    write_raster("y/b.tif", other, origin=(LEFT, TOP + 32), nodata=90)
    said = ["grid.stretch=0,255", "grid.nodata=7"]
    table = tile_sources(project, {"2010": project.root.parent / "y"}, *said)
    assert set(table.cells()) == {
        f"{COL + 1}_{ROW - 1}", f"{COL + 2}_{ROW - 1}", f"{COL}_{ROW}"
    }  # fmt: skip
    assert project.tile_manifest().reading == {"bands": [], "nodata": 7, "collar": False}


@pytest.mark.parametrize("bands", [(1, 2, 3), (4, 1), (3,), (4, 3, 2, 1), (2, 2)])
def test_bands_are_chosen_by_number(write_raster, project, bands):
    values = np.concatenate([ground(LEFT, TOP, 64, 32)] * 2)[:4]
    values[3] = 255 - values[0]
    path = write_raster("a.tif", values, origin=(LEFT, TOP))
    tagged(path, "red", "green", "blue", "undefined")
    table = tile_sources(project, {"2010": path}, f"grid.bands={list(bands)}")
    assert project.tile_manifest().channels.image == len(bands)
    for at, col in enumerate((COL, COL + 1)):
        wanted = np.moveaxis(values[:, :, 32 * at : 32 * at + 32], 0, -1)
        got = pixels(project, table, f"{col}_{ROW - 1}@2010")
        np.testing.assert_array_equal(got, wanted[..., [n - 1 for n in bands]])


@pytest.mark.parametrize("bands", [(1, 2, 3, 4), (1, 2, 3), (4,)])
def test_near_infrared_that_is_tagged_alpha_is_read_when_bands_are_named(
    write_raster, project, bands
):
    """Water, which is black in near infrared, stays valid."""
    values = np.random.default_rng(0).integers(1, 255, (4, 32, 64)).astype(np.uint8)
    values[3, :, :32] = 0
    path = tagged(
        write_raster("a.tif", values, origin=(LEFT, TOP)), "red", "green", "blue", "alpha"
    )
    table = tile_sources(project, {"2010": path}, f"grid.bands={list(bands)}")
    assert len(table) == 2
    got = pixels(project, table, f"{COL}_{ROW - 1}@2010")
    wanted = np.moveaxis(values[:, :, :32], 0, -1)[..., [n - 1 for n in bands]]
    np.testing.assert_array_equal(got, wanted)


def test_alpha_that_is_named_as_a_band_is_one_and_else_stays_the_mask(write_raster, project):
    values = np.full((4, 32, 64), 90, np.uint8)
    values[3] = np.where(HALVES, 255, 0)
    path = tagged(
        write_raster("a.tif", values, origin=(LEFT, TOP)), "red", "green", "blue", "alpha"
    )
    assert tile_sources(project, {"2010": path}, "grid.bands=[3,2]").cells() == [RIGHT_CELL]
    table = tile_sources(project, {"2010": path}, "grid.bands=[1,4]")
    assert len(table) == 2
    assert (pixels(project, table, f"{COL}_{ROW - 1}@2010") == [90, 0]).all()


def flooded(colour):
    """(h, w) whether True pixels of `colour` are connected to the border, by walking from it."""
    height, width = colour.shape
    found = np.zeros_like(colour)
    waiting = [
        (r, c)
        for r in range(height)
        for c in range(width)
        if r % (height - 1) * (c % (width - 1)) == 0
    ]
    while waiting:
        r, c = waiting.pop()
        if 0 <= r < height and 0 <= c < width and colour[r, c] and not found[r, c]:
            found[r, c] = True
            waiting += [(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)]
    return found


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_collars_are_flooded_from_the_border(write_raster, project, dtype):
    """Black and white each on its own, in any shape; what does not touch the border stays."""
    rng = np.random.default_rng(0)
    white = 255.0 if dtype == "float32" else float(np.iinfo(dtype).max)
    shades = np.array([0, white, 100])
    coarse = rng.choice(3, (20, 24), p=[0.45, 0.35, 0.2])
    values = shades[coarse.repeat(16, 0).repeat(16, 1)] * np.ones((3, 1, 1))
    values[1, 100:110] = 50  # not black in every band, nor white
    path = write_raster("a.tif", values.astype(dtype), origin=(LEFT, TOP))
    said = ["grid.collar=true", "grid.stretch=0,300", "grid.min_valid=0", "grid.size=8"]
    table = tile_sources(project, {"2010": path}, *said)
    wanted = ~flooded((values == 0).all(axis=0))
    if dtype != "float32":
        wanted &= ~flooded((values == white).all(axis=0))
    assert 0.1 < wanted.mean() < 0.9
    shares = wanted.reshape(40, 8, 48, 8).mean(axis=(1, 3))
    rows, cols = TOP // 8 - 1 - table.row, table.col - LEFT // 8
    np.testing.assert_allclose(table.valid, shares[rows, cols], atol=1e-6)
    assert project.tile_manifest().reading["collar"]
    assert not (project.root / "tiles.partial").exists()


def test_a_collar_reaches_through_invalid_pixels_and_leaves_no_dark_seam(write_raster, project):
    """A frame of nodata around black; pixels beside the collar are interpolated without it."""
    values = np.full((3, 64, 96), 200, np.uint8)
    values[:, :, :33] = 0
    values[:, :, :4] = 9
    values[:, 40:50, 70:80] = 0  # a shadow
    path = write_raster("a.tif", values, origin=(LEFT, TOP), nodata=9)
    said = ["grid.collar=true", "grid.gsd=0.5", "grid.min_valid=0.5"]
    table = tile_sources(project, {"2010": path}, *said)
    assert len(table) == 4 * 4
    beside = table.col == LEFT // 16 + 2
    assert table.valid[beside].tolist() == pytest.approx([15.5 / 16] * 4, abs=0.04)
    for name, is_beside in zip(table.ids(), beside, strict=True):
        values = set(np.unique(pixels(project, table, name)).tolist())
        assert 200 in values
        assert values == {0, 200} or not is_beside


def test_lossy_collars_are_nearly_black(write_raster, tmp_path, project):
    rng = np.random.default_rng(0)
    values = rng.integers(60, 200, (3, 64, 128)).astype(np.uint8)
    values[:, :, :64] = 0
    values[:, 10:20, 80:90] = 0
    form = {"driver": "GTiff", "count": 3, "height": 64, "width": 128, "dtype": "uint8"}
    form |= {"crs": "EPSG:32631", "transform": from_origin(LEFT, TOP, 1, 1)}
    with rasterio.open(tmp_path / "a.tif", "w", compress="jpeg", quality=60, **form) as target:
        target.write(values + rng.integers(0, 6, values.shape).astype(np.uint8))
    table = tile_sources(project, {"2010": tmp_path / "a.tif"}, "grid.collar=true")
    assert set(table.col.tolist()) == {COL + 2, COL + 3}
    assert (table.valid == 1).all()


def test_a_collar_is_no_part_of_a_stretch_in_percent(write_raster, project):
    values = np.full((1, 64, 64), 1000, np.uint16)
    values[:, :, 48:] = 2000
    values[:, :32] = 0
    path = write_raster("a.tif", values, origin=(LEFT, TOP))
    tile_sources(project, {"2010": path}, "grid.stretch=0%,100%", "grid.collar=true")
    assert project.tile_manifest().years["2010"].stretch == {"low": [1000], "high": [2000]}


def palette_raster(write_raster, name, indices, colours, **how):
    path = write_raster(name, indices[None], origin=(LEFT, TOP), **how)
    with rasterio.open(path, "r+") as target:
        target.write_colormap(1, {i: (*colour, 255) for i, colour in enumerate(colours)})
    return path


@pytest.mark.parametrize("step", ["grid.gsd=1", "grid.gsd=0.7"])
def test_a_colour_table_is_expanded_before_it_is_interpolated(write_raster, project, step):
    """Tiles are those of the same image in red, green and blue."""
    rng = np.random.default_rng(0)
    indices = rng.integers(0, 200, (64, 96)).astype(np.uint8)
    colours = rng.integers(0, 256, (256, 3)).astype(np.uint8)
    sources = {
        "2010": palette_raster(write_raster, "a.tif", indices, colours.tolist()),
        "2020": write_raster("b.tif", np.moveaxis(colours[indices], -1, 0), origin=(LEFT, TOP)),
    }
    table = tile_sources(project, sources, step)
    assert len(table) >= 12
    for cell in set(table.cells()):
        of_years = [pixels(project, table, f"{cell}@{year}") for year in sources]
        np.testing.assert_array_equal(*of_years, cell)


@pytest.mark.parametrize("declared", [9, None])
def test_nodata_of_a_colour_table_and_bands_of_it(write_raster, project, declared):
    indices = np.where(HALVES, 3, 9) * np.ones((32, 1), int)
    colours = [(i, 2 * i, 3 * i) for i in range(256)]
    path = palette_raster(write_raster, "a.tif", indices.astype(np.uint8), colours, nodata=declared)
    said = ["grid.bands=[3,1]", *(["grid.nodata=9"] if declared is None else [])]
    table = tile_sources(project, {"2010": path}, *said)
    assert table.cells() == [RIGHT_CELL]
    assert (pixels(project, table, f"{RIGHT_CELL}@2010") == [9, 3]).all()


def test_a_colour_table_of_greys_is_one_band(write_raster, project):
    indices = np.arange(32, dtype=np.uint8) * np.ones((32, 1), np.uint8)
    greys = [(255 - i,) * 3 for i in range(256)]
    table = tile_sources(project, {"2010": palette_raster(write_raster, "a.tif", indices, greys)})
    tile = pixels(project, table, f"{COL}_{ROW - 1}@2010")
    np.testing.assert_array_equal(tile, (255 - indices)[..., None])


def test_catalogue_is_geoparquet_1_1(write_raster, project):
    values = ground(LEFT, TOP, 96, 96)
    sources = {
        "2010-06-03": write_raster("a.tif", values, origin=(LEFT, TOP)),
        "2020": write_raster("b.tif", values, origin=(LEFT, TOP)),
    }
    tile_sources(project, sources)
    schema = pq.read_schema(project.catalogue)
    columns = "id cell col row year datetime source geometry valid changed split class store_row"
    assert [name for name in schema.names if name != "bbox"] == columns.split()
    geo = json.loads(schema.metadata[b"geo"])
    assert geo["version"] == "1.1.0"
    column = geo["columns"][geo["primary_column"]]
    assert column["encoding"] == "WKB"
    assert column["geometry_types"] == ["Polygon"]
    assert column["crs"]["id"] == {"authority": "EPSG", "code": 32631}
    assert column["covering"]["bbox"]["ymax"] == ["bbox", "ymax"]
    frame = geopandas.read_parquet(project.catalogue)
    assert frame.crs.to_epsg() == 32631
    assert len(frame) == 18
    assert frame.geometry.is_valid.all()
    assert frame.geometry.exterior.is_ccw.all()
    stored = pq.read_table(project.catalogue, columns=["bbox"])["bbox"].to_pylist()
    box = [[b[k] for k in ("xmin", "ymin", "xmax", "ymax")] for b in stored]
    np.testing.assert_array_equal(box, frame.bounds)
    np.testing.assert_array_equal(frame.bounds["minx"], frame["col"] * 32)
    np.testing.assert_array_equal(frame.bounds["maxy"], frame["row"] * 32 + 32)
    assert (frame.area == 32 * 32).all()
    assert (frame["id"] == frame["cell"] + "@" + frame["year"]).all()
    assert frame["id"].is_unique
    assert frame["store_row"].is_unique
    assert set(frame["source"]) == {"a.tif", "b.tif"}
    assert set(frame["datetime"].dt.strftime("%Y-%m-%d")) == {"2010-06-03", "2020-01-01"}
    window = (LEFT + 1, TOP - 31, LEFT + 31, TOP - 1)  # the covering lets readers skip
    assert len(geopandas.read_parquet(project.catalogue, bbox=window)) == 2


def test_again_is_up_to_date_and_writes_nothing(write_raster, project):
    path = write_raster("a.tif", ground(LEFT, TOP, 96, 96), origin=(LEFT, TOP))
    said = []
    named = (config.SourceConfig(year="2010", images=str(path)),)
    wanted = config.with_overrides(config.Config(source=named), ["grid.size=32", "split.by=source"])
    tile(project, wanted, workers=1)
    before = {p: p.stat().st_mtime_ns for p in project.tiles.rglob("*")}
    tile(project, wanted, workers=1, progress=lambda task, *_, **__: said.append(task))
    assert any("up to date" in task for task in said)
    assert {p: p.stat().st_mtime_ns for p in project.tiles.rglob("*")} == before
    tile(project, wanted, workers=1, force=True)
    assert project.catalogue.stat().st_mtime_ns > before[project.catalogue]


def test_changed_imagery_is_tiled_again(write_raster, project):
    values = ground(LEFT, TOP, 96, 96)
    path = write_raster("a.tif", values, origin=(LEFT, TOP))
    tile_sources(project, {"2010": path})
    first = project.tile_manifest().fingerprint
    write_raster("a.tif", 255 - values, origin=(LEFT, TOP))
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000_000))
    table = tile_sources(project, {"2010": path})
    np.testing.assert_array_equal(
        pixels(project, table, f"{COL}_{ROW - 1}@2010"), 255 - expected(COL, ROW - 1)
    )
    assert project.tile_manifest().fingerprint != first


def remade(project, sources, change, **options):
    """Whether tiles are cut again after `change()`, and not without it."""
    made = []
    for step in (lambda: None, lambda: None, change):
        step()
        tile_sources(project, sources, **options)
        made.append(project.tiles_manifest.stat().st_mtime_ns)
    assert made[0] == made[1]
    return made[2] > made[1]


def later(path):
    """Set the time of a file a second ahead, as if it were written then."""
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000_000_000))


def write_mask(path, valid):
    """Write a mask file (.msk), which a raster of that name without the suffix then has."""
    height, width = valid.shape
    form = {"driver": "GTiff", "count": 1, "dtype": "uint8", "height": height, "width": width}
    with pytest.warns(NotGeoreferencedWarning):
        target = rasterio.open(path, "w", **form)
    with target:
        target.write(valid.astype(np.uint8) * 255, 1)
        target.update_tags(INTERNAL_MASK_FLAGS_1="2")


def nodata_beside(path, value):
    """Write GDAL's sidecar (.aux.xml) that gives one band a nodata value."""
    band = f'<PAMRasterBand band="1"><NoDataValue>{value}</NoDataValue></PAMRasterBand>'
    path.with_name(f"{path.name}.aux.xml").write_text(f"<PAMDataset>{band}</PAMDataset>")


@pytest.mark.parametrize("how", [".aux.xml", ".msk"])
def test_tiles_are_stale_when_a_file_beside_their_source_changed(write_raster, project, how):
    values = np.full((1, 64, 64), 90, np.uint8)
    values[:, :, 32:] = 7
    path = write_raster("a.tif", values, origin=(LEFT, TOP))

    def change():
        if how == ".aux.xml":
            nodata_beside(path, 7)
        else:
            write_mask(path.with_name("a.tif.msk"), values[0] == 90)

    assert remade(project, {"2010": path}, change)
    cells = set(TileTable.load(project.catalogue).cells())
    assert cells == {f"{COL}_{ROW - 1}", f"{COL}_{ROW - 2}"}


def tile_index(path, folder):
    """A GDAL tile index (GTI) of one raster, in `folder`."""
    with rasterio.open(path) as source:
        box = shapely.box(*source.bounds)
    frame = geopandas.GeoDataFrame({"location": [str(path)]}, geometry=[box], crs=32631)
    frame.to_file(folder / "index.gpkg")
    (folder / "a.gti").write_text(
        f"<GDALTileIndexDataset><IndexDataset>{folder}/index.gpkg</IndexDataset>"
        "</GDALTileIndexDataset>"
    )
    return folder / "a.gti"


@pytest.mark.parametrize("change", ["pixels", "sidecar"])
@pytest.mark.parametrize("kind", ["vrt", "vrt of a vrt", "gti"])
def test_tiles_are_stale_when_a_file_behind_their_source_changed(
    write_raster, project, tmp_path, kind, change
):
    values = ground(LEFT, TOP, 64, 64)
    path = write_raster("behind/a.tif", values, origin=(LEFT, TOP))
    if kind == "gti":
        source = tile_index(path, tmp_path)
    else:
        source = tmp_path / "a.vrt"
        rasterio.shutil.copy(path, source, driver="VRT")
        if kind == "vrt of a vrt":
            bands = "".join(
                f'<VRTRasterBand dataType="Byte" band="{i}"><SimpleSource><SourceFilename>{source}'
                f"</SourceFilename><SourceBand>{i}</SourceBand></SimpleSource></VRTRasterBand>"
                for i in (1, 2, 3)
            )
            source = tmp_path / "b.vrt"
            source.write_text(
                '<VRTDataset rasterXSize="64" rasterYSize="64"><SRS>EPSG:32631</SRS><GeoTransform>'
                f"{LEFT}, 1, 0, {TOP}, 0, -1</GeoTransform>{bands}</VRTDataset>"
            )

    def write():
        if change == "sidecar":
            nodata_beside(path, 300)
        else:
            write_raster("behind/a.tif", 255 - values, origin=(LEFT, TOP))
            later(path)

    assert remade(project, {"2010": source}, write)
    table = TileTable.load(project.catalogue)
    wanted = expected(COL, ROW - 1)
    np.testing.assert_array_equal(
        pixels(project, table, f"{COL}_{ROW - 1}@2010"),
        wanted if change == "sidecar" else 255 - wanted,
    )


def test_vrts_of_each_other_are_an_error(project, tmp_path):
    """Looking for all files behind them comes to an end."""
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.vrt").write_text(
            '<VRTDataset rasterXSize="64" rasterYSize="64"><SRS>EPSG:32631</SRS><GeoTransform>'
            f'{LEFT}, 1, 0, {TOP}, 0, -1</GeoTransform><VRTRasterBand dataType="Byte" band="1">'
            f"<SimpleSource><SourceFilename>{tmp_path}/{other}.vrt</SourceFilename>"
            "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
        )
    with pytest.raises(GeomatchError, match=r"a\.vrt"):
        tile_sources(project, {"2010": tmp_path / "a.vrt"})


def test_tiles_are_stale_when_a_part_of_a_shapefile_changed(write_raster, project, tmp_path):
    path = write_raster("a.tif", ground(LEFT, TOP, 64, 64), origin=(LEFT, TOP))
    box = shapely.box(LEFT, TOP - 32, LEFT + 32, TOP)
    geopandas.GeoDataFrame(geometry=[box], crs=32631).to_file(tmp_path / "labels.shp")
    right = (tmp_path / "labels.prj").read_text()
    (tmp_path / "labels.prj").write_text(CRS.from_epsg(32630).to_wkt())
    named = {"labels": {"2010": tmp_path / "labels.shp"}}

    def change():
        (tmp_path / "labels.prj").write_text(right)
        later(tmp_path / "labels.prj")

    assert remade(project, {"2010": path}, change, **named)
    table = TileTable.load(project.catalogue)
    assert (pixels(project, table, f"{COL}_{ROW - 1}@2010")[..., 3] == 255).all()


def test_tiles_of_a_source_without_companions_stay_those_of_earlier_versions(
    write_raster,
):
    """They are not cut again, although more files are looked at now."""
    path = write_raster("a.tif", ground(LEFT, TOP, 64, 64), origin=(LEFT, TOP))
    stat = path.stat()
    assert rasters.inspect(str(path)).stamp == (stat.st_size, stat.st_mtime_ns)


def test_a_sheet_in_an_archive_is_read_as_the_sheet_itself(write_raster, project, tmp_path):
    path = write_raster("a.tif", ground(LEFT, TOP, 64, 64), origin=(LEFT, TOP))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(path, "in/a.tif")
    wanted = tile_sources(project, {"2010": path})
    stored = TileStore.open(project.pixels).read(wanted.store_row)
    inside = f"/vsizip/{tmp_path}/a.zip/in/a.tif"
    table = tile_sources(project, {"2010": inside})
    assert table.ids() == wanted.ids()
    np.testing.assert_array_equal(TileStore.open(project.pixels).read(table.store_row), stored)


@pytest.mark.slow
def test_more_sheets_than_files_may_be_open(write_raster, project, tmp_path):
    """In a process of its own, whose limit is below the number of sheets."""
    for col in range(12):
        for row in range(12):
            left, top = LEFT + 16 * col, TOP - 16 * row
            write_raster(f"y/{row}_{col}.tif", ground(left, top, 16, 16), origin=(left, top))
    command = f"ulimit -n 96; exec {sys.executable} -m geomatch tile -p {project.root} --check"
    years = " ".join(f"{year}={tmp_path}/y" for year in range(2010, 2012))
    given = f" {years} --workers 1 --size 32 --split source"
    done = subprocess.run(["bash", "-c", command + given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = TileTable.load(project.catalogue)
    assert len(table) == 36 * 2
    np.testing.assert_array_equal(
        pixels(project, table, f"{COL + 2}_{ROW - 3}@2010"), expected(COL + 2, ROW - 3)
    )


def test_too_many_open_files_blame_no_file(write_raster, monkeypatch):
    path = str(write_raster("a.tif", ground(LEFT, TOP, 32, 32), origin=(LEFT, TOP)))

    def refuse(path, mode):
        raise RasterioIOError(f"{path}: {os.strerror(errno.EMFILE)}")

    monkeypatch.setattr(rasterio, "open", refuse)
    with pytest.raises(GeomatchError, match="too many open files") as caught:
        rasters.inspect(path)
    assert "a.tif" not in str(caught.value)
    assert "ulimit -n" in caught.value.hint


def test_threads_of_gdal_do_not_move_pixels(write_raster, tmp_path, monkeypatch):
    """Two sheets that are not on one lattice, in one VRT: GDAL's issue 13464."""
    rng = np.random.default_rng(0)
    names = []
    for k in range(2):
        image = rng.integers(0, 255, (1, 750, 750)).astype(np.uint8).repeat(2, 1).repeat(2, 2)
        names.append(write_raster(f"{k}.tif", image, origin=(LEFT + 1500.4 * k, TOP)))
    size = 'xSize="1500" ySize="1500"'
    parts = "".join(
        f"<SimpleSource><SourceFilename>{name}</SourceFilename><SourceBand>1</SourceBand>"
        f'<SrcRect xOff="0" yOff="0" {size}/><DstRect xOff="{1500.4 * k}" yOff="0" {size}/>'
        "</SimpleSource>"
        for k, name in enumerate(names)
    )
    (tmp_path / "a.vrt").write_text(
        '<VRTDataset rasterXSize="3000" rasterYSize="1500"><SRS>EPSG:32631</SRS>'
        f"<GeoTransform>{LEFT}, 1, 0, {TOP}, 0, -1</GeoTransform>"
        f'<VRTRasterBand dataType="Byte" band="1">{parts}</VRTRasterBand></VRTDataset>'
    )
    made = []
    for value in ("1", "ALL_CPUS"):
        monkeypatch.setenv("GDAL_NUM_THREADS", value)
        project = new_project(tmp_path / value)
        tile_sources(project, {"2010": tmp_path / "a.vrt"}, "grid.size=128")
        made.append(project.tile_manifest().fingerprint)
    assert made[0] == made[1]


def test_hidden_files_of_a_folder_are_not_sheets(write_raster, project, tmp_path):
    """Such as the companions (._NAME) that Macs leave on other disks."""
    write_raster("y/a.tif", ground(LEFT, TOP, 64, 64), origin=(LEFT, TOP))
    (tmp_path / "y" / "._a.tif").write_bytes(b"\0\5\x16\7" + bytes(4092))
    assert len(tile_sources(project, {"2010": tmp_path / "y"})) == 4


def test_a_file_name_that_is_not_utf_8(write_raster, project, tmp_path):
    """The file and its mask are read, and the catalogue shows the rest of the name."""
    values = ground(LEFT, TOP, 64, 64)
    path = write_raster("a.tif", values, origin=(LEFT, TOP))
    write_mask(tmp_path / "a.tif.msk", np.indices((64, 64))[1] < 32)
    folder = os.fsencode(tmp_path) + b"/y\xe9"
    os.mkdir(folder)
    os.rename(path, folder + b"/for\xeat.tif")
    os.rename(tmp_path / "a.tif.msk", folder + b"/for\xeat.tif.msk")
    table = tile_sources(project, {"2010": os.fsdecode(folder)}, workers=2)
    assert set(table.cells()) == {f"{COL}_{ROW - 1}", f"{COL}_{ROW - 2}"}
    np.testing.assert_array_equal(
        pixels(project, table, f"{COL}_{ROW - 1}@2010"), expected(COL, ROW - 1)
    )
    assert set(table.sources) == {r"for\xeat.tif"}


def test_vector_labels_whose_name_is_not_utf_8(write_raster, project, tmp_path):
    """All parts of a shapefile are found."""
    path = write_raster("a.tif", ground(LEFT, TOP, 64, 64), origin=(LEFT, TOP))
    box = shapely.box(LEFT, TOP - 32, LEFT + 32, TOP)
    geopandas.GeoDataFrame(geometry=[box], crs=32631).to_file(tmp_path / "x.shp")
    for part in tmp_path.glob("x.*"):
        os.rename(part, os.fsencode(tmp_path) + b"/\xe9" + os.fsencode(part.suffix))
    labels = {"2010": os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.shp")}
    table = tile_sources(project, {"2010": path}, labels=labels, workers=2)
    assert (pixels(project, table, f"{COL}_{ROW - 1}@2010")[..., 3] == 255).all()
    assert (pixels(project, table, f"{COL + 1}_{ROW - 1}@2010")[..., 3] == 0).all()


def test_without_sources_the_last_ones_and_their_options_are_repeated(
    write_raster, project, monkeypatch, tmp_path
):
    """Also from another working folder, though the path was relative."""
    values = ground(LEFT, TOP, 96, 96)
    write_raster("imagery/a.tif", values, origin=(LEFT, TOP))
    write_raster("imagery/b.tif", values, origin=(LEFT, TOP))
    monkeypatch.chdir(tmp_path)
    named = ["2010=imagery/a.tif", "2020=imagery/b.tif", "--size", "48", "--split", "source"]
    command = ["tile", "-p", str(project.root), "--workers", "1"]
    first = run_command(*command, *named, "--set", "grid.min_valid=0.5")
    assert first.exit_code == 0, first.stderr
    first_made = project.tile_manifest()
    assert first_made.size == 48
    monkeypatch.chdir("/")
    again = run_command(*command)
    assert again.exit_code == 0, again.stderr
    assert "up to date" in again.stderr
    write_raster("imagery/a.tif", 255 - values[:, :90], origin=(LEFT, TOP))
    once_more = run_command(*command)
    assert once_more.exit_code == 0, once_more.stderr
    changed = project.tile_manifest()
    assert changed.fingerprint != first_made.fingerprint
    assert (changed.size, changed.grid) == (first_made.size, first_made.grid)
    assert changed.request == first_made.request


def test_stretch_between_two_values_is_linear(write_raster, project):
    values = np.arange(3 * 32 * 32, dtype=np.uint16).reshape(3, 32, 32)
    path = write_raster("a.tif", values, origin=(LEFT, TOP))
    table = tile_sources(project, {"2010": path}, "grid.stretch=500,2500")
    linear = np.clip((values.astype(float) - 500) / 2000 * 255, 0, 255)
    got = np.moveaxis(pixels(project, table, table.ids()[0]), -1, 0)
    assert np.abs(got - linear).max() <= 0.5 + 1e-3
    assert got.min() == 0
    assert got.max() == 255


def test_stretch_in_percent_is_over_the_whole_collection(write_raster, project):
    """Two sheets, of dark and of bright ground, get one stretch a band; nodata does not count."""
    rng = np.random.default_rng(2)
    dark = rng.integers(100, 1000, (2, 64, 64)).astype(np.uint16)
    bright = rng.integers(2000, 9000, (2, 64, 64)).astype(np.uint16)
    bright[1] *= 3
    dark[:, 40:, 40:] = 0
    write_raster("2010/a.tif", dark, origin=(LEFT, TOP), nodata=0)
    write_raster("2010/b.tif", bright, origin=(LEFT + 64, TOP), nodata=0)
    tile_sources(project, {"2010": project.root.parent / "2010"}, "grid.stretch=5%,90%")
    measured = project.tile_manifest().years["2010"].stretch
    for band in range(2):
        both = np.concatenate([dark[band][dark[band] > 0], bright[band].ravel()])
        low, high = np.percentile(both, [5, 90])
        assert measured["low"][band] == pytest.approx(low)
        assert measured["high"][band] == pytest.approx(high)
    table = TileTable.load(project.catalogue)
    low, high = np.asarray(measured["low"]), np.asarray(measured["high"])
    linear = (np.moveaxis(dark[:, :32, :32], 0, -1) - low) / (high - low) * 255
    got = pixels(project, table, f"{COL}_{ROW - 1}@2010")
    assert np.abs(got - np.clip(linear, 0, 255)).max() <= 0.5 + 1e-2


def test_utm_grid_gives_each_place_its_own_zone(write_raster, project):
    write_raster("2010/a.tif", ground(LEFT, TOP, 96, 96), origin=(LEFT, TOP))
    degrees = 1e-5
    rng = np.random.default_rng(3)
    values = smooth(rng, (3, 200, 300))
    write_raster("2010/b.tif", values, crs="EPSG:4326", origin=(9.0, 45.0), gsd=degrees)
    table = tile_sources(project, {"2010": project.root.parent / "2010"}, "grid.crs=utm")
    assert set(table.epsg.tolist()) == {32631, 32632}
    for cell, code in zip(table.cells(), table.epsg.tolist(), strict=True):
        assert cell.startswith(f"{code}_")
    # Zone 31 lies right on the grid, so that its tiles are exact there too.
    name = f"32631_{COL}_{ROW - 1}@2010"
    np.testing.assert_array_equal(pixels(project, table, name), expected(COL, ROW - 1))
    geo = json.loads(pq.read_schema(project.catalogue).metadata[b"geo"])
    assert "crs" not in geo["columns"]["geometry"]  # which means OGC:CRS84
    frame = geopandas.read_parquet(project.catalogue)
    assert frame.crs == "OGC:CRS84"
    for code, part in frame.groupby(table.epsg):
        local = part.to_crs(code).bounds
        np.testing.assert_allclose(local["minx"], part["col"] * 32, atol=1e-3)
        np.testing.assert_allclose(local["maxy"], part["row"] * 32 + 32, atol=1e-3)
    second = frame[table.epsg == 32632].total_bounds
    assert second[0] >= 9.0 - 1e-4
    assert second[2] <= 9.0 + 300 * degrees + 1e-4


def test_a_sheet_over_a_zone_border_gives_each_ground_one_zone(write_raster, project):
    values = smooth(np.random.default_rng(3), (3, 200, 400))
    path = write_raster("a.tif", values, crs="EPSG:4326", origin=(5.998, 45.0), gsd=1e-5)
    table = tile_sources(project, {"2010": path}, "grid.crs=utm")
    bounds = geopandas.read_parquet(project.catalogue).bounds
    centre = (bounds["minx"] + bounds["maxx"]) / 2
    assert set(table.epsg[centre < 6 - 1e-5].tolist()) == {32631}
    assert set(table.epsg[centre > 6 + 1e-5].tolist()) == {32632}


def write_degrees(path, values, west, north, step):
    """Write (bands, h, w) in EPSG:4326, the left edge at `west`, which may be past 180."""
    form = {"count": len(values), "height": values.shape[1], "width": values.shape[2]}
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        dtype=values.dtype,
        crs="EPSG:4326",
        transform=from_origin(west, north, step, step),
        **form,
    ) as target:
        target.write(values)
    return path


@pytest.mark.parametrize("west", [179.9985, -180.0015])
def test_a_sheet_over_180_degrees_has_tiles_on_both_sides(tmp_path, project, west):
    """The brightness is the longitude east of the left edge, however longitudes are counted."""
    ramp = np.tile(np.linspace(0, 250, 300).astype(np.uint8), (1, 150, 1))
    path = write_degrees(tmp_path / "a.tif", ramp, west, 50.0, 1e-5)
    table = tile_sources(project, {"2010": path}, "grid.crs=utm", "grid.size=16", "grid.gsd=1")
    assert set(table.epsg.tolist()) == {32601, 32660}
    for name, code, box in zip(table.ids(), table.epsg.tolist(), table.bounds(), strict=True):
        middle = [(box[0] + box[2]) / 2], [(box[1] + box[3]) / 2]
        (lon,), _ = transform(f"EPSG:{code}", "EPSG:4326", *middle)
        wanted = (lon - west) % 360 / 300e-5 * 250
        assert pixels(project, table, name)[7:9, 7:9].mean() == pytest.approx(wanted, abs=2)


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("crs", ["EPSG:3857", "EPSG:6933"])
def test_a_sheet_past_the_edge_of_a_cylindrical_projection(tmp_path, project, crs, side):
    """The brightness is x from the left edge on, which lies 300 m before that of the Earth."""
    edge = transform("EPSG:4326", crs, [side * 180.0], [50.0])[0][0]
    top = transform("EPSG:4326", crs, [0.0], [50.0])[1][0]
    ramp = np.tile(np.linspace(0, 250, 300).astype(np.uint8), (1, 150, 1))
    path = tmp_path / "a.tif"
    form = {"driver": "GTiff", "count": 1, "height": 150, "width": 300, "dtype": "uint8"}
    at = from_origin(edge - 300, top, 2, 2)
    with rasterio.open(path, "w", crs=crs, transform=at, **form) as target:
        target.write(ramp)
    table = tile_sources(project, {"2010": path}, "grid.crs=utm", "grid.size=16", "grid.gsd=1")
    assert set(table.epsg.tolist()) == {32601, 32660}
    for name, code, box in zip(table.ids(), table.epsg.tolist(), table.bounds(), strict=True):
        middle = [(box[0] + box[2]) / 2], [(box[1] + box[3]) / 2]
        (x,), _ = transform(f"EPSG:{code}", crs, *middle)
        around = abs(2 * edge)
        wanted = (x - (edge - 300)) % around / 600 * 250
        assert pixels(project, table, name)[7:9, 7:9].mean() == pytest.approx(wanted, abs=2)


def test_a_projected_sheet_over_180_degrees_has_tiles_on_both_sides(write_raster, project):
    (x,), (y,) = transform("EPSG:4326", "EPSG:32660", [180.0], [50.0])
    values = ground(0, 0, 300, 200)
    path = write_raster("a.tif", values, crs="EPSG:32660", origin=(x - 150, y + 100))
    table = tile_sources(project, {"2010": path}, "grid.crs=utm", "grid.size=16")
    assert set(table.epsg.tolist()) == {32601, 32660}
    assert min(np.sum(table.epsg == code) for code in (32601, 32660)) > 50


@pytest.mark.parametrize("west", [-180.0, pytest.param(0.0, marks=pytest.mark.slow)])
def test_a_raster_of_the_whole_earth_loses_no_zone(tmp_path, project, west):
    """Also where a transverse Mercator projection of all of it folds over."""
    east = np.linspace(0, 250, 720).astype(np.uint8)
    path = write_degrees(tmp_path / "a.tif", np.tile(east, (1, 160, 1)), west, 40.0, 0.5)
    overrides = ("grid.crs=utm", "grid.size=8", "grid.gsd=20000")
    table = tile_sources(project, {"2010": path}, *overrides)
    zones = set(table.epsg.tolist())
    assert zones == {*range(32601, 32661), *range(32701, 32761)}
    for i in range(0, len(table), 50):
        box, code = table.bounds()[i], table.epsg[i]
        middle = [(box[0] + box[2]) / 2], [(box[1] + box[3]) / 2]
        (lon,), _ = transform(f"EPSG:{code}", "EPSG:4326", *middle)
        got = pixels(project, table, table.ids()[i])[3:5, 3:5].mean()
        assert got == pytest.approx((lon - west) % 360 / 360 * 250, abs=2)


@pytest.mark.parametrize(
    ("crs", "place"),
    [
        ("EPSG:3413", (-50.0, 69.0)),
        ("EPSG:3413", (135.0, 89.9995)),
        ("EPSG:3031", (70.0, -70.0)),
        ("EPSG:3995", (179.9, 80.0)),
        ("EPSG:6933", (-179.9, 50.0)),
    ],
)
def test_a_crs_of_all_longitudes_is_gridded_itself(write_raster, project, crs, place):
    (x,), (y,) = transform("EPSG:4326", crs, [place[0]], [place[1]])
    left, top = 32 * round(x / 32), 32 * round(y / 32)
    path = write_raster("a.tif", ground(left, top, 96, 96), crs=crs, origin=(left, top))
    table = tile_sources(project, {"2010": path, "2020": path})
    assert table.grid.crs == crs
    assert len(table) == 2 * 9
    col, row = left // 32, top // 32 - 1
    np.testing.assert_array_equal(
        pixels(project, table, f"{col}_{row}@2020"), expected(col, row), crs
    )


@pytest.mark.parametrize(
    ("crs", "place"),
    [
        ("EPSG:2154", (-4.5, 48.4)),
        ("EPSG:3035", (-8.0, 40.0)),
        ("EPSG:5070", (-122.0, 47.0)),
        ("EPSG:32601", (179.5, 52.0)),
    ],
)
def test_a_source_within_the_area_of_a_wide_grid_is_taken(write_raster, project, crs, place):
    """National grids reach far from their meridian; a zone may meet the date line."""
    path = write_raster("a.tif", ground(0, 0, 96, 96), crs="EPSG:4326", origin=place, gsd=1e-5)
    assert tile_sources(project, {"2010": path}, f"grid.crs={crs}").grid.crs == crs


@pytest.mark.parametrize("crs", ["EPSG:32631", "EPSG:2154"])
def test_a_source_far_from_the_grid_crs_is_refused(write_raster, project, crs):
    near = write_raster("a.tif", ground(LEFT, TOP, 96, 96), origin=(LEFT, TOP))
    far = write_raster(
        "far.tif", ground(0, 0, 96, 96), crs="EPSG:4326", origin=(20.0, 45.1), gsd=1e-5
    )
    with pytest.raises(GeomatchError, match="far") as caught:
        tile_sources(project, {"2010": near, "2020": far}, f"grid.crs={crs}")
    assert "--crs utm" in caught.value.hint
    assert not project.catalogue.exists()


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (("2020", "2005-06", "20100315"), ("2005-06", "20100315", "2020")),
        (("before", "after"), ("before", "after")),
        (("after", "before"), ("after", "before")),
        (("2020", "old"), ("2020", "old")),
    ],
)
def test_years_are_in_time_order_or_as_given(write_raster, project, given, stored):
    path = write_raster("a.tif", ground(LEFT, TOP, 64, 64), origin=(LEFT, TOP))
    assert tile_sources(project, dict.fromkeys(given, path)).years == stored
    assert TileTable.load(project.catalogue).years == stored
    assert tuple(project.tile_manifest().years) == stored


def warped(path, crs, bounds, size):
    """(size, size, bands) of the whole image, warped by rasterio onto one window."""
    with rasterio.open(path) as source:
        image = source.read()
        result = np.zeros((len(image), size, size), np.uint8)
        reproject(
            image,
            result,
            src_transform=source.transform,
            src_crs=source.crs,
            dst_transform=from_origin(bounds[0], bounds[3], (bounds[2] - bounds[0]) / size, 1.0),
            dst_crs=crs,
            resampling=Resampling.bilinear,
        )
    return np.moveaxis(result, 0, -1)


@pytest.mark.parametrize("kind", ["geographic", "other zone", "rotated"])
def test_imagery_in_another_crs_is_warped_as_rasterio_does(write_raster, project, kind):
    values = smooth(np.random.default_rng(4), (3, 256, 256))
    if kind == "rotated":
        path = write_raster("a.tif", values)
        with rasterio.open(path, "r+") as target:
            a, b = np.cos(0.3), np.sin(0.3)
            target.transform = Affine(a, b, LEFT + 3.3, b, -a, TOP - 7.7)
    else:
        crs, gsd = ("EPSG:4326", 1e-5) if kind == "geographic" else ("EPSG:32632", 1.0)
        x, y = transform("EPSG:32631", crs, [LEFT + 3.3], [TOP - 7.7])
        path = write_raster("a.tif", values, crs=crs, origin=(x[0], y[0]), gsd=gsd)
    table = tile_sources(project, {"2010": path}, "grid.crs=EPSG:32631")
    assert len(table) >= 20
    for name, bounds in list(zip(table.ids(), table.bounds(), strict=True))[::4]:
        got = pixels(project, table, name).astype(int)
        wanted = warped(path, "EPSG:32631", bounds, 32).astype(int)
        assert np.abs(got - wanted).max() <= 8, name
        assert np.abs(got - wanted).mean() < 1.5, name
        moved = np.roll(wanted, 1, axis=1)
        assert np.abs(got - moved)[:, 1:].mean() > 3, "the picture tells a pixel's shift"


def test_imagery_is_interpolated_bilinearly(write_raster, project):
    """Half a pixel off the grid, each value is the mean of two."""
    values = np.tile((np.arange(97) * 2).astype(np.uint8), (1, 64, 1))
    path = write_raster("a.tif", values, origin=(LEFT - 0.5, TOP))
    table = tile_sources(project, {"2010": path})
    got = pixels(project, table, f"{COL + 1}_{ROW - 1}@2010")[..., 0]
    np.testing.assert_array_equal(got, np.tile(np.arange(32) * 2 + 65, (32, 1)))


@pytest.mark.parametrize("crs", ["EPSG:3857", "EPSG:4326", "EPSG:2263"])
def test_a_crs_without_metres_on_the_ground_is_gridded_in_utm(write_raster, project, crs):
    """Degrees, Web Mercator's stretched metres, and feet, at New York."""
    left, bottom, right, top = transform_bounds(
        "EPSG:4326", crs, -74.0, 40.7, -74.0 + 2e-3, 40.7 + 2e-3
    )
    path = write_raster(
        "a.tif",
        smooth(np.random.default_rng(5), (3, 200, 200)),
        crs=crs,
        origin=(left, top),
        gsd=(top - bottom) / 200,
    )
    assert right > left
    table = tile_sources(project, {"2010": path})
    assert table.grid.crs == "EPSG:32618"
    assert len(table) > 4


def test_pixel_size_defaults_to_the_first_years(write_raster, project):
    coarse = write_raster("a.tif", ground(LEFT, TOP, 64, 64), origin=(LEFT, TOP), gsd=2.0)
    fine = write_raster("b.tif", ground(LEFT, TOP, 256, 256), origin=(LEFT, TOP), gsd=0.5)
    named = tuple(
        config.SourceConfig(year=year, images=str(path))
        for year, path in [("2020", fine), ("2010", coarse)]
    )
    wanted = config.with_overrides(config.Config(source=named), ["grid.size=16", "split.by=source"])
    assert tile(project, wanted, workers=1).table.grid.gsd == 2.0


def test_pixel_size_of_a_turned_raster_is_its_pixels(write_raster, project):
    """Not that of the box around it, which is larger."""
    path = write_raster("a.tif", ground(LEFT, TOP, 256, 256))
    with rasterio.open(path, "r+") as target:
        turned = Affine.translation(LEFT, TOP) * Affine.rotation(-30) * Affine.scale(0.5, -0.5)
        target.transform = turned
    assert default_gsd(project, path) == 0.5


def test_pixel_size_of_a_long_strip_in_degrees_is_its_pixels(tmp_path, project):
    """In the projection of its zone the strip lies askew. 1e-5 degrees are 1.1132 m on the
    equator."""
    values = np.full((1, 128, 4096), 90, np.uint8)
    path = write_degrees(tmp_path / "a.tif", values, 5.7, 60.0, 1e-5)
    metres = 1.1132 * np.cos(np.radians(60)) ** 0.5
    assert default_gsd(project, path) == pytest.approx(metres, rel=0.005)


def default_gsd(project, path):
    named = (config.SourceConfig(year="2010", images=str(path)),)
    wanted = config.with_overrides(config.Config(source=named), ["grid.size=16", "split.by=source"])
    return tile(project, wanted, workers=1).table.grid.gsd


def test_one_or_two_workers_make_the_same_tiles(write_raster, tmp_path):
    values = ground(LEFT, TOP, 256, 256)
    sources = {
        "2010": write_raster("a.tif", values, origin=(LEFT, TOP)),
        "2020": write_raster("b.tif", 255 - values, origin=(LEFT, TOP)),
    }
    one, two = new_project(tmp_path / "one"), new_project(tmp_path / "two")
    tables = [
        tile_sources(one, sources, "grid.size=8"),
        tile_sources(two, sources, "grid.size=8", workers=2),
    ]
    assert len(list((one.pixels / "c").iterdir())) > 2, "several shards"
    assert one.tile_manifest().fingerprint == two.tile_manifest().fingerprint
    assert tables[0].ids() == tables[1].ids()
    rows = np.arange(len(tables[0]))[::7]
    read = [
        TileStore.open(p.pixels).read(t.store_row[rows])
        for p, t in zip((one, two), tables, strict=True)
    ]
    np.testing.assert_array_equal(*read)


def test_strides_cut_overlapping_tiles(write_raster, project):
    path = write_raster("a.tif", ground(LEFT, TOP, 96, 64), origin=(LEFT, TOP))
    table = tile_sources(project, {"2010": path}, "grid.stride=8")
    cols = {(LEFT + x) // 8 for x in range(0, 96 - 32 + 1, 8)}
    rows = {(TOP - 64 + y) // 8 for y in range(0, 64 - 32 + 1, 8)}
    assert set(table.cells()) == {f"{c}_{r}" for c in cols for r in rows}
    assert table.grid.reach == 3
    for name in table.ids():
        col, row = map(int, name.split("@")[0].split("_"))
        np.testing.assert_array_equal(pixels(project, table, name), expected(col, row, 32, 8))


@pytest.mark.parametrize("bands", [1, 2, 4])
def test_any_number_of_bands(write_raster, project, bands):
    base = ground(LEFT, TOP, 64, 64)
    values = np.concatenate([base, 255 - base[:1]])[:bands]
    path = write_raster("a.tif", values, origin=(LEFT, TOP))
    with rasterio.open(path, "r+") as target:  # GDAL takes the fourth band for alpha
        target.colorinterp = (ColorInterp.gray,) + (ColorInterp.undefined,) * (bands - 1)
    table = tile_sources(project, {"2010": path, "2020": path})
    assert project.tile_manifest().channels == Channels(bands, 0)
    got = pixels(project, table, f"{COL}_{ROW - 1}@2020")
    wanted = expected(COL, ROW - 1)
    wanted = np.concatenate([wanted, 255 - wanted[..., :1]], axis=-1)[..., :bands]
    np.testing.assert_array_equal(got, wanted)


def test_sources_of_the_toml_are_relative_to_the_project(write_raster, tmp_path, monkeypatch):
    write_raster("project/ortho/a.tif", ground(LEFT, TOP, 64, 64), origin=(LEFT, TOP))
    (tmp_path / "project" / "geomatch.toml").write_text(
        '[[source]]\nyear = 2010\nimages = "ortho/*.tif"\n[grid]\nsize = 16\n'
        '[split]\nby = "source"\n'
    )
    monkeypatch.chdir("/")
    result = run_command("tile", "-p", str(tmp_path / "project"), "--workers", "1")
    assert result.exit_code == 0, result.stderr
    assert len(TileTable.load(tmp_path / "project" / "tiles" / "tiles.parquet")) == 16


def test_a_path_with_brackets_is_a_file_not_a_glob(write_raster, project):
    path = write_raster("ortho [2010].tif", ground(LEFT, TOP, 64, 64), origin=(LEFT, TOP))
    assert len(tile_sources(project, {"2010": path})) == 4

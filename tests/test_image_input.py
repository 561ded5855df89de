"""Image files as queries are read as the imagery of the tiles was."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning
from small_project import tile_sources

from geomatch import image_input
from geomatch.data.store import TileStore
from geomatch.errors import GeomatchError

LEFT, TOP = 500_000, 5_000_000
COL, ROW = LEFT // 32 + 1, TOP // 32 - 2
"""A cell in the middle of the sheets."""
ROWS, COLS = slice(32, 64), slice(32, 64)
"""Its pixels."""


def noise(bands, dtype="uint8", high=255, seed=0):
    values = np.random.default_rng(seed).integers(1, high, (bands, 96, 96))
    return values.astype(dtype)


def tile_of(project, table, year):
    row = table.store_row[table.ids().index(f"{COL}_{ROW}@{year}")]
    return TileStore.open(project.pixels).read(np.array([row]))[0]


def cut(project, path, year=None):
    return image_input.cut(str(path), project.tile_manifest(), year)


def write_plain(path, values, *kinds, **form):
    """A raster without a place."""
    form |= {"count": len(values), "dtype": values.dtype, "height": 32, "width": 32}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        target = rasterio.open(path, "w", **form)
    with target:
        if kinds:
            target.colorinterp = [ColorInterp[kind] for kind in kinds]
        target.write(values)
    return path


@pytest.fixture
def deep(write_raster, project):
    """A project of 16-bit imagery whose years have other stretches, and the imagery of 2010."""
    older = noise(3, "uint16", 4000)
    write_raster("a.tif", older, origin=(LEFT, TOP))
    write_raster("b.tif", 2 * older, origin=(LEFT, TOP))
    root = project.root.parent
    sources = {"2010": root / "a.tif", "2020": root / "b.tif"}
    table = tile_sources(project, sources, "grid.stretch=5%,95%")
    return table, older[:, ROWS, COLS]


def test_deep_imagery_is_asked_through_the_stretch_of_a_year(project, deep, tmp_path, write_raster):
    """That of `--from-year`, else the newest year's; with and without a place."""
    table, values = deep
    placed = write_raster("cut.tif", values, origin=(LEFT + 32, TOP - 32))
    plain = write_plain(tmp_path / "cut.png", values, driver="PNG")
    stretch = project.tile_manifest().years["2020"].stretch
    low, high = (np.array(stretch[key])[:, None, None] for key in ("low", "high"))
    by_newest = np.clip(np.rint((values - low) / (high - low) * 255), 0, 255)
    for path in (placed, plain):
        asked = cut(project, path, "2010")
        np.testing.assert_array_equal(asked.pixels, tile_of(project, table, "2010"))
        assert asked.remark.endswith("; uint16 stretched as the tiles of 2010")
        assert (asked.epsg is None) == (path == plain)
        newest = cut(project, path)
        np.testing.assert_allclose(np.moveaxis(newest.pixels, -1, 0), by_newest, atol=1)
        assert newest.remark.endswith("of 2020")


def test_grey_deep_images_ask_a_colour_project(project, deep, tmp_path):
    _, values = deep
    path = write_plain(tmp_path / "grey.png", values[:1], driver="PNG")
    grey, colour = cut(project, path, "2010").pixels, tile_of(project, deep[0], "2010")
    np.testing.assert_array_equal(grey[..., 0], colour[..., 0])
    assert np.abs(grey.astype(int) - grey[..., :1]).max() <= 4  # stretches of bands are alike


def test_eight_bits_beside_stretched_tiles_stay_as_they_are(project, deep, tmp_path, write_raster):
    values = noise(3, seed=1)[:, ROWS, COLS]
    asked = cut(project, write_raster("cut.tif", values, origin=(LEFT + 32, TOP - 32)))
    np.testing.assert_array_equal(asked.pixels, np.moveaxis(values, 0, -1))
    assert asked.remark.endswith("; 8 bits as they are, the tiles were stretched")


def test_deep_imagery_beside_tiles_of_eight_bits_is_refused(project, write_raster, tmp_path):
    path = write_raster("a.tif", noise(3), origin=(LEFT, TOP))
    tile_sources(project, {"2010": path})
    values = noise(3, "uint16", 60000)[:, ROWS, COLS]
    placed = write_raster("cut.tif", values, origin=(LEFT + 32, TOP - 32))
    for path in (placed, write_plain(tmp_path / "cut.png", values, driver="PNG")):
        with pytest.raises(
            GeomatchError, match="values of uint16, but the tiles are of 8-bit"
        ) as e:
            cut(project, path)
        assert str(path) in e.value.message
        assert "-scale" in e.value.hint


@pytest.mark.parametrize("placed", [True, False])
def test_bands_and_nodata_are_those_of_the_tiles(project, write_raster, tmp_path, placed):
    """Recorded with the tiles; near infrared tagged alpha is one of the bands."""
    values = noise(4)
    values[:, 40:50, 40:50] = 7
    path = write_raster("a.tif", values, origin=(LEFT, TOP))
    kinds = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    with rasterio.open(path, "r+") as target:
        target.colorinterp = kinds
    said = ["grid.bands=[4,1,2]", "grid.nodata=7", "grid.min_valid=0.5"]
    wanted = tile_of(project, tile_sources(project, {"2010": path}, *said), "2010")
    assert (wanted[8:18, 8:18] == 0).all()
    inner = values[:, ROWS, COLS]
    if placed:
        asked = cut(project, write_raster("cut.tif", inner, origin=(LEFT + 32, TOP - 32)))
        np.testing.assert_array_equal(asked.pixels, wanted)
    else:
        names = [kind.name for kind in kinds]
        asked = cut(project, write_plain(tmp_path / "c.tif", inner, *names, driver="GTiff"))
        np.testing.assert_array_equal(asked.pixels, np.moveaxis(inner[[3, 0, 1]], 0, -1))


@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize("bands", [3, 4])
def test_alpha_first_is_not_taken_for_red(project, write_raster, tmp_path, placed, bands):
    values = noise(bands)
    path = write_raster("a.tif", values, origin=(LEFT, TOP))
    with rasterio.open(path, "r+") as target:
        target.colorinterp = [ColorInterp.gray] + [ColorInterp.undefined] * (bands - 1)
    table = tile_sources(project, {"2010": path})
    inner = np.concatenate([np.full((1, 32, 32), 255, np.uint8), values[:, ROWS, COLS]])
    kinds = ["alpha", "red", "green", "blue", "undefined"][: bands + 1]
    if placed:
        path = write_raster("cut.tif", inner, origin=(LEFT + 32, TOP - 32))
        with rasterio.open(path, "r+") as target:
            target.colorinterp = [ColorInterp[kind] for kind in kinds]
    else:
        path = write_plain(tmp_path / "cut.tif", inner, *kinds, driver="GTiff")
    np.testing.assert_array_equal(cut(project, path).pixels, tile_of(project, table, "2010"))


def test_an_image_is_turned_as_its_exif_orientation_says(project, write_raster, tmp_path):
    values = noise(3)
    table = tile_sources(project, {"2010": write_raster("a.tif", values, origin=(LEFT, TOP))})
    exif = Image.Exif()
    exif[0x112] = 6  # shown after a quarter turn clockwise
    stored = np.rot90(np.moveaxis(values[:, ROWS, COLS], 0, -1))
    Image.fromarray(stored).save(tmp_path / "cut.png", exif=exif)
    asked = cut(project, tmp_path / "cut.png")
    np.testing.assert_array_equal(asked.pixels, tile_of(project, table, "2010"))


def test_a_crs_without_a_place_is_no_place(project, write_raster, tmp_path):
    values = noise(3)
    table = tile_sources(project, {"2010": write_raster("a.tif", values, origin=(LEFT, TOP))})
    path = write_plain(
        tmp_path / "cut.tif", values[:, ROWS, COLS], driver="GTiff", crs="EPSG:32631"
    )
    asked = cut(project, path)
    assert asked.epsg is None
    np.testing.assert_array_equal(asked.pixels, tile_of(project, table, "2010"))


def test_a_collar_is_that_of_the_image(project, write_raster):
    values = noise(3)
    path = write_raster("a.tif", values, origin=(LEFT, TOP))
    tile_sources(project, {"2010": path}, "grid.collar=true", "grid.min_valid=0.5")
    values = values[:, ROWS, COLS]
    values[:, :, 20:] = 255
    values[:, 5, 5] = 255
    asked = cut(project, write_raster("cut.tif", values, origin=(LEFT + 32, TOP - 32)))
    wanted = np.moveaxis(values, 0, -1).copy()
    wanted[:, 20:] = 0
    np.testing.assert_array_equal(asked.pixels, wanted)


def test_other_bands_than_the_tiles_have(project, write_raster, tmp_path):
    tile_sources(project, {"2010": write_raster("a.tif", noise(5), origin=(LEFT, TOP))})
    path = write_plain(tmp_path / "cut.png", noise(3)[:, ROWS, COLS], driver="PNG")
    with pytest.raises(GeomatchError, match=r"cut\.png has 3 bands, the tiles have 5"):
        cut(project, path)

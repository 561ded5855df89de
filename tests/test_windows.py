"""Reading on the grid: what lies on its lattice is copied, and is then what GDAL would warp."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin

from geomatch.geo import rasters, windows
from geomatch.geo.grid import Grid
from geomatch.geo.rasters import Raster
from geomatch.geo.views import Reading
from geomatch.geo.windows import GridReader

CRS = "EPSG:32631"
SIZE = 16
COL, ROW = 500_000 // SIZE, 5_000_000 // SIZE - 1  # the upper left cell of the rasters below


def grid(stride: int = SIZE, gsd: float = 1.0) -> Grid:
    return Grid(CRS, SIZE, gsd, stride)


@pytest.fixture
def noise(write_raster):
    """A function that writes a raster of noise from 1 to 200, whose parts are then invalid."""

    def write(kind: str, dtype: str = "uint8", left: float = 500_000.0) -> Raster:
        rng = np.random.default_rng(5)
        values = rng.integers(1, 200, (3, 70, 100)).astype(dtype)
        holes = rng.random((70, 100)) < 0.3
        holes[16:32, 32:48] = True  # all of a cell
        nodata = None
        if kind == "nodata":
            values[:, holes], nodata = 250, 250
            values[0, 5] = 250  # in one band alone, which is no hole
        elif kind == "given":
            values[:, holes] = 77
        elif kind == "collar":
            values[:, :9] = values[:, :, 90:] = 0
        elif kind == "nan":
            values[1, holes] = np.nan
        path = write_raster("a.tif", values, origin=(left, 5_000_000), nodata=nodata)
        if kind == "mask":
            with rasterio.open(path, "r+") as target:
                target.write_mask(~holes)
        elif kind == "alpha":
            form = {"driver": "GTiff", "height": 70, "width": 100, "count": 4, "dtype": dtype}
            place = {"crs": CRS, "transform": from_origin(left, 5_000_000, 1, 1)}
            with rasterio.open(path, "w", photometric="RGB", alpha="YES", **form, **place) as to:
                to.write(np.concatenate([values, np.where(holes, 0, 255)[None].astype(dtype)]))
                assert to.colorinterp[3] == ColorInterp.alpha
        bands = {"bands": (3, 1)} if kind == "bands" else {}
        reading = Reading(
            **bands, nodata=77.0 if kind == "given" else None, collar=kind == "collar"
        )
        return rasters.inspect(str(path), reading, path.parent / "collars")

    return write


def read_all(reader: GridReader, stride: int = SIZE, count: int = 8):
    """Runs of cells from before the raster to behind it, in all its rows."""
    found = []
    for row in range(ROW * SIZE // stride, ROW * SIZE // stride - 6, -1):
        found += reader.read_run(COL * SIZE // stride - 1, row, count)
    return found


@pytest.mark.parametrize("stride", [SIZE, 5])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *(("plain", "uint8"), ("nodata", "uint8"), ("alpha", "uint8"), ("mask", "uint8")),
        *(("bands", "uint8"), ("given", "uint8"), ("collar", "uint8"), ("nodata", "float32")),
    ],
)
def test_a_copy_is_what_gdal_warps(noise, monkeypatch, kind, dtype, stride):
    raster = noise(kind, dtype)

    def read() -> list[windows.Cell]:
        with GridReader([raster], grid(stride), CRS, stretch=as_bytes(dtype)) as reader:
            found = read_all(reader, stride)
            assert {type(each).__name__ for each in reader._open.values()} == {expected}
            return found

    expected = "_Copied"
    copied = read()
    expected = "_Warped"
    monkeypatch.setattr(windows, "LATTICE", -1)
    warped = read()
    assert 0.1 < np.mean([valid for _, valid, _ in copied]) < 1
    for (pixels, valid, seen), (wanted, wanted_valid, wanted_seen) in zip(
        copied, warped, strict=True
    ):
        np.testing.assert_array_equal(valid, wanted_valid)
        np.testing.assert_array_equal(pixels * valid[..., None], wanted * valid[..., None])
        assert seen == wanted_seen


def as_bytes(dtype):
    return None if dtype == "uint8" else lambda values: np.nan_to_num(values).astype(np.uint8)


def test_what_is_not_a_number_spoils_no_neighbour(noise):
    """GDAL's kernel would weigh it by 0, which gives no number either."""
    raster = noise("nan", "float32")
    with rasterio.open(raster.path) as source:
        values = source.read()
    with GridReader([raster], grid(), CRS, stretch=as_bytes("float32")) as reader:
        pixels, valid, _ = reader.read(COL, ROW)
    np.testing.assert_array_equal(valid, np.isfinite(values).all(axis=0)[:16, :16])
    wanted = np.moveaxis(values[:, :16, :16], 0, -1)
    np.testing.assert_array_equal(pixels[valid], wanted[valid])


@pytest.mark.parametrize(("off", "is_copied"), [(0.004, True), (-0.009, True), (0.1, False)])
def test_a_hundredth_of_a_pixel_is_no_shift(noise, off, is_copied):
    raster = noise("plain", left=500_000 + off)
    with rasterio.open(raster.path) as source:
        wanted = np.moveaxis(source.read(), 0, -1)[16:32, 16:32]
    with GridReader([raster], grid(), CRS) as reader:
        pixels, valid, _ = reader.read(COL + 1, ROW - 1)
    assert valid.all()
    assert np.array_equal(pixels, wanted) == is_copied


def test_other_pixel_sizes_are_warped(noise):
    """Even where they differ so little that corners are on the lattice, far away they are not."""
    raster = noise("plain")
    with GridReader([raster], grid(gsd=1.001), CRS) as reader:
        reader.read(round(COL / 1.001), round(ROW / 1.001))
        assert {type(each).__name__ for each in reader._open.values()} == {"_Warped"}


def test_a_run_is_one_read(noise, monkeypatch):
    reads = []
    read = windows._Copied.read
    monkeypatch.setattr(
        windows._Copied, "read", lambda *given: reads.append(given[1:]) or read(*given)
    )
    with GridReader([noise("plain")], grid(), CRS) as reader:
        cells = list(reader.read_run(COL, ROW, 6))
    assert len(cells) == 6
    assert reads == [(COL * SIZE, -(ROW + 1) * SIZE, 6 * SIZE, SIZE)]


def test_a_run_over_two_sheets_is_filled_from_both(write_raster):
    """The first one by name is seen where they overlap, and nothing is read of it twice."""
    values = np.arange(48 * 3 * 16, dtype=np.uint8).reshape(3, 16, 48) | 1
    first = write_raster("a.tif", values, origin=(500_000, 5_000_000))
    second = write_raster("b.tif", values // 2 + 1, origin=(500_040, 5_000_000))
    sheets = [rasters.inspect(str(path), Reading()) for path in (first, second)]
    with GridReader(sheets, grid(), CRS) as reader:
        cells = list(reader.read_run(COL, ROW, 6))
    row = np.concatenate([pixels for pixels, _, _ in cells], axis=1)
    wanted = np.zeros((16, 96, 3), np.uint8)
    wanted[:, 40:88] = np.moveaxis(values // 2 + 1, 0, -1)
    wanted[:, :48] = np.moveaxis(values, 0, -1)
    np.testing.assert_array_equal(row, wanted)
    names = [[raster.name for raster in seen] for _, _, seen in cells]
    assert names == [["a.tif"], ["a.tif"], ["a.tif"], ["b.tif"], ["b.tif"], ["b.tif"]]
    assert [valid.all() for _, valid, _ in cells] == [True] * 5 + [False]


def test_whole_cells_of_a_run_that_is_damaged_are_read(tmp_path):
    """Blocks of the right half are cut off the file."""
    path = tmp_path / "a.tif"
    values = np.random.default_rng(0).integers(1, 255, (1, 16, 64), np.uint8)
    form = {"driver": "GTiff", "count": 1, "height": 16, "width": 64, "dtype": "uint8"}
    place = {"crs": CRS, "transform": from_origin(500_000, 5_000_000, 1, 1)}
    blocks = {"tiled": True, "blockxsize": 16, "blockysize": 16}
    with rasterio.open(path, "w", **form, **place, **blocks) as target:
        target.write(values)
    path.write_bytes(path.read_bytes()[: -2 * 256])
    raster = rasters.inspect(str(path), Reading())
    unreadable: dict[str, str] = {}
    with GridReader([raster], grid(), CRS, unreadable=unreadable) as reader:
        cells = list(reader.read_run(COL, ROW, 4))
    for number in (0, 1):
        part = values[0, :, number * 16 : number * 16 + 16]
        np.testing.assert_array_equal(cells[number][0][..., 0], part)
    assert [valid.mean() for _, valid, _ in cells] == [1, 1, 0, 0]
    assert list(unreadable) == [str(path)]

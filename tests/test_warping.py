"""Warping onto a grid: one kernel for all of a raster, and overviews where the grid is coarser."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp, Resampling
from rasterio.transform import Affine, from_origin
from scipy.ndimage import map_coordinates

from geomatch.geo import rasters, warping
from geomatch.geo.grid import Grid
from geomatch.geo.placement import bounds_in
from geomatch.geo.views import Reading
from geomatch.geo.windows import GridReader, read_extent

CRS, OTHER_CRS = "EPSG:32631", "EPSG:32632"
LEFT, TOP = 500_032, 5_000_000
SIDE = 256


def noise(bands: int = 3, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(5).integers(1, 200, (bands, side, side)).astype(np.uint8)


def read_all(raster, gsd: float, crs: str = CRS, **how) -> tuple[np.ndarray, np.ndarray, list]:
    """All cells of 32 px side by side: pixels, valid and left, bottom, right, top."""
    grid = Grid(crs, 32, gsd, 32)
    first_col, first_row, last_col, last_row = grid.span(bounds_in(raster, crs))
    rows = []
    with GridReader([raster], grid, crs, **how) as reader:
        for row in range(last_row, first_row - 1, -1):
            cells = list(reader.read_run(first_col, row, last_col - first_col + 1))
            rows.append([np.concatenate([cell[i] for cell in cells], axis=1) for i in (0, 1)])
    pixels, valid = (np.concatenate([row[i] for row in rows]) for i in (0, 1))
    low = grid.bounds(np.array(first_col), np.array(first_row))[:2]
    high = grid.bounds(np.array(last_col), np.array(last_row))[2:]
    return pixels, valid, [*low.tolist(), *high.tolist()]


def test_a_turned_raster_is_interpolated_between_four_pixels_and_no_more(write_raster):
    """GDAL's own choice would take twice as many for its flat blocks, and blur."""
    path = write_raster("a.tif", noise())
    turn = Affine.rotation(20)
    place = Affine.translation(LEFT, TOP) * Affine.scale(1, -1) * turn
    with rasterio.open(path, "r+") as target:
        target.transform = place
    pixels, valid, (left, _, _, top) = read_all(rasters.inspect(str(path)), 1.0)
    row, col = np.nonzero(valid)
    x, y = ~place @ (left + col + 0.5, top - row - 0.5)
    inside = (x > 1) & (x < SIDE - 1) & (y > 1) & (y < SIDE - 1)
    wanted = map_coordinates(noise()[0].astype(float), [y - 0.5, x - 0.5], order=1)
    assert inside.sum() > 60_000
    off = np.abs(pixels[row, col, 0] - wanted)[inside]
    assert off.max() < 2
    assert off.mean() < 0.5


@pytest.mark.parametrize(
    "kind", ["plain", "nodata", "mask", "late mask", "alpha", "bands", "given", "collar"]
)
def test_a_coarser_grid_is_read_from_overviews(write_raster, kind):
    """But not where the file does not say which pixels are invalid, and overviews blend them."""
    values, holes = noise(), np.zeros((SIDE, SIDE), bool)
    holes[:, 64:192] = True
    if kind in ("nodata", "given"):
        values[:, holes] = 250
    path = write_raster(
        "a.tif", values, origin=(LEFT, TOP), nodata=250 if kind == "nodata" else None
    )
    with rasterio.open(path, "r+") as target:
        if kind == "mask":
            target.write_mask(~holes)
    if kind == "alpha":
        form = {"driver": "GTiff", "height": SIDE, "width": SIDE, "count": 4, "dtype": "uint8"}
        place = {"crs": CRS, "transform": from_origin(LEFT, TOP, 1, 1)}
        with rasterio.open(path, "w", photometric="RGB", alpha="YES", **form, **place) as target:
            target.write(np.concatenate([values, np.where(holes, 0, 255)[None].astype(np.uint8)]))
            assert target.colorinterp[3] == ColorInterp.alpha
    with rasterio.open(path, "r+") as target:
        target.build_overviews([2, 4], Resampling.nearest)
    if kind == "late mask":
        with rasterio.open(path, "r+") as target:
            target.write_mask(~holes)
    with rasterio.open(path, OVERVIEW_LEVEL=0) as overview:
        known = np.moveaxis(overview.read([1, 2, 3]), 0, -1)
    bands = {"bands": (3, 1)} if kind == "bands" else {}
    reading = Reading(**bands, nodata=250.0 if kind == "given" else None, collar=kind == "collar")
    raster = rasters.inspect(str(path), reading, path.parent / "collars")
    pixels, valid, bounds = read_all(raster, 2.0)
    assert bounds == [LEFT, TOP - SIDE, LEFT + SIDE, TOP]
    has_holes = kind in ("nodata", "mask", "late mask", "alpha", "given")
    assert valid.mean() == (0.5 if has_holes else 1)
    wanted = known[..., [2, 0]] if kind == "bands" else known
    seen = valid & np.roll(valid, 1, axis=1) & np.roll(valid, -1, axis=1)
    is_overview = bool((pixels == wanted)[seen].all())
    assert is_overview == (kind not in ("late mask", "given", "collar"))
    if not is_overview:  # GDAL's kernel: a triangle two pixels of the grid wide
        weights = np.array([1, 3, 3, 1]) / 8
        around = values[:, 99:103, 219:223].astype(float)
        mean = np.einsum("bij,i,j->b", around, weights, weights)
        np.testing.assert_allclose(pixels[50, 110], mean, atol=0.51)
    extent = read_extent(raster, CRS, (LEFT, TOP - SIDE, LEFT + SIDE, TOP), 2.0)
    np.testing.assert_array_equal(extent[seen], pixels[seen])


@pytest.mark.parametrize(("gsd", "factor"), [(1.85, 1), (1.95, 2), (3.8, 2), (4.0, 4), (9.0, 4)])
def test_the_overview_is_the_coarsest_that_is_no_coarser(write_raster, gsd, factor):
    path = write_raster("a.tif", noise(), origin=(LEFT, TOP))
    with rasterio.open(path, "r+") as target:
        target.build_overviews([2, 4], Resampling.average)
    raster = rasters.inspect(str(path))
    view, at, kernel = warping.open_for_grid(raster, CRS, raster.bounds, gsd)
    with view:
        assert (view.width, at.a) == (SIDE // factor, factor)
    assert kernel == pytest.approx({"XSCALE": factor / gsd, "YSCALE": factor / gsd})


def test_labels_are_read_from_no_overview(write_raster):
    """An average of classes 1 and 3 is not class 2."""
    values = (1 + 2 * (np.indices((SIDE, SIDE)).sum(axis=0) % 2))[None].astype(np.uint8)
    path = write_raster("labels.tif", values, origin=(LEFT, TOP))
    with rasterio.open(path, "r+") as target:
        target.build_overviews([2], Resampling.average)
    raster = rasters.inspect(str(path))
    assert set(np.unique(read_all(raster, 2.0)[0]).tolist()) == {2}
    for gsd in (2.0, 3.0):
        pixels, _, _ = read_all(raster, gsd, nearest=True)
        assert set(np.unique(pixels).tolist()) <= {0, 1, 3}


def test_pixels_whose_size_differs_over_a_raster_have_no_single_kernel(write_raster):
    """Degrees of longitude shrink northward."""
    wide = write_raster("a.tif", noise(1), crs="EPSG:4326", origin=(3.0, 60.0), gsd=0.1)
    small = write_raster("b.tif", noise(1), crs="EPSG:4326", origin=(3.0, 45.0), gsd=1e-4)
    kernels = []
    for path, gsd in ((wide, 10_000.0), (small, 10.0)):
        raster = rasters.inspect(str(path))
        view, _, kernel = warping.open_for_grid(raster, CRS, bounds_in(raster, CRS), gsd)
        view.close()
        kernels.append(kernel)
    assert kernels[0] == {}
    assert kernels[1]["XSCALE"] == pytest.approx(0.788, abs=2e-3)  # metres of 1e-4 degrees, by 10
    assert kernels[1]["YSCALE"] == pytest.approx(1.111, abs=2e-3)


@pytest.mark.skipif(not shutil.which("gdalwarp"), reason="needs gdalwarp (gdal-bin)")
@pytest.mark.parametrize("kind", ["no overviews", "overviews", "jp2", "oscd"])
@pytest.mark.parametrize("crs", [CRS, OTHER_CRS])
def test_a_coarser_grid_is_what_gdalwarp_makes(request, write_raster, tmp_path, crs, kind):
    side, gsd = 600, 2.6
    smooth = np.repeat(np.repeat(noise(3, side // 4), 4, axis=1), 4, axis=2)
    path = write_raster("a.tif", smooth, origin=(LEFT + 0.4, TOP))
    if kind == "overviews":
        with rasterio.open(path, "r+") as target:
            target.build_overviews([2, 4], Resampling.average)
    elif kind == "jp2":
        with rasterio.open(path) as source, rasterio.open(
            tmp_path / "a.jp2", "w", driver="JP2OpenJPEG", width=side, height=side, count=3,
            dtype="uint8", crs=CRS, transform=source.transform, quality=100, reversible=True,
        ) as target:  # fmt: skip
            target.write(smooth)
        path = tmp_path / "a.jp2"
    elif kind == "oscd":
        path = request.getfixturevalue("data") / "oscd" / "beihai" / "beihai_20161209.jp2"
        crs, gsd = {CRS: "EPSG:32649", OTHER_CRS: "EPSG:32648"}[crs], 24.0
    raster = rasters.inspect(str(path))
    how = {} if raster.dtype == "uint8" else {"stretch": lambda v: (v >> 5).astype(np.uint8)}
    pixels, valid, bounds = read_all(raster, gsd, crs, **how)
    view, _, kernel = warping.open_for_grid(raster, crs, bounds_in(raster, crs), gsd)
    view.close()
    options = [part for key, value in kernel.items() for part in ("-wo", f"{key}={value}")]
    command = ["gdalwarp", "-q", "-dstalpha", "-r", "bilinear", "-et", "0.01", "-t_srs", crs]
    command += ["-tr", str(gsd), str(gsd), "-te", *map(str, bounds), *options]
    subprocess.run([*command, str(path), str(tmp_path / "warped.tif")], check=True)
    with rasterio.open(tmp_path / "warped.tif") as source:
        *wanted, alpha = source.read()
    assert np.mean(valid != (alpha > 0)) < 1e-3
    both = valid & (alpha > 0)
    wanted = np.moveaxis(np.asarray(wanted), 0, -1) >> (0 if raster.dtype == "uint8" else 5)
    off = np.abs(pixels[both].astype(int) - wanted[both])
    assert both.sum() > 20_000
    assert off.max() <= 3
    assert off.mean() < 0.2

"""Any raster and vector file has one of two outcomes: tiles that are right, or one clear error."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from pathlib import Path

import geopandas
import numpy as np
import pyogrio
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from command_line import run_command
from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.features import rasterize
from rasterio.transform import from_origin
from rasterio.warp import reproject, transform

from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable

LEFT, TOP = 500_000, 5_000_000
PACKAGES = ("rasterio", "pyogrio", "geopandas", "matplotlib", "sklearn", "scipy", "pyarrow")
RASTERS = {".tif", ".tiff", ".jp2", ".vrt", ".img", ".png", ".jpg", ".jpeg", ".nc", ".gif", ".bmp"}
VECTORS = {".shp", ".gpkg", ".geojson", ".fgb", ".gml", ".kml", ".parquet"}


def shipped(suffixes):
    """Files of some suffixes in the packages that tests depend on, each name once."""
    found = {}
    for package in PACKAGES:
        origin = importlib.util.find_spec(package).origin
        for path in sorted(Path(origin).parent.rglob("*")):
            if path.suffix.lower() in suffixes:
                found.setdefault(path.name, path)
    return found


SHIPPED_RASTERS, SHIPPED_VECTORS = shipped(RASTERS), shipped(VECTORS)


def outcome(project, capfd, path, *given):
    """The tiles of a command that names `path`, or None if it ends in one clear error."""
    base = ["--workers", "1", "-q", "--size", "16", "--set", "split.by=source"]
    result = run_command("tile", "-p", project.root, *base, *given)
    noise = capfd.readouterr()
    assert noise.err == noise.out == "", "a library printed"
    if result.exit_code == 0:
        return TileTable.load(project.catalogue)
    lines = result.stderr.splitlines()
    assert 1 <= len(lines) <= 2, result.stderr
    assert lines[0].startswith("error: "), result.stderr
    assert "unforeseen" not in lines[0], result.stderr
    assert len(lines) == 2, "a hint names the remedy"
    assert path.name in lines[0] or "year 2010" in lines[0] or "no tile" in lines[0]
    assert not project.catalogue.exists()
    return None


def check_images(project, table, path):
    """Tiles are what rasterio warps the whole file to, but for rounding at edges.

    What rasterio alone does not find past 180 degrees is left to `test_tile`.
    """
    assert len(table)
    with warnings.catch_warnings(), rasterio.open(path) as source:
        warnings.simplefilter("ignore")
        bands = project.tile_manifest().channels.image
        image = source.read(list(range(1, bands + 1)))
        image = np.concatenate([image, np.full_like(image[:1], 100)])  # 0 where nothing is found
        at, crs = source.transform, source.crs
    size, gsd = table.grid.size, table.grid.gsd
    compared = 0
    for i in range(0, len(table), max(1, len(table) // 4)):
        wanted = np.zeros((bands + 1, size, size), image.dtype)
        left, _, _, top = table.bounds()[i]
        reproject(
            image,
            wanted,
            src_transform=at,
            src_crs=crs,
            dst_transform=from_origin(left, top, gsd, gsd),
            dst_crs=f"EPSG:{table.epsg[i]}",
            resampling=Resampling.bilinear,
        )
        got = TileStore.open(project.pixels).read(table.store_row[[i]])[0].astype(float)
        wanted = np.clip(np.moveaxis(wanted, 0, -1).astype(float), 0, 255)
        found = wanted[..., -1] == 100
        away = np.abs(got - wanted[..., :-1])[found]
        assert not away.size or away.mean() < 2, f"tile {table.ids()[i]} of {path}"
        compared += away.size
    assert compared


# What packages ship


@pytest.mark.parametrize("name", SHIPPED_RASTERS)
def test_a_shipped_raster(project, capfd, name):
    path = SHIPPED_RASTERS[name]
    table = outcome(project, capfd, path, f"2010={path}", "--stretch", "0,255")
    if table is not None:
        check_images(project, table, path)


@pytest.fixture
def france(write_raster):
    """An image of 4 x 4 tiles within a country of Natural Earth."""
    return write_raster("france.tif", np.full((1, 64, 64), 90, np.uint8), origin=(LEFT, TOP))


def check_labels(project, table, path):
    """Labels are known exactly where a geometry of the file is."""
    shapes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer, kind in pyogrio.list_layers(path):
            if kind is not None:
                frame = geopandas.read_file(path, layer=layer).to_crs("EPSG:32631")
                shapes += [shape for shape in frame.geometry if shape is not None]
    shapes = [shape for shape in shapes if not shape.is_empty]
    known = np.zeros((64, 64), np.uint8)
    if shapes:
        known = rasterize(shapes, (64, 64), transform=from_origin(LEFT, TOP, 1, 1))
    read = TileStore.open(project.pixels).read(table.store_row)[..., 1] > 0
    for labels, (left, _, _, top) in zip(read, table.bounds(), strict=True):
        row, col = int(TOP - top), int(left - LEFT)
        np.testing.assert_array_equal(labels, known[row : row + 16, col : col + 16] > 0)


@pytest.mark.parametrize("name", SHIPPED_VECTORS)
def test_a_shipped_vector_file(project, capfd, france, name):
    path = SHIPPED_VECTORS[name]
    table = outcome(project, capfd, path, f"2010={france}", f"2010:labels={path}", "--gsd", "1")
    if table is not None:
        check_labels(project, table, path)


def test_the_sweep_sees_files_that_work_and_others():
    """Else the tests above prove nothing."""
    assert "naturalearth_lowres.shp" in SHIPPED_VECTORS
    assert len(SHIPPED_RASTERS) > 20


# Formats


def smooth(bands=3, side=64, dtype="uint8"):
    """(bands, side, side) that interpolation hardly changes, and that no mirroring keeps."""
    y, x = np.mgrid[:side, :side] / side
    planes = [60 + 100 * x + 50 * y**2 + 5 * band for band in range(bands)]
    return np.stack(planes).astype(dtype)


def write(path, values, crs="EPSG:32631", at=None, **options):
    form = {"count": len(values), "height": values.shape[1], "width": values.shape[2]}
    at = at or from_origin(LEFT, TOP, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            path,
            "w",
            driver="GTiff",
            dtype=values.dtype,
            crs=crs,
            transform=at,
            **form,
            **options,
        ) as target:
            target.write(values)
    return path


def drivers():
    with rasterio.Env() as env:
        return sorted(env.drivers())


KEPT = {"GTiff", "COG", "ENVI", "HFA", "VRT", "PNG", "JP2OpenJPEG"}
"""Formats of which tiles are certain."""


@pytest.mark.parametrize("driver", drivers())
def test_a_raster_of_any_format(project, tmp_path, capfd, driver):
    """Copied from a GeoTIFF by every driver that can."""
    source = write(tmp_path / "source.tif", smooth())
    path = tmp_path / f"copy.{driver.lower()}"
    options = {"REVERSIBLE": "YES", "QUALITY": "100"} if driver == "JP2OpenJPEG" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            rasterio.shutil.copy(source, path, driver=driver, **options)
        except Exception:
            assert driver not in KEPT
    capfd.readouterr()
    if not path.exists():
        return  # most drivers do not write such a file
    table = outcome(project, capfd, path, f"2010={path}", "--stretch", "0,255")
    assert table is not None or driver not in KEPT
    if table is not None:
        check_images(project, table, path)


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"]
)
def test_a_raster_of_any_dtype_and_bands(project, tmp_path, capfd, dtype, bands):
    values = smooth(bands)
    values = (values // 2 if dtype == "int8" else values).astype(dtype)
    path = write(tmp_path / "a.tif", values)
    table = outcome(project, capfd, path, f"2010={path}", "--stretch", "0,255")
    if table is not None:
        check_images(project, table, path)


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_a_complex_raster(project, tmp_path, capfd, dtype):
    path = write(tmp_path / "a.tif", smooth(dtype=dtype))
    outcome(project, capfd, path, f"2010={path}", "--stretch", "0,255")


@pytest.mark.parametrize("nodata", [0, 70, 255, 1e9, -1, np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_raster_of_any_nodata(project, tmp_path, capfd, dtype, nodata):
    values = smooth(dtype=dtype)
    try:
        path = write(tmp_path / "a.tif", values, nodata=nodata)
    except ValueError:
        pytest.skip("not written")
    given = (f"2010={path}", "--stretch", "0,255", "--set", "grid.min_valid=0.2")
    table = outcome(project, capfd, path, *given)
    assert table is not None or np.isinf(nodata) or np.isnan(nodata)


# Places


@pytest.mark.parametrize(
    "crs",
    [
        *("EPSG:32631", "EPSG:2154", "EPSG:3035", "EPSG:3413", "EPSG:3031", "EPSG:3995"),
        *("EPSG:6933", "EPSG:3857", "EPSG:4326", "EPSG:4269", "EPSG:2263", "EPSG:4978"),
        *("EPSG:5773", "EPSG:32631+5773", "IAU_2015:30100", "ESRI:54030", "ESRI:102001"),
        *('LOCAL_CS["site",UNIT["metre",1]]', "+proj=geos +h=35785831 +lon_0=0 +sweep=y"),
        *("+proj=ob_tran +o_proj=longlat +o_lon_p=0 +o_lat_p=39 +lon_0=18", "+proj=gnom +lat_0=90"),
    ],
)
@pytest.mark.parametrize("grid", ["auto", "utm", "EPSG:32631"])
@pytest.mark.parametrize("place", [(3.0, 45.0), (180.0, 70.0), (0.0, -89.9999)])
def test_a_raster_of_any_crs_and_place(project, tmp_path, capfd, crs, grid, place):
    known = rasterio.crs.CRS.from_user_input(crs)
    (x,), (y,) = [3.0], [45.0]
    with contextlib.suppress(Exception):
        (x,), (y,) = transform("EPSG:4326", known, [place[0]], [place[1]])
    if not np.isfinite([x, y]).all():
        pytest.skip("no such place")
    step = 1e-5 if known.is_geographic else 1.0
    at = from_origin(x - 32 * step, y + 32 * step, step, step)
    path = write(tmp_path / "a.tif", smooth(), crs, at)
    capfd.readouterr()
    table = outcome(project, capfd, path, f"2010={path}", "--crs", grid)
    plain = crs in ("EPSG:32631", "EPSG:2154", "EPSG:3035", "EPSG:3857", "EPSG:4326", "EPSG:6933")
    assert table is not None or not plain or place != (3.0, 45.0)
    if table is not None:
        check_images(project, table, path)


@pytest.mark.parametrize(
    "at",
    [
        *(Affine(1, 0, LEFT, 0, -1, TOP), Affine(1, 0, LEFT, 0, 1, TOP)),
        *(Affine(-1, 0, LEFT, 0, -1, TOP), Affine(-1, 0, LEFT, 0, 1, TOP)),
        *(Affine(0, 1, LEFT, 1, 0, TOP), Affine(0.8, 0.6, LEFT, 0.6, -0.8, TOP)),
        *(Affine(1, 0.3, LEFT, 0, -1, TOP), Affine(1, 0, LEFT, 0, -3, TOP)),
        *(Affine(1, 0, 0, 0, 1, 0), Affine(1, 0, 0, 0, -1, 0), Affine(0, 0, LEFT, 0, 0, TOP)),
        *(Affine(1, 1, LEFT, 1, 1, TOP), Affine(1e-7, 0, LEFT, 0, -1e-7, TOP)),
        *(Affine(1e9, 0, LEFT, 0, -1e9, TOP), Affine(1e30, 0, LEFT, 0, -1e30, TOP)),
        *(Affine(1, 0, 1e30, 0, -1, TOP), Affine(1, 0, 1e7, 0, -1, 1e7)),
        *(Affine(np.nan, 0, LEFT, 0, -1, TOP), Affine(1, 0, np.inf, 0, -1, TOP)),
    ],
    ids=lambda at: ",".join(f"{value:g}" for value in at[:6]),
)
def test_a_raster_of_any_geotransform(project, tmp_path, capfd, at):
    path = write(tmp_path / "a.tif", smooth(), at=at)
    table = outcome(project, capfd, path, f"2010={path}")
    if table is not None:
        check_images(project, table, path)

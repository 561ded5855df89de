"""Bad input to `tile`: a short error that names the file or key and the remedy; nothing is left."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import warnings

import geopandas
import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
from command_line import run_command
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning
from rasterio.rpc import RPC
from rasterio.transform import from_origin

from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable

LEFT, TOP = 500_000, 5_000_000


@pytest.fixture
def good(write_raster):
    return write_raster("good.tif", plain(), origin=(LEFT, TOP))


def plain(bands=3, dtype="uint8", side=64):
    return np.full((bands, side, side), 90, dtype)


def arguments(project, *given):
    """Tiles of 32 px at 1 m, all in train, unless `given` says otherwise."""
    base = ["--workers", "1", "-q", "--set", "split.by=source"]
    if "--size" not in given:
        base += ["--size", "32"]
    return ["tile", "-p", str(project.root), *base, *map(str, given)]


def check_error(stderr, words):
    lines = stderr.splitlines()
    assert 1 <= len(lines) <= 2, stderr
    assert lines[0].startswith("error: ")
    assert "unforeseen" not in lines[0], stderr
    assert len(lines[0]) < 600
    assert all(line.startswith("hint: ") for line in lines[1:])
    for word in words:
        assert word in stderr


def refused(project, *given, names, code=1):
    """`tile` fails with `code`, in an error and a hint that hold `names`, and leaves no tiles."""
    result = run_command(*arguments(project, *given))
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    check_error(result.stderr, names)
    assert not project.catalogue.exists()


def shell(project, *given):
    """`tile` in a process of its own, where libraries' own messages would show."""
    command = [sys.executable, "-m", "geomatch", *arguments(project, *given)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def accepted(project, *given):
    result = run_command(*arguments(project, *given))
    assert result.exit_code == 0, result.stderr
    return TileTable.load(project.catalogue)


# Rasters


def test_no_crs(write_raster, project, good):
    bad = write_raster("bad.tif", plain(), crs=None)
    refused(project, f"2010={good}", f"2020={bad}", names=("bad.tif", "CRS", "-a_srs"))


def test_an_image_without_georeference(project, tmp_path):
    form = {"driver": "PNG", "count": 3, "height": 64, "width": 64, "dtype": "uint8"}
    with (
        pytest.warns(NotGeoreferencedWarning),
        rasterio.open(tmp_path / "photo.png", "w", **form) as target,
    ):
        target.write(plain())
    done = shell(project, f"2010={tmp_path / 'photo.png'}")
    assert done.returncode == 1
    check_error(done.stderr, ("photo.png", "CRS"))


def unplaced(path, crs="EPSG:32631", **tags):
    """A raster without a geotransform; `tags` are set on it."""
    form = {"driver": "GTiff", "count": 3, "height": 64, "width": 64, "dtype": "uint8"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", crs=crs, **form) as target:
            for name, value in tags.items():
                setattr(target, name, value)
            target.write(plain())
    return path


CORNERS = [
    GroundControlPoint(row, col, LEFT + col, TOP - row) for row in (0, 64) for col in (0, 64)
]


def test_a_crs_without_a_geotransform(project, good, tmp_path):
    """It is not taken as lying at 0, 0 with pixels of one metre."""
    bad = unplaced(tmp_path / "bad.tif")
    refused(project, f"2010={good}", f"2020={bad}", names=("bad.tif", "geotransform", "-a_ullr"))


@pytest.mark.parametrize("crs", [None, "EPSG:32631"])
def test_ground_control_points_alone(project, good, tmp_path, crs):
    bad = unplaced(tmp_path / "bad.tif", crs, gcps=(CORNERS, CRS.from_epsg(32631)))
    names = ("bad.tif", "4 ground control points", "gdalwarp", "EPSG:32631")
    refused(project, f"2010={good}", f"2020={bad}", names=names)


def test_rpcs_alone(project, good, tmp_path):
    line = [0.0, 0.0, -1.0, *[0.0] * 17]
    sample = [0.0, 1.0, *[0.0] * 18]
    one = [1.0, *[0.0] * 19]
    rpcs = RPC(0.0, 100.0, 45.0, 0.1, one, line, 32.0, 32.0, 3.0, 0.1, one, sample, 32.0, 32.0)
    bad = unplaced(tmp_path / "bad.tif", None, rpcs=rpcs)
    refused(project, f"2010={good}", f"2020={bad}", names=("bad.tif", "RPCs", "gdalwarp", "-rpc"))


LOCAL = 'LOCAL_CS["building site",UNIT["metre",1]]'


@pytest.mark.parametrize("crs", [LOCAL, "IAU_2015:30100"])
def test_a_crs_that_is_nowhere_on_the_earth(write_raster, project, good, crs):
    """A local (engineering) one, or the Moon's."""
    bad = write_raster("bad.tif", plain(), crs=crs, origin=(30, 40), gsd=0.1)
    refused(project, f"2010={good}", f"2020={bad}", names=("bad.tif", "Earth", "-a_srs"))
    done = shell(project, f"2010={good}", f"2010:labels={bad}")
    check_error(done.stderr, ("bad.tif", "Earth", "-a_srs"))


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:32631"])
def test_coordinates_of_another_crs(write_raster, project, good, crs):
    """Metres called degrees; and what no zone reaches, which PROJ would take for ever to wrap."""
    origin = (LEFT, TOP) if crs == "EPSG:4326" else (1e30, 1e30)
    bad = write_raster("bad.tif", plain(), crs=crs, origin=origin, gsd=origin[0] / 1e6)
    refused(project, f"2010={good}", f"2020={bad}", names=("bad.tif", "outside", "-a_srs"))


@pytest.mark.parametrize("name", ["PROJ_LIB", "PROJ_DATA"])
def test_a_proj_database_of_another_program(project, good, tmp_path, monkeypatch, name):
    (tmp_path / "proj.db").write_bytes(b"")
    monkeypatch.setenv(name, str(tmp_path))
    done = shell(project, f"2010={good}")
    assert done.returncode == 1
    check_error(done.stderr, (f"{name}={tmp_path}", f"unset {name}"))


def test_no_common_ground(write_raster, project, good):
    bad = write_raster("bad.tif", plain(), origin=(LEFT + 5000, TOP))
    refused(project, f"2010={good}", f"2020={bad}", names=("2010", "2020", "more than one year"))


def test_other_bands_within_a_year(write_raster, project, tmp_path):
    write_raster("y/a.tif", plain(), origin=(LEFT, TOP))
    write_raster("y/b.tif", plain(1), origin=(LEFT + 64, TOP))
    refused(project, f"2010={tmp_path / 'y'}", names=("2010", "a.tif", "b.tif", "gdal_translate"))


def test_other_dtype_within_a_year(write_raster, project, tmp_path):
    write_raster("y/a.tif", plain(), origin=(LEFT, TOP))
    write_raster("y/b.tif", plain(dtype="uint16"), origin=(LEFT + 64, TOP))
    refused(
        project,
        f"2010={tmp_path / 'y'}",
        "--stretch",
        "0,100",
        names=("a.tif", "b.tif", "uint16", "gdal_translate"),
    )


def test_other_bands_between_years(write_raster, project, good):
    bad = write_raster("bad.tif", plain(1), origin=(LEFT, TOP))
    refused(project, f"2010={good}", f"2020={bad}", names=("bad.tif", "2020", "1 band", "3"))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_no_stretch(write_raster, project, dtype):
    bad = write_raster("bad.tif", plain(dtype=dtype), origin=(LEFT, TOP))
    refused(project, f"2010={bad}", code=2, names=("bad.tif", dtype, "--stretch"))


@pytest.mark.parametrize(
    "text", ["5", "a,b", "9,3", "5,5", "1,2,3", "2%,98", "2,98%", "-5%,98%", "2%,200%", "%,%", ""]
)
def test_bad_stretch(write_raster, project, text):
    values = np.arange(3 * 64 * 64, dtype=np.uint16).reshape(3, 64, 64)
    bad = write_raster("a.tif", values, origin=(LEFT, TOP))
    refused(project, f"2010={bad}", "--stretch", text, code=2, names=("--stretch", "MIN,MAX"))


@pytest.mark.parametrize("path", ["none/*.tif", "none", "none.tif", "empty"])
def test_nothing_there(project, good, tmp_path, path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing")
    refused(project, f"2010={good}", f"2020={tmp_path / path}", names=("2020", path, "glob"))


def test_a_folder_of_folders(write_raster, project, tmp_path):
    """The hint names the glob that takes their files, and does take them."""
    path = write_raster("y/sheets/a.TIF", plain(), origin=(LEFT, TOP))
    glob = f"{tmp_path / 'y'}/**/*.TIF"
    refused(project, f"2010={path.parents[1]}", names=("2010", "folders", f"'{glob}'"))
    assert len(accepted(project, f"2010={glob}")) == 4


def truncated(path, dtype="uint8"):
    """A compressed GeoTIFF of which the header and the first half are left; returns the whole."""
    values = np.random.default_rng(0).integers(1, 255, (3, 256, 256)).astype(dtype)
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=3,
        height=256,
        width=256,
        dtype=dtype,
        crs="EPSG:32631",
        transform=from_origin(LEFT, TOP, 1, 1),
        compress="deflate",
        tiled=True,
        blockxsize=64,
        blockysize=64,
    ) as target:
        target.write(values)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with rasterio.open(path) as source:
        assert source.crs is not None, "its header is sound"
    return whole


def test_truncated_tiff(project, tmp_path):
    """Nothing is left of it, and the same command goes through once the file is replaced."""
    path = tmp_path / "cut short.tif"
    whole = truncated(path)
    done = shell(project, f"2010={path}")
    assert done.returncode == 1
    check_error(done.stderr, ("cut short.tif", "damaged", "Replace"))
    assert not project.catalogue.exists()
    path.write_bytes(whole)
    assert len(accepted(project, f"2010={path}")) == 64
    with rasterio.open(path) as source:
        assert source.read(1).any()


def test_truncated_tiff_under_a_stretch_in_percent(project, tmp_path):
    path = tmp_path / "short.tif"
    truncated(path, "uint16")
    done = shell(project, f"2010={path}", "--stretch", "2%,98%")
    assert done.returncode == 1
    check_error(done.stderr, ("short.tif",))
    assert not project.catalogue.exists()


@pytest.mark.parametrize("content", [b"not a raster", b""])
def test_a_file_that_is_not_a_raster(project, tmp_path, content):
    path = tmp_path / "text.tif"
    path.write_bytes(content)
    done = shell(project, f"2010={path}")
    assert done.returncode == 1
    check_error(done.stderr, ("text.tif", "gdalinfo"))
    assert not project.catalogue.exists()


@pytest.fixture
def mixed(write_raster, tmp_path):
    """A folder of sheets: cut short, not a raster, without CRS; only "d.tif" is good."""
    folder = tmp_path / "y"
    write_raster("y/d.tif", plain(), origin=(LEFT + 256, TOP))
    whole = truncated(folder / "a.tif")
    (folder / "a.tif").write_bytes(whole[: len(whole) * 3 // 4])
    (folder / "b.tif").write_bytes(b"not a raster")
    write_raster("y/c.tif", plain(), crs=None)
    return folder


def test_bad_files_are_left_out_on_request_and_listed(project, mixed):
    refused(project, f"2010={mixed}", names=("b.tif", "opened"))
    result = run_command(*arguments(project, f"2010={mixed}", "--skip-bad"))
    assert result.exit_code == 0, result.stderr
    table = TileTable.load(project.catalogue)
    assert set(table.sources) == {"a.tif", "d.tif"}, "what could be read of a.tif is kept"
    assert np.sum(table.col >= (LEFT + 256) // 32) == 4
    reasons = {"a.tif": "damaged", "b.tif": "opened", "c.tif": "CRS"}
    unreadable = project.tile_manifest().unreadable
    assert set(unreadable) == {str(mixed / name) for name in reasons}
    assert "left out (3)" in result.stderr
    for name, reason in reasons.items():
        assert reason in unreadable[str(mixed / name)]
        assert f"  {mixed / name} {unreadable[str(mixed / name)]}" in result.stderr


def test_left_out_files_are_listed_again_and_taken_once_they_are_whole(project, mixed):
    whole = truncated(mixed / "a.tif")
    command = arguments(project, f"2010={mixed}", "--skip-bad")
    run_command(*command)
    made = project.tile_manifest()
    again = run_command("tile", "-p", project.root, "--workers", "1")
    assert "up to date" in again.stderr
    assert "left out (3)" in again.stderr
    for name in ("b.tif", "c.tif"):
        (mixed / name).unlink()
    without = run_command(*arguments(project, f"2010={mixed}"))
    assert without.exit_code == 1
    assert "a.tif is damaged" in without.stderr
    assert project.tile_manifest() == made
    (mixed / "a.tif").write_bytes(whole)
    result = run_command(*command)
    assert result.exit_code == 0, result.stderr
    assert "left out" not in result.stderr
    assert len(TileTable.load(project.catalogue)) == 64 + 4


def test_a_year_of_bad_files_alone_is_an_error(project, good, mixed):
    (mixed / "a.tif").unlink()
    (mixed / "d.tif").unlink()
    refused(project, f"2010={good}", f"2020={mixed}", "--skip-bad", names=("b.tif", "opened"))


def test_a_damaged_sheet_is_left_out_of_a_stretch(write_raster, project, tmp_path):
    values = plain(dtype="uint16")
    values[0, :32] = 190
    write_raster("y/b.tif", values, origin=(LEFT + 256, TOP))
    truncated(tmp_path / "y" / "a.tif", "uint16")
    table = accepted(project, f"2010={tmp_path / 'y'}", "--stretch", "0%,100%", "--skip-bad")
    assert len(table) == 4
    manifest = project.tile_manifest()
    assert manifest.years["2010"].stretch["high"] == [190, 90, 90]
    assert list(manifest.unreadable) == [str(tmp_path / "y" / "a.tif")]


def test_damaged_labels_and_masks_are_unknown_on_request(write_raster, project, good, tmp_path):
    for name in ("labels.tif", "changed.tif"):
        path = write_raster(name, plain(1), origin=(LEFT, TOP))
        path.write_bytes(path.read_bytes()[:1000])
    given = (f"2010={good}", f"2010:labels={tmp_path}/labels.tif")
    given += (f"2010:changed={tmp_path}/changed.tif",)
    refused(project, *given, names=("tif is damaged",))
    table = accepted(project, *given, "--skip-bad")
    assert len(table) == 4
    assert table.changed is None
    assert (TileStore.open(project.pixels).read(table.store_row)[..., 3] == 0).all()
    assert len(project.tile_manifest().unreadable) == 2


def test_colour_tables_beside_grey_sheets(write_raster, project, tmp_path):
    """They are read as colours, which the other sheets do not have."""
    for i, each in enumerate(("a.tif", "b.tif", "c.tif")):
        path = write_raster(f"y/{each}", plain(1), origin=(LEFT + 64 * i, TOP))
    with rasterio.open(path, "r+") as target:
        target.write_colormap(1, {90: (1, 2, 3, 255)})
    said = ("2010: 1 band of uint8 in a.tif, b.tif, but 3 bands of uint8 in c.tif", "--bands")
    refused(project, f"2010={tmp_path / 'y'}", names=said)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_near_infrared_that_is_tagged_alpha(write_raster, project, dtype):
    """Half of it is black, as water is; a mask of ragged edges passes."""
    values = np.random.default_rng(0).integers(1, 255, (4, 64, 64)).astype(dtype)
    values[3, :, :32] = 0
    path = write_raster("a.tif", values, origin=(LEFT, TOP))
    with rasterio.open(path, "r+") as target:
        target.colorinterp = [ColorInterp[name] for name in ("red", "green", "blue", "alpha")]
        said = ("a.tif", "band 4 is alpha", "--bands 1,2,3,4, or --bands 1,2,3 without")
    given = (f"2010={path}", "--stretch", "0,255")
    refused(project, *given, names=said)
    with rasterio.open(path, "r+") as target:
        target.write(np.where(values[3] > 60, values[3] // 8 + 220, values[3] // 8), 4)
    accepted(project, *given, "--set", "grid.min_valid=0")


def test_a_damaged_alpha_band(write_raster, project):
    """It is read before anything else, to tell a mask from near infrared."""
    values = np.random.default_rng(0).integers(0, 255, (4, 256, 256)).astype(np.uint8)
    path = write_raster("a.tif", values, origin=(LEFT, TOP))
    with rasterio.open(path, "r+") as target:
        target.colorinterp = [ColorInterp[name] for name in ("red", "green", "blue", "alpha")]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(project, f"2010={path}", names=("a.tif", "is damaged"))


def test_bands_that_are_not_there(write_raster, project):
    path = write_raster("a.tif", plain(), origin=(LEFT, TOP))
    refused(project, f"2010={path}", "--bands", "1,4", names=("a.tif", "no band 4", "has 3"))
    for text in ("0", "1;2", "1,", "red", "-1"):
        refused(project, f"2010={path}", "--bands", text, code=2, names=("--bands",))


def test_nodata_that_no_image_can_contain(write_raster, project):
    path = write_raster("a.tif", plain(), origin=(LEFT, TOP))
    for value in ("-9999", "7.5", "nan"):
        given = (f"2010={path}", "--nodata", value)
        refused(project, *given, code=2, names=("--nodata", value, "uint8"))


def test_complex_numbers(write_raster, project):
    path = write_raster("a.tif", plain(1, "complex64"), origin=(LEFT, TOP))
    refused(project, f"2010={path}", "--stretch", "0,1", names=("a.tif", "complex"))


def test_a_band_without_a_valid_pixel_under_a_stretch_in_percent(write_raster, project):
    values = plain(dtype="uint16")
    values[1] = 0
    path = write_raster("a.tif", values, origin=(LEFT, TOP), nodata=0)
    given = (f"2010={path}", "--stretch", "2%,98%")
    refused(project, *given, names=("a.tif", "band 2", "no valid pixel", "MIN,MAX"))


def test_no_tile_is_valid_enough(write_raster, project):
    values = plain()
    values[:, ::2] = 0
    path = write_raster("a.tif", values, origin=(LEFT, TOP), nodata=0)
    refused(project, f"2010={path}", names=("50%", "grid.min_valid", "nodata"))


def test_a_raster_smaller_than_a_tile(write_raster, project):
    path = write_raster("a.tif", plain(side=20), origin=(LEFT, TOP))
    refused(project, f"2010={path}", names=("valid",))


def test_all_tiles_between_splits(write_raster, project, good):
    """Each place is in a file of the test split and in one of training."""
    other = write_raster("other.tif", plain(), origin=(LEFT, TOP))
    given = (f"2010={good}", f"2020={other}", "--test", "other.tif")
    refused(project, *given, names=("no tile", "between splits"))


# Labels


@pytest.mark.parametrize(("bands", "dtype"), [(3, "uint16"), (1, "float32"), (2, "uint8")])
def test_a_label_raster_of_another_form(write_raster, project, good, bands, dtype):
    bad = write_raster("labels.tif", plain(bands, dtype), origin=(LEFT, TOP))
    refused(project, f"2010={good}", f"2010:labels={bad}", names=("labels.tif", dtype, "Byte"))


def test_label_rasters_of_two_forms(write_raster, project, good):
    grey = write_raster("grey.tif", plain(1), origin=(LEFT, TOP))
    colour = write_raster("colour.tif", plain(3), origin=(LEFT, TOP))
    refused(
        project,
        *(f"2010={good}", f"2020={good}", f"2010:labels={grey}", f"2020:labels={colour}"),
        names=("label", "three"),
    )


def test_labels_that_are_not_there(project, good):
    refused(
        project,
        *(f"2010={good}", f"2010:labels={good.parent / 'none.gpkg'}"),
        names=("labels of 2010", "none.gpkg", "vector file"),
    )


def without_crs(path):
    box = shapely.to_wkb(np.array([shapely.box(LEFT, TOP - 20, LEFT + 20, TOP)]))
    with pytest.warns(UserWarning, match="'crs' was not provided"):
        pyogrio.raw.write(path, box, [], [], geometry_type="Polygon", crs=None, driver="GPKG")
    return path


def test_vector_labels_without_crs(project, good, tmp_path):
    path = without_crs(tmp_path / "bad.gpkg")
    done = shell(project, f"2010={good}", f"2010:labels={path}")
    assert done.returncode == 1
    check_error(done.stderr, ("bad.gpkg", "CRS", "-a_srs"))
    assert not project.catalogue.exists()


def test_vector_labels_that_are_nowhere_on_the_earth(project, good, tmp_path):
    """As software without a CRS at hand writes a GeoPackage: srs_id -1."""
    path = tmp_path / "bad.gpkg"
    shape = geopandas.GeoDataFrame(
        geometry=[shapely.box(LEFT, TOP - 20, LEFT + 20, TOP)], crs=32631
    )
    shape.to_file(path)
    with contextlib.closing(sqlite3.connect(path)) as table:
        for name in ("gpkg_geometry_columns", "gpkg_contents"):
            table.execute(f"update {name} set srs_id = -1")
        table.commit()
    done = shell(project, f"2010={good}", f"2010:labels={path}")
    assert done.returncode == 1
    check_error(done.stderr, ("bad.gpkg", "Earth", "-a_srs"))


def test_a_file_that_is_not_a_vector_file(project, good, tmp_path):
    path = tmp_path / "bad.geojson"
    path.write_text("not a map")
    done = shell(project, f"2010={good}", f"2010:labels={path}")
    assert done.returncode == 1
    check_error(done.stderr, ("bad.geojson", "ogrinfo"))


def test_a_vector_file_without_a_layer_of_shapes(project, good, tmp_path):
    path = tmp_path / "table.gpkg"
    pyogrio.write_dataframe(geopandas.pd.DataFrame({"a": [1]}), path)
    refused(project, f"2010={good}", f"2010:labels={path}", names=("table.gpkg",))


def test_several_vector_files(project, good, tmp_path):
    shape = geopandas.GeoDataFrame(geometry=[shapely.Point(3, 45)], crs=4326)
    for name in "ab":
        shape.to_file(tmp_path / f"{name}.gpkg")
    refused(
        project,
        *(f"2010={good}", f"2010:labels={tmp_path}/*.gpkg"),
        names=("labels of 2010", "2 vector files", "ogr2ogr"),
    )


# Splits


def test_a_split_file_without_crs(project, good, tmp_path):
    path = without_crs(tmp_path / "areas.gpkg")
    refused(
        project,
        *(f"2010={good}", "--set", "split.by=file", "--test", path),
        names=("areas.gpkg", "CRS"),
    )


def test_a_missing_split_file(project, good, tmp_path):
    refused(
        project,
        *(f"2010={good}", "--set", "split.by=file", "--test", tmp_path / "none.gpkg"),
        names=("split", "none.gpkg"),
    )


def test_an_unknown_rule(project, good):
    refused(
        project,
        *(f"2010={good}", "--set", "split.by=colour"),
        code=2,
        names=("split.by", "colour", "blocks"),
    )


# Command line and configuration


@pytest.mark.parametrize(
    "text",
    ["2010", "=PATH", "2010=", "2010:label=PATH", "20 10=PATH", "20/10=PATH", "20@10=PATH", ":=P"],
)
def test_a_source_of_another_form(project, good, text):
    refused(project, text.replace("PATH", str(good)), code=2, names=(text.split("=")[0],))


def test_labels_without_images(project, good):
    refused(project, f"2010:labels={good}", code=2, names=("2010", "no images", "2010=PATH"))


def test_no_source_at_all(project):
    refused(project, code=2, names=("no imagery", "geomatch tile", "[[source]]"))


@pytest.mark.parametrize("key", ["year", "images"])
def test_a_source_of_the_file_that_lacks_a_key(project, good, key):
    values = {"year": "2010", "images": str(good)}
    del values[key]
    lines = [f'{name} = "{value}"' for name, value in values.items()]
    project.config.write_text("[[source]]\n" + "\n".join(lines) + "\n")
    refused(project, code=2, names=("source", key))


@pytest.mark.parametrize("year", ["20@10", "20/10", "20 10", ".."])
def test_a_year_of_the_file_that_no_tile_id_could_hold(project, good, year):
    project.config.write_text(f'[[source]]\nyear = "{year}"\nimages = "{good}"\n')
    refused(project, code=2, names=(year,))


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (("--size", "4"), ("size", "8")),
        (("--size", "0"), ("size",)),
        (("--size", "-32"), ("size",)),
        (("--gsd", "0"), ("gsd",)),
        (("--gsd", "-1"), ("gsd",)),
        (("--set", "grid.gsd=nan"), ("gsd",)),
        (("--set", "grid.gsd=inf"), ("gsd",)),
        (("--stride", "0"), ("stride",)),
        (("--stride", "-1"), ("stride",)),
        (("--stride", "33"), ("stride",)),
        (("--crs", "EPSG:4326"), ("EPSG:4326", "metres")),
        (("--crs", "EPSG:2263"), ("EPSG:2263", "metres")),
        (("--crs", "EPSG:999999"), ("999999", "EPSG code")),
        (("--crs", "moon"), ("moon", "EPSG code")),
        (("--set", "split.by=blocks", "--set", "split.block=5"), ("split.block",)),
        (("--set", "split.by=blocks", "--set", "split.block=0"), ("split.block",)),
        (("--set", "split.buffer=-5"), ("split.buffer",)),
    ],
)
def test_a_grid_that_makes_no_sense(project, good, given, names):
    refused(project, f"2010={good}", *given, code=2, names=names)


# What was there before


def test_a_refused_command_keeps_the_tiles_there_were(write_raster, project, good):
    accepted(project, f"2010={good}")
    before = {p: p.stat().st_mtime_ns for p in project.tiles.rglob("*")}
    bad = write_raster("bad.tif", plain(), crs=None)
    result = run_command(*arguments(project, f"2010={bad}"))
    assert result.exit_code == 1
    short = bad.with_name("short.tif")
    truncated(short)
    result = run_command(*arguments(project, f"2010={short}"))
    assert result.exit_code == 1
    assert {p: p.stat().st_mtime_ns for p in project.tiles.rglob("*")} == before
    assert len(TileTable.load(project.catalogue)) == 4


def test_a_second_writer(project, good):
    with project.lock("tiles"):
        done = shell(project, f"2010={good}")
        assert done.returncode == 1
        check_error(done.stderr, ("tiles", "another geomatch", "Wait"))
        assert not project.catalogue.exists()
    assert len(accepted(project, f"2010={good}")) == 4


@pytest.mark.parametrize("damage", ["cut short", "gone"])
@pytest.mark.parametrize("name", ["manifest.json", "tiles.parquet"])
def test_damaged_tiles_are_reported_and_the_remedy_works(project, good, name, damage):
    """The hint's command, with the sources given again, makes sound tiles."""
    accepted(project, f"2010={good}")
    path = project.tiles / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:40])
    result = run_command(*arguments(project, f"2010={good}"))
    if result.exit_code:
        check_error(result.stderr, (name, "geomatch tile"))
        force = ["--force"] if "--force" in result.stderr else []
        result = run_command(*arguments(project, f"2010={good}", *force))
    assert result.exit_code == 0, result.stderr
    assert len(TileTable.load(project.catalogue)) == project.tile_manifest().tiles == 4

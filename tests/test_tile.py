"""`tile`: every tile holds exactly the ground of its cell, and the catalogue says so."""

from __future__ import annotations

import json
import os

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
from affine import Affine
from command_line import run_command
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin
from rasterio.warp import Resampling, reproject, transform, transform_bounds
from small_project import new_project, tile_sources

from geomatch import config
from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.errors import GeomatchError
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


@pytest.mark.parametrize("how", ["nodata", "alpha", "mask"])
def test_invalid_ground_is_left_out(write_raster, tmp_path, project, how):
    """Of three cells one is whole, one lacks 1 of 32 columns, one is half empty."""
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
    table = tile_sources(project, {"2010": path})
    assert table.cells() == [f"{COL}_{row}"]
    assert project.tile_manifest().channels.image == 3
    table = tile_sources(project, {"2010": path}, "grid.min_valid=0.5")
    assert table.cells() == [f"{COL}_{row}", f"{COL + 1}_{row}", f"{COL + 2}_{row}"]
    assert table.valid.tolist() == pytest.approx([1, 31 / 32, 0.5])
    assert tile_sources(project, {"2010": path}, "grid.min_valid=0.6").cells() == table.cells()[:2]


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

"""Plans: arrays say what plain loops over places and files would."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from rasterio.crs import CRS

from geomatch import config
from geomatch.geo import placement, rasters, splits
from geomatch.geo.coordinates import CRS84, project_bounds
from geomatch.geo.grid import Grid, cell_keys, cells_of
from geomatch.geo.views import Layout
from geomatch.progress import silent
from geomatch.tiling.batches import Shards, Sheets, batches
from geomatch.tiling.label_layers import YearLabels
from geomatch.tiling.plan import make_plan
from geomatch.tiling.sources import YearSource

LAYOUT = Layout((1,), None, "uint8", False, False, None, False, True)


def sheet(name, epsg, left, bottom, side=1000.0):
    bounds = (left, bottom, left + side, bottom + side)
    lonlat = project_bounds(f"EPSG:{epsg}", bounds, CRS84)
    return rasters.Raster(name, CRS.from_epsg(epsg).to_wkt(), bounds, lonlat, LAYOUT, (1, 2))


def sheets_of(seed, codes, count):
    """Sheets at random, which overlap here and there."""
    rng = np.random.default_rng(seed)
    places = rng.uniform([400_000, 5_000_000], [408_000, 5_008_000], (count, 2)).round(1)
    return tuple(
        sheet(f"/{seed}/{number}.tif", codes[number % len(codes)], *place)
        for number, place in enumerate(places.tolist())
    )


def year_sources(codes=(32631,), count=12):
    return [
        YearSource(year, sheets_of(seed, codes, count), YearLabels(), None, "real")
        for seed, year in enumerate(("2010", "2020"))
    ]


def settings(*overrides):
    return config.with_overrides(config.Config(), overrides)


def touched(raster, grid, code):
    """Cells that share area with a raster."""
    left, bottom, right, top = placement.bounds_in(raster, f"EPSG:{code}")
    cols = range(int(left // grid.step) - 1, int(right // grid.step) + 2)
    rows = range(int(bottom // grid.step) - 1, int(top // grid.step) + 2)
    for col, row in itertools.product(cols, rows):
        box = grid.bounds(np.array(col), np.array(row))
        if box[0] < right and box[2] > left and box[1] < top and box[3] > bottom:
            yield col, row


def test_keys_order_as_cells_do():
    rng = np.random.default_rng(0)
    epsg, col, row = rng.integers([[32601], [-5], [-5]], [[32604], [5], [5]], (3, 200))
    keys = cell_keys(epsg, col, row)
    np.testing.assert_array_equal(np.argsort(keys, kind="stable"), np.lexsort((row, col, epsg)))
    zone, *cells = cells_of(keys)
    np.testing.assert_array_equal(np.unique(epsg)[zone], epsg)
    np.testing.assert_array_equal(cells, [col, row])


@pytest.mark.parametrize("codes", [(32631,), (32631, 32632, 32629, 32633)])
def test_a_plan_has_every_cell_of_every_year_in_bands(codes):
    found = year_sources(codes)
    grid = Grid("utm" if len(codes) > 1 else "EPSG:32631", 64, 1.0, 64)
    plan = make_plan(settings("split.by=source"), grid, found, silent)
    columns = plan.year, plan.epsg, plan.col, plan.row
    cells = list(map(tuple, np.column_stack(columns).tolist()))
    wanted = {
        (year, code, *cell)
        for year, source in enumerate(found)
        for raster in source.images
        for code in codes
        if CRS.from_epsg(code).to_wkt() == raster.crs
        for cell in touched(raster, grid, code)
    }
    assert set(cells) == wanted
    assert len(cells) == len(wanted)
    order = sorted(cells, key=lambda c: (c[0], c[1], c[3] // 16, c[2] // 16, c[3], c[2]))
    assert cells == order


def test_files_of_different_splits_leave_their_common_places_to_none():
    found = year_sources()
    grid = Grid("EPSG:32631", 64, 1.0, 64)
    chosen = settings(
        "split.by=source",
        "split.test=['1*.tif']",
        "split.validation=['/1/2.tif']",
        "split.buffer=0",
    )
    plan = make_plan(chosen, grid, found, silent)
    seen: dict[tuple[int, int], set[int]] = {}
    for raster in (image for source in found for image in source.images):
        name = raster.path.split("/")[-1]
        code = 2 if name.startswith("1") else 1 if raster.path == "/1/2.tif" else 0
        for cell in touched(raster, grid, 32631):
            seen.setdefault(cell, set()).add(code)
    columns = plan.col.tolist(), plan.row.tolist(), plan.split.tolist()
    got = {(col, row): code for col, row, code in zip(*columns, strict=True)}
    assert got == {cell: min(codes) for cell, codes in seen.items() if len(codes) == 1}
    assert set(got.values()) == {0, 1, 2}
    assert len(got) < len(seen)


@pytest.mark.parametrize("buffer", [0.0, 8.0, 25.0])
@pytest.mark.parametrize("stride", [8, 3])
def test_places_are_kept_apart_as_by_a_plain_loop(stride, buffer):
    grid = Grid("utm", 8, 1.0, stride)
    rng = np.random.default_rng(1)
    cells = rng.integers([32601, 0, 0], [32603, 30, 30], (700, 3))
    cells = np.unique(cells, axis=0)
    # Regions, with single places of another split within.
    split = np.where(cells[:, 1] < 12, 0, np.where(cells[:, 2] < 10, 2, 1))
    split[rng.random(len(cells)) < 0.03] = -1
    split[rng.random(len(cells)) < 0.01] = 2
    got = splits.keep_apart(grid, cell_keys(*cells.T), split, buffer)
    wanted = split.copy()
    low = cells[:, 1:] * grid.step
    for i, (zone, here) in enumerate(zip(cells[:, 0], split, strict=True)):
        gap = np.abs(low - low[i]).max(axis=1) - grid.side
        near = (cells[:, 0] == zone) & (gap < buffer) & (split > here)
        if here >= 0 and near.any():
            wanted[i] = -1
    np.testing.assert_array_equal(got, wanted)
    if buffer:
        assert (got != split).any()


def test_each_shard_has_the_sheets_over_its_cells(tmp_path):
    found = year_sources(count=40)
    grid = Grid("EPSG:32631", 64, 1.0, 64)
    plan = make_plan(settings("split.by=source"), grid, found, silent)
    near = Sheets(found)
    of_plan = Shards(plan, tmp_path, (1, 0), near, False)
    shards = of_plan.made(range(len(of_plan)))
    assert sum(map(len, shards)) == len(plan.col)
    assert len(shards) > 2
    for shard in shards:
        for year, source in shard.year_sources.items():
            mine = shard.year == year
            bounds = grid.bounds(shard.col[mine], shard.row[mine])
            low, high = bounds[:, :2].min(axis=0), bounds[:, 2:].max(axis=0)
            wanted = [
                image
                for image in found[year].images
                if (np.array(image.bounds[:2]) < high).all()
                and (np.array(image.bounds[2:]) > low).all()
            ]
            assert list(source.images) == wanted
    work = batches(shards, near, 1)
    numbers = sorted(shard.number for batch in work for shard in batch.shards)
    assert numbers == [shard.number for shard in shards]
    for batch in work:
        for shard in batch.shards:
            for year, source in shard.year_sources.items():
                assert set(source.images) <= set(batch.year_sources[year].images)

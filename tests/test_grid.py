"""The ground grid: pure arithmetic, checked against counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomatch.geo.grid import Grid, utm_epsg


def grid(size=32, gsd=0.5, stride=None):
    return Grid("EPSG:2154", size, gsd, size if stride is None else stride)


@pytest.mark.parametrize(
    ("x", "y", "cell"),
    [
        (0.0, 0.0, (0, 0)),
        (15.9, 15.9, (0, 0)),
        (16.0, 31.9, (1, 1)),
        (-0.1, -0.1, (-1, -1)),
        (-16.0, -16.1, (-1, -2)),
        (700_000.0, 6_600_000.0, (43_750, 412_500)),
    ],
)
def test_cell_is_floor_of_coordinate_over_side(x, y, cell):
    assert grid().cell_at(x, y) == cell


def test_bounds_start_at_the_origin_of_the_crs_and_rows_grow_north():
    bounds = grid().bounds(np.array([0, 1, -1, 0]), np.array([0, 0, -2, 1]))
    assert bounds.tolist() == [
        [0, 0, 16, 16],
        [16, 0, 32, 16],
        [-16, -32, 0, -16],
        [0, 16, 16, 32],
    ]


def test_points_lie_in_the_cell_found_for_them():
    rng = np.random.default_rng(0)
    for x, y in rng.uniform(-1000, 1000, (200, 2)):
        col, row = grid(gsd=0.3).cell_at(x, y)
        left, bottom, right, top = grid(gsd=0.3).bounds(np.array(col), np.array(row))
        assert left <= x < right
        assert bottom <= y < top


@pytest.mark.parametrize(("size", "stride"), [(32, 32), (32, 16), (32, 12), (32, 31), (30, 10)])
def test_with_a_stride_the_cell_at_a_point_has_the_nearest_centre(size, stride):
    cells = grid(size, 1.0, stride)
    index = np.arange(-20, 21)
    centres = cells.centres(index, index)[:, 0]
    for x in np.random.default_rng(1).uniform(-100, 100, 100):
        col, _ = cells.cell_at(x, 0.0)
        assert abs(cells.centres(np.array(col), np.array(0))[0] - x) == pytest.approx(
            np.abs(centres - x).min()
        )


@pytest.mark.parametrize(("size", "stride"), [(32, 32), (32, 16), (32, 12), (32, 31), (30, 10)])
def test_reach_counts_the_neighbours_that_overlap(size, stride):
    """Two cells overlap when |dcol| stride < size."""
    overlapping = [d for d in range(50) if d * stride < size]
    assert grid(size, 0.5, stride).reach == max(overlapping)


def test_columns_and_rows_count_strides():
    bounds = grid(32, 1.0, 8).bounds(np.array([3]), np.array([-1]))
    assert bounds.tolist() == [[24, -8, 56, 24]]


@pytest.mark.parametrize("stride", [32, 16, 12])
@pytest.mark.parametrize(
    "box", [(0.0, 0.0, 32.0, 32.0), (-40.0, -33.0, 5.0, 0.0), (31.9, 15.9, 64.0, 32.1)]
)
def test_touching_is_every_cell_that_shares_area(box, stride):
    cells = grid(32, 1.0, stride)
    col, row = cells.touching(box)
    found = set(zip(col.tolist(), row.tolist(), strict=True))
    assert len(found) == len(col)
    expected = set()
    for c in range(-20, 20):
        for r in range(-20, 20):
            left, bottom, right, top = cells.bounds(np.array(c), np.array(r))
            if min(right, box[2]) > max(left, box[0]) and min(top, box[3]) > max(bottom, box[1]):
                expected.add((c, r))
    assert found == expected


def test_an_edge_met_but_for_rounding_shares_no_area():
    """0.1 * 3 != 0.3: bounds of a sheet on the grid are rarely exact floats."""
    cells = Grid("EPSG:2154", 10, 0.1, 10)
    col, row = cells.touching((3 * 0.1 * 10 - 1e-9, 0.0, 4.0 + 1e-9, 1.0))
    assert (col.tolist(), row.tolist()) == ([3], [0])


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (Grid("EPSG:2154", 256, 0.5, 256), "EPSG:2154/128m/256px"),
        (Grid("utm", 128, 0.6, 128), "utm/76.8m/128px"),
    ],
)
def test_id(made, name):
    assert made.id == name


def test_id_tells_strides_apart():
    assert grid(32, 1.0, 16).id != grid(32, 1.0, 32).id


@pytest.mark.parametrize(
    ("lon", "lat", "code"),
    [
        (2.35, 48.85, 32631),
        (-74.0, 40.7, 32618),
        (151.2, -33.9, 32756),
        (0.0, 51.0, 32631),
        (-0.001, 51.0, 32630),
        (6.0, 45.0, 32632),
        (5.999, 45.0, 32631),
        (-180.0, 10.0, 32601),
        (180.0, 10.0, 32660),
        (180.1, 10.0, 32601),
        (-180.1, 10.0, 32660),
        (359.9, 10.0, 32630),
        (30.0, 0.0, 32636),
        (30.0, -0.001, 32736),
    ],
)
def test_utm_zone_codes(lon, lat, code):
    assert int(utm_epsg(np.array(lon), np.array(lat))) == code


def test_centres_are_in_the_middle():
    cells = grid(32, 0.5, 8)
    col, row = np.array([-3, 0, 7]), np.array([2, -1, 0])
    left, bottom, right, top = cells.bounds(col, row).T
    middle = np.stack([(left + right) / 2, (bottom + top) / 2], axis=-1)
    np.testing.assert_allclose(cells.centres(col, row), middle)
    assert math.isclose(cells.side, 16)
    assert math.isclose(cells.step, 4)


# Properties of any grid


@st.composite
def grids(draw):
    """Grids whose tiles lie side by side, overlap or leave gaps."""
    size, stride = draw(st.integers(1, 64)), draw(st.integers(1, 80))
    return Grid("EPSG:2154", size, draw(st.sampled_from([0.1, 0.25, 0.3, 1.0, 20.0])), stride)


PIXELS = st.integers(-500, 500)
"""Columns or rows of pixels, counted from the origin of the CRS."""
CELLS = st.integers(-40, 40)


def covering(cells, pixel):
    """Columns (or rows) whose tiles hold a column (or row) of pixels, in integers alone."""
    return {
        c for c in range(-600, 601) if c * cells.stride <= pixel < c * cells.stride + cells.size
    }


@given(grids(), PIXELS, PIXELS)
def test_a_point_is_in_the_cells_that_touch_it_and_in_no_other(cells, column, row):
    x, y = ((pixel + 0.5) * cells.gsd for pixel in (column, row))
    margin = cells.gsd / 4
    cols, rows = cells.touching((x - margin, y - margin, x + margin, y + margin))
    found = set(zip(cols.tolist(), rows.tolist(), strict=True))
    assert found == {(c, r) for c in covering(cells, column) for r in covering(cells, row)}
    left, bottom, right, top = cells.bounds(cols, rows).T
    assert ((left < x) & (x < right) & (bottom < y) & (y < top)).all()


@given(grids(), PIXELS, PIXELS)
def test_the_cell_at_a_point_holds_it_unless_tiles_leave_a_gap(cells, column, row):
    found = cells.cell_at((column + 0.5) * cells.gsd, (row + 0.5) * cells.gsd)
    for cell, pixel in zip(found, (column, row), strict=True):
        assert cell in covering(cells, pixel) or not covering(cells, pixel)


@given(grids(), CELLS, CELLS)
def test_the_cell_at_a_centre_is_the_cell(cells, col, row):
    x, y = cells.centres(np.array(col), np.array(row))
    assert cells.cell_at(x, y) == (col, row)


@given(grids(), CELLS, CELLS)
def test_a_cell_touches_its_neighbours_within_reach(cells, col, row):
    cols, rows = cells.touching(tuple(cells.bounds(np.array(col), np.array(row))))
    near = range(-max(cells.reach, 0), max(cells.reach, 0) + 1)
    wanted = {(col + across, row + up) for across in near for up in near}
    assert set(zip(cols.tolist(), rows.tolist(), strict=True)) == wanted

"""What is a match, what is its opposite, and what is neither."""

from __future__ import annotations

import numpy as np
import pytest
from hand_made import hand_made_tiles

from geomatch.data.ground_truth import are_neutral, by_place, drawn, overlapping, tasks
from geomatch.geo.grid import cell_keys


def block(side, years, stride=8):
    """A square of places in each year, column by column."""
    cells = [(c, r, y) for y in range(years) for c in range(side) for r in range(side)]
    col, row, year = (list(values) for values in zip(*cells, strict=True))
    return hand_made_tiles(col, row, year, stride=stride)


def share_ground(tiles, a, b):
    (l1, b1, r1, t1), (l2, b2, r2, t2) = tiles.bounds()[[a, b]]
    apart = l1 >= r2 or l2 >= r1 or b1 >= t2 or b2 >= t1
    return tiles.epsg[a] == tiles.epsg[b] and not apart


def everything(tiles):
    return np.ones(len(tiles), bool)


def test_places_by_year():
    tiles = hand_made_tiles([4, 9, 4, 7], [1, 1, 1, 1], [0, 0, 1, 1])
    table = by_place(tiles)
    assert sorted(map(tuple, table.tolist())) == [(-1, 3), (0, 2), (1, -1)]


def test_queries_have_a_match_and_the_database_is_all_of_the_other_year():
    #                        0  1  2  3  4  5  6
    tiles = hand_made_tiles([0, 1, 2, 1, 2, 3, 9], [0] * 7, [0, 0, 0, 1, 1, 1, 1])
    forward, back = tasks(tiles, everything(tiles), everything(tiles))
    assert (forward.years, back.years) == ((0, 1), (1, 0))
    assert forward.queries.tolist() == [1, 2]
    assert forward.database.tolist() == [3, 4, 5, 6]
    assert forward.database[forward.truth].tolist() == [3, 4]
    assert back.queries.tolist() == [3, 4]
    assert back.database.tolist() == [0, 1, 2]
    assert back.database[back.truth].tolist() == [1, 2]
    assert len(forward.neutral[0]) == len(back.neutral[0]) == 0


def test_every_ordered_pair_of_years_with_a_common_place_is_a_task():
    tiles = hand_made_tiles([0, 0, 5, 5, 0], [0] * 5, [0, 1, 1, 2, 1])
    tiles = tiles.select(np.arange(4))
    found = tasks(tiles, everything(tiles), everything(tiles))
    assert [task.years for task in found] == [(0, 1), (1, 0), (1, 2), (2, 1)]


def test_a_query_without_its_match_in_the_database_is_left_out():
    tiles = block(2, 2)
    asking = tiles.col == 0
    only = tiles.row == 0
    (forward, _) = tasks(tiles, asking, only)
    assert tiles.row[forward.queries].tolist() == [0]
    assert (tiles.row[forward.database] == 0).all()


@pytest.mark.parametrize("stride", [8, 7, 4, 3, 2])
@pytest.mark.parametrize("same_year", [False, True])
def test_common_ground_is_neutral_but_for_the_match(stride, same_year):
    tiles = block(5, 2, stride)
    for task in tasks(tiles, everything(tiles), everything(tiles), same_year):
        neutral = set(zip(*(part.tolist() for part in task.neutral), strict=True))
        assert len(neutral) == len(task.neutral[0])
        for i, query in enumerate(task.queries):
            for j, other in enumerate(task.database):
                expected = share_ground(tiles, query, other) and j != task.truth[i]
                assert ((i, j) in neutral) == expected
            match = task.database[task.truth[i]]
            assert tiles.year[match] == task.years[1]
            assert (tiles.col[match], tiles.row[match]) == (tiles.col[query], tiles.row[query])


def test_the_own_year_is_searched_on_request_without_the_place_itself():
    tiles = block(2, 2)
    forward, _ = tasks(tiles, everything(tiles), everything(tiles), same_year=True)
    assert len(forward.database) == 8
    assert set(forward.neutral[0].tolist()) == {0, 1, 2, 3}
    for i, j in zip(*forward.neutral, strict=True):
        assert forward.database[j] == forward.queries[i]


def test_other_zones_are_other_ground():
    tiles = hand_made_tiles([0, 0, 1], [0, 0, 0], [0, 1, 1], stride=4)
    tiles.epsg[1:] = 32631
    rows = np.array([0])
    assert len(overlapping(tiles, rows, np.array([1, 2]))[0]) == 0
    assert not are_neutral(tiles, np.array([0]), np.array([1, 2])).any()
    assert tasks(tiles, everything(tiles), everything(tiles)) == []


@pytest.mark.parametrize("stride", [8, 5, 3])
def test_are_neutral_is_sharing_ground(stride):
    tiles = block(4, 2, stride)
    for a in range(len(tiles)):
        found = are_neutral(tiles, np.array([a]), np.arange(len(tiles)))
        assert found.tolist() == [share_ground(tiles, a, b) for b in range(len(tiles))]


@pytest.mark.parametrize("stride", [8, 4])
@pytest.mark.parametrize("same_year", [False, True])
def test_drawn_queries_keep_their_match_their_neutral_tiles_and_the_whole_database(
    stride, same_year
):
    col, row, year = (axis.ravel().tolist() for axis in np.indices((5, 4, 3)))
    tiles = hand_made_tiles(col, row, year, stride=stride)
    whole = tasks(tiles, everything(tiles), everything(tiles), same_year)
    some = drawn(whole, 31)
    assert sum(len(task.queries) for task in some) == 31
    assert len(whole) == len(some) == 6
    for before, after in zip(whole, some, strict=True):
        assert after.years == before.years
        np.testing.assert_array_equal(after.database, before.database)
        kept = np.flatnonzero(np.isin(before.queries, after.queries))
        np.testing.assert_array_equal(after.queries, before.queries[kept])
        np.testing.assert_array_equal(after.query_place, before.query_place[kept])
        np.testing.assert_array_equal(after.truth, before.truth[kept])
        assert neutral_of(after) == [neutral_of(before)[i] for i in kept]


def neutral_of(task):
    """The neutral positions of each query."""
    return [set(task.neutral[1][task.neutral[0] == i].tolist()) for i in range(len(task.queries))]


def test_the_same_queries_are_drawn_again_and_all_of_few():
    tiles = hand_made_tiles([*range(40)] * 2, [0] * 80, [0] * 40 + [1] * 40)
    whole = tasks(tiles, everything(tiles), everything(tiles))
    first, again = ([task.queries.tolist() for task in drawn(whole, 9)] for _ in range(2))
    assert first == again
    assert [task.queries.tolist() for task in drawn(whole, 80)] == [
        task.queries.tolist() for task in whole
    ]
    # One query is of one pair of years.
    assert len(drawn(whole, 1)) == 1
    assert drawn([], 5) == []


def test_places_are_in_the_order_of_zone_column_and_row():
    rng = np.random.default_rng(0)
    epsg = rng.choice([32731, 32630, 2154], 500)
    col, row = rng.integers(-3_000_000, 60_000_000, (2, 500))
    col[::2], row[::3] = rng.choice([-1, 0, 1], 250), rng.choice([-1, 0, 1], 167)
    cells = np.stack([epsg, col, row], axis=1)
    wanted = np.unique(cells, axis=0, return_inverse=True)[1].reshape(-1)
    found = np.unique(cell_keys(epsg, col, row), return_inverse=True)[1].reshape(-1)
    np.testing.assert_array_equal(found, wanted)

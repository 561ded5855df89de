"""Hard pairs, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from geomatch.data.mining import HardPairs, hard_queries, join

NONE = np.empty(0, np.int64)
QUERIES = np.array([10, 11, 12, 13, 14])
DATABASE = np.array([20, 21, 22, 23, 24, 25])
TRUTH = np.array([0, 1, 2, 3, 4])
NEIGHBOURS = np.array(
    [
        [0, 1, 2, 3],  # found at once
        [5, 1, 0, 2],  # found second
        [5, 4, 2, 0],  # found third: too late
        [0, 1, 2, 4],  # not found
        [5, 0, 4, 1],  # third, behind two neutral tiles where they are neutral
    ]
)


def mined(neutral=(NONE, NONE), within=2, rows=slice(None)):
    return hard_queries(QUERIES[rows], DATABASE, TRUTH[rows], NEIGHBOURS[rows], neutral, within)


def as_lists(hard):
    kept = [[tile for tile in row if tile >= 0] for row in hard.negatives.tolist()]
    return list(zip(hard.query.tolist(), hard.match.tolist(), kept, strict=True))


def test_a_query_is_hard_whose_match_is_not_among_the_first_two():
    hard = mined()
    assert as_lists(hard) == [
        (12, 22, [25, 24, 20]),
        (13, 23, [20, 21, 22, 24]),
        (14, 24, [25, 20, 21]),
    ]
    assert hard.asked == 5
    assert hard.share == pytest.approx(3 / 5)


def test_padding_follows_the_negatives():
    hard = mined()
    assert hard.negatives.tolist()[0] == [25, 24, 20, -1]


@pytest.mark.parametrize(("within", "expected"), [(1, [11, 12, 13, 14]), (3, [13]), (4, [13])])
def test_how_near_is_near_enough_is_asked_for(within, expected):
    assert mined(within=within).query.tolist() == expected


def test_neutral_tiles_are_no_negatives_and_push_nothing_down():
    hard = mined((np.array([4, 4, 3]), np.array([5, 0, 1])))
    assert as_lists(hard) == [(12, 22, [25, 24, 20]), (13, 23, [20, 22, 24])]


def test_a_query_with_nothing_wrong_about_it_is_not_hard():
    # All that was found is neutral: there is no negative to learn from.
    hard = mined((np.full(4, 3), np.array([0, 1, 2, 4])))
    assert 13 not in hard.query


def test_join_pads_and_adds_up():
    first, second = mined(), mined(rows=slice(3, 4))
    narrow = HardPairs(second.query, second.match, second.negatives[:, :2], second.asked)
    both = join([first, narrow], 5)
    assert both.query.tolist() == [12, 13, 14, 13]
    assert both.match.tolist() == [22, 23, 24, 23]
    assert both.negatives.shape == (4, 5)
    assert both.negatives[3].tolist() == [20, 21, -1, -1, -1]
    assert both.asked == 6


def test_join_of_nothing():
    hard = join([], 5)
    assert len(hard.query) == 0
    assert hard.negatives.shape == (0, 5)
    assert hard.share is None


@pytest.mark.parametrize("hard", [mined(), join([], 5)], ids=["some", "none"])
def test_what_is_saved_is_loaded(hard, tmp_path):
    hard.save(tmp_path / "hard.parquet")
    found = HardPairs.load(tmp_path / "hard.parquet")
    assert found.asked == hard.asked
    for name in ("query", "match", "negatives"):
        mine, theirs = getattr(found, name), getattr(hard, name)
        assert mine.dtype == np.int64
        assert mine.tolist() == theirs.tolist()

"""Mined samples: by hand, and against plain loops."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hand_made import hand_made_classes, hand_made_tiles

from geomatch.data.ground_truth import Task, are_neutral, tasks
from geomatch.training.mining import (
    HardestTriplets,
    Mined,
    candidate_triplets,
    hard_queries,
    join,
    matches,
    nearest_on_ground,
    wrong_neighbours,
)

NONE = np.empty(0, np.int64)
NEIGHBOURS = np.array(
    [
        [0, 1, 2, 3],  # found at once
        [5, 1, 0, 2],  # found second
        [5, 4, 2, 0],  # found third: too late
        [0, 1, 2, 4],  # not found
        [5, 0, 4, 1],  # third, behind two neutral tiles where they are neutral
    ]
)
SCORES = np.array([[0.9, 0.7, 0.5, 0.4]] * 5, np.float32)
OWN = np.array([0.9, 0.7, 0.5, 0.2, 0.5], np.float32)
"""Of the matches: where they are among the neighbours, that neighbour's."""


def asked(neutral=(NONE, NONE), rows=slice(None)):
    """Tiles 10 to 14, each of whose places is among the database's 20 to 25."""
    place = np.arange(5)[rows]
    return Task((1, 0), place + 10, np.arange(6) + 20, place, np.arange(6), place, neutral)


def mined(neutral=(NONE, NONE), within=2, rows=slice(None)):
    task = asked(neutral, rows)
    near = NEIGHBOURS[rows], SCORES[rows], OWN[rows]
    return hard_queries(task, task.truth, *near, within)


def as_lists(hard):
    kept = [[tile for tile in row if tile >= 0] for row in hard.negatives.tolist()]
    return list(zip(hard.query.tolist(), hard.match.tolist(), kept, strict=True))


# By nearest neighbours


def test_a_query_is_hard_whose_match_is_not_among_the_first_two():
    hard = mined()
    assert as_lists(hard) == [
        (12, 22, [25, 24, 20]),
        (13, 23, [20, 21, 22, 24]),
        (14, 24, [25, 20, 21]),
    ]
    assert (hard.examined, hard.hard) == (5, 3)
    assert hard.share == pytest.approx(3 / 5)


def test_padding_follows_the_negatives():
    hard = mined()
    assert hard.negatives.tolist()[0] == [25, 24, 20, -1]


@pytest.mark.parametrize(("within", "expected"), [(1, [11, 12, 13, 14]), (3, [13]), (4, [13])])
def test_truth_within_decides_which_queries_are_hard(within, expected):
    assert mined(within=within).query.tolist() == expected


def test_neutral_tiles_are_no_negatives_and_push_nothing_down():
    hard = mined((np.array([4, 4, 3]), np.array([5, 0, 1])))
    assert as_lists(hard) == [(12, 22, [25, 24, 20]), (13, 23, [20, 22, 24])]


def test_a_query_with_nothing_wrong_about_it_is_not_hard():
    # All that was found is neutral: there is no negative to learn from.
    hard = mined((np.full(4, 3), np.array([0, 1, 2, 4])))
    assert 13 not in hard.query


def test_hardness_is_how_much_nearer_the_first_wrong_one_is():
    np.testing.assert_allclose(mined().hardness, [0.9 - 0.5, 0.9 - 0.2, 0.9 - 0.5], rtol=1e-6)
    # The first two neighbours of the fourth are neutral.
    hard = mined((np.array([3, 3]), np.array([0, 1])))
    assert hard.query.tolist() == [12, 13, 14]
    np.testing.assert_allclose(hard.hardness, [0.4, 0.5 - 0.2, 0.4], rtol=1e-6)
    assert hard.negatives[1].tolist() == [22, 24, -1, -1]


def test_wrong_neighbours_are_kept_of_queries_that_found_their_match_too():
    task = asked()
    found = wrong_neighbours(task, task.truth, NEIGHBOURS, SCORES, OWN)
    assert as_lists(found) == [
        (10, 20, [21, 22, 23]),
        (11, 21, [25, 20, 22]),
        (12, 22, [25, 24, 20]),
        (13, 23, [20, 21, 22, 24]),
        (14, 24, [25, 20, 21]),
    ]
    np.testing.assert_allclose(found.hardness, [0.7 - 0.9, 0.2, 0.4, 0.7, 0.4], rtol=1e-5)
    # The first query's match is nearest; of the others a wrong tile is.
    assert (found.examined, found.hard) == (5, 4)
    assert found.share == pytest.approx(4 / 5)


def test_neighbours_that_an_approximate_search_did_not_find_are_none():
    near, scores = NEIGHBOURS.copy(), SCORES.copy()
    near[:, 3], scores[:, 3] = -1, -np.inf
    near[4, 1:], scores[4, 1:] = -1, -np.inf
    task = asked((np.array([4]), np.array([5])))
    hard = hard_queries(task, task.truth, near, scores, OWN, 2)
    # The last query has a neutral neighbour alone.
    assert as_lists(hard) == [(12, 22, [25, 24]), (13, 23, [20, 21, 22])]
    assert np.isfinite(hard.hardness).all()


def test_of_classes_any_tile_of_the_class_is_found():
    tiles = hand_made_classes([0, 0, 0, 1, 1, 2, 2])
    everything = np.ones(7, bool)
    (task,) = tasks(tiles, everything, everything)
    assert task.queries.tolist() == list(range(7))
    near = np.array(
        [
            [0, 3, 2, 5],  # itself, then another class, then its own: second
            [3, 1, 4, 2],  # third
            [2, 3, 4, 5],  # not found
            [3, 4, 0, 1],  # first
            [4, 0, 3, 1],  # second
            [5, 0, 1, 2],  # not found
            [6, 5, 0, 1],  # first
        ]
    )
    scores = np.tile(np.array([1, 0.8, 0.6, 0.4], np.float32), (7, 1))
    match, own = np.array([2, 0, 0, 4, 3, 6, 5]), np.full(7, 0.5, np.float32)
    hard = hard_queries(task, match, near, scores, own, 2)
    assert as_lists(hard) == [(1, 0, [3, 4]), (2, 0, [3, 4, 5]), (5, 6, [0, 1, 2])]
    np.testing.assert_allclose(hard.hardness, [0.5, 0.3, 0.3], rtol=1e-6)
    found = wrong_neighbours(task, match, near, scores, own)
    assert found.query.tolist() == list(range(7))
    assert (found.examined, found.hard) == (7, 7)


def test_a_match_of_several_is_of_the_class_and_never_the_query_itself():
    tiles = hand_made_classes([2, 0, 1, 0, 0, 1, 2, 0, 3])
    everything = np.ones(9, bool)
    (task,) = tasks(tiles, everything, everything)
    seen = set()
    for seed in range(60):
        match = matches(task, (seed, 5))
        np.testing.assert_array_equal(match, matches(task, (seed, 5)))
        assert (task.database[match] != task.queries).all()
        np.testing.assert_array_equal(task.database_place[match], task.query_place)
        seen |= set(zip(task.queries.tolist(), task.database[match].tolist(), strict=True))
    # The last is alone in its class, and is not asked for.
    assert len(seen) == 4 * 3 + 2 + 2
    assert 8 not in task.queries


def test_the_match_is_the_truth_where_there_is_one():
    task = asked()
    np.testing.assert_array_equal(matches(task, (0,)), task.truth)


# What is kept


def test_join_pads_and_adds_up():
    first, second = mined(), mined(rows=slice(3, 4))
    narrow = dataclasses.replace(second, negatives=second.negatives[:, :2])
    both = join([first, narrow], 5)
    assert both.query.tolist() == [12, 13, 14, 13]
    assert both.match.tolist() == [22, 23, 24, 23]
    assert both.negatives.shape == (4, 5)
    assert both.negatives[3].tolist() == [20, 21, -1, -1, -1]
    np.testing.assert_allclose(both.hardness, [0.4, 0.7, 0.4, 0.7], rtol=1e-5)
    assert (both.examined, both.hard) == (6, 4)


def test_join_of_nothing():
    hard = join([], 5)
    assert len(hard.query) == len(hard.hardness) == 0
    assert hard.negatives.shape == (0, 5)
    assert hard.share is None


@pytest.mark.parametrize("hard", [mined(), join([], 5)], ids=["some", "none"])
def test_what_is_saved_is_loaded(hard, tmp_path):
    # Neighbours are kept of queries that are not hard, too.
    hard = dataclasses.replace(hard, examined=hard.examined + 7)
    hard.save(tmp_path / "hard.parquet")
    found = Mined.load(tmp_path / "hard.parquet")
    assert (found.examined, found.hard) == (hard.examined, hard.hard)
    for name in ("query", "match", "negatives", "hardness"):
        mine, theirs = getattr(found, name), getattr(hard, name)
        assert mine.dtype == (np.float32 if name == "hardness" else np.int64)
        assert mine.shape == theirs.shape
        assert mine.tolist() == theirs.tolist()


# By the ground


def scattered(seed=0, stride=4):
    """Tiles of up to two years in two zones whose cells have the same numbers."""
    rng = np.random.default_rng(seed)
    cells = [
        (zone, col, row)
        for zone in (32630, 32631)
        for col, row in np.argwhere(rng.random((9, 9)) < 0.4)
    ]
    seen = [(*cell, year) for cell in cells for year in range(2) if rng.random() < 0.85]
    zone, col, row, year = map(list, zip(*seen, strict=True))
    tiles = hand_made_tiles(col, row, year, stride=stride)
    return dataclasses.replace(tiles, epsg=np.array(zone))


@pytest.mark.parametrize("stride", [8, 4])
def test_the_nearest_places_on_other_ground(stride):
    tiles = scattered(stride=stride)
    k = 6
    found = nearest_on_ground(tiles, k)
    place = tiles.places()
    whole = {p for p in place.tolist() if (place == p).sum() == 2}
    assert sorted(place[found.query].tolist()) == sorted(whole)
    np.testing.assert_array_equal(found.query, found.match)
    assert found.negatives.shape == (len(whole), k)
    assert found.share is None
    reach = tiles.grid.reach
    assert reach == (0 if stride == 8 else 1)
    for query, negatives in zip(found.query, found.negatives, strict=True):
        distances = {}
        for other in range(len(tiles)):
            across = abs(int(tiles.col[other] - tiles.col[query]))
            up = abs(int(tiles.row[other] - tiles.row[query]))
            apart = across > reach or up > reach
            if place[other] in whole and tiles.epsg[other] == tiles.epsg[query] and apart:
                distances[int(place[other])] = np.hypot(across, up)
        assert (negatives >= 0).all()
        assert len(set(place[negatives])) == k
        mine = [distances[int(p)] for p in place[negatives]]
        assert mine == sorted(distances.values())[:k]


def test_places_without_so_many_others_have_fewer():
    # Three places of one zone, the first two of which overlap, and a lonely one in another.
    tiles = hand_made_tiles([0, 1, 9, 4] * 2, [0] * 8, [0] * 4 + [1] * 4, stride=4)
    tiles = dataclasses.replace(tiles, epsg=np.array([32630, 32630, 32630, 32631] * 2))
    found = nearest_on_ground(tiles, 3)
    near = dict(zip(tiles.col[found.query].tolist(), found.negatives.tolist(), strict=True))
    place = {col: [int(tiles.col[n]) if n >= 0 else -1 for n in row] for col, row in near.items()}
    assert place == {0: [9, -1, -1], 1: [9, -1, -1], 9: [1, 0, -1], 4: [-1, -1, -1]}


# By loss


def candidates(tiles, each, seed=(0, 1)):
    return np.concatenate(list(candidate_triplets(tiles, each, seed)), axis=1)


def test_every_ordered_pair_of_classes_has_as_many_triplets():
    tiles = hand_made_classes([0] * 3 + [1] * 2 + [2] * 6 + [3])
    anchor, positive, negative = candidates(tiles, 9)
    label = tiles.label
    np.testing.assert_array_equal(label[anchor], label[positive])
    assert (anchor != positive).all()
    pairs = list(zip(label[anchor].tolist(), label[negative].tolist(), strict=True))
    # The last class has no pair of its own, but is others' negative.
    wanted = [(a, b) for a in range(3) for b in range(4) if a != b]
    assert {pair: pairs.count(pair) for pair in set(pairs)} == dict.fromkeys(wanted, 3)


def test_triplets_of_a_class_are_drawn_from_all_its_tiles():
    tiles = hand_made_classes([0] * 3 + [1] * 4)
    anchor, positive, negative = candidates(tiles, 200)
    assert len(set(zip(anchor, positive, strict=True))) == 3 * 2 + 4 * 3
    assert set(negative) == set(range(7))
    again, other = candidates(tiles, 200), candidates(tiles, 200, (0, 2))
    np.testing.assert_array_equal(again, [anchor, positive, negative])
    assert not np.array_equal(other, again)


def test_fewer_triplets_than_classes_are_of_different_ones():
    tiles = hand_made_classes([0, 1, 2, 3, 4, 5] * 2)
    anchor, _, negative = candidates(tiles, 3)
    for label in range(6):
        others = tiles.label[negative[tiles.label[anchor] == label]].tolist()
        assert len(set(others)) == len(others) == 3


@pytest.mark.parametrize("stride", [8, 4])
def test_dated_triplets_have_a_negative_of_the_positive_s_year(stride):
    tiles = scattered(stride=stride)
    anchor, positive, negative = candidates(tiles, 60)
    place = tiles.places()
    np.testing.assert_array_equal(place[anchor], place[positive])
    assert (tiles.year[anchor] != tiles.year[positive]).all()
    np.testing.assert_array_equal(tiles.year[negative], tiles.year[positive])
    assert not are_neutral(tiles, anchor, negative).any()
    whole = [p for p in set(place.tolist()) if (place == p).sum() == 2]
    assert set(place[anchor].tolist()) == set(whole)
    # Either year is the anchor's, and places of a single year are others' negatives.
    assert set(tiles.year[anchor].tolist()) == {0, 1}
    assert set(place[negative].tolist()) > set(whole)


def test_a_single_place_has_no_triplet():
    assert list(candidate_triplets(hand_made_classes([0, 0, 0]), 5, (0,))) == []


def some_triplets(count, seed=0):
    """Rows of distinct triplets, and their hardness."""
    rng = np.random.default_rng(seed)
    hardness = rng.normal(-0.3, 0.2, count).astype(np.float32)
    return np.arange(3 * count).reshape(3, count), hardness


def taken(count, share, sizes, margin=0.1, seed=(0,), of=0):
    """What is taken of triplets that are added in parts of these sizes."""
    found = HardestTriplets(count, share, margin, seed)
    triplets, hardness = some_triplets(sum(sizes), of)
    start = 0
    for size in sizes:
        found.add(triplets[:, start : start + size], hardness[start : start + size])
        start += size
    return found.result(), hardness


@pytest.mark.parametrize("sizes", [[3000], [7] * 300, [1, 900, 3, 40, 500]])
def test_the_hardest_are_those_of_a_full_sort(sizes):
    found, hardness = taken(20, 1.0, sizes)
    assert found.query.tolist() == sorted(range(len(hardness)), key=lambda i: -hardness[i])[:20]
    np.testing.assert_array_equal(found.match, found.query + len(hardness))
    np.testing.assert_array_equal(found.negatives, found.query[:, None] + 2 * len(hardness))
    np.testing.assert_array_equal(found.hardness, np.sort(hardness)[::-1][:20])
    assert found.examined == len(hardness)
    assert found.hard == sum(h + np.float32(0.1) > 0 for h in hardness)
    assert 0 < found.hard < found.examined


def test_beside_the_hardest_some_are_drawn_from_all_others():
    seen = []
    for seed in range(300):
        found, hardness = taken(20, 0.4, [50] * 10, seed=(seed,))
        order = sorted(range(500), key=lambda i: -hardness[i])
        assert found.query[:8].tolist() == order[:8]
        drawn = found.query[8:].tolist()
        assert len(set(drawn)) == 12
        assert not set(drawn) & set(order[:8])
        seen += drawn
    # 3,600 draws among 492: about 7 each, as many of those added early as late, hard as easy.
    counts = np.bincount(seen, minlength=500)
    assert counts.max() < 25
    for part in (np.array_split(np.arange(500), 5), np.array_split(order[8:], 5)):
        shares = [counts[rows].sum() / len(seen) for rows in part]
        np.testing.assert_allclose(shares, 0.2, atol=0.025)


def test_dropping_what_cannot_be_taken_changes_nothing():
    (whole, _), (parts, _) = (taken(16, 0.5, sizes) for sizes in ([2000], [20] * 100))
    for name in ("query", "match", "negatives", "hardness"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_without_any_share_triplets_are_drawn_whatever_their_loss():
    found, hardness = taken(200, 0.0, [100] * 40)
    assert len(set(found.query.tolist())) == 200
    assert found.hardness.mean() == pytest.approx(hardness.mean(), abs=0.05)


def test_fewer_triplets_than_are_wanted_are_all_taken():
    found, _ = taken(50, 0.5, [12])
    assert sorted(found.query.tolist()) == list(range(12))
    empty, _ = taken(50, 0.5, [])
    assert len(empty.query) == 0
    assert empty.share is None

"""Ranks and metrics: by hand, by brute force, and by scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    label_ranking_average_precision_score,
    precision_score,
    recall_score,
)

from geomatch.search import metrics
from geomatch.search.exact import neighbours, unit
from geomatch.search.metrics import (
    mean,
    median,
    rank_relevant,
    rank_truth,
    recall_at,
    reciprocal_rank_at,
)

NONE = (np.empty(0, np.int64), np.empty(0, np.int64))


def ranked(scores, truth, neutral=NONE):
    """Rank a matrix of scores (q, n), as the inner products of unit vectors with a basis."""
    scores = np.asarray(scores, np.float32)
    queries, database = scores, np.eye(scores.shape[1], dtype=np.float32)
    return rank_truth(queries, database, np.array(truth), neutral)


def brute_force(scores, truth, neutral):
    """Rank and first answer of each query, in plain loops; the match loses every tie."""
    out = set(zip(*(part.tolist() for part in neutral), strict=True))
    ranks, firsts = [], []
    for i, row in enumerate(scores.tolist()):
        others = [j for j in range(len(row)) if j != truth[i] and (i, j) not in out]
        ahead = [j for j in others if row[j] >= row[truth[i]] - metrics.TIE]
        ranks.append(1 + len(ahead))
        firsts.append(max(ahead, key=lambda j, row=row: row[j]) if ahead else truth[i])
    return ranks, firsts


def first_answers(scores, truth, out):
    """The first positions of a query in plain loops; truths stand behind what ties with them."""
    left = [j for j in range(len(scores)) if j not in out and np.isfinite(scores[j])]
    order = sorted(left, key=lambda j: -scores[j] + 2 * metrics.TIE * (j in truth))
    return order[: metrics.TOP]


def assert_answers(found, scores, truths, outs):
    """Equal answers may be in any order, but truths are among them where they must be."""
    for i, (row, truth, out) in enumerate(zip(scores, truths, outs, strict=True)):
        wanted = first_answers(row, truth, out)
        mine = found.top[i][found.top[i] >= 0].tolist()
        assert len(set(mine)) == len(mine) == len(wanted)
        assert not set(mine) & set(out)
        np.testing.assert_allclose(row[mine], row[wanted], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.top_score[i][: len(mine)], row[mine], atol=1e-5)
        assert (found.top_score[i][len(mine) :] == -np.inf).all()
        for j in truth:
            assert (j in mine) == (j in wanted)
            assert j not in mine or mine.index(j) == wanted.index(j)


def ranked_relevant(scores, query_place, database_place, neutral=NONE, k=5):
    """Rank a matrix of scores (q, n) where the tiles of a query's place are relevant."""
    scores = np.asarray(scores, np.float32)
    basis = np.eye(scores.shape[1], dtype=np.float32)
    return rank_relevant(scores, basis, np.array(query_place), np.array(database_place), neutral, k)


def precision_by_hand(scores, relevant, out, k):
    """Figures of one query, in plain loops: every rival within a tie comes first."""
    left = [j for j in range(len(scores)) if j not in out]
    goals = sorted((j for j in left if relevant[j]), key=lambda j: -scores[j])
    rivals = [j for j in left if not relevant[j]]
    total, within = 0.0, 0.0
    for i, goal in enumerate(goals, 1):
        rank = i + sum(scores[j] >= scores[goal] - metrics.TIE for j in rivals)
        if i == 1:
            first = rank
        total += i / rank
        within += i / rank if rank <= k else 0
    return first, total / len(goals), within / min(len(goals), k), len(goals)


def test_the_match_at_each_place():
    found = ranked([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]], [0, 1, 2])
    assert found.rank.tolist() == [1, 2, 3]
    assert found.first.tolist() == [0, 0, 0]


def test_ties_never_help():
    found = ranked([[0.5, 0.5, 0.5, 0.2], [0.5, 0.5, 0.7, 0.2]], [0, 1])
    assert found.rank.tolist() == [3, 3]
    assert found.first[0] in (1, 2)
    assert found.first[1] == 2


def test_blank_tiles_that_are_all_alike_come_last():
    blank = unit(np.ones((6, 4), np.float32))
    found = rank_truth(blank, blank, np.arange(6), NONE)
    assert found.rank.tolist() == [6] * 6
    empty = np.zeros((6, 4), np.float32)
    assert rank_truth(unit(empty), unit(empty), np.arange(6), NONE).rank.tolist() == [6] * 6


def test_identical_tiles_tie_in_spite_of_rounding():
    vectors = np.random.default_rng(0).normal(size=(50, 333)).astype(np.float32)
    database = unit(np.repeat(vectors, 2, axis=0))
    found = rank_truth(unit(vectors), database, np.arange(0, 100, 2), NONE)
    assert found.rank.tolist() == [2] * 50
    assert found.first.tolist() == list(range(1, 100, 2))


def test_neutral_tiles_are_taken_out():
    scores = [[0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.7, 0.6]]
    found = ranked(scores, [3, 3], (np.array([1, 1]), np.array([0, 2])))
    assert found.rank.tolist() == [4, 2]
    assert found.first.tolist() == [0, 1]
    found = ranked(scores, [3, 3], (np.array([1, 0, 1, 0, 1, 0]), np.array([0, 0, 1, 1, 2, 2])))
    assert found.rank.tolist() == [1, 1]
    assert found.first.tolist() == [3, 3]


def test_scores_below_zero_are_ranked_too():
    found = ranked([[-0.9, -0.5, -0.1]], [1])
    assert found.rank.tolist() == [2]
    assert found.first.tolist() == [2]


@pytest.mark.parametrize("broken", ["query", "match", "all"])
def test_descriptors_of_nan_are_not_found(broken):
    rng = np.random.default_rng(0)
    queries = unit(rng.normal(size=(3, 4)).astype(np.float32))
    database = queries.copy()
    if broken in ("query", "all"):
        queries[1] = np.nan
    if broken in ("match", "all"):
        database[1] = np.nan
    assert rank_truth(queries, database, np.arange(3), NONE).rank[1] > 1


@pytest.mark.parametrize("blocks", [(512, 65_536, 65_536), (3, 4, 9), (1, 1, 1), (7, 5, 5)])
def test_blocks_change_nothing(monkeypatch, blocks):
    monkeypatch.setattr(metrics, "QUERY_BLOCK", blocks[0])
    monkeypatch.setattr(metrics, "DATABASE_BLOCK", blocks[1])
    monkeypatch.setattr(metrics, "READ", blocks[2])
    rng = np.random.default_rng(1)
    # Few distinct values, so that there are ties within and across blocks.
    queries = rng.integers(-3, 4, (17, 5)).astype(np.float32)
    database = rng.integers(-3, 4, (23, 5)).astype(np.float32)
    truth = np.where(np.arange(17) % 2, (queries @ database.T).argmax(1), rng.integers(23, size=17))
    pairs = np.unique(rng.integers([0, 0], [17, 23], (60, 2)), axis=0)
    pairs = pairs[pairs[:, 1] != truth[pairs[:, 0]]]
    neutral = tuple(rng.permutation(pairs).T)
    found = rank_truth(queries, database, truth, neutral)
    scores = queries @ database.T
    ranks, firsts = brute_force(scores, truth, neutral)
    assert found.rank.tolist() == ranks
    # Among equal answers any may be the first.
    rows = np.arange(17)
    np.testing.assert_array_equal(scores[rows, found.first], scores[rows, firsts])
    wrong = np.array(ranks) > 1
    assert (found.first[wrong] != truth[wrong]).all()
    assert (found.first[~wrong] == truth[~wrong]).all()
    assert 0 < wrong.sum() < 17
    outs = [{j for q, j in pairs.tolist() if q == i} for i in range(17)]
    assert_answers(found, scores, [[t] for t in truth], outs)
    np.testing.assert_array_equal(found.score, scores[rows, truth])
    np.testing.assert_array_equal(found.match, truth)
    assert not set(zip(rows.tolist(), found.first.tolist(), strict=True)) & set(
        map(tuple, pairs.tolist())
    )


@pytest.mark.parametrize("several", [False, True])
def test_the_first_answers_among_many(several):
    rng = np.random.default_rng(6)
    queries, database = (unit(rng.normal(size=(n, 4)).astype(np.float32)) for n in (40, 9_001))
    truth = rng.integers(9_001, size=40)
    # Some matches are first, some second to their own double, and some are NaN.
    truth[:20] = (queries[:20] @ database.T).argmax(axis=1)
    database[(truth[:5] + 1) % 9_001] = database[truth[:5]]
    database[rng.choice(np.setdiff1d(np.arange(9_001), truth), 9)] = np.nan
    neutral = np.repeat(np.arange(40), 3), rng.integers(9_001, size=120)
    kept = neutral[1] != np.repeat(truth, 3)
    neutral = neutral[0][kept], neutral[1][kept]
    if several:
        found = rank_relevant(queries, database, truth, np.arange(9_001), neutral)
    else:
        found = rank_truth(queries, database, truth, neutral)
    outs = [set(neutral[1][neutral[0] == i].tolist()) for i in range(40)]
    assert_answers(found, queries @ database.T, [[t] for t in truth], outs)


def test_fewer_answers_than_are_kept():
    found = ranked([[0.9, 0.5, 0.1]], [1], (np.array([0]), np.array([2])))
    assert found.top.tolist() == [[0, 1, -1, -1, -1]]
    found = ranked_relevant([[0.9, 0.5, 0.1]], [1], [0, 1, 1])
    assert found.top.tolist() == [[0, 1, 2, -1, -1]]


def test_a_query_of_nan_has_no_answers():
    database = np.eye(3, dtype=np.float32)
    queries = np.full((1, 3), np.nan, np.float32)
    assert rank_truth(queries, database, np.array([1]), NONE).top.tolist() == [[-1] * 5]
    found = rank_relevant(queries, database, np.array([1]), np.arange(3), NONE)
    assert found.top.tolist() == [[-1] * 5]


def test_metrics_by_hand():
    rank = np.array([1, 2, 5, 6, 10, 11])
    assert mean(reciprocal_rank_at(rank, 5)) == pytest.approx((1 + 1 / 2 + 1 / 5) / 6)
    assert mean(reciprocal_rank_at(rank, 1)) == pytest.approx(1 / 6)
    assert recall_at(rank, 1) == pytest.approx(1 / 6)
    assert recall_at(rank, 5) == pytest.approx(3 / 6)
    assert recall_at(rank, 10) == pytest.approx(5 / 6)
    assert median(rank) == 5.5


def test_reciprocal_ranks_by_hand():
    assert metrics.mrr(np.array([1, 2, 10])) == pytest.approx((1 + 1 / 2 + 1 / 10) / 3)
    assert metrics.mean(np.array([1, 2, 9])) == 4
    assert metrics.mrr(np.empty(0, np.int64)) is None


def test_relevant_items_within_a_depth_match_scikit_learn():
    rng = np.random.default_rng(7)
    queries, database = (unit(rng.normal(size=(n, 6)).astype(np.float32)) for n in (12, 60))
    places = np.arange(12) % 3, rng.integers(3, size=60)
    found = rank_relevant(queries, database, *places, NONE)
    order = np.argsort(-(queries @ database.T), axis=1)
    relevant = places[1] == places[0][:, None]
    for column, k in zip(found.hits.T, metrics.DEPTHS, strict=True):
        precision, recall = [], []
        for i in range(12):
            chosen = np.isin(np.arange(60), order[i, :k])
            precision.append(precision_score(relevant[i], chosen))
            recall.append(recall_score(relevant[i], chosen))
        assert metrics.precision_at(column, k) == pytest.approx(np.mean(precision))
        assert metrics.relevant_recall(column, found.relevant) == pytest.approx(np.mean(recall))


def test_metrics_of_nothing_are_undefined():
    none = np.empty(0, np.int64)
    assert mean(reciprocal_rank_at(none, 5)) is None
    assert recall_at(none, 5) is None
    assert median(none) is None


def test_map_matches_scikit_learn():
    rng = np.random.default_rng(0)
    queries, database = (unit(rng.normal(size=(n, 6)).astype(np.float32)) for n in (12, 30))
    truth = rng.integers(30, size=12)
    relevant = np.zeros((12, 30), int)
    relevant[np.arange(12), truth] = 1
    wanted = label_ranking_average_precision_score(relevant, queries @ database.T)
    rank = rank_truth(queries, database, truth, NONE).rank
    assert mean(reciprocal_rank_at(rank, 30)) == pytest.approx(wanted, rel=1e-6)


def test_unit_keeps_directions_and_leaves_zeros():
    vectors = np.array([[3, 4], [0, 0], [1e-3, 0]], np.float32)
    np.testing.assert_allclose(unit(vectors), [[0.6, 0.8], [0, 0], [1, 0]], atol=1e-6)


def test_neighbours_are_the_largest_products():
    rng = np.random.default_rng(0)
    queries, database = (unit(rng.normal(size=(n, 8)).astype(np.float32)) for n in (5, 40))
    scores, positions = neighbours(queries, database, 7)
    wanted = np.argsort(-(queries @ database.T), axis=1)[:, :7]
    np.testing.assert_array_equal(positions, wanted)
    np.testing.assert_allclose(
        scores, np.take_along_axis(queries @ database.T, wanted, 1), rtol=1e-5, atol=1e-6
    )
    assert neighbours(queries, database[:3], 7)[1].shape == (5, 3)


def test_several_relevant_tiles_by_hand():
    scores = [[0.9, 0.8, 0.7, 0.6, 0.5], [0.5, 0.6, 0.7, 0.8, 0.9]]
    found = ranked_relevant(scores, [1, 1], [1, 0, 1, 0, 1], k=2)
    # Relevant at ranks 1, 3 and 5 either way.
    assert found.rank.tolist() == [1, 1]
    assert found.first.tolist() == [0, 4]
    assert found.relevant.tolist() == [3, 3]
    np.testing.assert_allclose(found.ap, [(1 + 2 / 3 + 3 / 5) / 3] * 2)
    np.testing.assert_allclose(found.ap_at, [1 / 2] * 2)
    found = ranked_relevant(scores[:1], [1], [0, 0, 1, 1, 0])
    assert (found.rank.tolist(), found.first.tolist()) == ([3], [0])
    np.testing.assert_allclose(found.ap_at, [(1 / 3 + 2 / 4) / 2])


def test_the_query_itself_is_taken_out_of_its_class():
    scores = [[1.0, 0.5, 0.9, 0.1]]
    found = ranked_relevant(scores, [7], [7, 7, 3, 3], (np.array([0]), np.array([0])))
    assert (found.rank[0], found.first[0], found.relevant[0]) == (2, 2, 1)
    np.testing.assert_allclose(found.ap, [1 / 2])


def test_ties_never_help_several_relevant_tiles():
    found = ranked_relevant([[0.5, 0.5, 0.5, 0.2]], [1], [1, 1, 0, 1])
    assert (found.rank[0], found.first[0]) == (2, 2)
    np.testing.assert_allclose(found.ap, [(1 / 2 + 2 / 3 + 3 / 4) / 3])
    blank = unit(np.ones((6, 4), np.float32))
    found = rank_relevant(blank, blank, np.arange(6) % 2, np.arange(6) % 2, NONE)
    assert found.rank.tolist() == [4] * 6
    np.testing.assert_allclose(found.ap, (1 / 4 + 2 / 5 + 3 / 6) / 3)


@pytest.mark.parametrize("block", [2**24, 40, 1])
def test_several_relevant_tiles_as_counted_by_hand(monkeypatch, block):
    monkeypatch.setattr(metrics, "SCORES", block)
    rng = np.random.default_rng(3)
    queries = rng.integers(-3, 4, (19, 5)).astype(np.float32)
    database = rng.integers(-3, 4, (23, 5)).astype(np.float32)
    places = rng.integers(4, size=19), rng.integers(4, size=23)
    pairs = np.unique(rng.integers([0, 0], [19, 23], (60, 2)), axis=0)
    found = rank_relevant(queries, database, *places, tuple(rng.permutation(pairs).T), k=3)
    scores = queries @ database.T
    for i in range(19):
        out = {j for q, j in pairs.tolist() if q == i}
        relevant = places[1] == places[0][i]
        wanted = precision_by_hand(scores[i].tolist(), relevant, out, 3)
        mine = (found.rank[i], found.ap[i], found.ap_at[i], found.relevant[i])
        assert mine == pytest.approx(wanted)
        assert found.first[i] not in out
        assert relevant[found.first[i]] == (wanted[0] == 1)
        assert scores[i, found.first[i]] == max(scores[i, j] for j in range(23) if j not in out)
        best = scores[i][[j for j in range(23) if relevant[j] and j not in out]].max()
        assert found.score[i] == scores[i][found.match[i]] == best
        assert relevant[found.match[i]]
    assert 0 < (found.rank == 1).sum() < 19


def test_average_precision_matches_scikit_learn():
    rng = np.random.default_rng(0)
    queries, database = (unit(rng.normal(size=(n, 6)).astype(np.float32)) for n in (12, 60))
    places = np.arange(12) % 3, rng.integers(3, size=60)
    found = rank_relevant(queries, database, *places, NONE)
    scores = queries @ database.T
    for i in range(12):
        wanted = average_precision_score(places[1] == places[0][i], scores[i])
        assert found.ap[i] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("broken", [False, True])
def test_one_relevant_tile_is_ranked_as_the_one_match(broken):
    rng = np.random.default_rng(4)
    queries, database = (rng.integers(-2, 3, (n, 4)).astype(np.float32) for n in (30, 40))
    if broken:
        queries[3], database[7], database[8] = np.nan, np.nan, np.nan
    # The sixth query asks for the first of the two that are broken.
    truth = np.roll(np.arange(40), -2)[:30]
    database_place = np.arange(40)
    pairs = np.unique(rng.integers([0, 0], [30, 40], (90, 2)), axis=0)
    neutral = tuple(pairs[pairs[:, 1] != truth[pairs[:, 0]]].T)
    one = rank_truth(queries, database, truth, neutral)
    several = rank_relevant(queries, database, truth, database_place, neutral)
    np.testing.assert_array_equal(several.rank, one.rank)
    assert mean(several.ap_at) == pytest.approx(mean(reciprocal_rank_at(one.rank, 5)))
    assert mean(several.ap) == pytest.approx((1 / one.rank).mean())
    if not broken:
        np.testing.assert_array_equal(several.first == truth, one.rank == 1)
    assert len(set(one.rank.tolist())) > 5


def test_without_a_relevant_tile_nothing_is_found():
    found = ranked_relevant([[0.3, 0.9]], [5], [1, 2])
    assert (found.rank[0], found.first[0], found.relevant[0]) == (3, 1, 0)
    assert (found.ap[0], found.ap_at[0]) == (0, 0)


# Properties of any ranking


@st.composite
def searches(draw):
    """Scores (q, n) of few distinct values, the match of each query, and neutral pairs."""
    queries, tiles = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = rng.integers(-2, draw(st.integers(-1, 40)), (queries, tiles)).astype(np.float32)
    truth = rng.integers(tiles, size=queries)
    neutral = rng.random((queries, tiles)) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    neutral[np.arange(queries), truth] = False
    return scores, truth, neutral.nonzero()


@given(searches())
def test_a_rank_is_that_of_plain_loops(search):
    ranks, firsts = brute_force(*search)
    found = ranked(*search)
    assert found.rank.tolist() == ranks
    rows = np.arange(len(ranks))
    np.testing.assert_array_equal(search[0][rows, found.first], search[0][rows, firsts])


@given(searches(), st.randoms(use_true_random=False))
def test_the_order_of_the_database_changes_nothing(search, random):
    scores, truth, (query, tile) = search
    order = list(range(scores.shape[1]))
    random.shuffle(order)
    place_of = np.argsort(order)
    one = ranked(*search)
    other = ranked(scores[:, order], place_of[truth], (query, place_of[tile]))
    np.testing.assert_array_equal(other.rank, one.rank)
    np.testing.assert_array_equal(other.score, one.score)
    np.testing.assert_array_equal(other.top_score, one.top_score)
    np.testing.assert_array_equal(other.match, place_of[one.match])


@given(searches(), st.randoms(use_true_random=False))
def test_the_order_of_the_database_changes_no_precision(search, random):
    scores, place, (query, tile) = search
    tile_place = np.arange(scores.shape[1]) // 2
    place = tile_place[place]
    order = list(range(scores.shape[1]))
    random.shuffle(order)
    one = ranked_relevant(scores, place, tile_place, (query, tile))
    shuffled = query, np.argsort(order)[tile]
    other = ranked_relevant(scores[:, order], place, tile_place[order], shuffled)
    for name in ("rank", "relevant", "hits", "top_score"):
        np.testing.assert_array_equal(getattr(other, name), getattr(one, name), name)
    np.testing.assert_allclose(other.ap, one.ap)
    np.testing.assert_allclose(other.ap_at, one.ap_at)


@given(searches())
def test_a_tile_as_good_as_the_match_costs_a_rank(search):
    scores, truth, neutral = search
    one = ranked(*search)
    double = scores[np.arange(len(truth)), truth][:, None]
    assert ranked(np.hstack([scores, double]), truth, neutral).rank.tolist() == [
        rank + 1 for rank in one.rank
    ]

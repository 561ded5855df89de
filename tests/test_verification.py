"""Pair verification: the pairs that are drawn, and metrics by hand and by scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_curve, roc_auc_score

from geomatch.evaluation.verification import (
    BINS,
    POINTS,
    ROC,
    confusion,
    histogram,
    precision_recall,
    sample,
)

NONE = (np.empty(0, np.int64), np.empty(0, np.int64))


def draw(query_place, database_place, neutral=NONE, most=20_000, seed=0):
    rng = np.random.default_rng(seed)
    return sample(np.asarray(query_place), np.asarray(database_place), neutral, most, rng)


def test_each_anchor_has_a_pair_of_its_place_and_one_of_another():
    rng = np.random.default_rng(1)
    query_place, database_place = rng.integers(6, size=300), rng.integers(6, size=200)
    neutral = np.unique(rng.integers([0, 0], [300, 200], (9_000, 2)), axis=0)
    found = draw(query_place, database_place, tuple(neutral.T))
    assert sorted(found.anchor.tolist()) == list(range(300))
    np.testing.assert_array_equal(database_place[found.same], query_place[found.anchor])
    assert (database_place[found.other] != query_place[found.anchor]).all()
    left_out = set(map(tuple, neutral.tolist()))
    for position in (found.same, found.other):
        assert not left_out & set(zip(found.anchor.tolist(), position.tolist(), strict=True))


def test_pairs_are_spread_over_anchors_and_database():
    place = np.arange(5_000) % 10
    found = draw(place, place, (np.arange(5_000), np.arange(5_000)), most=1_000)
    assert len(found.anchor) == len(set(found.anchor.tolist())) == 1_000
    # Of a nested loop, the first pairs would have few anchors and the first of the database.
    for position in (found.anchor, found.same, found.other):
        assert np.histogram(position, 5, (0, 5_000))[0].min() > 150
    assert (found.anchor != found.same).all()


def test_pairs_are_those_of_the_seed():
    place = np.arange(100) % 7
    first, again, other = (draw(place, place, seed=seed) for seed in (0, 0, 1))
    for mine, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(mine, same)
    assert (first.other != other.other).any()


def test_anchors_without_a_pair_are_left_out():
    # Of place 2 the database has the query itself only, of place 9 nothing.
    found = draw([1, 2, 9], [1, 2, 1], (np.array([1]), np.array([1])))
    assert found.anchor.tolist() == [0]
    assert found.other.tolist() == [1]
    assert len(draw([1, 1], [1, 1]).anchor) == 0


def test_metrics_by_hand():
    same, other = np.array([0.9, 0.8, 0.6, 0.3]), np.array([0.7, 0.4, 0.2, 0.1])
    found = ROC.of(same, other)
    # Of 16 pairs of a match and another, 13 are in order.
    assert found.area == pytest.approx(13 / 16)
    assert found.equal_error_rate == pytest.approx(1 / 4)
    assert found.threshold(0) == 0.8
    assert found.threshold(0.01) == 0.8
    assert found.threshold(0.25) == 0.6
    assert found.threshold(1) == 0.1
    assert confusion(same, other, 0.6) == [[3, 1], [1, 3]]


def test_metrics_match_scikit_learn():
    rng = np.random.default_rng(2)
    same, other = rng.normal(1, 1, 400).round(2), rng.normal(0, 1, 300).round(2)
    found = ROC.of(same, other)
    truth, scores = np.repeat([1, 0], [400, 300]), np.concatenate([same, other])
    assert found.area == pytest.approx(roc_auc_score(truth, scores))
    for fpr in (0.001, 0.01, 0.1, 0.5):
        threshold = found.threshold(fpr)
        assert (other >= threshold).mean() <= fpr
        lower = scores[scores < threshold].max()
        assert (other >= lower).mean() > fpr
        wanted = confusion_matrix(truth, scores >= threshold)
        assert confusion(same, other, threshold) == wanted.tolist()
    # Around the equal error rate both errors are as large, but for one step of the curve.
    rate = found.equal_error_rate
    nearest = scores[np.argmin([abs((other >= t).mean() - (same < t).mean()) for t in scores])]
    assert (other >= nearest).mean() == pytest.approx(rate, abs=0.01)
    assert (same < nearest).mean() == pytest.approx(rate, abs=0.01)


def test_perfect_and_worthless_scores():
    perfect = ROC.of(np.full(5, 0.9), np.full(5, 0.1))
    assert (perfect.area, perfect.equal_error_rate, perfect.threshold(0.01)) == (1, 0, 0.9)
    alike = ROC.of(np.full(5, 0.5), np.full(5, 0.5))
    assert (alike.area, alike.equal_error_rate) == (0.5, 0.5)
    # No threshold keeps others out but one above all scores, which is a number all the same.
    assert 0.5 < alike.threshold(0.01) < 0.5001
    assert confusion(np.full(5, 0.5), np.full(5, 0.5), alike.threshold(0.01)) == [[5, 0], [5, 0]]


def test_scores_of_nan_match_nothing():
    same, other = np.array([0.9, np.nan]), np.array([0.1, np.nan])
    found = ROC.of(same, other)
    assert found.threshold(0) == 0.9
    assert confusion(same, other, 0.1) == [[1, 1], [1, 1]]
    assert np.isfinite(found.thresholds).all()


def test_a_thinned_curve_is_the_same_to_the_eye():
    rng = np.random.default_rng(3)
    same, other = rng.normal(1.5, 1, 20_000), rng.normal(0, 1, 20_000)
    found, drawn = ROC.of(same, other), ROC.of(same, other).thinned()
    assert len(drawn.fpr) <= POINTS < len(found.fpr)
    assert drawn.area == pytest.approx(found.area, abs=1e-4)
    for mine, whole in ((drawn.fpr, found.fpr), (drawn.tpr, found.tpr)):
        assert (mine[0], mine[-1]) == (whole[0], whole[-1]) == (0, 1)
    for fpr, tpr, threshold in zip(drawn.fpr, drawn.tpr, drawn.thresholds, strict=True):
        assert fpr == (other >= threshold).mean()
        assert tpr == (same >= threshold).mean()
    # What is short enough stays as it is.
    short = ROC.of(same[:20], other[:20])
    np.testing.assert_array_equal(short.thinned().thresholds, short.thresholds)


def test_precision_and_recall_match_scikit_learn():
    rng = np.random.default_rng(4)
    same, other = rng.normal(1, 1, 30).round(1), rng.normal(0, 1, 40).round(1)
    precision, recall = precision_recall(same, other)
    truth = np.repeat([1, 0], [30, 40])
    wanted = precision_recall_curve(truth, np.concatenate([same, other]))
    np.testing.assert_allclose(precision, wanted[0][::-1])
    np.testing.assert_allclose(recall, wanted[1][::-1])
    assert (precision[0], recall[0], recall[-1]) == (1, 0, 1)
    many = precision_recall(rng.normal(1, 1, 5_000), rng.normal(0, 1, 5_000))
    assert len(many[0]) == len(many[1]) <= POINTS
    assert (np.diff(many[1]) >= 0).all()


def test_a_histogram_counts_every_score_once():
    same, other = np.array([0.9, 0.8, 0.8, np.nan]), np.array([-0.1, 0.8, -np.inf])
    edges, mine, theirs = histogram(same, other)
    assert (edges[0], edges[-1], len(edges)) == (-0.1, 0.9, BINS + 1)
    assert (mine.sum(), theirs.sum()) == (3, 2)
    assert (mine[-1], theirs[0]) == (1, 1)
    at = np.searchsorted(edges, 0.8, "right") - 1
    assert (mine[at], theirs[at]) == (2, 1)

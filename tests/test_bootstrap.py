"""Bootstrap intervals: against plain loops, known spreads and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap as peer

from geomatch.evaluation.bootstrap import bootstrap, threshold_intervals


def test_intervals_of_lone_queries_match_scipy():
    values = np.random.default_rng(1).random((400, 2)) < [0.3, 0.8]
    found = bootstrap(values.astype(float), np.arange(400))
    for mine, column in zip(found, values.T, strict=True):
        wanted = peer(
            (column.astype(float),), np.mean, n_resamples=4000, method="percentile", rng=0
        )
        assert mine == pytest.approx([*wanted.confidence_interval], abs=0.008)
        assert mine[0] < column.mean() < mine[1]


def test_places_are_drawn_whole(monkeypatch):
    monkeypatch.setattr("geomatch.evaluation.bootstrap.DRAWS", 5)
    rng = np.random.default_rng(3)
    values, place = rng.random((12, 1)), np.array([7, 7, 7, 1, 1, 4, 4, 4, 4, 9, 9, 2])
    drawn, means = np.random.default_rng(11), []
    for _ in range(5):
        taken = [np.unique(place)[i] for i in drawn.integers(5, size=5)]
        means.append(np.mean([v for p in taken for v in values[place == p, 0]]))
    wanted = np.percentile(means, [2.5, 97.5])
    np.testing.assert_allclose(bootstrap(values, place, seed=11)[0], wanted)


def test_queries_of_one_place_count_as_one():
    values = np.random.default_rng(0).random((300, 1))
    alone = np.ptp(bootstrap(values, np.arange(300)))
    together = np.ptp(bootstrap(np.repeat(values, 4, axis=0), np.repeat(np.arange(300), 4)))
    apart = np.ptp(bootstrap(np.repeat(values, 4, axis=0), np.arange(1200)))
    assert together == pytest.approx(alone)
    assert apart < 0.6 * together


def test_intervals_are_those_of_the_seed():
    values, place = np.random.default_rng(0).random((50, 1)), np.arange(50)
    np.testing.assert_array_equal(bootstrap(values, place), bootstrap(values, place))
    assert (bootstrap(values, place) != bootstrap(values, place, seed=1)).any()


def test_what_never_varies_and_what_is_not_there():
    np.testing.assert_array_equal(bootstrap(np.ones((9, 1)), np.arange(9)), [[1, 1]])
    assert np.isnan(bootstrap(np.empty((0, 3)), np.empty(0, int))).all()


def test_a_threshold_and_the_rate_at_it_vary_together(monkeypatch):
    monkeypatch.setattr("geomatch.evaluation.bootstrap.DRAWS", 4)
    rng = np.random.default_rng(5)
    scores, tested = rng.random(40), rng.random(30)
    place, tested_place = rng.integers(8, size=40), rng.integers(6, size=30)
    draws, tested_draws = np.random.default_rng(0), np.random.default_rng(1)
    thresholds, rates = [], []
    for _ in range(4):
        drawn = [scores[place == p] for p in draws.integers(8, size=8)]
        values = np.concatenate(drawn)
        threshold = min(v for v in values if np.mean(values >= v) <= 0.2)
        others = [tested[tested_place == p] for p in tested_draws.integers(6, size=6)]
        thresholds.append(threshold)
        rates.append(np.mean(np.concatenate(others) >= threshold))
    found = threshold_intervals(scores, place, tested, tested_place, 0.2)
    np.testing.assert_allclose(
        found, [np.percentile(values, [2.5, 97.5]) for values in (thresholds, rates)]
    )


def test_a_rate_below_one_of_all_is_reached_by_none():
    scores, place = np.arange(10.0), np.arange(10)
    threshold, rate = threshold_intervals(scores, place, scores, place, 0.01)
    assert threshold[1] == pytest.approx(9)
    assert rate[0] == 0

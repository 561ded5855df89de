"""Calibration: against scikit-learn's, and against probabilities that are known."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from geomatch.evaluation.calibration import BINS, Calibration, reliability


def pairs(n=4000, seed=0):
    """Scores of the same and of other places, two normal distributions of one spread."""
    rng = np.random.default_rng(seed)
    return rng.normal(0.7, 0.1, n), rng.normal(0.4, 0.1, n)


def test_the_fit_finds_the_true_probability():
    found = Calibration.fit(*pairs(20_000))
    # Of two normals, the logit is (0.7 - 0.4) / 0.1^2 (score - 0.55).
    assert found.slope == pytest.approx(30, rel=0.05)
    assert -found.intercept / found.slope == pytest.approx(0.55, abs=0.005)
    np.testing.assert_allclose(
        found.probability(np.array([0.55, 0.6])), [0.5, 1 / (1 + np.exp(-1.5))], atol=0.03
    )


def test_the_fit_matches_scikit_learn():
    same, other = pairs()
    found = Calibration.fit(same, other)
    wanted = LogisticRegression(C=np.inf, tol=1e-8)
    wanted.fit(np.concatenate([same, other])[:, None], np.repeat([1, 0], 4000))
    # But for Platt's targets, which are a little short of 0 and 1.
    scores = np.linspace(0.2, 0.9, 20)
    np.testing.assert_allclose(
        found.probability(scores), wanted.predict_proba(scores[:, None])[:, 1], atol=0.005
    )


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_wholly_separate_pairs_have_a_finite_fit(scale):
    found = Calibration.fit(np.full(50, 0.9) * scale, np.full(50, 0.1) * scale)
    low, high = found.probability(np.array([0.1, 0.9]) * scale)
    assert low == pytest.approx(1 / 52, rel=1e-3)
    assert high == pytest.approx(51 / 52, rel=1e-3)


def test_pairs_all_alike_are_even_odds():
    found = Calibration.fit(np.full(50, 0.5), np.full(50, 0.5))
    assert found.probability(np.array([0.5])) == pytest.approx([0.5])


def test_a_score_of_nan_is_no_match():
    found = Calibration.fit(np.array([0.9, 0.8, np.nan]), np.array([0.1, np.nan, 0.2]))
    assert found.slope > 0
    assert found.probability(np.array([np.nan])) == [0]


def test_reliability_matches_scikit_learn():
    rng = np.random.default_rng(2)
    probability = rng.random(3000)
    truth = rng.random(3000) < probability**2
    found = reliability(probability[truth], probability[~truth])
    share, mean = calibration_curve(truth, probability, n_bins=BINS)
    np.testing.assert_allclose(found.share, share)
    np.testing.assert_allclose(found.probability, mean)
    assert found.pairs.sum() == 3000
    # The integral of p - p^2 over 0 to 1.
    assert found.error == pytest.approx(1 / 6, abs=0.02)


def test_reliability_by_hand():
    found = reliability(np.array([0.94, 1.0]), np.array([0.0, 0.96]))
    np.testing.assert_allclose(found.probability, [0.0, 2.9 / 3])
    np.testing.assert_allclose(found.share, [0, 2 / 3])
    assert found.pairs.tolist() == [1, 3]
    assert found.error == pytest.approx((2.9 - 2) / 4)


def test_a_good_fit_has_a_small_error():
    fitted = Calibration.fit(*pairs(seed=1))
    same, other = (fitted.probability(scores) for scores in pairs(seed=2))
    assert reliability(same, other).error < 0.02

"""Calibration: the probability that a pair shows the same place, from its score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

Float64Array = NDArray[np.float64]

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """probability = 1 / (1 + exp(-(slope * score + intercept))).

    It holds where half of all pairs show the same place, as in the pairs it is fitted on.
    """

    slope: float
    intercept: float

    @classmethod
    def fit(cls, same: NDArray[np.floating], other: NDArray[np.floating]) -> Calibration:
        """Fit a logistic regression to the scores of pairs of the same place and of other places.

        Platt 1999, "Probabilistic Outputs for Support Vector Machines", with his targets short of
        0 and 1, so that the slope stays finite where the scores separate the pairs fully.
        """
        pairs = [scores[np.isfinite(scores)].astype(np.float64) for scores in (other, same)]
        scores = np.concatenate(pairs)
        high = (len(pairs[1]) + 1) / (len(pairs[1]) + 2)
        low = 1 / (len(pairs[0]) + 2)
        target = np.repeat([low, high], [len(pairs[0]), len(pairs[1])])
        middle, spread = scores.mean(), scores.std() or 1.0
        # A target between 0 and 1 counts each score in both classes, weighted by its share.
        column = np.tile((scores - middle) / spread, 2)[:, None]
        classes = np.repeat([0, 1], len(scores))
        weights = np.concatenate([1 - target, target])
        fitted = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000)
        fitted.fit(column, classes, weights)
        slope = float(fitted.coef_[0, 0]) / spread
        return cls(slope, float(fitted.intercept_[0]) - slope * middle)

    def probability(self, scores: NDArray[np.floating]) -> Float64Array:
        """Probabilities of the same place for scores of any shape; 0 for NaN."""
        found: Float64Array = expit(self.slope * scores.astype(np.float64) + self.intercept)
        return np.nan_to_num(found, nan=0.0)


class Reliability(NamedTuple):
    """How well probabilities hold, in `BINS` bins; empty bins are left out.

    Attributes:
        probability: (b,) mean probability of each bin.
        share: (b,) share of pairs of the same place.
        pairs: (b,) number of pairs.
        error: expected calibration error: the mean difference of the two over all pairs.
    """

    probability: Float64Array
    share: Float64Array
    pairs: NDArray[np.int64]
    error: float


def reliability(same: Float64Array, other: Float64Array) -> Reliability:
    """Compare probabilities with the truth, for pairs of the same place and of other places.

    Guo, Pleiss, Sun and Weinberger 2017, "On Calibration of Modern Neural Networks".
    """
    probability = np.concatenate([same, other])
    truth = np.repeat([1.0, 0.0], [len(same), len(other)])
    code = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
    pairs = np.bincount(code, minlength=BINS)
    filled = pairs > 0
    mean, share = (
        np.bincount(code, values, BINS)[filled] / pairs[filled] for values in (probability, truth)
    )
    error = float((np.abs(mean - share) * pairs[filled]).sum() / len(probability))
    return Reliability(mean, share, pairs[filled], error)

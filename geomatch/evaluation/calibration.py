"""From the score of a pair to the probability that both show the same place."""

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

    Of pairs of which as many are of the same place as not, as they are drawn.
    """

    slope: float
    intercept: float

    @classmethod
    def fit(cls, same: NDArray[np.floating], other: NDArray[np.floating]) -> Calibration:
        """By logistic regression on the scores of pairs of the same place and of other places.

        Platt 1999, "Probabilistic Outputs for Support Vector Machines", with his targets short of
        0 and 1, so that pairs which are wholly told apart have a finite slope.
        """
        pairs = [scores[np.isfinite(scores)].astype(np.float64) for scores in (other, same)]
        scores = np.concatenate(pairs)
        high = (len(pairs[1]) + 1) / (len(pairs[1]) + 2)
        low = 1 / (len(pairs[0]) + 2)
        target = np.repeat([low, high], [len(pairs[0]), len(pairs[1])])
        middle, spread = scores.mean(), scores.std() or 1.0
        # A target between the classes is a share of each.
        column = np.tile((scores - middle) / spread, 2)[:, None]
        classes = np.repeat([0, 1], len(scores))
        weights = np.concatenate([1 - target, target])
        fitted = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000)
        fitted.fit(column, classes, weights)
        slope = float(fitted.coef_[0, 0]) / spread
        return cls(slope, float(fitted.intercept_[0]) - slope * middle)

    def probability(self, scores: NDArray[np.floating]) -> Float64Array:
        """Of the same place, for scores of any shape; 0 where one is no number."""
        found: Float64Array = expit(self.slope * scores.astype(np.float64) + self.intercept)
        return np.nan_to_num(found, nan=0.0)


class Reliability(NamedTuple):
    """How probabilities hold, in `BINS` bins of them; empty bins are left out.

    Attributes:
        probability: (b,) mean of each bin.
        share: (b,) that are of the same place.
        pairs: (b,) how many.
        error: expected calibration error: the mean difference of both over all pairs.
    """

    probability: Float64Array
    share: Float64Array
    pairs: NDArray[np.int64]
    error: float


def reliability(same: Float64Array, other: Float64Array) -> Reliability:
    """Of the probabilities of pairs of the same place, and of other places.

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

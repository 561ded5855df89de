"""Pair verification: a threshold of the score decides whether two tiles show the same place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import auc, precision_recall_curve, roc_curve

from geomatch.errors import UsageError

Float64Array = NDArray[np.float64]
Ints = NDArray[np.int64]

TRIES = 64
"""Draws for each anchor, which is left out if none of them fits."""
POINTS = 200
"""Points of a curve at most."""
BINS = 50
"""Bins of a histogram."""


class Pairs(NamedTuple):
    """A pair of the same place and one of other places for each anchor.

    Attributes:
        anchor: (n,) indices of queries.
        same: (n,) positions in the database of tiles of the anchors' places.
        other: (n,) positions in the database of tiles of other places.
    """

    anchor: Ints
    same: Ints
    other: Ints


def check_fpr(fpr: float) -> None:
    """Check that a false positive rate lies between 0 and 1.

    Raises:
        UsageError: it does not.
    """
    if not 0 <= fpr <= 1:
        raise UsageError(f"--fpr {fpr}: a share between 0 and 1 is expected")


def sample(
    query_place: Ints,
    database_place: Ints,
    neutral: tuple[Ints, Ints],
    most: int,
    rng: np.random.Generator,
) -> Pairs:
    """Draw a tile of the same place and one of another place for at most `most` queries.

    Args:
        query_place: (q,) codes of places.
        database_place: (n,) codes of places.
        neutral: parallel (query, position) arrays of pairs that count as neither.
    """
    n = len(database_place)
    anchor = rng.permutation(len(query_place))[:most]
    place = query_place[anchor]
    order = np.argsort(database_place, kind="stable")
    low, high = (np.searchsorted(database_place[order], place, side) for side in ("left", "right"))
    left_out = np.unique(neutral[0] * n + neutral[1])

    def draw(some: Ints, same: bool) -> Ints:
        """(len(some),) positions drawn for some anchors, -1 where the tile does not fit."""
        count = (high - low)[some] if same else np.full(len(some), n)
        drawn = rng.integers(np.maximum(count, 1))
        position = order[np.minimum(low[some] + drawn, n - 1)] if same else drawn
        fits = (count > 0) & ((database_place[position] == place[some]) == same)
        fits &= ~np.isin(anchor[some] * n + position, left_out)
        return np.where(fits, position, -1)

    found = []
    for same in (True, False):
        position = np.full(len(anchor), -1)
        for _ in range(TRIES):
            missing = np.flatnonzero(position < 0)
            position[missing] = draw(missing, same)
        found.append(position)
    whole = (found[0] >= 0) & (found[1] >= 0)
    return Pairs(anchor[whole], found[0][whole], found[1][whole])


@dataclass(frozen=True)
class ROC:
    """Receiver operating characteristic of scores.

    Attributes:
        fpr, tpr: (t,) shares of pairs of other places, and of the same place, that pass.
        thresholds: (t,) falling; a pair passes if it scores at least as much.
    """

    fpr: Float64Array
    tpr: Float64Array
    thresholds: Float64Array

    @classmethod
    def of(cls, same: NDArray[np.floating], other: NDArray[np.floating]) -> ROC:
        """The curve of the scores of pairs of the same place (n,) and of other places (m,)."""
        scores = _numbers(np.concatenate([same, other]))
        truth = np.repeat([1, 0], [len(same), len(other)])
        fpr, tpr, thresholds = roc_curve(truth, scores, drop_intermediate=False)
        # The least threshold that nothing passes replaces infinity, which JSON cannot hold.
        thresholds[0] = np.nextafter(thresholds[1], np.inf)
        return cls(fpr, tpr, thresholds)

    @property
    def area(self) -> float:
        """Area under the curve."""
        return float(auc(self.fpr, self.tpr))

    @property
    def equal_error_rate(self) -> float:
        """The false positive rate where it equals the miss rate, interpolated."""
        missed = 1 - self.tpr
        i = int(np.argmax(self.fpr >= missed))
        before, after = (missed - self.fpr)[[i - 1, i]]
        part = before / (before - after)
        return float(self.fpr[i - 1] + part * (self.fpr[i] - self.fpr[i - 1]))

    def threshold(self, fpr: float) -> float:
        """The lowest threshold that at most the share `fpr` of other places passes."""
        return float(self.thresholds[self.fpr <= fpr][-1])

    def thinned(self) -> ROC:
        """At most `POINTS` of its points, evenly along the curve."""
        kept = _along(self.fpr, self.tpr)
        return ROC(self.fpr[kept], self.tpr[kept], self.thresholds[kept])


def precision_recall(
    same: NDArray[np.floating], other: NDArray[np.floating]
) -> tuple[Float64Array, Float64Array]:
    """Precision and recall of pairs as the threshold falls, at most `POINTS` of each.

    Recall rises from 0, where precision is 1 by definition.
    """
    scores = _numbers(np.concatenate([same, other]))
    truth = np.repeat([1, 0], [len(same), len(other)])
    precision, recall, _ = precision_recall_curve(truth, scores)
    kept = _along(recall[::-1], precision[::-1])
    return precision[::-1][kept], recall[::-1][kept]


def histogram(
    same: NDArray[np.floating], other: NDArray[np.floating]
) -> tuple[Float64Array, NDArray[np.int64], NDArray[np.int64]]:
    """Edges (BINS + 1,) of bins over all finite scores, and counts of both kinds (BINS,)."""
    finite = [scores[np.isfinite(scores)].astype(np.float64) for scores in (same, other)]
    edges = np.histogram_bin_edges(np.concatenate(finite), BINS)
    counts = [np.histogram(scores, edges)[0] for scores in finite]
    return edges, counts[0], counts[1]


def _along(x: Float64Array, y: Float64Array) -> Ints:
    """Indices of at most `POINTS` points of a curve, its ends among them, evenly along it."""
    length = np.concatenate([[0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    if len(length) <= POINTS:
        return np.arange(len(length))
    wanted = np.linspace(0, length[-1], POINTS)
    kept: Ints = np.unique(np.searchsorted(length, wanted).clip(max=len(length) - 1))
    kept[-1] = len(length) - 1
    return kept


def confusion(
    same: NDArray[np.floating], other: NDArray[np.floating], threshold: float
) -> list[list[int]]:
    """Counts of pairs, [[true negatives, false positives], [false negatives, true positives]]."""
    return [
        [int((~passes).sum()), int(passes.sum())]
        for passes in (_numbers(scores) >= threshold for scores in (other, same))
    ]


def _numbers(scores: NDArray[np.floating]) -> Float64Array:
    """Scores in which NaN is below all others."""
    return np.nan_to_num(scores.astype(np.float64), nan=float(np.finfo(np.float32).min))

"""Bootstrap intervals of means over queries, drawn by place.

The queries of one place, from several years, succeed or fail together, so whole places are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]
Interval = tuple[float, float]

DRAWS = 1000
LEVEL = 95.0
"""Per cent."""


def bootstrap(values: Float64Array, place: NDArray[np.int64], seed: int = 0) -> Float64Array:
    """95 % percentile intervals of means.

    Efron and Tibshirani 1993, "An Introduction to the Bootstrap". Given the differences of two
    systems on the same queries, the result is their paired interval.

    Args:
        values: (n, m) of each query, for m means.
        place: (n,) codes of places.

    Returns:
        (m, 2) low and high; NaN without values.
    """
    if not len(values):
        return np.full((values.shape[1], 2), np.nan)
    codes = np.unique(place, return_inverse=True)[1].reshape(-1)
    count = np.bincount(codes)
    sums = np.stack([np.bincount(codes, column) for column in values.T], axis=1)
    rng, n = np.random.default_rng(seed), len(count)
    means = np.empty((DRAWS, values.shape[1]))
    for draw in means:
        times = np.bincount(rng.integers(n, size=n), minlength=n)
        draw[:] = times @ sums / (times @ count)
    tail = (100 - LEVEL) / 2
    interval: Float64Array = np.percentile(means, [tail, 100 - tail], axis=0).T
    return interval


def threshold_intervals(
    scores: NDArray[np.floating],
    place: NDArray[np.int64],
    tested: NDArray[np.floating],
    tested_place: NDArray[np.int64],
    fpr: float,
) -> tuple[Interval, Interval]:
    """95 % intervals of a threshold, and of the rate at which other scores reach it.

    Both sets of scores are drawn by place, so that the second interval has what is uncertain in
    the threshold and in the rate.

    Args:
        scores: (n,) of pairs of different places, of which a share `fpr` at most is to reach the
            threshold.
        place: (n,) codes of their places.
        tested, tested_place: (m,) the same of other pairs.
    """
    order, falling = np.argsort(-scores, kind="stable"), np.argsort(-tested, kind="stable")
    known, others = scores[order], tested[falling]
    thresholds, rates = np.empty((2, DRAWS))
    pairs = zip(_counts(place[order], 0), _counts(tested_place[falling], 1), strict=True)
    for draw, (times, tested_times) in enumerate(pairs):
        drawn, total = known[times > 0], times[times > 0].cumsum()
        passing = np.searchsorted(total, fpr * total[-1], "right")
        threshold = drawn[passing - 1] if passing else np.nextafter(drawn[0], np.inf)
        reached = np.searchsorted(-others, -threshold, "right")
        thresholds[draw] = threshold
        rates[draw] = tested_times[:reached].sum() / tested_times.sum()
    tail = (100 - LEVEL) / 2
    low, high = np.percentile([thresholds, rates], [tail, 100 - tail], axis=1).tolist()
    return (low[0], high[0]), (low[1], high[1])


def _counts(place: NDArray[np.int64], seed: int) -> Iterator[NDArray[np.int64]]:
    """How often each row (n,) is in each of `DRAWS` samples of places."""
    codes = np.unique(place, return_inverse=True)[1].reshape(-1)
    rng, n = np.random.default_rng(seed), int(codes.max()) + 1
    for _ in range(DRAWS):
        yield np.bincount(rng.integers(n, size=n), minlength=n)[codes]

"""Bootstrap intervals of means over queries, drawn by place.

The queries of one place, from several years, succeed or fail together, so whole places are drawn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]

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

"""Exact neighbours by inner product, in blocks."""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def unit(vectors: Floats) -> Floats:
    """Rows of unit length, so that an inner product is the cosine; zero rows stay zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Floats = (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
    return scaled


def neighbours(queries: Floats, database: Floats, k: int) -> tuple[Floats, NDArray[np.int64]]:
    """The k rows of `database` (n, d) with the largest inner product to each query (q, d).

    Returns:
        Scores and positions, (q, min(k, n)), best first.
    """
    k = min(k, len(database))
    scores, positions = faiss.knn(queries, database, k, metric=faiss.METRIC_INNER_PRODUCT)
    return scores, positions

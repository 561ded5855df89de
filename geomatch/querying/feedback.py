"""Queries that are moved towards or away from answers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]

ALPHA = 3.0
"""Power of the similarity by which an answer counts, as in the paper."""
LIKED, UNLIKED = 0.75, 0.15
"""Shares of confirmed and of rejected answers beside that of the query, 1: the usual ones."""


def expand(query: Float32Array, answers: Float32Array) -> Float32Array:
    """Alpha query expansion: the mean of a query and of its answers, which count by similarity.

    Radenovic, Tolias and Chum 2018, "Fine-tuning CNN image retrieval with no human annotation".

    Args:
        query: descriptor (d,), of unit length where descriptors are compared by the cosine.
        answers: (k, d) its nearest tiles.
    """
    lengths = np.linalg.norm(answers, axis=1) * np.linalg.norm(query)
    weights = np.maximum(answers @ query / np.maximum(lengths, 1e-12), 0) ** ALPHA
    moved: Float32Array = (query + weights @ answers) / (1 + weights.sum())
    return moved.astype(np.float32)


def rocchio(queries: Float32Array, liked: Float32Array, unliked: Float32Array) -> Float32Array:
    """Move queries (n, d) to the mean of confirmed answers, and away from that of rejected ones.

    Rocchio 1971, "Relevance feedback in information retrieval". The shares add up to one, so that
    distances stay comparable too.

    Args:
        liked, unliked: (m, d) each, of any number.
    """
    total, moved = 1.0, queries.astype(np.float64)
    for answers, share in ((liked, LIKED), (unliked, -UNLIKED)):
        if len(answers):
            total, moved = total + share, moved + share * answers.mean(axis=0)
    result: Float32Array = (moved / total).astype(np.float32)
    return result

"""Metrics of a ranking, from arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

QUERY_BLOCK, DATABASE_BLOCK = 512, 65_536
TIE = 1e-6
"""Scores nearer than this are a tie: identical tiles may differ in the last bits of a product."""


class Ranking(NamedTuple):
    """Of each query: the rank of its match, and the position of the first answer."""

    rank: Ints
    first: Ints


def rank_truth(
    queries: Floats, database: Floats, truth: Ints, neutral: tuple[Ints, Ints]
) -> Ranking:
    """Rank of each query's one match, in blocks of bounded memory.

    Rank is 1 + the number of other tiles that score at least as high: ties never help.

    Args:
        queries: (q, d) unit vectors.
        database: (n, d) unit vectors.
        truth: (q,) position of the match.
        neutral: parallel (query, position) arrays of tiles to take out of the ranking.
    """
    rank = np.ones(len(queries), np.int64)
    first = truth.copy()
    order = np.argsort(neutral[0], kind="stable")
    rows, positions = neutral[0][order], neutral[1][order]
    for start in range(0, len(queries), QUERY_BLOCK):
        block = queries[start : start + QUERY_BLOCK]
        mine = slice(*np.searchsorted(rows, [start, start + len(block)]))
        out_rows = np.concatenate([np.arange(len(block)), rows[mine] - start])
        out_positions = np.concatenate([truth[start : start + len(block)], positions[mine]])
        goal = np.einsum("qd,qd->q", block, database[truth[start : start + len(block)]])
        best = np.full(len(block), -np.inf, np.float32)
        for begin in range(0, len(database), DATABASE_BLOCK):
            scores = block @ database[begin : begin + DATABASE_BLOCK].T
            inside = (out_positions >= begin) & (out_positions < begin + scores.shape[1])
            scores[out_rows[inside], out_positions[inside] - begin] = -np.inf
            # Written so that what is no number counts as ahead.
            rank[start : start + len(block)] += (~(scores < goal[:, None] - TIE)).sum(axis=1)
            top = scores.argmax(axis=1)
            value = scores[np.arange(len(block)), top]
            better = value > best
            best[better] = value[better]
            ahead = better & (value >= goal - TIE)
            first[start : start + len(block)][ahead] = top[ahead] + begin
        # A query that is no number finds nothing.
        rank[start : start + len(block)][~np.isfinite(goal)] = len(database)
    return Ranking(rank, first)


def map_at(rank: Ints, k: int) -> float | None:
    """mAP@k for one relevant item: mean of 1/rank within k, else 0 (the same as MRR@k)."""
    return float(np.where(rank <= k, 1 / rank, 0).mean()) if len(rank) else None


def recall_at(rank: Ints, k: int) -> float | None:
    """Share of queries with their match among the first k."""
    return float((rank <= k).mean()) if len(rank) else None


def median(values: NDArray[np.number]) -> float | None:
    """The median, None of nothing."""
    return float(np.median(values)) if len(values) else None

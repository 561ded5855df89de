"""Metrics of a ranking, from arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

QUERY_BLOCK, DATABASE_BLOCK = 512, 65_536
SCORES = 2**24
"""Of one block where whole rows are ranked: 64 MB, and about as much again for what is relevant."""
TIE = 1e-6
"""Scores of unit vectors nearer than this are a tie, and of longer ones by as much more: identical
tiles may differ in the last bits of a product."""


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
        matches = database[truth[start : start + len(block)]]
        goal = np.einsum("qd,qd->q", block, matches)
        goal -= _tie(np.einsum("qd,qd->q", np.abs(block), np.abs(matches)))
        best = np.full(len(block), -np.inf, np.float32)
        for begin in range(0, len(database), DATABASE_BLOCK):
            scores = block @ database[begin : begin + DATABASE_BLOCK].T
            inside = (out_positions >= begin) & (out_positions < begin + scores.shape[1])
            scores[out_rows[inside], out_positions[inside] - begin] = -np.inf
            # Written so that what is no number counts as ahead.
            rank[start : start + len(block)] += (~(scores < goal[:, None])).sum(axis=1)
            top = scores.argmax(axis=1)
            value = scores[np.arange(len(block)), top]
            better = value > best
            best[better] = value[better]
            ahead = better & (value >= goal)
            first[start : start + len(block)][ahead] = top[ahead] + begin
        # A query that is no number finds nothing.
        rank[start : start + len(block)][~np.isfinite(goal)] = len(database)
    return Ranking(rank, first)


def _tie(terms: Floats) -> Floats:
    """How far a score may be from a match's to be a tie, from the sum of the sizes of its terms."""
    tie: Floats = np.float32(TIE) * np.maximum(terms, 1)
    return tie


class Precision(NamedTuple):
    """Of each query with several relevant items: how they rank.

    Attributes:
        rank: of the first of them.
        first: position of the first answer.
        ap: average precision over the whole ranking.
        ap_at: the same within the first k, of at most k: sum of P(i) rel(i) over min(relevant, k).
        relevant: how many there are; without any, nothing is found.
    """

    rank: Ints
    first: Ints
    ap: NDArray[np.float64]
    ap_at: NDArray[np.float64]
    relevant: Ints


def rank_relevant(
    queries: Floats,
    database: Floats,
    query_place: Ints,
    database_place: Ints,
    neutral: tuple[Ints, Ints],
    k: int = 5,
) -> Precision:
    """Precision of each query's ranking, where all tiles of its place are relevant.

    Other tiles that score as high as a relevant one come before it, as in `rank_truth`, which
    gives the same where one tile is relevant. Blocks of queries bound the memory.

    Args:
        queries: (q, d) unit vectors.
        database: (n, d) unit vectors.
        query_place: (q,) codes of places.
        database_place: (n,) codes of places.
        neutral: parallel (query, position) arrays of tiles to take out of the ranking.
    """
    n = len(database)
    found = Precision(
        rank=np.full(len(queries), n + 1),
        first=np.zeros(len(queries), np.int64),
        ap=np.zeros(len(queries)),
        ap_at=np.zeros(len(queries)),
        relevant=np.zeros(len(queries), np.int64),
    )
    order = np.argsort(neutral[0], kind="stable")
    rows, positions = neutral[0][order], neutral[1][order]
    block = max(1, SCORES // max(n, 1))
    for start in range(0, len(queries), block):
        scores = queries[start : start + block] @ database.T
        relevant = query_place[start : start + block, None] == database_place
        others = ~relevant
        mine = slice(*np.searchsorted(rows, [start, start + len(scores)]))
        for kind in (relevant, others):
            kind[rows[mine] - start, positions[mine]] = False
        for i in range(len(scores)):
            tie = _tie(np.abs(database[relevant[i]]) @ np.abs(queries[start + i]))
            _rank_query(found, start + i, scores[i], relevant[i], others[i], tie, k)
    return found


def _rank_query(
    found: Precision,
    query: int,
    scores: Floats,
    relevant: NDArray[np.bool_],
    others: NDArray[np.bool_],
    tie: Floats,
    k: int,
) -> None:
    """Enter the figures of one query, whose scores are (n,); `tie` is of each relevant one."""
    rival = int(np.where(others & ~np.isnan(scores), scores, -np.inf).argmax())
    found.first[query] = rival
    if not relevant.any():
        return
    where = np.flatnonzero(relevant)
    goals = np.where(np.isfinite(scores[where]), scores[where], -np.inf)
    order = np.argsort(-goals, kind="stable")
    goals, tie = goals[order], tie[order]
    within = np.arange(1, len(goals) + 1)
    # Sorting puts what is no number last, so that it counts as ahead.
    rivals = np.sort(scores[others])
    rank = within + len(rivals) - np.searchsorted(rivals, goals - tie)
    # A query that is no number finds nothing.
    rank = np.where(np.isfinite(goals), rank, len(scores) - len(goals) + within)
    precision = within / rank
    if rank[0] == 1 or not np.isfinite(goals[0]):
        found.first[query] = where[order[0]]
    found.rank[query] = rank[0]
    found.ap[query] = precision.mean()
    found.ap_at[query] = precision[rank <= k].sum() / min(len(goals), k)
    found.relevant[query] = len(goals)


def map_at(rank: Ints, k: int) -> float | None:
    """mAP@k for one relevant item: mean of 1/rank within k, else 0 (the same as MRR@k)."""
    return mean(np.where(rank <= k, 1 / rank, 0))


def recall_at(rank: Ints, k: int) -> float | None:
    """Share of queries with their match among the first k."""
    return float((rank <= k).mean()) if len(rank) else None


def mean(values: NDArray[np.floating]) -> float | None:
    """The mean, None of nothing."""
    return float(values.mean()) if len(values) else None


def median(values: NDArray[np.number]) -> float | None:
    """The median, None of nothing."""
    return float(np.median(values)) if len(values) else None

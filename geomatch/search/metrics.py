"""Metrics of a ranking, from arrays."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
Ints = NDArray[np.int64]

QUERY_BLOCK, DATABASE_BLOCK = 512, 8192
"""Of which scores are in memory at one time: 16 MB, near the processor."""
SCORES = 2**24
"""Of one block where whole rows are ranked: 64 MB, and about as much again for what is relevant."""
TIE = 1e-6
"""Scores of unit vectors nearer than this are a tie, and of longer ones by as much more: identical
tiles may differ in the last bits of a product."""
TOP = 5
"""Answers of each query that are kept."""
DEPTHS = (1, 5, 10)
"""Of a ranking, to which relevant items are counted."""
GROUPS = 64
"""Scores of a group: the first answers are within the groups whose largest are largest."""


@dataclass(frozen=True)
class Ranking:
    """Of each query: how its match ranks, and what comes first.

    Attributes:
        rank: (q,) of the match.
        match: (q,) its position; of several matches, that of the first.
        score: (q,) its inner product.
        top: (q, TOP) positions of the first answers in order, then -1. The match stands behind
            what ties with it.
        top_score: (q, TOP) their inner products, then -inf.
    """

    rank: Ints
    match: Ints
    score: Float32Array
    top: Ints
    top_score: Float32Array

    @property
    def first(self) -> Ints:
        """(q,) position of the first answer, -1 for a query that is no number."""
        return self.top[:, 0]

    @property
    def tied(self) -> NDArray[np.bool_]:
        """(q,) whether the first two answers score the same."""
        first, second = self.top_score[:, 0], self.top_score[:, 1]
        found: NDArray[np.bool_] = second >= first - _tie(np.abs(first))
        return found & (self.top[:, 1] >= 0)


def rank_truth(
    queries: Float32Array, database: Float32Array, truth: Ints, neutral: tuple[Ints, Ints]
) -> Ranking:
    """Rank of each query's one match, in blocks of bounded memory.

    Rank is 1 + the number of other tiles that score at least as high: ties never help.

    Args:
        queries: (q, d) unit vectors.
        database: (n, d) unit vectors.
        truth: (q,) position of the match.
        neutral: parallel (query, position) arrays of tiles to take out of the ranking.
    """
    found = Ranking(
        rank=np.ones(len(queries), np.int64),
        match=truth,
        score=np.empty(len(queries), np.float32),
        top=np.empty((len(queries), TOP), np.int64),
        top_score=np.empty((len(queries), TOP), np.float32),
    )
    order = np.argsort(neutral[0], kind="stable")
    rows, positions = neutral[0][order], neutral[1][order]

    def rank(start: int) -> None:
        part = slice(start, min(start + QUERY_BLOCK, len(queries)))
        mine = slice(*np.searchsorted(rows, [part.start, part.stop]))
        out_rows = np.concatenate([np.arange(part.stop - start), rows[mine] - start])
        out_positions = np.concatenate([truth[part], positions[mine]])
        _rank_block(found, part, queries[part], database, (out_rows, out_positions))

    # NumPy leaves the other threads to work meanwhile.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(rank, range(0, len(queries), QUERY_BLOCK)))
    return found


def _rank_block(
    found: Ranking,
    part: slice,
    queries: Float32Array,
    database: Float32Array,
    out: tuple[Ints, Ints],
) -> None:
    """Enter the figures of a block of queries (q, d); `out` are pairs that are no rivals."""
    count, truth = len(queries), found.match[part]
    matches = database[truth]
    score = np.einsum("qd,qd->q", queries, matches)
    goal = score - _tie(np.einsum("qd,qd->q", np.abs(queries), np.abs(matches)))
    values = np.full((count, TOP), -np.inf, np.float32)
    positions = np.full((count, TOP), -1)
    ahead = np.zeros(count, np.int64)
    # Memory that is asked for once: every page of it costs time.
    room = np.empty(count * (DATABASE_BLOCK + GROUPS), np.float32)
    for begin in range(0, len(database), DATABASE_BLOCK):
        searched = database[begin : begin + DATABASE_BLOCK]
        groups = -(-len(searched) // GROUPS)
        scores = room[: count * groups * GROUPS].reshape(count, -1)
        np.matmul(queries, searched.T, out=scores[:, : len(searched)])
        scores[:, len(searched) :] = -np.inf
        inside = (out[1] >= begin) & (out[1] < begin + len(searched))
        scores[out[0][inside], out[1][inside] - begin] = -np.inf
        # A group's scores lie `groups` apart, so that rows of them compare as a whole.
        largest = scores.reshape(count, GROUPS, groups).max(axis=1)
        # Written so that what is no number counts as ahead.
        for i in np.flatnonzero(~(largest.max(axis=1) < goal)):
            ahead[i] += scores.shape[1] - np.count_nonzero(scores[i] < goal[i])
        if np.isnan(largest).any():
            scores[np.isnan(scores)] = -np.inf
            largest = scores.reshape(count, GROUPS, groups).max(axis=1)
        better = np.flatnonzero(largest.max(axis=1) > values[:, -1])
        if not len(better):
            continue
        near = np.arange(min(TOP, groups)) - min(TOP, groups)
        chosen = np.argpartition(largest[better], near[0], axis=1)[:, near]
        members = (chosen[:, :, None] + groups * np.arange(GROUPS)).reshape(len(better), -1)
        candidates = np.concatenate([values[better], scores[better[:, None], members]], axis=1)
        of = np.concatenate([positions[better], members + begin], axis=1)
        kept = _first(candidates)
        values[better] = np.take_along_axis(candidates, kept, 1)
        positions[better] = np.take_along_axis(of, kept, 1)
    # A query that is no number finds nothing.
    broken = ~np.isfinite(goal)
    found.rank[part] = np.where(broken, len(database), 1 + ahead)
    place = np.where(broken, TOP, (values >= goal[:, None]).sum(axis=1))
    found.score[part] = score
    found.top_score[part] = _inserted(values, score, place)
    found.top[part] = _inserted(positions, truth, place)
    found.top[part][found.top_score[part] == -np.inf] = -1


def _tie(terms: Float32Array) -> Float32Array:
    """How far a score may be from a match's to be a tie, from the sum of the sizes of its terms."""
    tie: Float32Array = np.float32(TIE) * np.maximum(terms, 1)
    return tie


def _first(values: Float32Array) -> Ints:
    """Where the `TOP` largest of each row are, best first."""
    if values.shape[1] > TOP:
        kept = np.argpartition(values, -TOP, axis=1)[:, -TOP:]
    else:
        kept = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    order = np.argsort(-np.take_along_axis(values, kept, 1), axis=1, kind="stable")
    first: Ints = np.take_along_axis(kept, order, 1)
    return first


def _inserted(columns: Any, item: Any, place: Ints) -> Any:
    """(q, TOP) of `columns` with an item (q,) at its place, and the rest moved on."""
    at = np.arange(TOP)
    later = np.where(at > place[:, None], np.roll(columns, 1, axis=1), columns)
    return np.where(at == place[:, None], item[:, None], later)


@dataclass(frozen=True)
class Precision(Ranking):
    """Of each query with several relevant items: how they rank.

    Attributes:
        ap: (q,) average precision over the whole ranking.
        ap_at: (q,) the same within the first k, of at most k: sum of P(i) rel(i) over
            min(relevant, k).
        relevant: (q,) how many there are; without any, nothing is found.
        hits: (q, 3) how many are within each of `DEPTHS`.
    """

    ap: NDArray[np.float64]
    ap_at: NDArray[np.float64]
    relevant: Ints
    hits: Ints


def rank_relevant(
    queries: Float32Array,
    database: Float32Array,
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
        match=np.full(len(queries), -1),
        score=np.full(len(queries), -np.inf, np.float32),
        top=np.full((len(queries), TOP), -1),
        top_score=np.full((len(queries), TOP), -np.inf, np.float32),
        ap=np.zeros(len(queries)),
        ap_at=np.zeros(len(queries)),
        relevant=np.zeros(len(queries), np.int64),
        hits=np.zeros((len(queries), len(DEPTHS)), np.int64),
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
        rivals = np.where(others & ~np.isnan(scores), scores, np.float32(-np.inf))
        nearest = _first(rivals)
        for i in range(len(scores)):
            tie = _tie(np.abs(database[relevant[i]]) @ np.abs(queries[start + i]))
            _rank_query(found, start + i, scores[i], relevant[i], others[i], tie, k)
            _fill(found, start + i, rivals[i][nearest[i]], nearest[i])
    return found


def _rank_query(
    found: Precision,
    query: int,
    scores: Float32Array,
    relevant: NDArray[np.bool_],
    others: NDArray[np.bool_],
    tie: Float32Array,
    k: int,
) -> None:
    """Enter the figures of one query, whose scores are (n,); `tie` is of each relevant one."""
    if not relevant.any():
        return
    where = np.flatnonzero(relevant)
    goals = np.where(np.isfinite(scores[where]), scores[where], -np.inf)
    order = np.argsort(-goals, kind="stable")
    where, goals, tie = where[order], goals[order], tie[order]
    within = np.arange(1, len(goals) + 1)
    # Sorting puts what is no number last, so that it counts as ahead.
    rivals = np.sort(scores[others])
    rank = within + len(rivals) - np.searchsorted(rivals, goals - tie)
    # A query that is no number finds nothing.
    rank = np.where(np.isfinite(goals), rank, len(scores) - len(goals) + within)
    precision = within / rank
    found.rank[query] = rank[0]
    found.match[query], found.score[query] = where[0], goals[0]
    found.ap[query] = precision.mean()
    found.ap_at[query] = precision[rank <= k].sum() / min(len(goals), k)
    found.relevant[query] = len(goals)
    found.hits[query] = np.searchsorted(rank, DEPTHS, "right")
    # What is no number counts as ahead, but is no answer.
    place = rank - 1 - np.isnan(rivals).sum()
    shown = (place < TOP) & np.isfinite(goals)
    found.top[query, place[shown]] = where[shown]
    found.top_score[query, place[shown]] = goals[shown]


def _fill(found: Precision, query: int, values: Float32Array, positions: Ints) -> None:
    """Put the rivals of a query (k,), best first, where no match stands among its first."""
    finite = values > -np.inf
    free = np.flatnonzero(found.top[query] < 0)[: finite.sum()]
    found.top[query, free] = positions[finite][: len(free)]
    found.top_score[query, free] = values[finite][: len(free)]


def within(rank: Ints, k: int) -> NDArray[np.float64]:
    """AP@k of each query for one relevant item: 1/rank within k, else 0; its mean is MRR@k too."""
    return np.where(rank <= k, 1 / rank, 0.0)


def recall_at(rank: Ints, k: int) -> float | None:
    """Share of queries with their match among the first k."""
    return float((rank <= k).mean()) if len(rank) else None


def mrr(rank: Ints) -> float | None:
    """Mean reciprocal rank."""
    return mean(1 / rank)


def precision_at(hits: Ints, k: int) -> float | None:
    """mP@k: mean share of the first k that are relevant, of (q,) counts of them."""
    return mean(hits / k)


def relevant_recall(hits: Ints, relevant: Ints) -> float | None:
    """Mean share of the relevant items that are within some depth, of (q,) counts of both.

    `recall_at` is the share of queries with any of them, which is the same for one relevant item.
    """
    return mean(hits / relevant)


def mean(values: NDArray[np.number] | NDArray[np.bool_]) -> float | None:
    """The mean, None of nothing."""
    return float(values.mean()) if len(values) else None


def median(values: NDArray[np.number]) -> float | None:
    """The median, None of nothing."""
    return float(np.median(values)) if len(values) else None

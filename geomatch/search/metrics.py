"""Retrieval metrics, computed from arrays."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch.search.exact import Rows

Float32Array = NDArray[np.float32]
Ints = NDArray[np.int64]

QUERY_BLOCK, DATABASE_BLOCK = 512, 8192
"""Queries and database rows scored at a time: 16 MB of scores, which stay in the cache."""
READ = 65_536
"""Rows of the database in memory at a time: 32 MB of 128 values each."""
SCORES = 2**24
"""Scores per block where whole rows are ranked: 64 MB, plus about as much for relevance masks."""
TIE = 1e-6
"""Scores of unit vectors that differ by less than this are tied, since the products of identical
tiles may differ in their last bits. For longer vectors the tolerance grows with the products."""
TOP = 5
"""Answers that are kept for each query."""
DEPTHS = (1, 5, 10)
"""Rank cutoffs at which relevant items are counted."""
GROUPS = 64
"""Scores per group. The TOP answers are in the TOP groups with the largest maxima."""


@dataclass(frozen=True)
class Ranking:
    """The rank of each query's match, and its first answers.

    Attributes:
        rank: (q,) rank of the match; of the best one if there are several.
        match: (q,) position of that match.
        score: (q,) inner product of that match.
        top: (q, TOP) positions of the first answers in order of rank, padded with -1. The match
            comes after answers that tie with it.
        top_score: (q, TOP) their inner products, padded with -inf.
    """

    rank: Ints
    match: Ints
    score: Float32Array
    top: Ints
    top_score: Float32Array

    @property
    def first(self) -> Ints:
        """Position (q,) of the first answer; -1 for a query with NaN."""
        return self.top[:, 0]

    @property
    def tied(self) -> NDArray[np.bool_]:
        """Whether the first two answers tie (q,)."""
        first, second = self.top_score[:, 0], self.top_score[:, 1]
        tied: NDArray[np.bool_] = second >= first - _tolerance(np.abs(first))
        return tied & (self.top[:, 1] >= 0)


def rank_truth(
    queries: Float32Array, database: Rows, truth: Ints, neutral: tuple[Ints, Ints]
) -> Ranking:
    """Rank the single match of each query, in blocks of bounded memory.

    The database is read twice: its rows that are matches, then all of it, block by block.

    The rank is 1 + the number of other tiles that score at least as high: ties never help.

    Args:
        queries: (q, d) unit vectors.
        database: (n, d) unit vectors, an array or what reads them.
        truth: (q,) position of the match.
        neutral: parallel (query, position) arrays of tiles to take out of the ranking.
    """
    count = len(queries)
    order = np.argsort(neutral[0], kind="stable")
    rows, positions = neutral[0][order], neutral[1][order]
    matches = database[truth]
    score = np.einsum("qd,qd->q", queries, matches)
    terms = np.einsum("qd,qd->q", np.abs(queries), np.abs(matches))
    state = _Search(
        goal=score - _tolerance(terms),
        ahead=np.zeros(count, np.int64),
        top=np.full((count, TOP), -1),
        top_score=np.full((count, TOP), -np.inf, np.float32),
    )

    def search(start: int, searched: Float32Array, begin: int) -> None:
        part = slice(start, min(start + QUERY_BLOCK, count))
        inside = slice(*np.searchsorted(rows, [part.start, part.stop]))
        excluded_rows = np.concatenate([np.arange(part.stop - start), rows[inside] - start])
        excluded_positions = np.concatenate([truth[part], positions[inside]])
        _search_block(
            state, part, queries[part], searched, begin, excluded_rows, excluded_positions
        )

    # NumPy releases the GIL in these operations.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for begin in range(0, len(database), READ):
            block = partial(search, searched=database[begin : begin + READ], begin=begin)
            list(pool.map(block, range(0, count, QUERY_BLOCK)))
    # A query with NaN finds nothing.
    invalid = ~np.isfinite(state.goal)
    place = np.where(invalid, TOP, (state.top_score >= state.goal[:, None]).sum(axis=1))
    top_score = _inserted(state.top_score, score, place)
    top = _inserted(state.top, truth, place)
    top[top_score == -np.inf] = -1
    return Ranking(
        rank=np.where(invalid, len(database), 1 + state.ahead),
        match=truth,
        score=score,
        top=top,
        top_score=top_score,
    )


@dataclass(frozen=True)
class _Search:
    """What is known of q queries after a part of the database.

    Attributes:
        goal: (q,) scores that tie with the match, or exceed it.
        ahead: (q,) number of other tiles that scored at least as much.
        top, top_score: (q, TOP) of the best other tiles, as in `Ranking`.
    """

    goal: Float32Array
    ahead: Ints
    top: Ints
    top_score: Float32Array


def _search_block(
    state: _Search,
    part: slice,
    queries: Float32Array,
    database: Float32Array,
    first: int,
    excluded_rows: Ints,
    excluded_positions: Ints,
) -> None:
    """Search a block of the database for a block of queries (q, d), the `part` of all.

    Args:
        first: position of the block's first row.
        excluded_rows, excluded_positions: pairs of a query and a position in the whole database:
            the matches and the neutral tiles.
    """
    count = len(queries)
    goal, ahead = state.goal[part], state.ahead[part]
    values, positions = state.top_score[part], state.top[part]
    # Allocated once, because faulting in fresh pages takes time.
    buffer = np.empty(count * (DATABASE_BLOCK + GROUPS), np.float32)
    for start in range(0, len(database), DATABASE_BLOCK):
        searched, begin = database[start : start + DATABASE_BLOCK], first + start
        groups = -(-len(searched) // GROUPS)
        scores = buffer[: count * groups * GROUPS].reshape(count, -1)
        np.matmul(queries, searched.T, out=scores[:, : len(searched)])
        scores[:, len(searched) :] = -np.inf
        inside = (excluded_positions >= begin) & (excluded_positions < begin + len(searched))
        scores[excluded_rows[inside], excluded_positions[inside] - begin] = -np.inf
        # The scores of a group are `groups` apart, so that the maxima are taken of whole rows.
        largest = scores.reshape(count, GROUPS, groups).max(axis=1)
        # `not <`, so that NaN counts as ahead.
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
        at = np.concatenate([positions[better], members + begin], axis=1)
        kept = _largest(candidates)
        values[better] = np.take_along_axis(candidates, kept, 1)
        positions[better] = np.take_along_axis(at, kept, 1)


def _tolerance(terms: Float32Array) -> Float32Array:
    """The largest difference of tied scores, from the sum of absolute terms of the product."""
    tolerance: Float32Array = np.float32(TIE) * np.maximum(terms, 1)
    return tolerance


def _largest(values: Float32Array) -> Ints:
    """Columns (q, TOP) of the largest values of each row, best first."""
    if values.shape[1] > TOP:
        kept = np.argpartition(values, -TOP, axis=1)[:, -TOP:]
    else:
        kept = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    order = np.argsort(-np.take_along_axis(values, kept, 1), axis=1, kind="stable")
    largest: Ints = np.take_along_axis(kept, order, 1)
    return largest


def _inserted(columns: Any, item: Any, place: Ints) -> Any:
    """Insert an item (q,) into columns (q, TOP) at its place, shifting later ones to the right."""
    at = np.arange(TOP)
    later = np.where(at > place[:, None], np.roll(columns, 1, axis=1), columns)
    return np.where(at == place[:, None], item[:, None], later)


@dataclass(frozen=True)
class MultiMatchRanking(Ranking):
    """A ranking in which a query may have several relevant items.

    Attributes:
        ap: (q,) average precision over the whole ranking.
        ap_at: (q,) average precision at k: sum of P(i) rel(i) over i <= k, divided by
            min(relevant, k).
        relevant: (q,) number of relevant items; the match of a query with none is -1.
        hits: (q, 3) number of relevant items within each of `DEPTHS`.
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
) -> MultiMatchRanking:
    """Rank all tiles of each query's place, in blocks of bounded memory.

    As in `rank_truth`, other tiles that tie with a relevant one come before it; for a single
    relevant tile both functions agree.

    Args:
        queries: (q, d) unit vectors.
        database: (n, d) unit vectors.
        query_place: (q,) codes of places.
        database_place: (n,) codes of places.
        neutral: parallel (query, position) arrays of tiles to take out of the ranking.
        k: cutoff of `ap_at`.
    """
    n = len(database)
    found = MultiMatchRanking(
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
        inside = slice(*np.searchsorted(rows, [start, start + len(scores)]))
        for mask in (relevant, others):
            mask[rows[inside] - start, positions[inside]] = False
        other_scores = np.where(others & ~np.isnan(scores), scores, np.float32(-np.inf))
        nearest = _largest(other_scores)
        for i in range(len(scores)):
            tolerance = _tolerance(np.abs(database[relevant[i]]) @ np.abs(queries[start + i]))
            _rank_query(found, start + i, scores[i], relevant[i], others[i], tolerance, k)
            _fill_top(found, start + i, other_scores[i][nearest[i]], nearest[i])
    return found


def _rank_query(
    found: MultiMatchRanking,
    query: int,
    scores: Float32Array,
    relevant: NDArray[np.bool_],
    others: NDArray[np.bool_],
    tolerance: Float32Array,
    k: int,
) -> None:
    """Fill in the ranking of one query.

    Args:
        scores: (n,) inner products with the database.
        relevant, others: (n,) masks of the relevant tiles and of their competitors.
        tolerance: (relevant,) see `_tolerance`.
    """
    if not relevant.any():
        return
    where = np.flatnonzero(relevant)
    goals = np.where(np.isfinite(scores[where]), scores[where], -np.inf)
    order = np.argsort(-goals, kind="stable")
    where, goals, tolerance = where[order], goals[order], tolerance[order]
    count = np.arange(1, len(goals) + 1)
    # Sorting puts NaN last, so that it counts as ahead.
    other_scores = np.sort(scores[others])
    ahead = len(other_scores) - np.searchsorted(other_scores, goals - tolerance)
    # A query with NaN finds nothing.
    rank = count + np.where(np.isfinite(goals), ahead, len(scores) - len(goals))
    precision = count / rank
    found.rank[query] = rank[0]
    found.match[query], found.score[query] = where[0], goals[0]
    found.ap[query] = precision.mean()
    found.ap_at[query] = precision[rank <= k].sum() / min(len(goals), k)
    found.relevant[query] = len(goals)
    found.hits[query] = np.searchsorted(rank, DEPTHS, "right")
    # NaN counts as ahead but is not an answer.
    place = rank - 1 - np.isnan(other_scores).sum()
    shown = (place < TOP) & np.isfinite(goals)
    found.top[query, place[shown]] = where[shown]
    found.top_score[query, place[shown]] = goals[shown]


def _fill_top(found: MultiMatchRanking, query: int, values: Float32Array, positions: Ints) -> None:
    """Fill the places of `top` without a match with other tiles (k,), best first."""
    finite = values > -np.inf
    free = np.flatnonzero(found.top[query] < 0)[: finite.sum()]
    found.top[query, free] = positions[finite][: len(free)]
    found.top_score[query, free] = values[finite][: len(free)]


def reciprocal_rank_at(rank: Ints, k: int) -> NDArray[np.float64]:
    """Reciprocal rank (q,) up to k, else 0: AP@k of a single relevant item. Its mean is MRR@k."""
    return np.where(rank <= k, 1 / rank, 0.0)


def recall_at(rank: Ints, k: int) -> float | None:
    """Share of queries with a match among the first k."""
    return float((rank <= k).mean()) if len(rank) else None


def mrr(rank: Ints) -> float | None:
    """Mean reciprocal rank."""
    return mean(1 / rank)


def precision_at(hits: Ints, k: int) -> float | None:
    """mP@k: mean share of relevant items among the first k, from their counts (q,)."""
    return mean(hits / k)


def relevant_recall(hits: Ints, relevant: Ints) -> float | None:
    """Mean share of the relevant items that are within a cutoff, from counts (q,) of both.

    `recall_at` is the share of queries with any of them; both agree for one relevant item.
    """
    return mean(hits / relevant)


def mean(values: NDArray[np.number] | NDArray[np.bool_]) -> float | None:
    """The mean; None if there are no values."""
    return float(values.mean()) if len(values) else None


def median(values: NDArray[np.number]) -> float | None:
    """The median; None if there are no values."""
    return float(np.median(values)) if len(values) else None

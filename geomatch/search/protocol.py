"""The evaluation protocol of train and eval: each tile of a split queries every other year.

Without years, each tile queries the other tiles, and those of its class are relevant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomatch.data.ground_truth import Task
from geomatch.search.exact import Metric, Rows, as_database, as_queries, scores
from geomatch.search.metrics import (
    MultiMatchRanking,
    Ranking,
    mean,
    rank_relevant,
    rank_truth,
    reciprocal_rank_at,
)


@dataclass(frozen=True)
class Outcome:
    """The result of a task.

    Attributes:
        ranking: a `MultiMatchRanking` without years, where a query may have several matches.
        match_score: (q,) score of the match: cosine similarity, or negative distance.
        top_score: (q, k) scores of the first answers in order of rank, padded with NaN.
    """

    task: Task
    ranking: Ranking | MultiMatchRanking
    match_score: NDArray[np.float32]
    top_score: NDArray[np.float32]


@dataclass(frozen=True)
class _Database:
    """Some rows of `vectors` in the form of a database, which they are brought into as read."""

    vectors: Rows
    rows: NDArray[np.int64]
    metric: Metric

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice | NDArray[np.int64], /) -> NDArray[np.float32]:
        return as_database(self.vectors[self.rows[part]], self.metric)


def retrieve(vectors: Rows, tasks: Iterable[Task], metric: Metric) -> list[Outcome]:
    """Rank the database of each task by exact search.

    Args:
        vectors: (n, d) descriptors, one row per tile. A database is read in blocks, but without
            years, where whole rankings are measured, at once.
    """
    outcomes = []
    for task in tasks:
        query_vectors = vectors[task.queries]
        queries = as_queries(query_vectors, metric)
        database = _Database(vectors, task.database, metric)
        ranking: Ranking | MultiMatchRanking
        if task.truth is None:
            places = task.query_place, task.database_place
            ranking = rank_relevant(queries, database[:], *places, task.neutral)
        else:
            ranking = rank_truth(queries, database, task.truth, task.neutral)
        products = np.concatenate([ranking.score[:, None], ranking.top_score], axis=1)
        products[~np.isfinite(products)] = np.nan
        scored = scores(products, query_vectors, metric)
        outcomes.append(Outcome(task, ranking, scored[:, 0], scored[:, 1:]))
    return outcomes


def all_ranks(outcomes: list[Outcome]) -> NDArray[np.int64]:
    """Ranks of the queries of all tasks."""
    return np.concatenate([np.empty(0, np.int64), *(o.ranking.rank for o in outcomes)])


def precisions5(outcomes: list[Outcome]) -> NDArray[np.float64]:
    """AP@5 of the queries of all tasks."""
    parts = [
        o.ranking.ap_at
        if isinstance(o.ranking, MultiMatchRanking)
        else reciprocal_rank_at(o.ranking.rank, 5)
        for o in outcomes
    ]
    return np.concatenate([np.empty(0), *parts])


def map5(outcomes: list[Outcome]) -> float | None:
    """mAP@5 of the queries of all tasks; None without queries."""
    return mean(precisions5(outcomes))

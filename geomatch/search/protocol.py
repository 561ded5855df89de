"""The evaluation protocol, for train and eval: a split's tiles asked for in every other year.

Without years, tiles are asked for others of their class.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomatch.data.ground_truth import Task
from geomatch.search.exact import Metric, as_database, as_queries, scores
from geomatch.search.metrics import (
    Precision,
    Ranking,
    mean,
    rank_relevant,
    rank_truth,
    within,
)


@dataclass(frozen=True)
class Outcome:
    """One ordered pair of years: what was asked, and how its matches ranked.

    Attributes:
        ranking: a `Precision` where a query has several matches.
        match_score: (q,) of the match: cosine similarity, or negative distance.
        top_score: (q, k) of the first answers, in order; NaN where there are fewer.
    """

    task: Task
    ranking: Ranking | Precision
    match_score: NDArray[np.float32]
    top_score: NDArray[np.float32]


def retrieve(vectors: NDArray[np.float32], asked: Iterable[Task], metric: Metric) -> list[Outcome]:
    """Exact retrieval of tasks.

    Args:
        vectors: (n, d) descriptors, a row a tile.
    """
    outcomes = []
    for task in asked:
        asking = vectors[task.queries]
        queries = as_queries(asking, metric)
        database = as_database(vectors[task.database], metric)
        ranking: Ranking | Precision
        if task.truth is None:
            places = task.query_place, task.database_place
            ranking = rank_relevant(queries, database, *places, task.neutral)
        else:
            ranking = rank_truth(queries, database, task.truth, task.neutral)
        products = np.concatenate([ranking.score[:, None], ranking.top_score], axis=1)
        products[~np.isfinite(products)] = np.nan
        scored = scores(products, asking, metric)
        outcomes.append(Outcome(task, ranking, scored[:, 0], scored[:, 1:]))
    return outcomes


def all_ranks(outcomes: list[Outcome]) -> NDArray[np.int64]:
    """Ranks of all queries of all pairs."""
    return np.concatenate([np.empty(0, np.int64), *(o.ranking.rank for o in outcomes)])


def precisions5(outcomes: list[Outcome]) -> NDArray[np.float64]:
    """AP@5 of all queries of all pairs."""
    parts = [
        o.ranking.ap_at if isinstance(o.ranking, Precision) else within(o.ranking.rank, 5)
        for o in outcomes
    ]
    return np.concatenate([np.empty(0), *parts])


def map5(outcomes: list[Outcome]) -> float | None:
    """mAP@5 of all queries of all pairs, None without any."""
    return mean(precisions5(outcomes))

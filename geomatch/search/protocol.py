"""The evaluation protocol, for train and eval: a split's tiles asked for in every other year.

Without years, tiles are asked for others of their class.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomatch.data.pairs import Task
from geomatch.search.exact import Metric, as_database, as_queries
from geomatch.search.metrics import Precision, Ranking, map_at, mean, rank_relevant, rank_truth


@dataclass(frozen=True)
class Outcome:
    """One ordered pair of years: what was asked, and how its matches ranked.

    `ranking` is a `Precision` where a query has several matches.
    """

    task: Task
    ranking: Ranking | Precision


def retrieve(vectors: NDArray[np.float32], asked: Iterable[Task], metric: Metric) -> list[Outcome]:
    """Exact retrieval of tasks.

    Args:
        vectors: (n, d) descriptors, a row a tile.
    """
    outcomes = []
    for task in asked:
        queries = as_queries(vectors[task.queries], metric)
        database = as_database(vectors[task.database], metric)
        ranking: Ranking | Precision
        if task.truth is None:
            places = task.query_place, task.database_place
            ranking = rank_relevant(queries, database, *places, task.neutral)
        else:
            ranking = rank_truth(queries, database, task.truth, task.neutral)
        outcomes.append(Outcome(task, ranking))
    return outcomes


def all_ranks(outcomes: list[Outcome]) -> NDArray[np.int64]:
    """Ranks of all queries of all pairs."""
    return np.concatenate([np.empty(0, np.int64), *(o.ranking.rank for o in outcomes)])


def map5(outcomes: list[Outcome]) -> float | None:
    """mAP@5 of all queries of all pairs, None without any."""
    several = [o.ranking.ap_at for o in outcomes if isinstance(o.ranking, Precision)]
    return mean(np.concatenate(several)) if several else map_at(all_ranks(outcomes), 5)

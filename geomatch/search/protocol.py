"""The evaluation protocol: a split's tiles asked for in every other year, for train and eval."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomatch.data.pairs import Task
from geomatch.search.exact import unit
from geomatch.search.metrics import Ranking, rank_truth


@dataclass(frozen=True)
class Outcome:
    """One ordered pair of years: what was asked, and how its matches ranked."""

    task: Task
    ranking: Ranking


def retrieve(vectors: NDArray[np.float32], asked: Iterable[Task]) -> list[Outcome]:
    """Exact retrieval of tasks.

    Args:
        vectors: (n, d) descriptors, a row a tile; compared by cosine.
    """
    outcomes = []
    for task in asked:
        queries, database = unit(vectors[task.queries]), unit(vectors[task.database])
        outcomes.append(Outcome(task, rank_truth(queries, database, task.truth, task.neutral)))
    return outcomes


def all_ranks(outcomes: list[Outcome]) -> NDArray[np.int64]:
    """Ranks of all queries of all pairs."""
    return np.concatenate([np.empty(0, np.int64), *(o.ranking.rank for o in outcomes)])

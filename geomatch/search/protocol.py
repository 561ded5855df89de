"""The evaluation protocol: a split's tiles asked for in every other year, for train and eval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomatch.data.pairs import Task, tasks
from geomatch.data.tiles import TileTable
from geomatch.search.exact import unit
from geomatch.search.metrics import Ranking, rank_truth


@dataclass(frozen=True)
class Outcome:
    """One ordered pair of years: what was asked, and how its matches ranked."""

    task: Task
    ranking: Ranking


def retrieve(
    tiles: TileTable,
    vectors: NDArray[np.float32],
    queries: NDArray[np.bool_],
    database: NDArray[np.bool_],
    same_year: bool = False,
) -> list[Outcome]:
    """Exact retrieval between all ordered pairs of years.

    Args:
        vectors: (n, d) descriptors, a row a tile; compared by cosine.
        queries, database: (n,) which tiles ask, and which are searched.
        same_year: see `tasks`.
    """
    rows = unit(vectors)
    return [
        Outcome(task, rank_truth(rows[task.queries], rows[task.database], task.truth, task.neutral))
        for task in tasks(tiles, queries, database, same_year)
    ]


def all_ranks(outcomes: list[Outcome]) -> NDArray[np.int64]:
    """Ranks of all queries of all pairs."""
    return np.concatenate([np.empty(0, np.int64), *(o.ranking.rank for o in outcomes)])

"""The revisited Oxford and Paris protocol, with junk and three difficulties.

Radenovic, Iscen, Tolias, Avrithis and Chum 2018, "Revisiting Oxford and Paris: Large-Scale Image
Retrieval Benchmarking". Its average precision is trapezoidal, unlike that of `metrics`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
DEPTHS = (1, 5, 10)
FIGURES = ("trapezoidal map", *(f"mp@{k}" for k in DEPTHS))


class Truth(NamedTuple):
    """Positions in the database that show what a query shows; the rest does not.

    Attributes:
        easy, hard: by how well they show it.
        junk: neither right nor wrong, such as what shows a little of it.
    """

    easy: Ints
    hard: Ints
    junk: Ints


def trapezoidal_ap(places: Ints, relevant: int) -> float:
    """Average precision by the trapezoidal rule.

    Args:
        places: (r,) of relevant items in the ranking, from 0 on, rising.
        relevant: how many there are.
    """
    found = np.arange(len(places))
    before = np.where(places == 0, 1.0, found / np.maximum(places, 1))
    after = (found + 1) / (places + 1)
    return float((before + after).sum() / 2 / relevant)


def without_junk(ranking: Ints, relevant: Ints, junk: Ints) -> Ints:
    """(r,) places of relevant items in a ranking (n,), from 0 on, once junk is taken out of it."""
    kept = ranking[~np.isin(ranking, junk)]
    return np.flatnonzero(np.isin(kept, relevant))


def evaluate(
    rankings: Iterable[Ints], truths: Iterable[Truth]
) -> dict[str, dict[str, float | None]]:
    """Figures of "easy", "medium" and "hard": "trapezoidal map", "mp@1", "mp@5" and "mp@10".

    Easy takes hard items for junk, hard takes easy ones for junk, and medium asks for both. A query
    without an item to find is left out; None is the mean of no queries. Precision at k is that at
    the last relevant item where it comes earlier.

    Args:
        rankings: of each query, positions in the database, best first.
    """
    by_grade: dict[str, list[list[float]]] = {"easy": [], "medium": [], "hard": []}
    for ranking, truth in zip(rankings, truths, strict=True):
        asked = {
            "easy": (truth.easy, np.union1d(truth.junk, truth.hard)),
            "medium": (np.union1d(truth.easy, truth.hard), truth.junk),
            "hard": (truth.hard, np.union1d(truth.junk, truth.easy)),
        }
        for name, (relevant, junk) in asked.items():
            if not len(relevant):
                continue
            places = without_junk(ranking, relevant, junk)
            depths = [min(int(places.max(initial=0)) + 1, k) for k in DEPTHS]
            precision = [float((places < k).sum() / k) for k in depths]
            by_grade[name].append([trapezoidal_ap(places, len(relevant)), *precision])
    nothing = [None] * len(FIGURES)
    return {
        name: dict(zip(FIGURES, np.mean(rows, axis=0).tolist() if rows else nothing, strict=True))
        for name, rows in by_grade.items()
    }

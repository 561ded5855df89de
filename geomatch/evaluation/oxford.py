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
METRICS = ("trapezoidal map", *(f"mp@{k}" for k in DEPTHS))


class Truth(NamedTuple):
    """Positions in the database of the items relevant to a query; all others are wrong.

    Attributes:
        easy, hard: relevant, by how hard they are to recognise.
        junk: neither relevant nor wrong, such as items that show little of the place.
    """

    easy: Ints
    hard: Ints
    junk: Ints


def trapezoidal_ap(places: Ints, relevant: int) -> float:
    """Average precision by the trapezoidal rule.

    Args:
        places: (r,) of relevant items in the ranking, counted from 0, rising.
        relevant: how many there are.
    """
    found = np.arange(len(places))
    before = np.where(places == 0, 1.0, found / np.maximum(places, 1))
    after = (found + 1) / (places + 1)
    return float((before + after).sum() / 2 / relevant)


def without_junk(ranking: Ints, relevant: Ints, junk: Ints) -> Ints:
    """(r,) places, counted from 0, of relevant items in a ranking (n,) without its junk."""
    kept = ranking[~np.isin(ranking, junk)]
    return np.flatnonzero(np.isin(kept, relevant))


def evaluate(
    rankings: Iterable[Ints], truths: Iterable[Truth]
) -> dict[str, dict[str, float | None]]:
    """Metrics of "easy", "medium" and "hard": "trapezoidal map", "mp@1", "mp@5" and "mp@10".

    "easy" treats hard items as junk, "hard" treats easy items as junk, and "medium" takes both as
    relevant. A query without a relevant item is left out; None is the mean of no queries. Where
    the last relevant item ranks above k, precision is taken there.

    Args:
        rankings: of each query, positions in the database, best first.
    """
    by_grade: dict[str, list[list[float]]] = {"easy": [], "medium": [], "hard": []}
    for ranking, truth in zip(rankings, truths, strict=True):
        relevant_and_junk = {
            "easy": (truth.easy, np.union1d(truth.junk, truth.hard)),
            "medium": (np.union1d(truth.easy, truth.hard), truth.junk),
            "hard": (truth.hard, np.union1d(truth.junk, truth.easy)),
        }
        for name, (relevant, junk) in relevant_and_junk.items():
            if not len(relevant):
                continue
            places = without_junk(ranking, relevant, junk)
            depths = [min(int(places.max(initial=0)) + 1, k) for k in DEPTHS]
            precision = [float((places < k).sum() / k) for k in depths]
            by_grade[name].append([trapezoidal_ap(places, len(relevant)), *precision])
    nothing = [None] * len(METRICS)
    return {
        name: dict(zip(METRICS, np.mean(rows, axis=0).tolist() if rows else nothing, strict=True))
        for name, rows in by_grade.items()
    }

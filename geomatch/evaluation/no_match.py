"""When a query has no match: answers to tiles as queries, with their places and without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch.data.confidence import ANSWERS, Confidence, standard_scores
from geomatch.data.eval_report import NoMatchMetrics
from geomatch.data.ground_truth import are_neutral, by_place
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.evaluation.bootstrap import threshold_intervals
from geomatch.evaluation.calibration import Calibration, reliability
from geomatch.search import exact
from geomatch.search.exact import Metric, Rows

QUERIES = 2_000
"""Tiles of a split that are queries at most."""
TOP = 5
"""Answers to each query whose probability is looked at."""

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class Answered:
    """Answers to the tiles of a split, among all tiles of the other years.

    Attributes:
        split: the split.
        years: that are searched for each query.
        place: (q,) codes of the places of the queries.
        score: (q, TOP) standard scores of the first answers; NaN for none.
        right: (q, TOP) whether an answer shows the query's place.
        wrong: (q, TOP) whether it shows none of the query's ground.
        without: (q, TOP) standard scores of the first answers that show none of it: those to a
            query without a match.
    """

    split: str
    years: int
    place: NDArray[np.int64]
    score: Float64Array
    right: NDArray[np.bool_]
    wrong: NDArray[np.bool_]
    without: Float64Array

    def __len__(self) -> int:
        return len(self.place)

    def confidence(self) -> Confidence:
        """What standard scores are worth, if half of all queries have a match."""
        other = np.concatenate([self.score[self.wrong], self.without.ravel()])
        fitted = Calibration.fit(self.score[self.right], other)
        first = self.without[:, 0].tolist()
        return Confidence(
            split=self.split,
            years=self.years,
            slope=fitted.slope,
            intercept=fitted.intercept,
            first=tuple(first),
        )

    def metrics(self, known: Answered, threshold: float, fpr: float) -> NoMatchMetrics:
        """How well the confidence of `known` answers, and its threshold for a rate, hold here."""
        first, confidence = self.without[:, 0], known.confidence()
        threshold_interval, fpr_interval = threshold_intervals(
            known.without[:, 0], known.place, first, self.place, fpr
        )
        found = Calibration(confidence.slope, confidence.intercept)
        error = reliability(
            found.probability(self.score[self.right]),
            found.probability(np.concatenate([self.score[self.wrong], self.without.ravel()])),
        ).error
        return NoMatchMetrics(
            queries=len(self),
            threshold=threshold,
            threshold_interval=threshold_interval,
            fpr=float((first >= threshold).mean()),
            fpr_interval=fpr_interval,
            tpr=float((self.right[:, 0] & (self.score[:, 0] >= threshold)).mean()),
            holds=fpr_interval[0] <= fpr,
            error=error,
        )


def measured(
    vectors: Rows, metric: Metric, tiles: TileTable, fpr: float
) -> dict[str, NoMatchMetrics]:
    """How well queries without a match are told on the reference split, and on the test split.

    Nothing where the former is too small.

    Args:
        fpr: share of queries without a match whose first answer may pass.
    """
    known = reference(vectors, metric, tiles)
    if known is None:
        return {}
    threshold = known.confidence().threshold(fpr)
    if threshold is None:
        return {}
    test = answered(vectors, metric, tiles, "test")
    return {
        each.split: each.metrics(known, threshold, fpr)
        for each in (known, test)
        if each is not None
    }


def reference(vectors: Rows, metric: Metric, tiles: TileTable) -> Answered | None:
    """The answers to validation tiles; without such, to training tiles."""
    found = answered(vectors, metric, tiles, "validation")
    return answered(vectors, metric, tiles, "train") if found is None else found


def answered(vectors: Rows, metric: Metric, tiles: TileTable, split: str) -> Answered | None:
    """Answers to the tiles of a split, or to some drawn at random.

    Args:
        vectors: (n, d) descriptors, one row per tile.

    Returns:
        None where tiles have no years, or are too few.
    """
    if not tiles.dated:
        return None
    place, years = tiles.places(), len(tiles.years) - 1
    of_place = (by_place(tiles) >= 0).sum(axis=1)
    queries = np.flatnonzero((tiles.split == SPLITS.index(split)) & (of_place[place] > 1))
    queries = np.sort(np.random.default_rng(0).permutation(queries)[:QUERIES])
    reach = 0 if tiles.grid is None else tiles.grid.reach
    own = years * (2 * reach + 1) ** 2
    parts: list[tuple[NDArray[Any], ...]] = []
    for year in range(len(tiles.years)):
        rows = queries[tiles.year[queries] == year]
        database = np.flatnonzero(tiles.year != year)
        if not len(rows) or not len(database):
            continue
        for part, products, position in exact.search(
            vectors, rows, database, ANSWERS + own, metric, exact_up_to=len(database)
        ):
            scores = exact.scores(products, vectors[rows[part]], metric)
            parts.append(_judged(tiles, rows[part], database[position], scores))
    if not parts:
        return None
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    found = Answered(split, years, *columns)
    known = np.isfinite(found.score[:, 0]) & np.isfinite(found.without[:, 0])
    return Answered(split, years, *(column[known] for column in columns)) if known.any() else None


def _judged(
    tiles: TileTable,
    queries: NDArray[np.int64],
    answers: NDArray[np.int64],
    scores: NDArray[np.float32],
) -> tuple[NDArray[Any], ...]:
    """The fields of `Answered` for queries (q,) and their answers (q, k), best first."""
    place = tiles.places()
    known = np.arange(TOP) < answers.shape[1]

    def padded(values: NDArray[Any], empty: float) -> NDArray[Any]:
        missing = max(0, TOP - values.shape[1])
        return np.pad(values[:, :TOP], ((0, 0), (0, missing)), constant_values=empty)

    years = len(tiles.years) - 1
    standing = standard_scores(scores[:, :ANSWERS], years)
    own = are_neutral(tiles, queries[:, None], answers)
    right = place[answers] == place[queries][:, None]
    # Without the query's ground, the answers after it move up.
    order = np.argsort(own, axis=1, kind="stable")[:, :ANSWERS]
    left = np.take_along_axis(np.where(own, np.nan, scores), order, 1)
    without = standard_scores(left, years)
    return (
        place[queries],
        padded(standing, np.nan),
        padded(right, False),
        padded(~own, False) & known,
        padded(without, np.nan),
    )

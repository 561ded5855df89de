"""Figures of descriptors on every split: what `eval` reports, and its baselines alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geomatch.data.ground_truth import Task, tasks
from geomatch.data.query_results import QueryTable
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.evaluation import verification
from geomatch.evaluation.bootstrap import bootstrap
from geomatch.evaluation.calibration import Calibration, reliability
from geomatch.geo import footprints
from geomatch.geo.splits import block_side, blocks_of
from geomatch.progress import ProgressCallback
from geomatch.search import exact, metrics
from geomatch.search.exact import Metric
from geomatch.search.metrics import DEPTHS, Precision
from geomatch.search.protocol import Outcome, all_ranks, precisions5, retrieve

ANCHORS = 20_000
"""The most, of each split, that pairs are drawn for; each has one of its place and one other."""
NEAR = (1, 2, 5)
"""Sides of a tile within which a first answer is told to be near."""
CHANGED = 0.1
"""Share of changed ground that parts the strata."""

Float64Array = NDArray[np.float64]
Scored = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Scores of pairs of the same place, and of pairs of other places."""


@dataclass(frozen=True)
class Conditions:
    """What is searched.

    Attributes:
        database: "split": a split's own tiles, "all": those of every split, "train": the training
            split's.
        years: these only; without any, all.
        same_year: the queries' own year too, as a distraction.
    """

    database: str = "split"
    years: tuple[str, ...] = ()
    same_year: bool = False

    @property
    def unusual(self) -> tuple[str, ...]:
        """Words for what is not as usual."""
        wider = (self.database,) if self.database != "split" else ()
        return (*wider, *self.years, *(("same-year",) if self.same_year else ()))

    def searched(self, tiles: TileTable, splits: ArrayLike) -> NDArray[np.bool_]:
        """(n,) which tiles are searched for queries of `splits`, of whatever year."""
        own = {"split": splits, "all": range(len(SPLITS)), "train": SPLITS.index("train")}
        return np.isin(tiles.split, own[self.database])

    def tasks(self, tiles: TileTable, split: int) -> list[Task]:
        """What is asked of a split."""
        return [
            task
            for task in tasks(
                tiles, tiles.split == split, self.searched(tiles, split), self.same_year
            )
            if not self.years or tiles.years[task.years[1]] in self.years
        ]


@dataclass(frozen=True)
class Measured:
    """Figures of some descriptors.

    Attributes:
        splits: figures of each, as `Report` has them.
        queries: of all splits, in order.
        values: (n, 4) AP@5 and recall at 1, 5 and 10 of each of them.
        scored: scores of the drawn pairs of each split.
    """

    splits: dict[str, dict[str, Any]]
    queries: QueryTable
    values: Float64Array
    scored: dict[str, Scored]


def measure(
    vectors: NDArray[np.float32],
    metric: Metric,
    tiles: TileTable,
    placed: bool,
    conditions: Conditions,
    fpr: float,
    progress: ProgressCallback,
) -> Measured:
    """Figures of descriptors (n, d), a row a tile.

    Args:
        placed: whether the placement is real, so that there are metres.
        fpr: share of pairs of other places that may pass; see `Report`.
    """
    splits: dict[str, dict[str, Any]] = {}
    scored, tables, values = {}, [], [np.empty((0, 1 + len(DEPTHS)))]
    blank = _blank(vectors, tiles.places())
    for code, split in enumerate(SPLITS):
        progress("evaluating", code, len(SPLITS), split)
        asked = conditions.tasks(tiles, code)
        outcomes = retrieve(vectors, asked, metric)
        found = QueryTable.join([_table(tiles, outcome, placed) for outcome in outcomes])
        tables.append(found)
        values.append(_values(outcomes))
        splits[split] = _metrics(tiles, outcomes, found, values[-1], blank)
        scored[split] = _scored(vectors, asked, metric)
    for split, summary in _verification(scored, fpr).items():
        splits[split]["roc"] = summary
    progress("evaluating", len(SPLITS), len(SPLITS))
    return Measured(splits, QueryTable.join(tables), np.concatenate(values), scored)


def intervals(values: Float64Array, place: NDArray[np.int64]) -> dict[str, list[float] | None]:
    """Low and high of the 95 % bootstrap intervals of "map@5" and recall, drawn by place.

    Args:
        values: (n, 4) of each query, as `Measured` has them; or differences of them.
        place: (n,) codes of the queries' places.
    """
    found = bootstrap(values, place)
    keys = ("map@5", *(f"recall@{k}" for k in DEPTHS))
    return {
        key: None if np.isnan(ends).any() else ends.tolist()
        for key, ends in zip(keys, found, strict=True)
    }


def _values(outcomes: list[Outcome]) -> Float64Array:
    rank = all_ranks(outcomes)
    return np.stack([precisions5(outcomes), *(rank <= k for k in DEPTHS)], axis=1)


def _blank(vectors: NDArray[np.float32], place: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(n,) whether a tile's descriptor is exactly that of a tile of another place."""
    rows = np.ascontiguousarray(vectors)
    size = rows.dtype.itemsize * rows.shape[1]
    code = np.unique(rows.view(f"V{size}")[:, 0], return_inverse=True)[1].reshape(-1)
    low, high = np.full(len(rows), len(rows)), np.full(len(rows), -1)
    np.minimum.at(low, code, place)
    np.maximum.at(high, code, place)
    found: NDArray[np.bool_] = low[code] < high[code]
    return found


def _table(tiles: TileTable, outcome: Outcome, placed: bool) -> QueryTable:
    """What every query of a task found."""
    task, ranking, centres = outcome.task, outcome.ranking, tiles.centres()
    asking = task.queries
    top = np.where(ranking.top < 0, -1, task.database[ranking.top])
    metres = np.full(top.shape, np.nan)
    if placed:
        for column, answer in zip(metres.T, top.T, strict=True):
            found = np.flatnonzero(answer >= 0)
            mine, theirs = asking[found], answer[found]
            column[found] = footprints.distance(
                tiles.epsg[mine], centres[mine], tiles.epsg[theirs], centres[theirs]
            )
    place = centres[asking]
    lonlat = place if tiles.grid is None else footprints.lonlat(tiles.epsg[asking], place)
    return QueryTable(
        tile=asking,
        match=task.database[ranking.match],
        match_score=outcome.match_score,
        rank=ranking.rank,
        top=top,
        top_score=outcome.top_score,
        distance_m=metres,
        lon=lonlat[:, 0],
        lat=lonlat[:, 1],
    )


# Figures of ranks


def _metrics(
    tiles: TileTable,
    outcomes: list[Outcome],
    found: QueryTable,
    values: Float64Array,
    blank: NDArray[np.bool_],
) -> dict[str, Any]:
    """A split's figures; `found` and `values` are of all outcomes, in their order."""
    searched = np.unique(np.concatenate([np.empty(0, int), *(o.task.database for o in outcomes)]))
    whole = {
        **_summary(tiles, found, values, len(searched)),
        "intervals": intervals(values, tiles.places()[found.tile]),
        "content": _by("content", *_content(tiles, outcomes, found, blank), found, values),
    }
    if tiles.changed is not None:
        whole["changed"] = _by("changed", *_changed(tiles, found), found, values)
    if not tiles.dated:
        return {**whole, **_of_classes(tiles, outcomes, found, values), "pairs": []}
    by_years, start = [], 0
    for outcome in outcomes:
        part = slice(start, start + len(outcome.task.queries))
        start = part.stop
        by_years.append(
            {
                "query_year": tiles.years[outcome.task.years[0]],
                "database_year": tiles.years[outcome.task.years[1]],
                **_summary(tiles, found.select(part), values[part], len(outcome.task.database)),
            }
        )
    regions = _by("region", *_regions(tiles, found), found, values) if tiles.grid else []
    return {**whole, "regions": regions, "pairs": by_years}


def _summary(
    tiles: TileTable, found: QueryTable, values: Float64Array, database: int
) -> dict[str, Any]:
    metres = found.distance_m[~np.isnan(found.distance_m[:, 0]), 0]
    side = tiles.grid.side if tiles.grid else math.nan
    return {
        "queries": len(found),
        "database": database,
        **_ranks(found.rank, values),
        "median_error_m": metrics.median(metres),
        "mean_rank": metrics.mean(found.rank),
        "mrr": metrics.mrr(found.rank),
        **{f"within_{n}_tiles": metrics.mean(metres <= n * side) for n in NEAR},
    }


def _ranks(rank: NDArray[np.int64], values: Float64Array) -> dict[str, float | None]:
    keys = ("map@5", *(f"recall@{k}" for k in DEPTHS))
    means = {key: metrics.mean(column) for key, column in zip(keys, values.T, strict=True)}
    return {**means, "median_rank": metrics.median(rank)}


def _by(
    key: str,
    names: Sequence[str],
    code: NDArray[np.int64],
    found: QueryTable,
    values: Float64Array,
) -> list[dict[str, Any]]:
    """Figures of groups of queries, whose name stands under `key`.

    Args:
        code: (n,) into `names`; -1 for queries of no group.
    """
    groups = []
    for group in np.unique(code[code >= 0]).tolist():
        mine = code == group
        summary = _ranks(found.rank[mine], values[mine])
        groups.append({key: names[group], "queries": int(mine.sum()), **summary})
    return groups


def _content(
    tiles: TileTable, outcomes: list[Outcome], found: QueryTable, blank: NDArray[np.bool_]
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Names and codes by whether descriptors can tell a query's place from others."""
    tied = np.concatenate([np.empty(0, bool), *(o.ranking.tied for o in outcomes)])
    if len(found):
        place = tiles.places()[found.top[:, :2]]
        tied &= place[:, 0] != place[:, -1]
    code = np.where(blank[found.tile], 2, np.where(tied, 1, 0))
    return ("distinct", "ambiguous", "blank"), code


def _regions(tiles: TileTable, found: QueryTable) -> tuple[Sequence[str], NDArray[np.int64]]:
    """Names and codes of the sheets that queries are from; of one sheet a year, of blocks of it."""
    source, year = tiles.source[found.tile], tiles.year[found.tile]
    if len(np.unique(source)) > len(np.unique(year)):
        return tiles.sources, source
    assert tiles.grid is not None
    side = block_side(tiles.grid, len(np.unique(tiles.places())))
    asking = tiles.select(found.tile)
    keys = blocks_of(tiles.grid, asking.epsg, asking.col, asking.row, side)
    blocks, code = np.unique(keys, axis=0, return_inverse=True)
    return [f"block {x}_{y}" for _, x, y in blocks.tolist()], code.reshape(-1)


def _changed(tiles: TileTable, found: QueryTable) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Names and codes of how much of the ground changed, by the mask of either year."""
    assert tiles.changed is not None
    shares = np.stack([tiles.changed[found.tile], tiles.changed[found.match]])
    known = ~np.isnan(shares).all(axis=0)
    share = np.nan_to_num(shares).max(axis=0)
    code = np.where(known, (share > 0).astype(np.int64) + (share > CHANGED), -1)
    return ("0", f"up to {CHANGED:.0%}", f"above {CHANGED:.0%}"), code


def _of_classes(
    tiles: TileTable, outcomes: list[Outcome], found: QueryTable, values: Float64Array
) -> dict[str, Any]:
    """Mean average precision of all queries, and figures of each class that asks."""
    several = [o.ranking for o in outcomes if isinstance(o.ranking, Precision)]
    ap = np.concatenate([np.empty(0), *(ranking.ap for ranking in several)])
    hits = np.concatenate([np.empty((0, len(DEPTHS)), int), *(r.hits for r in several)])
    relevant = np.concatenate([np.empty(0, int), *(r.relevant for r in several)])
    label = tiles.label[found.tile]
    classes = [
        {
            "class": tiles.classes[code],
            "queries": int((label == code).sum()),
            "hit@5": metrics.recall_at(found.rank[label == code], 5),
            "map": metrics.mean(ap[label == code]),
            "map@5": metrics.mean(values[label == code, 0]),
        }
        for code in np.unique(label)
    ]
    depths = list(zip(hits.T, DEPTHS, strict=True))
    return {
        "map": metrics.mean(ap),
        **{f"mp@{k}": metrics.precision_at(column, k) for column, k in depths},
        **{f"relevant_recall@{k}": metrics.relevant_recall(c, relevant) for c, k in depths},
        "classes": classes,
    }


# Figures of pairs


def _scored(vectors: NDArray[np.float32], asked: list[Task], metric: Metric) -> Scored:
    """Scores of drawn pairs of the same place, and of other places; as many of every task."""
    same, other = [np.empty(0, np.float32)], [np.empty(0, np.float32)]
    rng = np.random.default_rng(0)
    for task in asked:
        places = task.query_place, task.database_place
        drawn = verification.sample(*places, task.neutral, ANCHORS // len(asked), rng)
        anchor = task.queries[drawn.anchor]
        for scores, position in ((same, drawn.same), (other, drawn.other)):
            products = exact.products(vectors, anchor, task.database[position], metric)
            scores.append(exact.scores(products[:, None], vectors[anchor], metric)[:, 0])
    return np.concatenate(same), np.concatenate(other)


def _verification(scored: Mapping[str, Scored], fpr: float) -> dict[str, dict[str, Any] | None]:
    """Figures of telling pairs of the same place from others, by split.

    Args:
        scored: by split.
        fpr: wanted on "validation", whose threshold and calibration serve every split; without it,
            each its own.
    """
    curves = {split: verification.ROC.of(*both) for split, both in scored.items() if len(both[0])}
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(scored)
    for split, curve in curves.items():
        reference_split = "validation" if "validation" in curves else split
        threshold = curves[reference_split].threshold(fpr)
        (tn, fp), (fn, tp) = counts = verification.confusion(*scored[split], threshold)
        found[split] = {
            "auc": curve.area,
            "eer": curve.equal_error_rate,
            "threshold": threshold,
            "fpr": fp / (fp + tn),
            "tpr": tp / (tp + fn),
            "confusion": counts,
            **_drawn(curve, *scored[split]),
            "calibration": _calibration(Calibration.fit(*scored[reference_split]), *scored[split]),
        }
    return found


def _drawn(
    curve: verification.ROC, same: NDArray[np.float32], other: NDArray[np.float32]
) -> dict[str, Any]:
    """What is drawn of the scores of pairs: points of curves, and counts."""
    points = curve.thinned()
    precision, recall = verification.precision_recall(same, other)
    edges, *counts = verification.histogram(same, other)
    return {
        "curve": {
            "fpr": points.fpr.tolist(),
            "tpr": points.tpr.tolist(),
            "threshold": points.thresholds.tolist(),
        },
        "pr": {"recall": recall.tolist(), "precision": precision.tolist()},
        "histogram": {
            "edges": edges.tolist(),
            "same": counts[0].tolist(),
            "other": counts[1].tolist(),
        },
    }


def _calibration(
    fitted: Calibration, same: NDArray[np.float32], other: NDArray[np.float32]
) -> dict[str, Any]:
    held = reliability(fitted.probability(same), fitted.probability(other))
    return {
        "slope": fitted.slope,
        "intercept": fitted.intercept,
        "error": held.error,
        "probability": held.probability.tolist(),
        "share": held.share.tolist(),
        "pairs": held.pairs.tolist(),
    }

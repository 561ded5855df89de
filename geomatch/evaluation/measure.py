"""Metrics of descriptors on every split, for embeddings and baselines alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geomatch.data.eval_report import (
    CalibrationMetrics,
    ChangeMetrics,
    ClassFolderMetrics,
    ClassMetrics,
    ContentMetrics,
    Interval,
    RankMetrics,
    RegionMetrics,
    SplitMetrics,
    VerificationMetrics,
    YearPairMetrics,
)
from geomatch.data.ground_truth import Task, drawn, tasks
from geomatch.data.query_results import QueryTable
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.evaluation import verification
from geomatch.evaluation.bootstrap import bootstrap, threshold_intervals
from geomatch.evaluation.calibration import Calibration, reliability
from geomatch.geo import footprints
from geomatch.geo.splits import block_side, blocks_of
from geomatch.progress import ProgressCallback
from geomatch.search import exact, metrics
from geomatch.search.exact import Metric, Rows
from geomatch.search.metrics import DEPTHS, MultiMatchRanking
from geomatch.search.protocol import Outcome, all_ranks, precisions5, retrieve

ANCHORS = 20_000
"""Queries of a split that pairs are drawn for at most, one of the same place and one of others."""
BLOCK = 65_536
"""Descriptors in memory at a time where all are looked at."""
NEAR = (1, 2, 5)
"""A first answer counts as near within so many sides of a tile."""
CHANGED = 0.1
"""Share of changed ground between the upper two strata."""

Float64Array = NDArray[np.float64]


class Scored(NamedTuple):
    """Scores of drawn pairs.

    Attributes:
        same: (n,) of pairs of the same place.
        other: (n,) of pairs of other places.
        place: (n,) codes of the places of the tiles that both have in common.
    """

    same: NDArray[np.float32]
    other: NDArray[np.float32]
    place: NDArray[np.int64]


Group = TypeVar("Group", bound=RankMetrics)


@dataclass(frozen=True)
class Conditions:
    """What is searched.

    Attributes:
        database: "split": a split's own tiles, "all": those of every split, "train": the training
            split's.
        years: these only; empty for all.
        same_year: the queries' own year too, as a distraction.
        queries: of a split at most, drawn from all of them; 0 for all.
    """

    database: str = "split"
    years: tuple[str, ...] = ()
    same_year: bool = False
    queries: int = 0

    @property
    def unusual(self) -> tuple[str, ...]:
        """Words for what differs from the usual conditions."""
        wider = (self.database,) if self.database != "split" else ()
        return (*wider, *self.years, *(("same-year",) if self.same_year else ()))

    def searched(self, tiles: TileTable, splits: ArrayLike) -> NDArray[np.bool_]:
        """(n,) which tiles are searched for queries of `splits`, whatever their year."""
        own = {"split": splits, "all": range(len(SPLITS)), "train": SPLITS.index("train")}
        return np.isin(tiles.split, own[self.database])

    def tasks(self, tiles: TileTable, split: int) -> list[Task]:
        """The retrieval tasks of a split, with all of its queries."""
        return [
            task
            for task in tasks(
                tiles, tiles.split == split, self.searched(tiles, split), self.same_year
            )
            if not self.years or tiles.years[task.years[1]] in self.years
        ]


@dataclass(frozen=True)
class Measured:
    """Metrics of some descriptors.

    Attributes:
        splits: metrics by split.
        queries: of all splits, in order.
        values: (n, 4) AP@5 and recall at 1, 5 and 10 of each query.
        scored: scores of the drawn pairs of each split.
    """

    splits: dict[str, SplitMetrics]
    queries: QueryTable
    values: Float64Array
    scored: dict[str, Scored]


def measure(
    vectors: Rows,
    metric: Metric,
    tiles: TileTable,
    in_metres: bool,
    conditions: Conditions,
    fpr: float,
    progress: ProgressCallback,
) -> Measured:
    """Metrics of descriptors (n, d), one row per tile.

    Args:
        vectors: an array, or a file's, which is read in blocks.
        in_metres: whether distances between tiles are metres on the ground.
        fpr: share of pairs of other places that may pass as the same one.
    """
    scored: dict[str, Scored] = {}
    retrieved: dict[str, tuple[list[Outcome], QueryTable, Float64Array]] = {}
    drawn_from: dict[str, int | None] = {}
    for code, split in enumerate(SPLITS):
        progress("evaluating", code, len(SPLITS), split)
        split_tasks = conditions.tasks(tiles, code)
        total = sum(len(task.queries) for task in split_tasks)
        drawn_from[split] = None
        if 0 < conditions.queries < total:
            drawn_from[split] = total
            split_tasks = drawn(split_tasks, conditions.queries)
            progress(f"{split}: {conditions.queries} of {total} queries, drawn at random")
        outcomes = retrieve(vectors, split_tasks, metric)
        found = QueryTable.join([_table(tiles, outcome, in_metres) for outcome in outcomes])
        retrieved[split] = outcomes, found, _values(outcomes)
        scored[split] = _scored(vectors, split_tasks, metric)
    blank, roc = _blank(vectors, tiles.places()), _verification(scored, fpr)
    splits = {
        split: _metrics(tiles, *results, blank, roc[split], drawn_from[split])
        for split, results in retrieved.items()
    }
    progress("evaluating", len(SPLITS), len(SPLITS))
    _, tables, values = zip(*retrieved.values(), strict=True)
    return Measured(splits, QueryTable.join(tables), np.concatenate(values), scored)


def intervals(values: Float64Array, place: NDArray[np.int64]) -> dict[str, Interval | None]:
    """Low and high of the 95 % bootstrap intervals of "map@5" and recall, drawn by place.

    Args:
        values: (n, 4) of each query, as `Measured` has them; or differences of them.
        place: (n,) codes of the queries' places.
    """
    found = bootstrap(values, place)
    keys = ("map@5", *(f"recall@{k}" for k in DEPTHS))
    return {
        key: None if np.isnan(ends).any() else (float(ends[0]), float(ends[1]))
        for key, ends in zip(keys, found, strict=True)
    }


def _values(outcomes: list[Outcome]) -> Float64Array:
    rank = all_ranks(outcomes)
    return np.stack([precisions5(outcomes), *(rank <= k for k in DEPTHS)], axis=1)


def _blank(vectors: Rows, place: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(n,) whether a tile's descriptor equals that of a tile of another place.

    Only descriptors whose hash is that of another place's are compared, since they are few.
    """
    found = np.zeros(len(place), bool)
    if len(place):
        alike = np.flatnonzero(_of_several(_hashed(vectors, len(place)), place))
        rows = np.ascontiguousarray(vectors[alike])
        code = np.unique(rows.view(f"V{rows.itemsize * rows.shape[1]}")[:, 0], return_inverse=True)
        found[alike] = _of_several(code[1].reshape(-1), place[alike])
    return found


def _hashed(vectors: Rows, count: int) -> NDArray[np.uint64]:
    """A hash (count,) of each descriptor's bits: their sum with random odd weights."""
    parts = []
    for start in range(0, count, BLOCK):
        words = np.ascontiguousarray(vectors[start : start + BLOCK]).view(np.uint32)
        weights = np.random.default_rng(0).integers(2**63, size=words.shape[1], dtype=np.uint64)
        parts.append((words * (2 * weights + 1)).sum(axis=1, dtype=np.uint64))
    return np.concatenate(parts)


def _of_several(key: NDArray[Any], place: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(n,) whether the same key belongs to tiles of different places."""
    order = np.lexsort((place, key))
    key, place = key[order], place[order]
    first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])[: len(key)])
    count = np.diff(np.append(first, len(key)))
    several = place[first] != place[first + count - 1]
    found = np.empty(len(key), bool)
    found[order] = np.repeat(several, count)
    return found


def _table(tiles: TileTable, outcome: Outcome, in_metres: bool) -> QueryTable:
    """The answers to every query of a task."""
    task, ranking, centres = outcome.task, outcome.ranking, tiles.centres()
    queries = task.queries
    top = np.where(ranking.top < 0, -1, task.database[ranking.top])
    metres = np.full(top.shape, np.nan)
    if in_metres:
        for column, answer in zip(metres.T, top.T, strict=True):
            found = np.flatnonzero(answer >= 0)
            query, near = queries[found], answer[found]
            column[found] = footprints.distance(
                tiles.epsg[query], centres[query], tiles.epsg[near], centres[near]
            )
    place = centres[queries]
    lonlat = place if tiles.grid is None else footprints.lonlat(tiles.epsg[queries], place)
    return QueryTable(
        tile=queries,
        match=task.database[ranking.match],
        match_score=outcome.match_score,
        rank=ranking.rank,
        top=top,
        top_score=outcome.top_score,
        distance_m=metres,
        lon=lonlat[:, 0],
        lat=lonlat[:, 1],
    )


# Metrics of ranks


def _metrics(
    tiles: TileTable,
    outcomes: list[Outcome],
    found: QueryTable,
    values: Float64Array,
    blank: NDArray[np.bool_],
    roc: VerificationMetrics | None,
    drawn_from: int | None,
) -> SplitMetrics:
    """The metrics of a split; `found` and `values` are of all outcomes, in their order."""
    searched = np.unique(np.concatenate([np.empty(0, int), *(o.task.database for o in outcomes)]))
    groups = _content(tiles, outcomes, found, blank)
    changed = class_folders = None
    regions: tuple[RegionMetrics, ...] | None = () if tiles.dated else None
    if tiles.changed is not None:
        changed = _by(ChangeMetrics, "changed", *_changed(tiles, found), found, values)
    if not tiles.dated:
        class_folders = _of_classes(tiles, outcomes, found, values)
    elif tiles.grid is not None:
        regions = _by(RegionMetrics, "region", *_regions(tiles, found), found, values)
    return SplitMetrics(
        **_distances(tiles, found, values, len(searched)),
        drawn_from=drawn_from,
        intervals=intervals(values, tiles.places()[found.tile]),
        content=_by(ContentMetrics, "content", *groups, found, values),
        pairs=_of_years(tiles, outcomes, found, values) if tiles.dated else (),
        roc=roc,
        changed=changed,
        regions=regions,
        class_folders=class_folders,
    )


def _of_years(
    tiles: TileTable, outcomes: list[Outcome], found: QueryTable, values: Float64Array
) -> tuple[YearPairMetrics, ...]:
    """Metrics of each ordered pair of years."""
    pairs, start = [], 0
    for outcome in outcomes:
        part = slice(start, start + len(outcome.task.queries))
        start = part.stop
        query_year, database_year = (tiles.years[code] for code in outcome.task.years)
        distances = _distances(tiles, found.select(part), values[part], len(outcome.task.database))
        pairs.append(
            YearPairMetrics(query_year=query_year, database_year=database_year, **distances)
        )
    return tuple(pairs)


def _distances(
    tiles: TileTable, found: QueryTable, values: Float64Array, database: int
) -> dict[str, Any]:
    """The fields of `DistanceMetrics`."""
    metres = found.distance_m[~np.isnan(found.distance_m[:, 0]), 0]
    side = tiles.grid.side if tiles.grid else math.nan
    return {
        **_ranks(found.rank, values),
        "database": database,
        "median_error_m": metrics.median(metres),
        "mean_rank": metrics.mean(found.rank),
        "mrr": metrics.mrr(found.rank),
        **{f"within_{n}_tiles": metrics.mean(metres <= n * side) for n in NEAR},
    }


def _ranks(rank: NDArray[np.int64], values: Float64Array) -> dict[str, Any]:
    """The fields of `RankMetrics`."""
    names = ("map5", *(f"recall{k}" for k in DEPTHS))
    means = {name: metrics.mean(column) for name, column in zip(names, values.T, strict=True)}
    return {"queries": len(rank), **means, "median_rank": metrics.median(rank)}


def _by(
    kind: type[Group],
    field: str,
    names: Sequence[str],
    code: NDArray[np.int64],
    found: QueryTable,
    values: Float64Array,
) -> tuple[Group, ...]:
    """Metrics of groups of queries.

    Args:
        kind: the type of the groups, and the `field` of it that holds a group's name.
        code: (n,) into `names`; -1 for queries of no group.
    """
    groups = []
    for group in np.unique(code[code >= 0]).tolist():
        members = code == group
        ranks = _ranks(found.rank[members], values[members])
        groups.append(kind(**{field: names[group]}, **ranks))
    return tuple(groups)


def _content(
    tiles: TileTable, outcomes: list[Outcome], found: QueryTable, blank: NDArray[np.bool_]
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Names and codes of queries by whether descriptors tell their place from others."""
    tied = np.concatenate([np.empty(0, bool), *(o.ranking.tied for o in outcomes)])
    if len(found):
        place = tiles.places()[found.top[:, :2]]
        tied &= place[:, 0] != place[:, -1]
    code = np.where(blank[found.tile], 2, np.where(tied, 1, 0))
    return ("distinct", "ambiguous", "blank"), code


def _regions(tiles: TileTable, found: QueryTable) -> tuple[Sequence[str], NDArray[np.int64]]:
    """Names and codes of the queries' source sheets; of blocks, where a year has one sheet."""
    source, year = tiles.source[found.tile], tiles.year[found.tile]
    if len(np.unique(source)) > len(np.unique(year)):
        return tiles.sources, source
    assert tiles.grid is not None
    side = block_side(tiles.grid, len(np.unique(tiles.places())))
    queries = tiles.select(found.tile)
    keys = blocks_of(tiles.grid, queries.epsg, queries.col, queries.row, side)
    blocks, code = np.unique(keys, axis=0, return_inverse=True)
    return [f"block {x}_{y}" for _, x, y in blocks.tolist()], code.reshape(-1)


def _changed(tiles: TileTable, found: QueryTable) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Names and codes of queries by how much of the ground changed, in the mask of either year."""
    assert tiles.changed is not None
    shares = np.stack([tiles.changed[found.tile], tiles.changed[found.match]])
    known = ~np.isnan(shares).all(axis=0)
    share = np.nan_to_num(shares).max(axis=0)
    code = np.where(known, (share > 0).astype(np.int64) + (share > CHANGED), -1)
    return ("0", f"up to {CHANGED:.0%}", f"above {CHANGED:.0%}"), code


def _of_classes(
    tiles: TileTable, outcomes: list[Outcome], found: QueryTable, values: Float64Array
) -> ClassFolderMetrics:
    """Mean average precision of all queries, and metrics of each class that has some."""
    several = [o.ranking for o in outcomes if isinstance(o.ranking, MultiMatchRanking)]
    ap = np.concatenate([np.empty(0), *(ranking.ap for ranking in several)])
    hits = np.concatenate([np.empty((0, len(DEPTHS)), int), *(r.hits for r in several)])
    relevant = np.concatenate([np.empty(0, int), *(r.relevant for r in several)])
    label = tiles.label[found.tile]
    classes = [
        ClassMetrics(
            label=tiles.classes[code],
            queries=int((label == code).sum()),
            hit5=metrics.recall_at(found.rank[label == code], 5),
            map=metrics.mean(ap[label == code]),
            map5=metrics.mean(values[label == code, 0]),
        )
        for code in np.unique(label)
    ]
    by_depth = dict(zip(DEPTHS, hits.T, strict=True))
    precision = {f"precision{k}": metrics.precision_at(h, k) for k, h in by_depth.items()}
    recall = {
        f"relevant_recall{k}": metrics.relevant_recall(h, relevant) for k, h in by_depth.items()
    }
    return ClassFolderMetrics(map=metrics.mean(ap), **precision, **recall, classes=tuple(classes))


# Metrics of pairs


def _scored(vectors: Rows, tasks: list[Task], metric: Metric) -> Scored:
    """Scores of drawn pairs of the same place, and of other places; as many of every task."""
    same, other = [np.empty(0, np.float32)], [np.empty(0, np.float32)]
    place = [np.empty(0, np.int64)]
    rng = np.random.default_rng(0)
    for task in tasks:
        places = task.query_place, task.database_place
        pairs = verification.sample(*places, task.neutral, ANCHORS // len(tasks), rng)
        place.append(task.query_place[pairs.anchor])
        tiles = task.queries[pairs.anchor], *(task.database[p] for p in (pairs.same, pairs.other))
        # What a file holds is read once.
        rows, at = np.unique(np.concatenate(tiles), return_inverse=True)
        near = vectors[rows]
        anchor, *positions = np.split(at.reshape(-1), 3)
        for scores, position in zip((same, other), positions, strict=True):
            products = exact.products(near, anchor, position, metric)
            scores.append(exact.scores(products[:, None], near[anchor], metric)[:, 0])
    return Scored(np.concatenate(same), np.concatenate(other), np.concatenate(place))


def _verification(
    scored: Mapping[str, Scored], fpr: float
) -> dict[str, VerificationMetrics | None]:
    """Metrics of pairs of the same place and of others, by split; None without pairs.

    Args:
        fpr: wanted on "validation", whose threshold and calibration serve every split; without
            pairs of it, each split is its own reference.
    """
    curves = {
        split: verification.ROC.of(s.same, s.other) for split, s in scored.items() if len(s.same)
    }
    found: dict[str, VerificationMetrics | None] = dict.fromkeys(scored)
    for split, curve in curves.items():
        reference_split = "validation" if "validation" in curves else split
        threshold = curves[reference_split].threshold(fpr)
        known, (same, other, place) = scored[reference_split], scored[split]
        threshold_interval, fpr_interval = threshold_intervals(
            known.other, known.place, other, place, fpr
        )
        counts = verification.confusion(same, other, threshold)
        (tn, fp), (fn, tp) = counts
        points = curve.thinned()
        precision, recall = verification.precision_recall(same, other)
        edges, *bins = verification.histogram(same, other)
        found[split] = VerificationMetrics(
            auc=curve.area,
            eer=curve.equal_error_rate,
            threshold=threshold,
            threshold_interval=threshold_interval,
            fpr=fp / (fp + tn),
            fpr_interval=fpr_interval,
            holds=fpr_interval[0] <= fpr,
            tpr=tp / (tp + fn),
            confusion=tuple(map(tuple, counts)),
            curve=_lists(fpr=points.fpr, tpr=points.tpr, threshold=points.thresholds),
            pr=_lists(recall=recall, precision=precision),
            histogram=_lists(edges=edges, same=bins[0], other=bins[1]),
            calibration=_calibration(Calibration.fit(known.same, known.other), same, other),
        )
    return found


def _lists(**arrays: NDArray[Any]) -> dict[str, tuple[float, ...]]:
    return {name: tuple(values.tolist()) for name, values in arrays.items()}


def _calibration(
    fitted: Calibration, same: NDArray[np.float32], other: NDArray[np.float32]
) -> CalibrationMetrics:
    found = reliability(fitted.probability(same), fitted.probability(other))
    return CalibrationMetrics(
        slope=fitted.slope,
        intercept=fitted.intercept,
        error=found.error,
        probability=tuple(found.probability.tolist()),
        share=tuple(found.share.tolist()),
        pairs=tuple(found.pairs.tolist()),
    )

"""Evaluate: how well the same places are found in the other years, by exact search.

Without years, how well a tile finds others of its class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np

from geomatch import config
from geomatch.data.embeddings import DescriptorFile
from geomatch.data.eval_report import Report, RivalMetrics
from geomatch.data.pair_scores import ScoredPairs
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import UsageError
from geomatch.evaluation import graded, no_match
from geomatch.evaluation.measure import Conditions, Measured, intervals, measure
from geomatch.evaluation.verification import check_fpr
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, replacing
from geomatch.search.exact import Metric, Rows


def evaluate(
    project: Project,
    *,
    run: str | None = None,
    database: config.Database = "split",
    years: tuple[str, ...] = (),
    same_year: bool = False,
    queries: int = config.EvalConfig.queries,
    fpr: float = 0.01,
    baselines: bool = False,
    others: Sequence[str] = (),
    grades: Path | None = None,
    html: bool = True,
    progress: ProgressCallback = silent,
) -> Report:
    """Measure embeddings on every split, by the protocol that the guide to evaluation states.

    Args:
        run: name of the embeddings ("RUN@STEP"); by default the latest.
        database: "split" searches a split's own tiles, "all" those of every split, "train" the
            training split's.
        years: search these years only.
        same_year: search the queries' own year too, as a distraction.
        queries: of a split at most, drawn at random, among its whole database; 0 for all.
        fpr: share of pairs of other places that may pass as the same one, and of queries without a
            match whose first answer may; the thresholds for it are chosen on the validation split,
            where there is one.
        baselines: measure an untrained encoder and others beside it; see
            `geomatch.evaluation.baselines`.
        others: names of embeddings to measure beside it.
        grades: a CSV file of graded answers, for the revisited Oxford and Paris protocol. Its
            queries are searched for among the other tiles of their splits, or in `database`.
        html: write `report.html`, its curves and its matches beside `report.json`.

    Raises:
        UsageError: there is no such database or year, or `fpr` is not a share.
        GeomatchError: there are no embeddings, or they are stale.
    """
    check_fpr(fpr)
    if database not in get_args(config.Database):
        raise UsageError(
            f"database {database!r}", f"Available: {', '.join(get_args(config.Database))}."
        )
    in_metres = project.tile_manifest().in_metres
    name = project.embeddings_of(run)
    described = _open(project, name)
    metric = described.manifest.metric
    rivals = [project.embeddings_of(other) for other in others]
    tiles = TileTable.load(project.catalogue)
    tiles.check_years(years)
    conditions = Conditions(database, years, same_year, queries)
    truths = graded.read(grades, tiles) if grades else {}

    def measured(vectors: Rows, metric: Metric) -> Measured:
        return measure(vectors, metric, tiles, in_metres, conditions, fpr, progress)

    found = measured(described, metric)
    beside = []
    for other in rivals:
        rival = _open(project, other)
        results = measured(rival, rival.manifest.metric)
        beside.append(_rival(other, results, found, tiles))
    if baselines:
        from geomatch.evaluation.baselines import baselines as describe

        for other, vectors, its_metric in describe(project, tiles, described.manifest, progress):
            beside.append(_rival(other, measured(vectors, its_metric), found, tiles))
    graded_metrics = None
    if truths:
        searched = conditions.searched(tiles, np.unique(tiles.split[list(truths)]))
        if years:
            searched &= np.isin(tiles.year, [tiles.years.index(year) for year in years])
        graded_metrics = graded.measure(described, metric, np.flatnonzero(searched), truths)
    told = no_match.measured(described, metric, tiles, fpr)
    unusual = list(conditions.unusual)
    if queries != config.EvalConfig.queries:
        unusual.append(f"queries{queries}")
    options = [*unusual, *([f"fpr{fpr:g}"] if fpr != 0.01 else [])]
    report = Report(
        embeddings=name,
        database=database,
        splits={
            split: replace(metrics, no_match=told.get(split))
            for split, metrics in found.splits.items()
        },
        name="-".join([name, *options]),
        others=tuple(beside),
        graded=graded_metrics,
    )
    folder = project.reports / report.name
    with replacing(folder / "queries.parquet") as temporary:
        found.queries.save(temporary, tiles)
    if not unusual:
        _keep_pairs(found, described, project.embeddings / f"{name}.parquet")
    report.save(folder / "report.json")
    if html:
        from geomatch.report.html import write_page

        write_page(project, folder)
    return report


def _open(project: Project, name: str) -> DescriptorFile:
    described = DescriptorFile(project.embeddings / f"{name}.parquet")
    project.check_fresh(described.manifest)
    return described


def _rival(name: str, other: Measured, measured: Measured, tiles: TileTable) -> RivalMetrics:
    """Metrics of other descriptors, and by how much they are behind on the same queries."""
    difference = measured.values - other.values
    split, place = tiles.split[measured.queries.tile], tiles.places()[measured.queries.tile]
    differences = {}
    for code, label in enumerate(SPLITS):
        rows = split == code
        means = difference[rows].sum(axis=0) / max(rows.sum(), 1)
        ends = intervals(difference[rows], place[rows])
        differences[label] = {
            key: None if interval is None else (float(mean), *interval)
            for (key, interval), mean in zip(ends.items(), means, strict=True)
        }
    return RivalMetrics(name=name, splits=other.splits, differences=differences)


def _keep_pairs(found: Measured, described: DescriptorFile, path: Path) -> None:
    """Keep the scores that `compare` takes its threshold and calibration from."""
    filled = [split for split in ("validation", "train") if len(found.scored[split].same)]
    if filled:
        scored = found.scored[filled[0]]
        pairs = ScoredPairs(scored.same, scored.other, filled[0], described.manifest.fingerprint)
        with replacing(ScoredPairs.beside(path)) as temporary:
            pairs.save(temporary)

"""Evaluate: how well the same places are found in the other years, by exact search.

Without years, how well a tile finds others of its class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch.data.embeddings import Embeddings
from geomatch.data.pair_scores import ScoredPairs
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import UsageError
from geomatch.evaluation import graded
from geomatch.evaluation.measure import Conditions, Measured, intervals, measure
from geomatch.evaluation.verification import check_fpr
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, read_json, replacing, write_json
from geomatch.search.exact import Metric


@dataclass(frozen=True)
class Report:
    """Figures of each split, and what they were measured on.

    `splits` maps a split's name to "queries", "database", "map@5", "recall@1", "recall@5",
    "recall@10", "median_rank", "median_error_m", "mean_rank", "mrr" and, within 1, 2 and 5 sides of
    a tile, the share of queries whose first answer is as near: "within_1_tiles" and so on. "pairs"
    is a list of the same for each ordered pair of years. "intervals" has [low, high] of "map@5" and
    recall: 95 % of bootstrap samples of places.

    Lists of "queries", "map@5", recall and "median_rank" of groups are "regions", each with the
    sheet or block that is its "region", and "content", with "blank" (the query's descriptor is
    exactly that of another place, as of tiles without content), "ambiguous" (its first two answers
    are of different places and score the same) and "distinct", the rest.
    Where a mask says how much of the ground changed, "changed" has groups of the share of the
    query's tile or its match's: "0", "up to 10%" and "above 10%".

    Of class folders there are "map", over the whole ranking, "mp@1", "relevant_recall@1" (of the
    relevant items, the share that is found) and so on at 5 and 10, and "classes", a list of
    "class", "queries", "hit@5", "map" and "map@5".

    "roc" is of drawn pairs of tiles: "auc", "eer" and, where a pair passes from a "threshold" of
    the score on, "fpr", "tpr" and "confusion": [[true negatives, false positives], [false
    negatives, true positives]]. Drawn are "curve", with "fpr", "tpr" and "threshold", "pr", with
    "precision" and "recall" (both from the strictest threshold on, at most 200 points), and
    "histogram", with "edges" of bins of the score, one more than the counts of pairs of the "same"
    and of the "other" place. "calibration" has the "slope" and "intercept" of a score's logit, as
    fitted on validation, the expected calibration "error", and of bins of the probability its
    mean ("probability"), the "share" of pairs of the same place, and how many "pairs" there are.

    Undefined figures are None, as is "roc" without pairs.

    "others" are baselines and other runs: "name", "splits" as above, and "differences" of each
    split: of "map@5" and recall, [difference, low, high] to this one's advantage, with the ends of
    the paired 95 % interval.

    "graded", None without graded answers, has "queries", "database", and of "easy", "medium" and
    "hard" the "trapezoidal map" and "mp@1", "mp@5" and "mp@10"; see `geomatch.evaluation.graded`.

    `name` is that of its folder in `reports/`, where `report.json` lies beside `queries.parquet`, a
    `QueryTable` of all splits.
    """

    embeddings: str
    database: str
    splits: dict[str, dict[str, Any]]
    name: str = ""
    others: tuple[dict[str, Any], ...] = ()
    graded: dict[str, Any] | None = None

    def save(self, path: Path) -> None:
        """Write JSON."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what `save` wrote."""
        values = read_json(path, "geomatch eval")
        keys = ("embeddings", "database", "splits", "name", "graded")
        return cls(**{key: values[key] for key in keys}, others=tuple(values["others"]))


def evaluate(
    project: Project,
    *,
    run: str | None = None,
    database: str = "split",
    years: tuple[str, ...] = (),
    same_year: bool = False,
    fpr: float = 0.01,
    baselines: bool = False,
    others: Sequence[str] = (),
    grades: Path | None = None,
    progress: ProgressCallback = silent,
) -> Report:
    """Measure embeddings on every split, after the protocol of the README.

    Args:
        run: name of the embeddings ("RUN@STEP"); by default the latest.
        database: "split" searches a split's own tiles, "all" those of every split, "train" the
            training split's.
        years: search these years only.
        same_year: search the queries' own year too, as a distraction.
        fpr: share of pairs of other places that may pass as the same one; the threshold for it is
            chosen on the validation split, where there is one.
        baselines: measure an untrained encoder and others beside it; see
            `geomatch.evaluation.baselines`.
        others: names of embeddings to measure beside it.
        grades: a CSV file of graded answers, for the revisited Oxford and Paris protocol. Its
            queries are searched for in what else there is of their splits, or in `database`.

    Raises:
        GeomatchError: there are no embeddings, or they are stale.
    """
    check_fpr(fpr)
    placed = project.tile_manifest().in_metres
    name = project.embeddings_of(run)
    path = project.embeddings / f"{name}.parquet"
    described = _described(project, name)
    rivals = [project.embeddings_of(other) for other in others]
    tiles = TileTable.load(project.catalogue)
    if unknown := [year for year in years if year not in tiles.years]:
        raise UsageError(
            f"there are no tiles of {', '.join(unknown)}", f"Available: {', '.join(tiles.years)}."
        )
    conditions = Conditions(database, years, same_year)
    truths = graded.read(grades, tiles) if grades else {}

    def measured(vectors: NDArray[np.float32], metric: Metric) -> Measured:
        return measure(vectors, metric, tiles, placed, conditions, fpr, progress)

    found = measured(described.vectors, described.manifest.metric)
    beside = [
        _beside(other, found, measured(rival.vectors, rival.manifest.metric), tiles)
        for other, rival in ((other, _described(project, other)) for other in rivals)
    ]
    if baselines:
        from geomatch.evaluation.baselines import baselines as describe

        beside += [
            _beside(other, found, measured(vectors, metric), tiles)
            for other, vectors, metric in describe(project, tiles, described.manifest, progress)
        ]
    told = [*conditions.unusual, *([f"fpr{fpr:g}"] if fpr != 0.01 else [])]
    graded_metrics = None
    if truths:
        searched = conditions.searched(tiles, np.unique(tiles.split[list(truths)]))
        if years:
            searched &= np.isin(tiles.year, [tiles.years.index(year) for year in years])
        graded_metrics = graded.measure(
            described.vectors, described.manifest.metric, np.flatnonzero(searched), truths
        )
    result = Report(
        name, database, found.splits, "-".join([name, *told]), tuple(beside), graded_metrics
    )
    folder = project.reports / result.name
    with replacing(folder / "queries.parquet") as temporary:
        found.queries.save(temporary, tiles)
    if not conditions.unusual:
        _keep_pairs(found, described, path)
    result.save(folder / "report.json")
    return result


def _described(project: Project, name: str) -> Embeddings:
    described = Embeddings.load(project.embeddings / f"{name}.parquet")
    project.check_fresh(described.manifest)
    return described


def _beside(name: str, mine: Measured, other: Measured, tiles: TileTable) -> dict[str, Any]:
    """Figures of other descriptors, and by how much they are behind on the same queries."""
    difference = mine.values - other.values
    split, place = tiles.split[mine.queries.tile], tiles.places()[mine.queries.tile]
    differences = {}
    for code, label in enumerate(SPLITS):
        asked = split == code
        ends = intervals(difference[asked], place[asked])
        differences[label] = {
            key: None if pair is None else [float(mean), *pair]
            for (key, pair), mean in zip(
                ends.items(), difference[asked].sum(axis=0) / max(asked.sum(), 1), strict=True
            )
        }
    return {"name": name, "splits": other.splits, "differences": differences}


def _keep_pairs(found: Measured, described: Embeddings, path: Path) -> None:
    """Keep the scores that `compare` takes its threshold and calibration from."""
    filled = [split for split in ("validation", "train") if len(found.scored[split][0])]
    if filled:
        same, other = found.scored[filled[0]]
        pairs = ScoredPairs(same, other, filled[0], described.manifest.fingerprint)
        with replacing(ScoredPairs.beside(path)) as temporary:
            pairs.save(temporary)

"""Evaluate: how well the same places are found in the other years, by exact search.

Without years, how well a tile finds others of its class.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch.data.embeddings import Embeddings
from geomatch.data.pairs import Task, tasks
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import UsageError
from geomatch.geo import footprints
from geomatch.progress import Reporter, silent
from geomatch.project import FORMAT, Project, latest, read_manifest, write_json
from geomatch.search import exact, metrics, pairs
from geomatch.search.exact import Metric
from geomatch.search.metrics import Precision
from geomatch.search.protocol import Outcome, all_ranks, map5, retrieve

ANCHORS = 20_000
"""The most, of each split, that pairs are drawn for; each has one of its place and one other."""

Scored = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Scores of pairs of the same place, and of pairs of other places."""


@dataclass(frozen=True)
class Report:
    """Figures of each split, and what they were measured on.

    `splits` maps a split's name to "queries", "database", "map@5", "recall@1", "recall@5",
    "recall@10", "median_rank", "median_error_m" and "pairs", a list of the same for each ordered
    pair of years. Of class folders there are "map", over the whole ranking, and "classes", a list
    of "class", "queries", "hit@5", "map" and "map@5". "roc" is of drawn pairs of tiles: "auc",
    "eer" and, where a pair passes from a "threshold" of the score on, "fpr", "tpr" and
    "confusion": [[true negatives, false positives], [false negatives, true positives]].
    Undefined figures are None.
    """

    embeddings: str
    database: str
    splits: dict[str, dict[str, Any]]

    def save(self, path: Path) -> None:
        """Write JSON."""
        write_json(path, {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what `save` wrote."""
        facts = read_manifest(path, "geomatch eval")
        return cls(facts["embeddings"], facts["database"], facts["splits"])


def evaluate(
    project: Project,
    *,
    run: str | None = None,
    database: str = "split",
    years: tuple[str, ...] = (),
    same_year: bool = False,
    fpr: float = 0.01,
    report: Reporter = silent,
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

    Raises:
        GeomatchError: there are no embeddings, or they are stale.
    """
    if not 0 <= fpr <= 1:
        raise UsageError(f"--fpr {fpr}: a share between 0 and 1 is expected")
    facts = project.tile_facts()
    name = latest(project.embedding_names(), run, "embeddings", "geomatch embed")
    described = Embeddings.load(project.embeddings / f"{name}.parquet")
    project.check_fresh(described.facts)
    metric: Metric = described.facts["metric"]
    tiles = TileTable.load(project.catalogue)
    if unknown := [year for year in years if year not in tiles.years]:
        raise UsageError(
            f"there are no tiles of {', '.join(unknown)}", f"There are: {', '.join(tiles.years)}."
        )
    splits: dict[str, dict[str, Any]] = {}
    scored = {}
    for code, split in enumerate(SPLITS):
        mine = tiles.split == code
        searched = {"split": mine, "all": mine | True, "train": tiles.split == 0}[database]
        report("evaluating", code, len(SPLITS), split)
        asked = [
            task
            for task in tasks(tiles, mine, searched, same_year)
            if not years or tiles.years[task.years[1]] in years
        ]
        outcomes = retrieve(described.vectors, asked, metric)
        splits[split] = _figures(tiles, outcomes, facts["placement"] == "real")
        scored[split] = _scored(described.vectors, asked, metric)
    for split, figures in _verification(scored, fpr).items():
        splits[split]["roc"] = figures
    report("evaluating", len(SPLITS), len(SPLITS))
    result = Report(name, database, splits)
    told = [
        *([database] if database != "split" else []),
        *years,
        *(["same-year"] if same_year else []),
        *([f"fpr{fpr:g}"] if fpr != 0.01 else []),
    ]
    result.save(project.reports / "-".join([name, *told]) / "report.json")
    return result


def _figures(tiles: TileTable, outcomes: list[Outcome], placed: bool) -> dict[str, Any]:
    searched = np.unique(np.concatenate([np.empty(0, int), *(o.task.database for o in outcomes)]))
    if not tiles.dated:
        return {**_summary(outcomes, np.empty(0), len(searched)), **_of_classes(tiles, outcomes)}
    errors = [_errors(tiles, outcome) if placed else np.empty(0) for outcome in outcomes]
    by_years = [
        {
            "query_year": tiles.years[outcome.task.years[0]],
            "database_year": tiles.years[outcome.task.years[1]],
            **_summary([outcome], error, len(outcome.task.database)),
        }
        for outcome, error in zip(outcomes, errors, strict=True)
    ]
    everything = np.concatenate([np.empty(0), *errors])
    return {**_summary(outcomes, everything, len(searched)), "pairs": by_years}


def _summary(outcomes: list[Outcome], error: NDArray[np.float64], database: int) -> dict[str, Any]:
    rank = all_ranks(outcomes)
    return {
        "queries": len(rank),
        "database": database,
        "map@5": map5(outcomes),
        "recall@1": metrics.recall_at(rank, 1),
        "recall@5": metrics.recall_at(rank, 5),
        "recall@10": metrics.recall_at(rank, 10),
        "median_rank": metrics.median(rank),
        "median_error_m": metrics.median(error),
    }


def _of_classes(tiles: TileTable, outcomes: list[Outcome]) -> dict[str, Any]:
    """Mean average precision of all queries, and figures of each class that asks."""
    several = [o.ranking for o in outcomes if isinstance(o.ranking, Precision)]
    ap = np.concatenate([np.empty(0), *(ranking.ap for ranking in several)])
    ap5 = np.concatenate([np.empty(0), *(ranking.ap_at for ranking in several)])
    asking = np.concatenate([np.empty(0, int), *(o.task.queries for o in outcomes)])
    rank, label = all_ranks(outcomes), tiles.label[asking]
    classes = [
        {
            "class": tiles.classes[code],
            "queries": int((label == code).sum()),
            "hit@5": metrics.recall_at(rank[label == code], 5),
            "map": metrics.mean(ap[label == code]),
            "map@5": metrics.mean(ap5[label == code]),
        }
        for code in np.unique(label)
    ]
    return {"map": metrics.mean(ap), "pairs": [], "classes": classes}


def _scored(vectors: NDArray[np.float32], asked: list[Task], metric: Metric) -> Scored:
    """Scores of drawn pairs of the same place, and of other places; as many of every task."""
    same, other = [np.empty(0, np.float32)], [np.empty(0, np.float32)]
    rng = np.random.default_rng(0)
    for task in asked:
        places = task.query_place, task.database_place
        drawn = pairs.sample(*places, task.neutral, ANCHORS // len(asked), rng)
        anchor = task.queries[drawn.anchor]
        for scores, position in ((same, drawn.same), (other, drawn.other)):
            products = exact.products(vectors, anchor, task.database[position], metric)
            scores.append(exact.scores(products[:, None], vectors[anchor], metric)[:, 0])
    return np.concatenate(same), np.concatenate(other)


def _verification(scored: dict[str, Scored], fpr: float) -> dict[str, dict[str, Any] | None]:
    """Figures of telling pairs of the same place from others, by split.

    Args:
        scored: by split.
        fpr: wanted on "validation", whose threshold serves every split; without it, each its own.
    """
    curves = {split: pairs.ROC.of(*both) for split, both in scored.items() if len(both[0])}
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(scored)
    for split, curve in curves.items():
        threshold = curves.get("validation", curve).threshold(fpr)
        (tn, fp), (fn, tp) = counts = pairs.confusion(*scored[split], threshold)
        found[split] = {
            "auc": curve.area,
            "eer": curve.equal_error_rate,
            "threshold": threshold,
            "fpr": fp / (fp + tn),
            "tpr": tp / (tp + fn),
            "confusion": counts,
        }
    return found


def _errors(tiles: TileTable, outcome: Outcome) -> NDArray[np.float64]:
    """(q,) metres from each query's centre to that of its first answer."""
    task, centres = outcome.task, tiles.centres()
    first = task.database[outcome.ranking.first]
    return footprints.distance(
        tiles.epsg[task.queries], centres[task.queries], tiles.epsg[first], centres[first]
    )

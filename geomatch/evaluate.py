"""Evaluate: how well the same places are found in the other years, by exact search."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch.data.embeddings import Embeddings
from geomatch.data.pairs import tasks
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import UsageError
from geomatch.geo import footprints
from geomatch.progress import Reporter, silent
from geomatch.project import FORMAT, Project, latest, read_manifest, write_json
from geomatch.search import metrics
from geomatch.search.protocol import Outcome, all_ranks, retrieve


@dataclass(frozen=True)
class Report:
    """Figures of each split, and what they were measured on.

    `splits` maps a split's name to "queries", "database", "map@5", "recall@1", "recall@5",
    "recall@10", "median_rank", "median_error_m" and "pairs", a list of the same for each ordered
    pair of years. Undefined figures are None.
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
    report: Reporter = silent,
) -> Report:
    """Measure embeddings on every split, after the protocol of the README.

    Args:
        run: name of the embeddings ("RUN@STEP"); by default the latest.
        database: "split" searches a split's own tiles, "all" those of every split.
        years: search these years only.
        same_year: search the queries' own year too, as a distraction.

    Raises:
        GeomatchError: there are no embeddings, or they are stale.
    """
    facts = project.tile_facts()
    name = latest(project.embedding_names(), run, "embeddings", "geomatch embed")
    described = Embeddings.load(project.embeddings / f"{name}.parquet")
    project.check_fresh(described.facts)
    tiles = TileTable.load(project.catalogue)
    if unknown := [year for year in years if year not in tiles.years]:
        raise UsageError(
            f"there are no tiles of {', '.join(unknown)}", f"There are: {', '.join(tiles.years)}."
        )
    splits = {}
    for code, split in enumerate(SPLITS):
        mine = tiles.split == code
        searched = mine if database == "split" else np.ones(len(tiles), bool)
        report("evaluating", code, len(SPLITS), split)
        asked = [
            task
            for task in tasks(tiles, mine, searched, same_year)
            if not years or tiles.years[task.years[1]] in years
        ]
        outcomes = retrieve(described.vectors, asked)
        splits[split] = _figures(tiles, outcomes, facts["placement"] == "real")
    report("evaluating", len(SPLITS), len(SPLITS))
    result = Report(name, database, splits)
    told = [*(["all"] if database == "all" else []), *years, *(["same-year"] if same_year else [])]
    result.save(project.reports / "-".join([name, *told]) / "report.json")
    return result


def _figures(tiles: TileTable, outcomes: list[Outcome], placed: bool) -> dict[str, Any]:
    errors = [_errors(tiles, outcome) if placed else np.empty(0) for outcome in outcomes]
    pairs = [
        {
            "query_year": tiles.years[outcome.task.years[0]],
            "database_year": tiles.years[outcome.task.years[1]],
            **_summary(outcome.ranking.rank, error, len(outcome.task.database)),
        }
        for outcome, error in zip(outcomes, errors, strict=True)
    ]
    searched = np.unique(np.concatenate([np.empty(0, int), *(o.task.database for o in outcomes)]))
    everything = np.concatenate([np.empty(0), *errors])
    return {**_summary(all_ranks(outcomes), everything, len(searched)), "pairs": pairs}


def _summary(rank: NDArray[np.int64], error: NDArray[np.float64], database: int) -> dict[str, Any]:
    return {
        "queries": len(rank),
        "database": database,
        "map@5": metrics.map_at(rank, 5),
        "recall@1": metrics.recall_at(rank, 1),
        "recall@5": metrics.recall_at(rank, 5),
        "recall@10": metrics.recall_at(rank, 10),
        "median_rank": metrics.median(rank),
        "median_error_m": metrics.median(error),
    }


def _errors(tiles: TileTable, outcome: Outcome) -> NDArray[np.float64]:
    """(q,) metres from each query's centre to that of its first answer."""
    task, centres = outcome.task, tiles.centres()
    first = task.database[outcome.ranking.first]
    return footprints.distance(
        tiles.epsg[task.queries], centres[task.queries], tiles.epsg[first], centres[first]
    )

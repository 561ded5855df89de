"""Demo: the six commands on a made-up landscape of two years, in one empty folder."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from geomatch import config
from geomatch.data.pairs import tasks
from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.embed import embed
from geomatch.errors import UsageError
from geomatch.evaluate import evaluate
from geomatch.geo.landscape import write_landscape
from geomatch.index import index
from geomatch.progress import Reporter, silent
from geomatch.project import Project, write_json
from geomatch.query import Matches, query
from geomatch.report.pictures import Thumbnail, sheet
from geomatch.tile import tile
from geomatch.train import train

QUERIES = 5
MARK = "demo.json"
"""Its presence says that a folder is the demo's own."""

SETTINGS = (
    "grid.size=64",
    "grid.gsd=1.0",
    "model.trunk=resnet10",
    "train.loss=infonce",
    "train.epochs=15",
    "train.batch=32",
    "train.lr=1e-3",
    "mining.every=5",
)


@dataclass(frozen=True)
class Shown:
    """What the demo ends with: mAP@5 of the test places, trained and untrained."""

    places: int
    trained: float
    untrained: float
    picture: Path
    seconds: float


def demo(folder: Path, *, seed: int = 0, report: Reporter = silent) -> Shown:
    """Make a landscape, then tile, train, embed, index, query and evaluate it.

    Raises:
        UsageError: `folder` holds something else.
    """
    started = time.monotonic()
    mark = folder / MARK
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        raise UsageError(f"{folder} is not empty", "Name another folder: geomatch demo DIR")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(mark, {"seed": seed})
    project = Project(folder)
    if not project.config.exists():
        project.config.write_text(config.template(), encoding="utf-8")
    imagery = folder / "imagery"
    if not (imagery / "labels_after.tif").exists():
        report("making a landscape and photographing it in two years")
        imagery.mkdir(exist_ok=True)
        write_landscape(imagery, seed=seed)
    return _chain(project, imagery, seed, started, report)


def _chain(project: Project, imagery: Path, seed: int, started: float, report: Reporter) -> Shown:
    settings = config.with_sources(
        config.load(project.config, [*SETTINGS, f"train.seed={seed}", f"split.seed={seed}"]),
        [
            config.Source(
                year=year,
                images=str(imagery.absolute() / f"images_{year}.tif"),
                labels=str(imagery.absolute() / f"labels_{year}.tif"),
            )
            for year in ("before", "after")
        ],
    )
    tile(project, settings, overrides=SETTINGS, report=report)
    figures = []
    # A run of no epochs is the untrained encoder.
    for name, epochs in (("untrained", 0), ("run1", settings.train.epochs)):
        wanted = replace(settings, train=replace(settings.train, epochs=epochs))
        train(project, wanted, run=name, report=report)
        named = embed(project, run=name, report=report).name
        figures.append(evaluate(project, run=named, report=report).splits["test"])
    index(project, run=named, report=report)
    picture = _picture(project, report)
    return Shown(
        places=figures[0]["queries"] // 2,
        untrained=figures[0]["map@5"],
        trained=figures[1]["map@5"],
        picture=picture,
        seconds=time.monotonic() - started,
    )


def _picture(project: Project, report: Reporter) -> Path:
    """Five queries of the test region, spread over it, with their nearest tiles."""
    tiles = TileTable.load(project.catalogue)
    test = tiles.split == SPLITS.index("test")
    asking = tasks(tiles, test, test)[0].queries
    chosen = asking[np.linspace(0, len(asking) - 1, QUERIES).astype(int)]
    ids = tiles.select(chosen).ids()
    store = TileStore.open(project.pixels)
    rows = [_row(query(project, name, report=report), name, store) for name in ids]
    path = project.reports / "demo.png"
    path.parent.mkdir(exist_ok=True)
    sheet(rows, path)
    return path


def _row(found: Matches, name: str, store: TileStore) -> list[Thumbnail]:
    assert found.query_row is not None
    pixels = store.read(np.array([found.query_row, *found.rows]))
    cell, _, year = name.rpartition("@")
    return [
        Thumbnail(pixels[0], (f"query {cell}", year)),
        *(
            Thumbnail(
                pixels[match.rank],
                (f"{match.rank}: {match.score:.3f}", f"{match.distance_m:.0f} m, {match.year}"),
                match.tile.rpartition("@")[0] == cell,
            )
            for match in found.matches
        ),
    ]

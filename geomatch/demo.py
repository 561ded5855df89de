"""Demo: the whole pipeline on a synthetic landscape of two years, in one empty folder."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geomatch import config
from geomatch.data.ground_truth import tasks
from geomatch.data.tiles import SPLITS
from geomatch.embed import embed
from geomatch.errors import UsageError
from geomatch.evaluate import evaluate
from geomatch.geo.landscape import write_landscape
from geomatch.index import index
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, read_json, replace_folder, replacing, write_json
from geomatch.query import query
from geomatch.report.contact_sheet import sheet
from geomatch.report.matches import TilePictures
from geomatch.tile import tile
from geomatch.train import train

QUERIES = 5
MARK = "demo.json"
"""File that marks a folder as the demo's own."""

SETTINGS = """\
# Settings of the demo: every command works in this folder without further options.

[[source]]
year = "before"
images = "imagery/images_before.tif"
labels = "imagery/labels_before.tif"

[[source]]
year = "after"
images = "imagery/images_after.tif"
labels = "imagery/labels_after.tif"

[grid]
size = 64
gsd = 1.0

[split]
seed = {seed}

[model]
trunk = "resnet10"
stage = 3
pooling = "grid"
instance_norm = true
head = "pca"
centre = true

[train]
loss = "infonce"
epochs = 6
batch = 32
optimizer = "adamw"
lr = 1e-3
weight_decay = 0.01
schedule = "cosine"
warmup = 1.0
clip = 1.0
ema = 0.99
seed = {seed}

[mining]
rule = "neighbours"
every = 2
"""


@dataclass(frozen=True)
class Shown:
    """The result of `demo`: mAP@5 of the test places, trained and untrained."""

    places: int
    trained: float | None
    untrained: float | None
    picture: Path
    seconds: float


def demo(
    folder: Path,
    *,
    seed: int = 0,
    overrides: Sequence[str] = (),
    progress: ProgressCallback = silent,
) -> Shown:
    """Make a landscape, then tile, train, embed, index, query and evaluate it.

    Args:
        overrides: "table.key=value" strings that are written into the demo's `geomatch.toml`.

    Raises:
        UsageError: `folder` holds something else, or the demo with another seed or settings.
    """
    started = time.monotonic()
    project, mark = Project(folder), folder / MARK
    text = config.edited(SETTINGS.format(seed=seed), overrides)
    if folder.exists() and any(folder.iterdir()):
        if not mark.exists():
            raise UsageError(f"{folder} is not empty", "Name another folder: geomatch demo DIR")
        before = read_json(mark, "geomatch demo DIR")["seed"]
        if before != seed:
            raise UsageError(
                f"{folder} holds the demo with seed {before}",
                f"Continue with --seed {before}, or name another folder.",
            )
        if project.config.exists():
            _check_settings(project, text)
    write_json(mark, {"seed": seed})
    if not project.config.exists():
        with replacing(project.config) as temporary:
            temporary.write_text(text, encoding="utf-8")
    imagery = folder / "imagery"
    if not imagery.exists():
        progress("making a landscape and its images of two years")
        partial = folder / "imagery.partial"
        partial.mkdir(exist_ok=True)
        write_landscape(partial, seed=seed)
        replace_folder(partial, imagery)
    return _chain(project, started, progress)


def _check_settings(project: Project, text: str) -> None:
    """Check that a demo in progress has the settings in `text`.

    Raises:
        UsageError: some differ.
    """
    there, wanted = config.load(project.config), config.from_dict(tomllib.loads(text), MARK)
    tables = [table for table in config.as_dict(wanted) if table not in ("source", "labels")]
    if changed := config.differences(there, wanted, tables):
        raise UsageError(
            f"{project.root} holds the demo with other settings: {', '.join(changed)}",
            "Give the --set options it was started with, undo edits of its geomatch.toml, or name "
            "another folder.",
        )


def _chain(project: Project, started: float, progress: ProgressCallback) -> Shown:
    settings = config.load(project.config)
    tile(project, settings, progress=progress)
    metrics = []
    # A run of no epochs is the untrained encoder.
    for name, epochs in (("untrained", 0), ("run1", settings.train.epochs)):
        wanted = config.with_overrides(settings, [f"train.epochs={epochs}"])
        train(project, wanted, run=name, reference=False, progress=progress)
        embedded = embed(project, run=name, settings=settings, progress=progress)
        report = evaluate(
            project,
            run=embedded.name,
            database=settings.eval.database,
            queries=settings.eval.queries,
            html=False,
            progress=progress,
        )
        metrics.append(report.splits["test"])
    index(project, run=embedded.name, settings=settings.index, progress=progress)
    picture = _picture(project, progress)
    return Shown(
        places=metrics[0].queries // 2,
        untrained=metrics[0].map5,
        trained=metrics[1].map5,
        picture=picture,
        seconds=time.monotonic() - started,
    )


def _picture(project: Project, progress: ProgressCallback) -> Path:
    """Five queries, spread over the test region, with their nearest tiles."""
    pictures = TilePictures.of(project)
    tiles = pictures.tiles
    test = tiles.split == SPLITS.index("test")
    asking = tasks(tiles, test, test)[0].queries
    chosen = asking[np.linspace(0, len(asking) - 1, QUERIES).astype(int)]
    ids = tiles.select(chosen).ids()
    rows = []
    for name in ids:
        found = query(project, name, progress=progress)
        rows.append(pictures.row(found.as_json(), found.rows, found.query.picture, name))
    path = project.reports / "demo.png"
    path.parent.mkdir(exist_ok=True)
    sheet(rows, path)
    return path

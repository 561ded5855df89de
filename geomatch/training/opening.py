"""Opening: what a run is made of before its first step, and whether it may go on.

Settings are made to fit the tiles, tiles are divided into splits, and a run that exists is checked
to have been begun with the same.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np

from geomatch import config
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import GeomatchError, UsageError
from geomatch.manifests import RunManifest, TileManifest
from geomatch.nn.encoder import TileForm
from geomatch.progress import ProgressCallback
from geomatch.project import Project, write_record
from geomatch.report import mlflow_run
from geomatch.runs import read_run
from geomatch.training import setup
from geomatch.training.origin import session
from geomatch.training.sampler import Sampler


def prepare(
    project: Project, settings: config.Config, manifest: TileManifest, progress: ProgressCallback
) -> tuple[config.Config, dict[str, TileTable], Sampler]:
    """Settings that fit the tiles, tiles by split, and the sampler.

    Raises:
        UsageError: settings contradict each other or the tiles.
        GeomatchError: there are too few tiles to train on.
    """
    asked, settings = settings, setup.of_tiles(settings, manifest)
    if settings.mining != asked.mining:
        progress("images without years have no neighbours: batches are drawn at random")
    splits = _splits(TileTable.load(project.catalogue), settings)
    return settings, splits, _checked_sampler(settings, splits["train"])


def _splits(tiles: TileTable, settings: config.Config) -> dict[str, TileTable]:
    """Tiles of training and validation, and of other splits to be measured or pictured."""
    years = settings.split.years
    if unknown := [year for year in years if year not in tiles.years]:
        raise UsageError(
            f"split.years: no tiles of {', '.join(unknown)}",
            f"Available: {', '.join(tiles.years)}.",
        )
    if years:
        tiles = tiles.select(np.isin(tiles.year, [tiles.years.index(year) for year in years]))
    needed = {"train", "validation", *settings.eval.during, settings.train.frames}
    return {
        split: tiles.select(tiles.split == code)
        for code, split in enumerate(SPLITS)
        if split in needed
    }


def open_run(
    project: Project, name: str, settings: config.Config, tiles: TileManifest, form: TileForm
) -> config.Config:
    """Begin a run, or check that it was begun with these settings; returns them resolved.

    Raises:
        UsageError: the run was begun with other settings or tiles.
    """
    folder = project.run(name)
    settings, manifest = resolve(project, name, settings, tiles, form)
    finished = (folder / "finished.json").exists()
    if not finished or read_run(folder)[2].settings != manifest.settings:
        manifest = replace(manifest, sessions=(*manifest.sessions, session(project.root)))
    write_record(folder / "config.json", manifest)
    return settings


def resolve(
    project: Project, name: str, settings: config.Config, tiles: TileManifest, form: TileForm
) -> tuple[config.Config, RunManifest]:
    """Resolved settings and manifest of a run, which is begun or checked, but not written.

    Raises:
        UsageError: the run was begun with other settings or tiles.
    """
    mlflow_run.check(settings.train.mlflow)
    path = project.run(name) / "config.json"
    before, old = None, None
    if path.exists():
        before, _, old = read_run(project.run(name))
    settings = setup.resolve_settings(settings, project.root, before)
    manifest = setup.manifest(settings, form, tiles)
    if before is not None and old is not None:
        requested = config.from_dict(manifest.settings, str(path))
        changed = config.differences(before, requested, (*setup.TABLES, "split"))
        if "train.epochs" in changed and requested.train.epochs > before.train.epochs:
            changed.remove("train.epochs")
        if "train.mlflow" in changed:  # which is no part of what is trained
            changed.remove("train.mlflow")
        if old.tiles != manifest.tiles:
            changed.append("the tiles")
        manifest = replace(manifest, id=old.id, sessions=old.sessions)
        if changed:
            raise UsageError(
                f"run {name} was begun with other settings: {', '.join(changed)}",
                f"Start a new one: geomatch train --run {next_name(project)}",
            )
    return settings, manifest


def _checked_sampler(settings: config.Config, training: TileTable) -> Sampler:
    """The sampler of batches, after checking that settings and training tiles fit."""
    train, rule = settings.train, settings.mining.rule
    devices, batch = jax.device_count(), train.batch
    parts = devices * train.accumulate
    if batch < 1 or batch % parts:
        times = f" times train.accumulate = {train.accumulate}" if train.accumulate > 1 else ""
        raise UsageError(
            f"train.batch = {batch} is not divisible by {devices} devices{times}",
            f"--set train.batch={max(1, -(-batch // parts)) * parts}",
        )
    if rule == "in-batch" and train.loss != "triplet":
        raise UsageError(
            f'mining.rule = "in-batch" needs a triplet loss, but train.loss = "{train.loss}"',
            "--set train.loss=triplet, or --set mining.rule=none.",
        )
    if rule == "ranked" and train.loss not in ("triplet", "contrastive"):
        raise UsageError(
            f'mining.rule = "ranked" ranks triplets by distance, but train.loss = "{train.loss}" '
            "has none",
            "--set train.loss=triplet, or --set mining.rule=knn.",
        )
    if train.distil and (train.loss != "infonce" or settings.model.head == "conv"):
        raise UsageError(
            f'train.distil with train.loss = "{train.loss}" and '
            f'model.head = "{settings.model.head}"',
            "It needs --set train.loss=infonce and a head that takes pooled features.",
        )
    sampler = Sampler(training, train, settings.mining)
    if sampler.anchors < 2:
        if training.dated:
            raise GeomatchError(
                "fewer than two training places are seen in two years",
                "See geomatch info: more imagery, another split, or a lower grid.min_valid.",
            )
        raise GeomatchError(
            "fewer than two classes have two training images each",
            "See geomatch info: more images, or other shares of images.validation and images.test.",
        )
    return sampler


def next_name(project: Project) -> str:
    """The first of "run1", "run2", ... that no run has."""
    taken = project.run_names()
    return next(f"run{i}" for i in range(1, len(taken) + 2) if f"run{i}" not in taken)

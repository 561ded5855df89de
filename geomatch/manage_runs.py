"""Runs of a project as a whole: list, compare, rename, tag and prune them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geomatch import config
from geomatch.data import embeddings
from geomatch.data.eval_report import Report
from geomatch.errors import GeomatchError, StaleError, UsageError
from geomatch.manifests import DescriptorManifest, RunManifest
from geomatch.nn.checkpoint import Checkpoints
from geomatch.project import (
    Project,
    check_name,
    latest,
    read_json,
    read_record,
    write_json,
)
from geomatch.records import Record, named
from geomatch.report.curves import training_series

AGAIN = "geomatch train --run NEW"
"""Makes a run again whose manifest is damaged."""


@dataclass(frozen=True)
class RunSummary(Record):
    """A run at a glance.

    Attributes:
        tags: given with `tag_run`.
        started: when it was first started, ISO 8601 in UTC; None if it was not recorded.
        trunk, epochs: of its settings; None if its manifest is damaged.
        last, best: steps of its newest and best checkpoint; None without one.
        map5: mAP@5 on validation of the best one.
        finished: whether it trained to its end.
        other_tiles: whether the tiles changed since.
        size: of its files in bytes.
        used_by: embeddings and indexes that it made, and searches that it is a trial of.
    """

    name: str
    tags: tuple[str, ...]
    started: str | None
    trunk: str | None
    epochs: int | None
    last: int | None
    best: int | None
    map5: float | None = field(metadata=named("map@5"))
    finished: bool
    other_tiles: bool
    size: int
    used_by: tuple[str, ...]


@dataclass(frozen=True)
class RunMetrics(Record):
    """What a run measured.

    Attributes:
        untrained, map5: mAP@5 on validation before the first step, and the best.
        best: step of that checkpoint.
        epochs: that were trained.
        loss: that was logged last.
        images_per_s: median of the tiles trained on per second.
        test: mAP@5 on test of its newest report.
    """

    untrained: float | None
    map5: float | None = field(metadata=named("map@5"))
    best: int | None
    epochs: float | None
    loss: float | None
    images_per_s: float | None
    test: float | None = field(metadata=named("test/map@5"))


@dataclass(frozen=True)
class RunComparison(Record):
    """Runs side by side.

    Attributes:
        settings: values of the settings that differ, in the order of `runs`, by "table.key";
            "tiles" and "geomatch" stand for the fingerprint of the tiles and the version.
        metrics: in the order of `runs`.
        curves: (epoch, value) points by metric and run.
    """

    runs: tuple[str, ...]
    settings: dict[str, list[Any]]
    metrics: tuple[RunMetrics, ...]
    curves: dict[str, dict[str, list[list[float]]]]


def checkpoint_state(folder: Path) -> tuple[int | None, int | None, float | None]:
    """Steps of the newest and the best checkpoint of a run, and the mAP@5 of the best one."""
    if not (folder / "checkpoints").exists():
        return None, None, None
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        best = checkpoints.best
        return checkpoints.last, best, None if best is None else checkpoints.metric(best)


def list_runs(project: Project) -> list[RunSummary]:
    """All runs, the latest last."""
    tiles = project.tile_manifest().fingerprint if project.tiles_manifest.exists() else None
    made = _made(project)
    return [_summary(project, name, tiles, made) for name in project.run_names()]


def _summary(
    project: Project, name: str, tiles: str | None, made: Iterable[tuple[str, DescriptorManifest]]
) -> RunSummary:
    folder, manifest = project.run(name), None
    state: tuple[int | None, int | None, float | None] = (None, None, None)
    with contextlib.suppress(StaleError):
        manifest = read_record(folder / "config.json", RunManifest, AGAIN)
        state = checkpoint_state(folder)
    used_by = [] if manifest is None else [w for w, m in made if m.run_id == manifest.id]
    study, _, number = name.rpartition("-")
    if number.isdigit() and (project.root / "tune" / f"{study}.db").exists():
        used_by.append(f"study {study}")
    files = (path for path in folder.rglob("*") if path.is_file())
    last, best, map5 = state
    return RunSummary(
        name=name,
        tags=_tags(folder),
        started=manifest.sessions[0].started if manifest and manifest.sessions else None,
        trunk=manifest.settings["model"]["trunk"] if manifest else None,
        epochs=manifest.settings["train"]["epochs"] if manifest else None,
        last=last,
        best=best,
        map5=map5,
        finished=(folder / "finished.json").exists(),
        other_tiles=manifest is not None and manifest.tiles != tiles,
        size=sum(path.stat().st_size for path in files),
        used_by=tuple(used_by),
    )


def _made(project: Project) -> list[tuple[str, DescriptorManifest]]:
    """Embeddings and indexes that can be read, with their manifests."""
    found: list[tuple[str, DescriptorManifest]] = []
    for name in project.embedding_names():
        with contextlib.suppress(StaleError):
            manifest = embeddings.read_manifest(project.embeddings / f"{name}.parquet")
            found.append((f"embeddings {name}", manifest))
    for name in project.index_names():
        with contextlib.suppress(StaleError):
            found.append((f"index {name}", project.index_manifest(name)))
    return found


def _existing(project: Project, name: str) -> Path:
    """The folder of a run.

    Raises:
        GeomatchError: there is no such run.
    """
    names = project.run_names()
    latest(names, name, "run", "geomatch train")
    if name not in names:
        raise GeomatchError(f"no run {name!r}", f"Available: {', '.join(names)}.")
    return project.run(name)


# Compare


def compare_runs(project: Project, names: Sequence[str]) -> RunComparison:
    """Settings on which runs differ, their metrics and their curves.

    Raises:
        UsageError: fewer than two runs are named, or one of them twice.
        GeomatchError: there is no such run.
        StaleError: the manifest of a run is damaged.
    """
    if len(set(names)) < max(2, len(names)):
        raise UsageError("two or more different runs are compared", "geomatch runs compare A B")
    folders = [_existing(project, name) for name in names]
    manifests = [read_record(folder / "config.json", RunManifest, AGAIN) for folder in folders]
    curves: dict[str, dict[str, list[list[float]]]] = {}
    metrics = []
    for name, folder in zip(names, folders, strict=True):
        series = training_series(folder / "metrics.jsonl")
        for key, points in series.items():
            curves.setdefault(key, {})[name] = [[*point] for point in points]
        metrics.append(_metrics(project, name, series))
    return RunComparison(tuple(names), _differing(manifests), tuple(metrics), curves)


def _differing(manifests: Sequence[RunManifest]) -> dict[str, list[Any]]:
    flat = []
    for manifest in manifests:
        # An older run lacks settings that came since: they had their defaults.
        settings = config.as_dict(config.from_dict(manifest.settings, "config.json"))
        values = {
            f"{table}.{key}": value
            for table in manifest.settings
            for key, value in settings[table].items()
        }
        flat.append(values | {"tiles": manifest.tiles, "geomatch": manifest.geomatch})
    return {
        key: [values.get(key) for values in flat]
        for key in dict.fromkeys(key for values in flat for key in values)
        if any(values.get(key) != flat[0].get(key) for values in flat)
    }


def _metrics(
    project: Project, name: str, series: dict[str, list[tuple[float, float]]]
) -> RunMetrics:
    _, best, map5 = checkpoint_state(project.run(name))
    scores, losses = series.get("validation/map@5", []), series.get("train/loss", [])
    speeds = sorted(value for _, value in series.get("train/images_per_s", []))
    return RunMetrics(
        untrained=scores[0][1] if scores and scores[0][0] == 0 else None,
        map5=map5,
        best=best,
        epochs=max((points[-1][0] for points in series.values()), default=None),
        loss=losses[-1][1] if losses else None,
        images_per_s=speeds[len(speeds) // 2] if speeds else None,
        test=_test_score(project, name),
    )


def _test_score(project: Project, name: str) -> float | None:
    """mAP@5 on test of the newest report of a run's embeddings."""
    paths = project.reports.glob("*/report.json")
    for path in sorted(paths, key=lambda path: -path.stat().st_mtime_ns):
        with contextlib.suppress(StaleError):
            report = Report.load(path)
            if report.embeddings.partition("@")[0] == name and "test" in report.splits:
                return report.splits["test"].map5
    return None


# Change


def rename_run(project: Project, old: str, new: str) -> tuple[str, ...]:
    """Rename a run; returns the embeddings and indexes that it made, which keep their names.

    Raises:
        UsageError: the new name is taken or not valid, or a search names the run.
        GeomatchError: there is no such run, or it is being used.
    """
    folder = _existing(project, old)
    check_name(new)
    used_by = _summary(project, old, None, _made(project)).used_by
    for study in (text for text in used_by if text.startswith("study ")):
        raise UsageError(f"run {old} is a trial of {study}", "Tag it: geomatch runs tag RUN TAG")
    with project.lock(f"runs/{old}"), project.lock(f"runs/{new}"):
        if project.run(new).exists():
            raise UsageError(f"there is a run {new} already", "Choose another name.")
        os.rename(folder, project.run(new))
    return used_by


def tag_run(
    project: Project, name: str, add: Sequence[str] = (), remove: Sequence[str] = ()
) -> tuple[str, ...]:
    """Add tags to a run, or take them from it; returns those it has.

    Raises:
        UsageError: a tag is not a plain word.
        GeomatchError: there is no such run.
    """
    folder = _existing(project, name)
    for tag in add:
        check_name(tag, "tag")
    tags = [tag for tag in dict.fromkeys((*_tags(folder), *add)) if tag not in remove]
    if tags != [*_tags(folder)]:
        write_json(_tags_file(folder), {"tags": tags})
    return tuple(tags)


def _tags_file(folder: Path) -> Path:
    return folder / "tags.json"


def _tags(folder: Path) -> tuple[str, ...]:
    path = _tags_file(folder)
    if not path.exists():
        return ()
    return tuple(read_json(path, "geomatch runs tag RUN TAG").get("tags", ()))


# Prune


def prunable(project: Project, names: Sequence[str] = (), best: int = 1) -> list[RunSummary]:
    """The runs of these names; or those that nothing speaks for.

    That are runs without a tag that are not the latest, not among the best on validation, and that
    made no embeddings or index that is still there.

    Args:
        best: how many of the best to spare where no names are given.

    Raises:
        GeomatchError: there is no such run.
    """
    for name in names:
        _existing(project, name)
    runs = list_runs(project)
    if names:
        return [run for run in runs if run.name in names]
    scored = sorted((run for run in runs if run.map5 is not None), key=lambda run: -(run.map5 or 0))
    spared = {run.name for run in (*scored[:best], *runs[-1:])}
    return [run for run in runs if not (run.name in spared or run.tags or run.used_by)]


def prune_runs(project: Project, names: Sequence[str]) -> None:
    """Delete runs.

    Raises:
        GeomatchError: there is no such run, or it is being used.
    """
    # A run that is half deleted must not be listed, nor be resumed by one of its name.
    waste = project.root / ".pruned"
    for name in names:
        folder = _existing(project, name)
        with project.lock(f"runs/{name}"):
            waste.mkdir(exist_ok=True)
            os.rename(folder, waste / f"{name}-{os.getpid()}")
    shutil.rmtree(waste, ignore_errors=True)

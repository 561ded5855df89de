"""Options that several commands share, and the project that they open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from geomatch import config
from geomatch.errors import UsageError
from geomatch.project import Project
from geomatch.shares import Share

ProjectFolder = Annotated[
    Path,
    typer.Option("-p", "--project", envvar="GEOMATCH_PROJECT", help="The project folder."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Overrides geomatch.toml; repeatable."),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--run",
        help="NAME or NAME@STEP; by default the best checkpoint of the latest run.",
        metavar="RUN",
    ),
]
Embeddings = Annotated[
    str | None,
    typer.Option("--run", help="Embeddings to use; by default the latest.", metavar="RUN[@STEP]"),
]
Years = Annotated[
    list[str] | None, typer.Option("--year", help="Search this year only; repeatable.")
]
FalsePositives = Annotated[
    float,
    typer.Option("--fpr", help="Share of pairs of different places that may pass as the same."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Shard = Annotated[
    str | None,
    typer.Option(
        help="Do the i-th of n equal shards of the work, in a job array --shard "
        "$SLURM_ARRAY_TASK_ID/n; then --join.",
        metavar="i/n",
    ),
]
Join = Annotated[
    bool, typer.Option("--join", help="Put the shards together, or name those that are missing.")
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Do the work on the Dask cluster of this scheduler, over a shared folder.",
        metavar="ADDRESS",
    ),
]
SearchedIndex = Annotated[
    str | None,
    typer.Option(
        "--index",
        help="Index to search, or the postgresql:// URL of its database; by default that of "
        "the latest embeddings.",
    ),
]
Build = Annotated[
    bool,
    typer.Option("--build/--no-build", help="Make the index first where it is missing or stale."),
]
HERE = Path()


def overrides(settings: Sequence[str] | None, options: Mapping[str, Any]) -> list[str]:
    """Options that stand for configuration keys, then `--set`: "table.key=value" strings.

    Args:
        options: values by "table.key"; None and empty lists were not given.
    """
    given = {key: value for key, value in options.items() if value not in (None, [])}
    return [f"{key}={config.toml(value)}" for key, value in given.items()] + list(settings or ())


def share_of(shard: str | None, join: bool, scheduler: str | None) -> Share | None:
    """The share of the work that `--shard` names.

    Raises:
        UsageError: it is combined with `--join` or `--scheduler`, or these with each other.
    """
    if bool(shard) + join + bool(scheduler) > 1:
        raise UsageError("--shard, --join and --scheduler exclude each other")
    return Share.parse(shard) if shard else None


def open_project(
    folder: Path, settings: Sequence[str] | None, options: Mapping[str, Any] | None = None
) -> tuple[Project, config.Config]:
    """A project and its configuration; arguments as for `overrides`."""
    project = Project.open(folder)
    return project, config.load(project.config, overrides(settings, options or {}))

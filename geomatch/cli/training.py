"""Commands that train: train, tune."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from geomatch.cli.options import HERE, Json, ProjectFolder, Quiet, Settings, open_project
from geomatch.errors import UsageError


def train(
    project: ProjectFolder = HERE,
    run: Annotated[
        str | None, typer.Option(help="Name of the run; by default the latest, or run1.")
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            envvar="JAX_COORDINATOR_ADDRESS",
            help="Where the first of several processes listens, which train the run together; "
            "under SLURM (srun) and Open MPI it is found.",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, envvar="JAX_NUM_PROCESSES", help="Number of these processes."
        ),
    ] = None,
    process_id: Annotated[
        int | None,
        typer.Option(
            metavar="I", min=0, envvar="JAX_PROCESS_ID", help="This one's number, from 0."
        ),
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option(
            help="Time that a new run may take, in place of train.epochs; its first steps tell how "
            "many epochs that are.",
            metavar="H",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Train no run: take a few steps, tell shapes, memory and time, and draw the first "
            "batch as reports/dry-run.png.",
        ),
    ] = False,
    overfit: Annotated[
        int | None,
        typer.Option(
            help="Train no run: learn N places by heart, and tell what is wrong if that fails.",
            metavar="N",
        ),
    ] = None,
    as_json: Json = False,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Train a run, or continue it."""
    from geomatch.cli import console

    opened, wanted = open_project(project, settings)
    opened.tile_manifest()  # without tiles, fail before the imports that take seconds
    from geomatch import train as stage
    from geomatch.cli import trial_tables

    given = {
        "--dry-run": dry_run,
        "--overfit": overfit is not None,
        "--hours": hours is not None,
        "--processes": processes not in (None, 1),
    }
    if sum(given.values()) > 1:
        names = " and ".join(name for name, there in given.items() if there)
        raise UsageError(f"{names} cannot be combined")
    with console.progress(quiet) as progress:
        if dry_run:
            planned = stage.dry_run(opened, wanted, run=run, progress=progress)
        elif overfit is not None:
            learnt = stage.overfit(opened, wanted, overfit, progress=progress)
        else:
            together = stage.Processes(coordinator, processes, process_id)
            trained = stage.train(
                opened, wanted, run=run, hours=hours, processes=together, progress=progress
            )
            scores = {
                "validation mAP@5": trained.map5,
                "untrained": trained.untrained,
                "ImageNet features": trained.imagenet,
            }
            told = ", ".join(f"{name} {x:.3f}" for name, x in scores.items() if x is not None)
            best = f"run {trained.run}: best checkpoint is step {trained.best}"
            progress(f"{best} ({told})" if told else best)
    if dry_run:
        trial_tables.show_dry_run(planned, as_json)
    elif overfit is not None:
        trial_tables.show_overfit(learnt, as_json)
    elif as_json:
        values = asdict(trained)
        console.data({"run": values.pop("run"), "map@5": values.pop("map5"), **values})


def tune(
    project: ProjectFolder = HERE,
    study: Annotated[
        str, typer.Option(help="Name of the search; its runs are NAME-000 and so on.")
    ] = "tune",
    as_json: Json = False,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Search the settings in tune.space, each trial a run, or continue a search."""
    from geomatch.cli import console

    opened, wanted = open_project(project, settings)
    opened.tile_manifest()  # without tiles, fail before the imports that take seconds
    from geomatch.tune import short
    from geomatch.tune import tune as stage

    with console.progress(quiet) as progress:
        found = stage(opened, wanted, study=study, progress=progress)
    if as_json:
        console.data(found.as_json())
    else:
        keys = tuple(found.trials[0].settings)
        console.table(
            f"{found.study}: {len(found.trials)} trials",
            ("run", "state", "mAP@5", *keys),
            [
                (trial.run, trial.state, trial.map5, *map(short, trial.settings.values()))
                for trial in found.trials
            ],
            numbers=("mAP@5", *keys),
        )
    console.note(
        f"best: {found.best} (validation mAP@5 {found.map5:.3f}). "
        f"Next: geomatch embed --run {found.best}"
    )

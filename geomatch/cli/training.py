"""Commands that train: train, tune."""

from __future__ import annotations

from typing import Annotated

import typer

from geomatch.cli.options import HERE, Json, ProjectFolder, Quiet, Settings, open_project


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
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Train a run, or continue it."""
    from geomatch.cli import console

    opened, wanted = open_project(project, settings)
    opened.tile_manifest()  # without tiles, fail before the imports that take seconds
    from geomatch.train import Processes
    from geomatch.train import train as stage

    together = Processes(coordinator, processes, process_id)
    with console.progress(quiet) as progress:
        trained = stage(opened, wanted, run=run, processes=together, progress=progress)
        score = ""
        if trained.map5 is not None and trained.untrained is not None:
            score = f" (validation mAP@5 {trained.map5:.3f}, untrained {trained.untrained:.3f})"
        progress(f"run {trained.run}: best checkpoint is step {trained.best}{score}")


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

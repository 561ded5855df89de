"""Commands for a project as a whole: init, info, demo."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from geomatch.cli.options import HERE, Json, ProjectFolder, Quiet, Settings, open_project
from geomatch.init import presets

Preset = Enum("Preset", {name: name for name in presets()})  # type: ignore[misc]


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    preset: Annotated[
        Preset | None, typer.Option(help="Start with the settings of an example.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Make a project folder with a commented geomatch.toml."""
    from geomatch import config
    from geomatch.cli import console
    from geomatch.init import init as stage

    made = stage(folder, preset=preset and preset.value, overrides=settings or ())
    given = config.load(made.config)
    names_data = given.source or given.images.folders or given.images.pairs
    then = f"geomatch tile -p {folder}"
    then = f"put the data where it says, then {then}" if names_data else f"{then} YEAR=PATH ..."
    console.note(f"Made {made.config}. Next: {then}")


def info(project: ProjectFolder = HERE, as_json: Json = False, settings: Settings = None) -> None:
    """Show what the project holds, what is stale and what to run next."""
    from geomatch.cli import console

    opened, _ = open_project(project, settings)
    from geomatch.info import info as stage

    found = stage(opened)
    if as_json:
        console.data(found)
    else:
        console.overview(found)


def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR")] = Path("geomatch-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the landscape and of the training.")] = 0,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Run the whole pipeline on a synthetic landscape of two years."""
    from geomatch.cli import console
    from geomatch.demo import demo as stage

    with console.progress(quiet) as progress:
        result = stage(folder, seed=seed, overrides=settings or (), progress=progress)
    console.key_values(
        {
            "project": folder,
            "test places": result.places,
            "test mAP@5": result.trained,
            "untrained": result.untrained,
            "picture": result.picture,
            "seconds": round(result.seconds),
        }
    )

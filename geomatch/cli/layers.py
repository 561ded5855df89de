"""Commands for GIS programs: export tiles, export matches."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, get_args

import typer

from geomatch import config
from geomatch.cli.options import HERE, ProjectFolder, Quiet, Settings, open_project

# Typer takes lists of enumerations alone.
Split = Enum("Split", {name: name for name in get_args(config.Split)})  # type: ignore[misc]
GeoPackage = Annotated[
    Path | None, typer.Option("--gpkg", help="Write a GeoPackage.", metavar="FILE")
]
GeoJson = Annotated[
    Path | None, typer.Option("--geojson", help="Write GeoJSON, in degrees.", metavar="FILE")
]


def export_tiles(
    project: ProjectFolder = HERE,
    year: Annotated[
        list[str] | None, typer.Option(help="Only tiles of this year; repeatable.")
    ] = None,
    split: Annotated[
        list[Split] | None, typer.Option(help="Only tiles of this split; repeatable.")
    ] = None,
    gpkg: GeoPackage = None,
    geojson: GeoJson = None,
    cogs: Annotated[
        Path | None,
        typer.Option(
            "--cog",
            help="Write pixels as Cloud Optimized GeoTIFFs DIR/YEAR/CELL.tif.",
            metavar="DIR",
        ),
    ] = None,
    stac: Annotated[
        Path | None,
        typer.Option(
            help="Write such files and DIR/items.json, a STAC item collection.", metavar="DIR"
        ),
    ] = None,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Write footprints of tiles, or their pixels."""
    from geomatch.cli import console

    opened, _ = open_project(project, settings)
    from geomatch.export_tiles import export_tiles as stage

    with console.progress(quiet) as progress:
        made = stage(
            opened,
            years=year or (),
            splits=[each.value for each in split or ()],
            gpkg=gpkg,
            geojson=geojson,
            cogs=cogs,
            stac=stac,
            progress=progress,
        )
    console.note(f"{made.tiles} tiles: {', '.join(map(str, made.files))}")


def export_matches(
    project: ProjectFolder = HERE,
    report: Annotated[
        str | None, typer.Option(help="Name of a report of eval; by default the latest.")
    ] = None,
    gpkg: GeoPackage = None,
    geojson: GeoJson = None,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Write what each query of eval found: its rank, and lines to its answers."""
    from geomatch.cli import console

    opened, _ = open_project(project, settings)
    from geomatch.export_matches import export_matches as stage

    with console.progress(quiet) as progress:
        made = stage(opened, report=report, gpkg=gpkg, geojson=geojson, progress=progress)
    console.note(f"{made.queries} queries of {made.report}: {', '.join(map(str, made.files))}")

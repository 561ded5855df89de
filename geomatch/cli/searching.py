"""Commands that describe images and find places by it: embed, index, query, compare."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from geomatch import config
from geomatch.cli.options import (
    HERE,
    Checkpoint,
    Embeddings,
    FalsePositives,
    Json,
    ProjectFolder,
    Quiet,
    Settings,
    Years,
    open_project,
)
from geomatch.errors import UsageError


def embed(
    project: ProjectFolder = HERE,
    run: Checkpoint = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="imagenet, which needs no training; or the folder of a run or of another project.",
            metavar="PATH",
        ),
    ] = None,
    engine: Annotated[
        config.Engine | None, typer.Option(help="What computes the descriptors.")
    ] = None,
    dtype: Annotated[
        config.EmbedDtype | None, typer.Option(help="Precision; int8 needs OpenVINO.")
    ] = None,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Compute the descriptor of every tile."""
    from geomatch.cli import console

    options = {"embed.engine": engine, "embed.dtype": dtype}
    opened, wanted = open_project(project, settings, options)
    opened.tile_manifest()  # without tiles, fail before the imports that take seconds
    from geomatch.embed import embed as stage

    with console.progress(quiet) as progress:
        made = stage(opened, run=run, model=model, settings=wanted, progress=progress)
    if made.remark:
        console.note(made.remark)
    console.note(f"{made.tiles} descriptors in {made.path}")


def index(
    project: ProjectFolder = HERE,
    run: Embeddings = None,
    engine: Annotated[
        config.IndexKind | None,
        typer.Option(help="How it is searched: exactly, or approximately for millions of tiles."),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="Write it to a PostgreSQL database with pgvector: postgresql://USER@HOST/NAME.",
            metavar="URL",
        ),
    ] = None,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Index embeddings for queries."""
    from geomatch.cli import console

    opened, wanted = open_project(project, settings, {"index.engine": engine})
    from geomatch.index import index as stage

    with console.progress(quiet) as progress:
        made = stage(opened, run=run, settings=wanted.index, to=to, progress=progress)
    console.note(f"{made.tiles} tiles in {made.where}")
    if made.engine.queries:
        found = f"{made.engine.recall:.3f} of {made.engine.queries} queries"
        console.note(f"recall@5 against exact search: {found}")


def query(
    target: Annotated[
        str, typer.Argument(help="A tile id, LON,LAT or an image file.", metavar="TARGET")
    ],
    project: ProjectFolder = HERE,
    top: Annotated[int, typer.Option(help="Number of answers.")] = 5,
    year: Years = None,
    same_year: Annotated[
        bool, typer.Option("--same-year", help="Search the query's own year too.")
    ] = False,
    from_year: Annotated[
        str | None,
        typer.Option(
            help="Year of the tile at LON,LAT, or of an image; by default the newest.",
            metavar="YEAR",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--index", help="Index to search; by default the latest.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Draw the query and its answers as a PNG.", metavar="FILE")
    ] = None,
    as_json: Json = False,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Find where a place is in the other years."""
    from geomatch.cli import console
    from geomatch.query import query as stage

    # Unknown options arrive here as well; only a number may start with a minus.
    if re.match(r"-[^\d.]", target):
        raise UsageError(f"no such option: {target}", "See: geomatch query --help")
    opened, _ = open_project(project, settings)
    with console.progress(quiet) as progress:
        found = stage(
            opened,
            target,
            top=top,
            years=tuple(year or ()),
            same_year=same_year,
            from_year=from_year,
            index=name,
            sheet=sheet,
            progress=progress,
        )
    if sheet:
        console.note(f"picture in {sheet}")
    if as_json:
        console.data(found.as_json())
    else:
        _show(found.as_json(), target)


def _show(matches: Sequence[Mapping[str, Any]], target: str) -> None:
    from geomatch.cli import console

    def column(key: str, form: str = "") -> list[Any]:
        values = [match[key] for match in matches]
        return [format(v, form) if form and v is not None else v for v in values]

    columns = {key: column(key) for key in ("rank", "tile", "year", "score")}
    columns |= {key: column(key, ".6f") for key in ("lon", "lat")}
    columns["distance (m)"] = column("distance_m", ".0f")
    # Images without years or georeference leave columns empty.
    shown = {title: values for title, values in columns.items() if set(values) != {None}}
    console.table(
        f"{matches[0]['query'] if matches else target}: nearest tiles",
        tuple(shown),
        list(zip(*shown.values(), strict=True)),
        numbers=("rank", "score", "lon", "lat", "distance (m)"),
    )


def compare(
    a: Annotated[str, typer.Argument(help="An image file.", metavar="A")],
    b: Annotated[str, typer.Argument(help="Another image file.", metavar="B")],
    project: ProjectFolder = HERE,
    run: Embeddings = None,
    fpr: FalsePositives = 0.01,
    as_json: Json = False,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Tell whether two images show the same place."""
    from geomatch.cli import console

    opened, _ = open_project(project, settings)
    from geomatch.compare import compare as stage

    with console.progress(quiet) as progress:
        found = stage(opened, a, b, run=run, fpr=fpr, progress=progress)
    if as_json:
        console.data(found.as_json())
        return
    console.key_values(
        {
            "verdict": "the same place" if found.match else "not the same place",
            "score": f"{found.score:.4f}",
            "distance": f"{found.distance:.4f}",
            "threshold": f"{found.threshold:.4f} (at most {fpr:.2%} of other places pass)",
            "probability": f"{found.probability:.3f}",
        }
    )

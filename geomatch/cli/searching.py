"""Commands that describe images and find places by it: embed, index, query, compare."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
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
from geomatch.errors import GeomatchError, UsageError


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
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Index embeddings for queries."""
    from geomatch.cli import console

    opened, wanted = open_project(project, settings)
    from geomatch.index import index as stage

    with console.progress(quiet) as progress:
        made = stage(opened, run=run, metric=wanted.index.metric, progress=progress)
    console.note(f"{made.tiles} tiles in {made.folder}")


def query(
    target: Annotated[
        list[str],
        typer.Argument(
            help="A tile id, LON,LAT or an image file; for several at once also W,S,E,N (the tiles "
            "whose centres are in that box of degrees), a folder or glob of images, or - for a "
            "list on stdin, one a line.",
            metavar="TARGET...",
        ),
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
            help="Year of the tiles at LON,LAT or W,S,E,N, or of an image; by default the newest.",
            metavar="YEAR",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--index", help="Index to search; by default that of the latest embeddings."),
    ] = None,
    fpr: Annotated[
        float,
        typer.Option(
            help="Share of queries without a match that may get one; others print: no match."
        ),
    ] = 0.01,
    build: Annotated[
        bool,
        typer.Option(
            "--build/--no-build", help="Make the index first where it is missing or stale."
        ),
    ] = True,
    as_csv: Annotated[
        Path | None, typer.Option("--csv", help="Write the answers as CSV.", metavar="FILE")
    ] = None,
    geojson: Annotated[
        Path | None,
        typer.Option(
            help="Write footprints of the answers, and lines from the query to each, as GeoJSON.",
            metavar="FILE",
        ),
    ] = None,
    gpkg: Annotated[
        Path | None, typer.Option(help="The same as GeoPackage.", metavar="FILE")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Draw queries and answers as a PNG.", metavar="FILE")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON; a line for each of several targets.")
    ] = False,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Find where a place is in the other years."""
    from geomatch.cli import console

    # Unknown options arrive here as well; only a number may start with a minus.
    if unknown := next((each for each in target if re.match(r"-[^\d.]", each)), None):
        raise UsageError(f"no such option: {unknown}", "See: geomatch query --help")
    opened, wanted = open_project(project, settings)
    from geomatch.query import query_each
    from geomatch.querying.answers import Unanswered
    from geomatch.querying.options import Options
    from geomatch.querying.targets import is_several

    options = Options(
        top=top,
        years=tuple(year or ()),
        same_year=same_year,
        from_year=from_year,
        index=name,
        fpr=fpr,
        build=build,
        csv=as_csv,
        geojson=geojson,
        gpkg=gpkg,
        sheet=sheet,
    )
    several = len(target) > 1 or target == ["-"] or is_several(target[0])
    answered = failed = 0
    with console.progress(quiet) as progress:
        answers = query_each(opened, _listed(target), options, settings=wanted, progress=progress)
        for found in answers:
            answered += 1
            if several and as_json:
                console.data(found.as_line(), line=True)
            if isinstance(found, Unanswered):
                failed += 1
                if not several:
                    raise found.error
                console.failure(found.error)
            elif not as_json:
                _show(found.as_json(), found.query.name)
            elif not several:
                console.data(found.as_json())
    for path in options.files:
        console.note(f"answers in {path}")
    if failed:
        raise GeomatchError(f"{failed} of {answered} queries have no answer, as told above")


def _listed(targets: Sequence[str]) -> Iterator[str]:
    """Targets, with the lines of stdin in place of "-"."""
    for target in targets:
        if target == "-":
            yield from filter(None, map(str.strip, sys.stdin))
        else:
            yield target


def _show(matches: Sequence[Mapping[str, Any]], name: str) -> None:
    from geomatch.cli import console

    def column(key: str, form: str = "") -> list[Any]:
        values = [match[key] for match in matches]
        return [format(v, form) if form and v is not None else v for v in values]

    columns = {key: column(key) for key in ("rank", "tile", "year", "score", "probability")}
    columns |= {key: column(key, ".6f") for key in ("lon", "lat")}
    columns["distance (m)"] = column("distance_m", ".0f")
    # Images without years or georeference leave columns empty.
    shown = {title: values for title, values in columns.items() if set(values) != {None}}
    is_none = any(match["match"] is False for match in matches)
    console.table(
        f"{name}: no match; nearest tiles" if is_none else f"{name}: nearest tiles",
        tuple(shown),
        list(zip(*shown.values(), strict=True)),
        numbers=("rank", "score", "probability", "lon", "lat", "distance (m)"),
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

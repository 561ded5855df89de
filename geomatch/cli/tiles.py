"""The command that cuts tiles."""

from __future__ import annotations

from typing import Annotated

import typer

from geomatch import config
from geomatch.cli.options import (
    HERE,
    Join,
    Json,
    ProjectFolder,
    Quiet,
    Scheduler,
    Settings,
    Shard,
    overrides,
    share_of,
)
from geomatch.errors import UsageError
from geomatch.project import Project

Areas = Annotated[
    list[str] | None,
    typer.Option(help="Glob (split source) or polygon file (split file); repeatable."),
]

SHOWN = 20
"""The largest number of files that are named as left out."""


def tile(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="YEAR=PATH ...",
            help="Imagery of a year: a folder, file or quoted glob; YEAR:labels=PATH: labels; "
            "YEAR:changed=PATH: a mask of changed ground. stac=PATH: a STAC item collection. With "
            "--year-from, PATH and :labels=PATH. By default those in geomatch.toml, or those of "
            "the last time.",
        ),
    ] = None,
    project: ProjectFolder = HERE,
    year_from: Annotated[
        str,
        typer.Option(
            help="Regular expression that finds the year in file names, or in the datetime of STAC "
            "items, such as '_(\\d{4})_'; groups are joined by hyphens.",
            metavar="REGEX",
        ),
    ] = "",
    asset: Annotated[
        str, typer.Option(help="The asset of STAC items that is the imagery.", metavar="KEY")
    ] = "",
    folders: Annotated[
        str | None,
        typer.Option(
            help="Images without georeference: DIR/CLASS/IMAGE, .npz or MNIST's idx; or "
            "train=PATH, then test=PATH and validation=PATH as arguments.",
            metavar="DIR",
        ),
    ] = None,
    pairs: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Two folders of images with the same names.", metavar="DIR_A DIR_B"),
    ] = None,
    least: Annotated[
        int | None, typer.Option(help="Leave out classes of fewer images.", metavar="N")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Leave out this class; repeatable.", metavar="CLASS")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            help="Tile side in pixels. By default 256, or the side of images without georeference "
            "that are all square and of one size."
        ),
    ] = None,
    gsd: Annotated[float | None, typer.Option(help="Metres per pixel.")] = None,
    crs: Annotated[str | None, typer.Option(help="EPSG code, auto or utm.")] = None,
    stride: Annotated[int | None, typer.Option(help="Pixels between tiles.")] = None,
    stretch: Annotated[
        str | None,
        typer.Option(help="Conversion to uint8: MIN,MAX or 2%,98%.", metavar="LOW,HIGH"),
    ] = None,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Go on without rasters that cannot be used; list them."),
    ] = False,
    bands: Annotated[
        str | None,
        typer.Option(help="Image bands, by number and in order: 1,2,3.", metavar="N,N,..."),
    ] = None,
    nodata: Annotated[
        float | None,
        typer.Option(help="Value of invalid pixels, for files that declare none.", metavar="V"),
    ] = None,
    collar: Annotated[
        bool | None,
        typer.Option("--collar", help="Black or white that touches a file's border is invalid."),
    ] = None,
    split: Annotated[
        config.SplitRule | None, typer.Option(help="How the regions of the splits are chosen.")
    ] = None,
    validation: Areas = None,
    test: Areas = None,
    fictitious: Annotated[
        bool,
        typer.Option("--fictitious", help="The placement is made up: report no errors in metres."),
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one per core.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Cut all tiles again, and draw the splits again.")
    ] = False,
    shard: Shard = None,
    join: Join = False,
    scheduler: Scheduler = None,
    preview: Annotated[
        int,
        typer.Option(
            min=0,
            help="Draw N places, their years side by side with the labels, as tiles/preview.png.",
            metavar="N",
        ),
    ] = 0,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Measure how far the years are shifted, and draw it on a map."
        ),
    ] = False,
    as_json: Json = False,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Cut tiles of several years, and their labels, on one ground grid."""
    from geomatch.cli import console
    from geomatch.tiling.request import tile_arguments

    opened = Project.open(project)
    share = share_of(shard, join, scheduler)
    if share and (preview or check or force):
        raise UsageError(
            "--shard cuts tiles alone", "Give --preview and --check with --join, and no --force."
        )
    if join and force:
        raise UsageError("--join cuts nothing", "Leave out --force.")
    options = {
        "grid.size": size,
        "grid.gsd": gsd,
        "grid.crs": crs,
        "grid.stride": stride,
        "grid.stretch": stretch,
        "grid.skip_bad": skip_bad or None,
        "grid.bands": None if bands is None else _numbers(bands),
        "grid.nodata": nodata,
        "grid.collar": collar,
        "split.by": split,
        "images.least": least,
        "images.ignore": ignore,
    }
    chosen = tile_arguments(
        opened,
        sources or (),
        folders=folders,
        pairs=pairs,
        validation=validation or (),
        test=test or (),
        fictitious=fictitious,
        year_from=year_from,
        asset=asset,
        overrides=overrides(settings, options),
    )
    from geomatch.tile import cut_share
    from geomatch.tile import tile as stage

    if share:
        with console.progress(quiet) as progress:
            cut = cut_share(
                opened,
                chosen.settings,
                share,
                overrides=chosen.overrides,
                workers=workers,
                progress=progress,
            )
        console.note(f"shard {share} is done: {cut.tiles} tiles, {cut.kept} of them kept")
        if as_json:
            console.data({"shard": str(share), "tiles": cut.tiles, "kept": cut.kept})
        return
    with console.progress(quiet) as progress:
        made = stage(
            opened,
            chosen.settings,
            overrides=chosen.overrides,
            workers=workers,
            force=force,
            preview=preview,
            check=check,
            join=join,
            scheduler=scheduler,
            progress=progress,
        )
    table = made.table
    if table.grid:
        what = f"({made.skipped} skipped for too little valid data) on {made.grid}"
    else:
        groups = "places" if table.dated else "classes"
        what = f"of {made.grid} in {len(table.classes)} {groups}"
    counts = ", ".join(f"{name} {count}" for name, count in made.splits.items())
    console.note(f"{len(table)} tiles {what}: {counts}")
    empty = [name for name, count in made.splits.items() if not count]
    if table.grid and chosen.settings.split.by == "blocks" and empty:
        console.note(
            f"no tiles for {' and '.join(empty)}: the ground is small for blocks with a buffer "
            "between them; try smaller tiles, or --set split.buffer=0"
        )
    if table.grid and made.unreadable:
        console.note(f"left out ({len(made.unreadable)}), as listed in {opened.tiles_manifest}:")
        for path, reason in list(made.unreadable.items())[:SHOWN]:
            console.note(f"  {path} {reason}")
    if made.stale:
        console.note(f"stale now: {', '.join(made.stale)}. Runs stay as they are.")
    if preview:
        console.note(f"preview in {opened.preview}")
    if check:
        from geomatch.cli import registration_table

        console.note(f"map of the shifts in {opened.registration_map}")
        registration_table.warn(made.registration)
    if as_json:
        values = {"tiles": len(table), "skipped": made.skipped, "grid": made.grid}
        shifts = [pair.as_json() for pair in made.registration] if check else None
        console.data({**values, "splits": made.splits, "registration": shifts})
    elif check:
        registration_table.show(made.registration)


def _numbers(text: str) -> list[int]:
    """Band numbers, such as "1,2,3"."""
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdigit() and int(number) for number in numbers):
        raise UsageError(f"--bands {text}: not numbers from 1", "For example: --bands 1,2,3")
    return [int(number) for number in numbers]

"""The command line: a thin shell over the stages, each imported inside its command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from geomatch import __version__, config
from geomatch.errors import GeomatchError, UsageError
from geomatch.project import Project

NEGATIVE_POINT = re.compile(r"-\d+(\.\d*)?,\s*-?\d+(\.\d*)?")


class Commands(TyperGroup):
    """The commands, with every failure told in a line or two instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GeomatchError as error:
            failure = error
        except OSError as error:
            failure = _explain(error)
        except KeyboardInterrupt:
            failure = GeomatchError(
                "interrupted", "What was finished is kept: run the same command to go on."
            )
            failure.exit_code = 130
        from geomatch import console

        console.failure(failure)
        raise typer.Exit(failure.exit_code)


def _explain(error: OSError) -> GeomatchError:
    where = f"{error.filename}: " if error.filename else ""
    return GeomatchError(
        f"{where}{error.strerror or error}",
        "Free space or check permissions, then run the same command: what was finished is kept.",
    )


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help="Find the same place in aerial imagery of different years.",
    pretty_exceptions_enable=False,
)

ProjectFolder = Annotated[
    Path,
    typer.Option("-p", "--project", envvar="GEOMATCH_PROJECT", help="The project folder."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Beats geomatch.toml; repeatable."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
HERE = Path()


def _version(wanted: bool) -> None:
    if wanted:
        print(f"geomatch {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def init(folder: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Make a project folder with a commented geomatch.toml."""
    project = Project(folder)
    if project.config.exists():
        raise UsageError(f"{project.config} is there already")
    folder.mkdir(parents=True, exist_ok=True)
    project.config.write_text(config.template(), encoding="utf-8")
    print(f"Made {project.config}. Next: geomatch tile -p {folder} YEAR=PATH YEAR=PATH")


@app.command()
def tile(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="YEAR=PATH ...",
            help="Imagery of a year: a folder, file or quoted glob; YEAR:labels=PATH for labels. "
            "None: the ones of geomatch.toml, or of the last time.",
        ),
    ] = None,
    project: ProjectFolder = HERE,
    size: Annotated[int | None, typer.Option(help="Tile side in pixels.")] = None,
    gsd: Annotated[float | None, typer.Option(help="Metres a pixel.")] = None,
    crs: Annotated[str | None, typer.Option(help="EPSG code, auto or utm.")] = None,
    stride: Annotated[int | None, typer.Option(help="Pixels between tiles.")] = None,
    stretch: Annotated[
        str | None, typer.Option(help="To uint8: MIN,MAX or 2%,98%.", metavar="LOW,HIGH")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="blocks, source or file.", metavar="RULE")
    ] = None,
    validation: Annotated[
        list[str] | None, typer.Option(help="Glob (source) or polygon file (file); repeatable.")
    ] = None,
    test: Annotated[
        list[str] | None, typer.Option(help="Glob (source) or polygon file (file); repeatable.")
    ] = None,
    fictitious: Annotated[
        bool, typer.Option("--fictitious", help="The placement is made up: quote no metres.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; one a core by default.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Cut anew what is up to date.")] = False,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Cut tiles of several years, and their labels, on one ground grid."""
    from geomatch import console
    from geomatch.tile import asked_before
    from geomatch.tile import tile as run

    opened = Project.open(project)
    options = {
        "grid.size": size,
        "grid.gsd": gsd,
        "grid.crs": crs,
        "grid.stride": stride,
        "grid.stretch": stretch,
        "split.by": split,
        "split.validation": validation,
        "split.test": test,
    }
    overrides = [
        f"{name}={config.toml(value)}" for name, value in options.items() if value is not None
    ] + (settings or [])
    before = asked_before(opened)
    in_file = config.load(opened.config)
    if sources:
        named = _parse_sources(sources, "fictitious" if fictitious else "real")
    elif in_file.source:
        named = tuple(config.located(source, opened.root) for source in in_file.source)
    else:
        named = config.from_dict({"source": before["source"]}, str(opened.tiles)).source
        overrides = before["set"] + overrides
    wanted = config.with_sources(config.load(opened.config, overrides), named)
    with console.progress(quiet) as report:
        table = run(
            opened, wanted, overrides=overrides, workers=workers, force=force, report=report
        )
    facts = opened.tile_facts()
    console.note(
        f"{len(table)} tiles ({facts['planned'] - len(table)} skipped for too little valid data) "
        f"on {facts['grid']}: "
        + ", ".join(f"{name} {count}" for name, count in facts["splits"].items())
    )


@app.command()
def train(
    project: ProjectFolder = HERE,
    run: Annotated[str | None, typer.Option(help="Name of the run; the latest, or run1.")] = None,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Train a run, or go on with it."""
    from geomatch import console

    opened = Project.open(project)
    wanted = config.load(opened.config, settings or [])
    opened.tile_facts()
    from geomatch.train import train as stage

    with console.progress(quiet) as report:
        trained = stage(opened, wanted, run=run, report=report)
    score = "" if trained.map5 is None else f" (validation mAP@5 {trained.map5:.3f})"
    console.note(f"run {trained.run}: best checkpoint is step {trained.best}{score}")


def _parse_sources(texts: list[str], placement: str) -> tuple[config.Source, ...]:
    """Sources from YEAR=PATH and YEAR:labels=PATH, in the order given."""
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        year, _, kind = name.partition(":")
        if not (equals and year and path) or kind not in ("", "labels"):
            raise UsageError(
                f"{text}: not of the form YEAR=PATH or YEAR:labels=PATH",
                "For example: geomatch tile 2010=ortho/2010 2010:labels=landcover.tif",
            )
        if re.search(r"[@/\s]", year):
            raise UsageError(f"{text}: a year's name has no '@', '/' or white space")
        entry = found.setdefault(year, {"year": year, "placement": placement})
        key = kind or "images"
        if key in entry:
            raise UsageError(f"{text}: {name} is named twice", "Use one folder or quoted glob.")
        entry[key] = str(Path(path).expanduser().absolute())
    for year, entry in found.items():
        if "images" not in entry:
            raise UsageError(f"year {year} has labels but no images", f"Add {year}=PATH.")
    return config.from_dict({"source": list(found.values())}, "command line").source

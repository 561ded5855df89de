"""The command line: a thin shell over the stages, each imported inside its command."""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from geomatch import __version__, config
from geomatch.errors import GeomatchError, UsageError
from geomatch.project import Project


class Commands(TyperGroup):
    """The commands, with every failure told in a line or two instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GeomatchError as error:
            failure = error
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:
            # The reader of our output went away (as `head` does): nothing is left to say.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except OSError as error:
            failure = _explain(error)
        except Exception as error:
            # Typer's own, of a wrong option, know how to show themselves.
            if hasattr(error, "show") or os.environ.get("GEOMATCH_TRACEBACK"):
                raise
            failure = _unforeseen(error)
        except KeyboardInterrupt:
            failure = GeomatchError(
                "interrupted", "What was finished is kept: run the same command to go on."
            )
        from geomatch import console

        console.failure(failure)
        raise typer.Exit(failure.exit_code)


def _unforeseen(error: Exception) -> GeomatchError:
    text = (str(error).splitlines() or [""])[0]
    if "No space left" in str(error):
        return _explain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return GeomatchError(
            f"out of memory: {text}", "Lower train.batch, or use smaller tiles or a smaller trunk."
        )
    return GeomatchError(
        f"unforeseen {type(error).__name__}: {text}",
        "A defect of geomatch: set GEOMATCH_TRACEBACK=1 to see where, and report it.",
    )


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
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--run", help="NAME or NAME@STEP; the latest run's best checkpoint.", metavar="RUN"
    ),
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
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    preset: Annotated[
        str | None, typer.Option(help="Begin with the settings of an example.", metavar="NAME")
    ] = None,
) -> None:
    """Make a project folder with a commented geomatch.toml."""
    project = Project(folder)
    text = config.template() if preset is None else _preset(preset)
    if project.config.exists():
        raise UsageError(f"{project.config} is there already")
    folder.mkdir(parents=True, exist_ok=True)
    project.config.write_text(text, encoding="utf-8")
    typer.echo(f"Made {project.config}. Next: geomatch tile -p {folder} YEAR=PATH ...", err=True)


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
    }
    overrides = [
        f"{name}={config.toml(value)}" for name, value in options.items() if value is not None
    ] + (settings or [])
    in_file = config.load(opened.config)
    rule = config.load(opened.config, overrides).split.by
    for name, given in (("validation", validation), ("test", test)):
        if given:
            overrides.append(f"split.{name}={config.toml(_areas(rule, given))}")
    if sources:
        named = _parse_sources(sources, "fictitious" if fictitious else "real")
    elif in_file.source:
        named = in_file.source
    else:
        before = asked_before(opened)
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

    opened, wanted = _open(project, settings)
    opened.tile_facts()
    from geomatch.train import train as stage

    with console.progress(quiet) as report:
        trained = stage(opened, wanted, run=run, report=report)
    score = "" if trained.map5 is None else f" (validation mAP@5 {trained.map5:.3f})"
    console.note(f"run {trained.run}: best checkpoint is step {trained.best}{score}")


@app.command()
def embed(
    project: ProjectFolder = HERE,
    run: Checkpoint = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="imagenet: no training needed; or a run's folder, or another project.",
            metavar="PATH",
        ),
    ] = None,
    engine: Annotated[str | None, typer.Option(help="auto, jax, openvino or onnxruntime.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or int8 (OpenVINO).")
    ] = None,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Describe every tile with a trained encoder, or with one that needs no training."""
    from geomatch import console

    asked = [f"embed.engine={engine}"] if engine else []
    asked += [f"embed.dtype={dtype}"] if dtype else []
    opened, wanted = _open(project, asked + (settings or []))
    opened.tile_facts()
    from geomatch.embed import embed as stage

    with console.progress(quiet) as report:
        made = stage(opened, run=run, model=model, settings=wanted, report=report)
    console.note(f"{made.tiles} descriptors in {made.path}")


@app.command()
def index(
    project: ProjectFolder = HERE,
    run: Annotated[
        str | None, typer.Option(help="Embeddings to index; the latest.", metavar="RUN@STEP")
    ] = None,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Index embeddings for querying."""
    from geomatch import console

    opened, _ = _open(project, settings)
    from geomatch.index import index as stage

    with console.progress(quiet) as report:
        made = stage(opened, run=run, report=report)
    console.note(f"{made.tiles} tiles in {made.folder}")


@app.command(context_settings={"ignore_unknown_options": True})
def query(
    target: Annotated[
        str, typer.Argument(help="A tile id, LON,LAT or an image file.", metavar="TARGET")
    ],
    project: ProjectFolder = HERE,
    top: Annotated[int, typer.Option(help="How many answers.")] = 5,
    year: Annotated[
        list[str] | None, typer.Option(help="Search this year only; repeatable.")
    ] = None,
    same_year: Annotated[
        bool, typer.Option("--same-year", help="Search the query's own year too.")
    ] = False,
    from_year: Annotated[
        str | None, typer.Option(help="Whose tile to take at LON,LAT; the newest.", metavar="YEAR")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--index", help="Index to search; the latest.")
    ] = None,
    as_json: Json = False,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Find where a place is in the other years."""
    from geomatch import console
    from geomatch.query import query as stage

    # Unknown options pass, so that a negative longitude can: what is no number is a mistake.
    if re.match(r"-[^\d.]", target):
        raise UsageError(f"no such option: {target}", "See: geomatch query --help")
    opened, _ = _open(project, settings)
    with console.progress(quiet) as report:
        found = stage(
            opened,
            target,
            top=top,
            years=tuple(year or ()),
            same_year=same_year,
            from_year=from_year,
            index=name,
            report=report,
        )
    if as_json:
        console.data(found.as_json())
        return
    asked = found.matches[0].query if found.matches else target
    console.table(
        f"{asked}: nearest tiles",
        ("rank", "tile", "year", "score", "lon", "lat", "distance (m)"),
        [
            (
                match.rank,
                match.tile,
                match.year,
                match.score,
                f"{match.lon:.6f}",
                f"{match.lat:.6f}",
                None if match.distance_m is None else f"{match.distance_m:.0f}",
            )
            for match in found.matches
        ],
        numbers=("rank", "score", "lon", "lat", "distance (m)"),
    )


@app.command("eval")
def evaluate(
    project: ProjectFolder = HERE,
    run: Annotated[
        str | None, typer.Option(help="Embeddings to measure; the latest.", metavar="RUN@STEP")
    ] = None,
    database: Annotated[
        str | None, typer.Option(help="split: search its own tiles; all: those of every split.")
    ] = None,
    year: Annotated[
        list[str] | None, typer.Option(help="Search this year only; repeatable.")
    ] = None,
    same_year: Annotated[
        bool, typer.Option("--same-year", help="Search the queries' own year too.")
    ] = False,
    as_json: Json = False,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Measure how well places are found in the other years."""
    from geomatch import console

    asked = [f"eval.database={database}"] if database else []
    opened, wanted = _open(project, asked + (settings or []))
    from geomatch.evaluate import evaluate as stage

    with console.progress(quiet) as report:
        result = stage(
            opened,
            run=run,
            database=wanted.eval.database,
            years=tuple(year or ()),
            same_year=same_year,
            report=report,
        )
    if as_json:
        console.data({"splits": result.splits})
        return
    columns = {
        "queries": "queries",
        "tiles": "database",
        "mAP@5": "map@5",
        "R@1": "recall@1",
        "R@5": "recall@5",
        "R@10": "recall@10",
        "rank": "median_rank",
        "error m": "median_error_m",
    }
    rows = []
    for split, figures in result.splits.items():
        rows.append((split, *(figures[key] for key in columns.values())))
        if len(figures["pairs"]) > 1:
            rows += [
                (
                    f"  {pair['query_year']} in {pair['database_year']}",
                    *(pair[key] for key in columns.values()),
                )
                for pair in figures["pairs"]
            ]
    title = f"{result.embeddings}, exact search; rank and error are medians"
    console.table(title, ("split", *columns), rows, numbers=tuple(columns))


weights = typer.Typer(no_args_is_help=True, help="Weights that were trained elsewhere.")
app.add_typer(weights, name="weights")


@weights.command("import")
def import_weights(
    file: Annotated[Path, typer.Argument(help="A .pth, .safetensors or .h5 file.")],
    trunk: Annotated[str, typer.Option(help="The trunk they are of, such as resnet50.")],
    project: ProjectFolder = HERE,
    settings: Settings = None,
) -> None:
    """Read a trunk of torchvision, timm or Keras, for train.init."""
    from geomatch import console

    opened, _ = _open(project, [*(settings or []), f"model.trunk={trunk}"])
    from geomatch.weights import import_weights as run

    made = run(opened, file, trunk)
    left = f"; left out: {', '.join(made.left_out)}" if made.left_out else ""
    console.note(
        f"{made.tensors} tensors in the names of {made.family}, preprocessing "
        f"{made.preprocessing!r}{left}"
    )
    console.note(
        f"Next: geomatch train --set model.trunk={trunk} --set train.init={made.path.as_posix()}"
    )


export = typer.Typer(no_args_is_help=True, help="Files for other programs.")
app.add_typer(export, name="export")


@export.command("model")
def export_model(
    project: ProjectFolder = HERE,
    run: Checkpoint = None,
    model: Annotated[
        Path | None,
        typer.Option(help="A run's folder, or another project, in place of --run.", exists=True),
    ] = None,
    onnx: Annotated[
        Path | None, typer.Option(help="Write the encoder as ONNX.", metavar="FILE")
    ] = None,
    safetensors: Annotated[
        Path | None,
        typer.Option(help="Write all weights, and a model card beside them.", metavar="FILE"),
    ] = None,
    settings: Settings = None,
) -> None:
    """Write a trained encoder as ONNX or safetensors."""
    from geomatch import console

    opened, _ = _open(project, settings)
    from geomatch.export import export_model as write

    made = write(opened, run=run, model=model, onnx=onnx, safetensors=safetensors)
    console.note(f"{made.name}: {', '.join(map(str, made.files))}")


@app.command()
def info(project: ProjectFolder = HERE, as_json: Json = False, settings: Settings = None) -> None:
    """Show what is there, from what, what is stale and what to run next."""
    from geomatch import console

    opened, _ = _open(project, settings)
    import jax

    from geomatch.info import info as stage

    found = stage(opened)
    found["devices"] = [str(device) for device in jax.devices()]
    if as_json:
        console.data(found)
    else:
        console.overview(found)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR")] = Path("geomatch-demo"),
    seed: Annotated[int, typer.Option(help="Of the landscape and the training.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Run the whole chain on a made-up landscape of two years."""
    from geomatch import console
    from geomatch.demo import demo as stage

    with console.progress(quiet) as report:
        result = stage(folder, seed=seed, report=report)
    console.facts(
        {
            "project": folder,
            "test places": result.places,
            "test mAP@5": result.trained,
            "untrained": result.untrained,
            "picture": result.picture,
            "seconds": round(result.seconds),
        }
    )


def _open(folder: Path, settings: list[str] | None) -> tuple[Project, config.Config]:
    """A project and its configuration, every `--set` checked."""
    project = Project.open(folder)
    return project, config.load(project.config, settings or [])


def _preset(name: str) -> str:
    """The settings of an example."""
    package = Path(__file__).parent
    # Examples are packed into a wheel; in a checkout they stand beside the package.
    for folder in (package / "examples", package.parent / "examples"):
        if folder.is_dir():
            known = sorted(path.parent.name for path in folder.glob("*/geomatch.toml"))
            if name in known:
                return (folder / name / "geomatch.toml").read_text(encoding="utf-8")
            raise UsageError(f"there is no preset {name!r}", f"There is: {', '.join(known)}.")
    raise GeomatchError("this installation has no examples", "Install geomatch anew.")


def _areas(rule: str, given: list[str]) -> list[str]:
    """What --validation or --test name: polygon files from the current folder, globs as they are.

    Raises:
        UsageError: the split is by blocks, which are drawn.
    """
    if rule == "blocks":
        raise UsageError(
            "--validation and --test name files, but the split is by blocks",
            "Add --split source (globs of imagery) or --split file (polygons).",
        )
    if rule == "source":
        return given
    return [str(Path(path).expanduser().absolute()) for path in given]


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
        entry = found.setdefault(year, {"year": year, "placement": placement})
        key = kind or "images"
        if key in entry:
            raise UsageError(f"{text}: {name} is named twice", "Use one folder or quoted glob.")
        entry[key] = str(Path(path).expanduser().absolute())
    return config.from_dict({"source": list(found.values())}, "command line").source

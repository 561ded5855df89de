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
        from geomatch.cli import console

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
    then = f"geomatch tile -p {folder}"
    then = f"{then} YEAR=PATH ..." if preset is None else f"put the data where it says, then {then}"
    typer.echo(f"Made {project.config}. Next: {then}", err=True)


@app.command()
def tile(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="YEAR=PATH ...",
            help="Imagery of a year: a folder, file or quoted glob; YEAR:labels=PATH: labels; "
            "YEAR:changed=PATH: a mask of changed ground. None: those of geomatch.toml, or of "
            "the last time.",
        ),
    ] = None,
    project: ProjectFolder = HERE,
    folders: Annotated[
        str | None,
        typer.Option(
            help="Images without a ground instead: DIR/CLASS/IMAGE, .npz or MNIST's idx; or "
            "train=PATH, then test=PATH and validation=PATH as arguments.",
            metavar="DIR",
        ),
    ] = None,
    pairs: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Two folders of images of the same names.", metavar="DIR_A DIR_B"),
    ] = None,
    least: Annotated[
        int | None, typer.Option(help="Leave out classes of fewer images.", metavar="N")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Leave out a class; repeatable.", metavar="CLASS")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            help="Tile side in pixels; of images without a ground their own, where all are square "
            "and alike."
        ),
    ] = None,
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
    from geomatch.cli import console
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
        "images.least": least,
        "images.ignore": ignore or None,
    }
    overrides = [
        f"{name}={config.toml(value)}" for name, value in options.items() if value is not None
    ] + (settings or [])
    in_file = config.load(opened.config)
    rule = config.load(opened.config, overrides).split.by
    for name, given in (("validation", validation), ("test", test)):
        if given:
            overrides.append(f"split.{name}={config.toml(_areas(rule, given))}")
    images = config.load(opened.config, overrides).images
    if folders or pairs:
        if pairs and (folders or sources):
            raise UsageError("--pairs takes two folders and nothing else")
        splits = [_absolute(text) for text in (folders, *(sources or [])) if text]
        overrides.append(f"images.folders={config.toml(() if pairs else splits)}")
        overrides.append(f"images.pairs={config.toml([_absolute(p) for p in pairs or ()])}")
        named: tuple[config.SourceConfig, ...] = ()
    elif sources:
        named = _parse_sources(sources, "fictitious" if fictitious else "real")
    elif in_file.source or images.folders or images.pairs:
        named = in_file.source
    else:
        before = asked_before(opened)
        named = config.from_dict({"source": before.source}, str(opened.tiles)).source
        overrides = [*before.set, *overrides]
    wanted = config.with_sources(config.load(opened.config, overrides), named)
    if named and sources:
        wanted = config.with_overrides(wanted, ["images.folders=[]", "images.pairs=[]"])
    with console.progress(quiet) as progress:
        table = run(
            opened, wanted, overrides=overrides, workers=workers, force=force, progress=progress
        )
    made = opened.tile_manifest()
    skipped = made.planned - len(table)
    console.note(
        (
            f"{len(table)} tiles ({skipped} skipped for too little valid data) on {made.grid}: "
            if table.grid
            else f"{len(table)} tiles of {made.grid} in {len(table.classes)} "
            f"{'places' if table.dated else 'classes'}: "
        )
        + ", ".join(f"{name} {count}" for name, count in made.splits.items())
    )


@app.command()
def train(
    project: ProjectFolder = HERE,
    run: Annotated[str | None, typer.Option(help="Name of the run; the latest, or run1.")] = None,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Train a run, or go on with it."""
    from geomatch.cli import console

    opened, wanted = _open(project, settings)
    opened.tile_manifest()
    from geomatch.train import train as stage

    with console.progress(quiet) as progress:
        trained = stage(opened, wanted, run=run, progress=progress)
        score = "" if trained.map5 is None else f" (validation mAP@5 {trained.map5:.3f})"
        progress(f"run {trained.run}: best checkpoint is step {trained.best}{score}")


@app.command()
def tune(
    project: ProjectFolder = HERE,
    study: Annotated[
        str, typer.Option(help="Name of the search, and of its runs: NAME-000 and on.")
    ] = "tune",
    as_json: Json = False,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Search the settings of tune.space, each trial a run, or go on with a search."""
    from geomatch.cli import console

    opened, wanted = _open(project, settings)
    opened.tile_manifest()
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
    score = next(trial.map5 for trial in found.trials if trial.run == found.best)
    console.note(
        f"best: {found.best} (validation mAP@5 {score:.3f}). "
        f"Next: geomatch embed --run {found.best}"
    )


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
    from geomatch.cli import console

    asked = [f"embed.engine={engine}"] if engine else []
    asked += [f"embed.dtype={dtype}"] if dtype else []
    opened, wanted = _open(project, asked + (settings or []))
    opened.tile_manifest()
    from geomatch.nn import backend, engines

    if engines.choose(wanted.embed.engine, wanted.embed.dtype).engine == "jax":
        backend.keep_memory()  # here, since the stage brings pyarrow
    from geomatch.embed import embed as stage

    with console.progress(quiet) as progress:
        made = stage(opened, run=run, model=model, settings=wanted, progress=progress)
    console.note(f"{made.tiles} descriptors in {made.path}")


@app.command()
def index(
    project: ProjectFolder = HERE,
    run: Annotated[
        str | None, typer.Option(help="Embeddings to index; the latest.", metavar="RUN[@STEP]")
    ] = None,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Index embeddings for querying."""
    from geomatch.cli import console

    opened, wanted = _open(project, settings)
    from geomatch.index import index as stage

    with console.progress(quiet) as progress:
        made = stage(opened, run=run, metric=wanted.index.metric, progress=progress)
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
    sheet: Annotated[
        Path | None, typer.Option(help="Draw query and answers as a PNG.", metavar="FILE")
    ] = None,
    as_json: Json = False,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Find where a place is in the other years."""
    from geomatch.cli import console
    from geomatch.query import query as stage

    # Unknown options pass, so that a negative longitude can: what is no number is a mistake.
    if re.match(r"-[^\d.]", target):
        raise UsageError(f"no such option: {target}", "See: geomatch query --help")
    opened, _ = _open(project, settings)
    with console.progress(quiet) as progress:
        found = stage(
            opened,
            target,
            top=top,
            years=tuple(year or ()),
            same_year=same_year,
            from_year=from_year,
            index=name,
            progress=progress,
        )
    if sheet:
        from geomatch.report.matches import match_sheet

        query_tile = found.query_pixels if found.query_row is None else found.query_row
        assert query_tile is not None
        match_sheet(opened, found.as_json(), found.rows, query_tile, target, sheet)
        console.note(f"picture in {sheet}")
    if as_json:
        console.data(found.as_json())
        return
    asked = found.matches[0].query if found.matches else target
    columns: dict[str, list[Any]] = {
        "rank": [match.rank for match in found.matches],
        "tile": [match.tile for match in found.matches],
        "year": [match.year for match in found.matches],
        "score": [match.score for match in found.matches],
        "lon": [None if m.lon is None else f"{m.lon:.6f}" for m in found.matches],
        "lat": [None if m.lat is None else f"{m.lat:.6f}" for m in found.matches],
        "distance (m)": [
            None if m.distance_m is None else f"{m.distance_m:.0f}" for m in found.matches
        ],
    }
    # Of images without years or a ground, nothing stands in those columns.
    shown = {name: values for name, values in columns.items() if set(values) != {None}}
    console.table(
        f"{asked}: nearest tiles",
        tuple(shown),
        list(zip(*shown.values(), strict=True)),
        numbers=("rank", "score", "lon", "lat", "distance (m)"),
    )


@app.command("eval")
def evaluate(
    project: ProjectFolder = HERE,
    run: Annotated[
        str | None, typer.Option(help="Embeddings to measure; the latest.", metavar="RUN[@STEP]")
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(help="Tiles searched: split (its own), all, or train (the training split's)."),
    ] = None,
    year: Annotated[
        list[str] | None, typer.Option(help="Search this year only; repeatable.")
    ] = None,
    same_year: Annotated[
        bool, typer.Option("--same-year", help="Search the queries' own year too.")
    ] = False,
    fpr: Annotated[
        float, typer.Option(help="Share of pairs of other places that may pass as the same.")
    ] = 0.01,
    html: Annotated[
        bool, typer.Option("--html/--no-html", help="Write report.html and its curves as PNGs.")
    ] = True,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Beside it: untrained, of ImageNet, colour histogram and gradients (HOG).",
        ),
    ] = False,
    others: Annotated[
        list[str] | None,
        typer.Option("--compare", help="Beside it: other embeddings; repeatable.", metavar="RUN"),
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

    asked = [f"eval.database={database}"] if database else []
    opened, wanted = _open(project, asked + (settings or []))
    from geomatch.evaluate import evaluate as stage

    with console.progress(quiet) as progress:
        result = stage(
            opened,
            run=run,
            database=wanted.eval.database,
            years=tuple(year or ()),
            same_year=same_year,
            fpr=fpr,
            baselines=baselines,
            others=tuple(others or ()),
            grades=grades,
            progress=progress,
        )
    if html:
        from geomatch.report.html import write_page

        console.note(f"report in {write_page(opened, opened.reports / result.name)}")
    if as_json:
        values = result.as_json()
        shown = ("splits", *(key for key in ("others", "graded") if values[key]))
        console.data({key: values[key] for key in shown})
        return
    from geomatch.cli.eval_tables import show

    show(result, fpr)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="An image file.", metavar="A")],
    b: Annotated[str, typer.Argument(help="Another.", metavar="B")],
    project: ProjectFolder = HERE,
    run: Annotated[
        str | None, typer.Option(help="Embeddings to compare by; the latest.", metavar="RUN[@STEP]")
    ] = None,
    fpr: Annotated[
        float, typer.Option(help="Share of pairs of other places that may pass as the same.")
    ] = 0.01,
    as_json: Json = False,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Tell whether two images show the same place."""
    from geomatch.cli import console

    opened, _ = _open(project, settings)
    from geomatch.compare import compare as stage

    with console.progress(quiet) as progress:
        found = stage(opened, a, b, run=run, fpr=fpr, progress=progress)
    if as_json:
        console.data(found.as_json())
        return
    console.facts(
        {
            "verdict": "the same place" if found.match else "not the same place",
            "score": f"{found.score:.4f}",
            "distance": f"{found.distance:.4f}",
            "threshold": f"{found.threshold:.4f} (at most {fpr:.2%} of other places pass)",
            "probability": f"{found.probability:.3f}",
        }
    )


@app.command()
def project2d(
    project: ProjectFolder = HERE,
    run: Annotated[
        str | None, typer.Option(help="Embeddings to draw; the latest.", metavar="RUN[@STEP]")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    method: Annotated[str, typer.Option(help="pca or tsne.")] = "pca",
    out: Annotated[
        Path | None, typer.Option(help="PNG to write; in reports/ by default.", metavar="FILE")
    ] = None,
    projector: Annotated[
        bool,
        typer.Option("--projector", help="Of all splits, for TensorBoard's Embedding Projector."),
    ] = False,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Draw descriptors in two dimensions."""
    from geomatch.cli import console

    opened, _ = _open(project, settings)
    from geomatch import project2d as stage

    with console.progress(quiet) as progress:
        if projector:
            folder = stage.projector(opened, run=run, progress=progress)
            console.note(f"to look at it: tensorboard --logdir {folder}")
            return
        made = stage.project2d(
            opened, run=run, split=split, method=method, out=out, progress=progress
        )
    console.note(f"picture in {made}")


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
    from geomatch.cli import console

    opened, _ = _open(project, [*(settings or []), f"model.trunk={trunk}"])
    from geomatch.import_weights import import_weights as run

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
    from geomatch.cli import console

    opened, _ = _open(project, settings)
    from geomatch.export import export_model as write

    made = write(opened, run=run, model=model, onnx=onnx, safetensors=safetensors)
    console.note(f"{made.name}: {', '.join(map(str, made.files))}")


@app.command()
def info(project: ProjectFolder = HERE, as_json: Json = False, settings: Settings = None) -> None:
    """Show what is there, from what, what is stale and what to run next."""
    from geomatch.cli import console

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
    from geomatch.cli import console
    from geomatch.demo import demo as stage

    with console.progress(quiet) as progress:
        result = stage(folder, seed=seed, progress=progress)
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
    package = Path(__file__).parents[1]
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


def _absolute(text: str) -> str:
    """PATH, or SPLIT=PATH, with the path from the current folder."""
    split, equals, path = text.partition("=")
    if split not in ("train", "validation", "test"):
        split, equals, path = "", "", text
    return f"{split}{equals}{Path(path).expanduser().absolute()}"


def _parse_sources(texts: list[str], placement: str) -> tuple[config.SourceConfig, ...]:
    """Sources from YEAR=PATH, YEAR:labels=PATH and YEAR:changed=PATH, in the order given."""
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        year, _, kind = name.partition(":")
        if not (equals and year and path) or kind not in ("", "labels", "changed"):
            raise UsageError(
                f"{text}: not of the form YEAR=PATH, YEAR:labels=PATH or YEAR:changed=PATH",
                "For example: geomatch tile 2010=ortho/2010 2010:labels=landcover.tif",
            )
        entry = found.setdefault(year, {"year": year, "placement": placement})
        key = kind or "images"
        if key in entry:
            raise UsageError(f"{text}: {name} is named twice", "Use one folder or quoted glob.")
        entry[key] = str(Path(path).expanduser().absolute())
    return config.from_dict({"source": list(found.values())}, "command line").source

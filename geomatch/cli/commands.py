"""The `geomatch` command: every command, in the order of the pipeline.

A command parses its options, calls the function of its name and prints what that returns. It
imports the function when it runs, so that `geomatch --help` stays quick.
"""

from __future__ import annotations

from typing import Annotated

import typer

from geomatch import __version__
from geomatch.cli import (
    layers,
    measuring,
    models,
    projects,
    runs,
    searching,
    serving,
    tiles,
    training,
)
from geomatch.cli.failures import Commands

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help="Find the same place in aerial imagery of different years.",
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"geomatch {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


app.command()(projects.init)
app.command()(tiles.tile)
app.command()(training.train)
app.command()(training.tune)
app.command()(searching.embed)
app.command()(searching.index)
# Options that are unknown pass, since a negative longitude looks like one.
app.command(cls=searching.Query, context_settings={"ignore_unknown_options": True})(searching.query)
app.command()(serving.serve)
app.command("eval")(measuring.evaluate)
app.command()(searching.compare)
app.command()(measuring.change)
app.command()(measuring.project2d)
app.command()(projects.info)
app.command()(projects.demo)

run_commands = typer.Typer(cls=runs.ListByDefault, help="The runs of a project.")
run_commands.command("list")(runs.list_runs)
run_commands.command()(runs.compare)
run_commands.command()(runs.rename)
run_commands.command()(runs.tag)
run_commands.command()(runs.prune)
app.add_typer(run_commands, name="runs")

weights = typer.Typer(help="Weights that were trained elsewhere.")
weights.command("import")(models.import_weights)
app.add_typer(weights, name="weights")

export = typer.Typer(help="Files for other programs.")
export.command("model")(models.export_model)
export.command("tiles")(layers.export_tiles)
export.command("matches")(layers.export_matches)
app.add_typer(export, name="export")

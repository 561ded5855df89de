"""The command that serves a page: serve."""

from __future__ import annotations

from typing import Annotated

import typer

from geomatch.cli.options import (
    HERE,
    Build,
    ProjectFolder,
    Quiet,
    SearchedIndex,
    Settings,
    open_project,
)


def serve(
    project: ProjectFolder = HERE,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; with one that other machines reach, a token is needed."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 for any that is free.", min=0, max=65535)
    ] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            help="What every request has to know; where it is needed, one is made.",
            envvar="GEOMATCH_TOKEN",
            show_envvar=True,
        ),
    ] = None,
    name: SearchedIndex = None,
    build: Build = True,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Ask on a page: drop an image or pick a place on a map."""
    from geomatch.cli import console

    opened, wanted = open_project(project, settings)
    from geomatch.serve import serve as stage

    def ready(url: str) -> None:
        console.line(url)
        if not quiet:
            console.note("Open it in a browser; Ctrl-C ends it.")

    with console.progress(quiet) as progress:
        stage(
            opened,
            host=host,
            port=port,
            token=token,
            index=name,
            build=build,
            settings=wanted,
            ready=ready,
            progress=progress,
        )

"""Commands for the runs of a project: list, compare, rename, tag, prune."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from geomatch.cli.options import HERE, Json, ProjectFolder, Settings, open_project

Name = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")]


class ListByDefault(TyperGroup):
    """Commands of which `list` is meant where none is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing and (not args or args[0].startswith("-")):
            args = args if "--help" in args[:1] else ["list", *args]
        return super().parse_args(ctx, args)


def list_runs(
    project: ProjectFolder = HERE, as_json: Json = False, settings: Settings = None
) -> None:
    """List the runs, the latest last (the default)."""
    from geomatch.cli import console

    opened, _ = open_project(project, settings)
    from geomatch import manage_runs

    found = manage_runs.list_runs(opened)
    if as_json:
        console.data([run.as_json() for run in found])
    else:
        from geomatch.cli import run_tables

        run_tables.show_list("runs", found)


def compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN RUN ...", help="Two runs or more.")],
    project: ProjectFolder = HERE,
    html: Annotated[
        bool, typer.Option("--html/--no-html", help="Write a page with curves in reports/runs.")
    ] = True,
    as_json: Json = False,
    settings: Settings = None,
) -> None:
    """Compare runs: settings that differ, metrics and curves."""
    from geomatch.cli import console

    opened, _ = open_project(project, settings)
    from geomatch import manage_runs
    from geomatch.cli import run_tables

    found = manage_runs.compare_runs(opened, names)
    if html:
        run_tables.write_page(opened.comparison(names), found)
        console.note(f"page in {opened.comparison(names)}")
    if as_json:
        console.data(found.as_json())
    else:
        run_tables.show_comparison(found)


def rename(
    old: Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Its new name.")],
    project: ProjectFolder = HERE,
    settings: Settings = None,
) -> None:
    """Rename a run."""
    from geomatch.cli import console

    opened, _ = open_project(project, settings)
    from geomatch import manage_runs

    used_by = manage_runs.rename_run(opened, old, new)
    console.note(f"run {old} is now {new}")
    if used_by:
        console.note(f"its {', '.join(used_by)} keep their names and still work")


def tag(
    name: Name,
    tags: Annotated[
        list[str] | None, typer.Argument(metavar="[TAG ...]", help="Tags to add.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(help="A tag to take away; repeatable.", metavar="TAG")
    ] = None,
    project: ProjectFolder = HERE,
    settings: Settings = None,
) -> None:
    """Give a run tags, or show those it has; prune spares tagged runs."""
    from geomatch.cli import console

    opened, _ = open_project(project, settings)
    from geomatch import manage_runs

    found = manage_runs.tag_run(opened, name, tags or (), remove or ())
    console.note(f"run {name}: {', '.join(found) or 'no tags'}")


def prune(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN ...]",
            help="Runs to delete; by default those without a tag that are neither the latest nor "
            "the best, and have no embeddings or index.",
        ),
    ] = None,
    project: ProjectFolder = HERE,
    best: Annotated[
        int, typer.Option(min=0, help="Without names: spare the N best on validation.", metavar="N")
    ] = 1,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete them without asking.")] = False,
    as_json: Json = False,
    settings: Settings = None,
) -> None:
    """Delete runs, after showing which and asking."""
    from geomatch.cli import console

    opened, _ = open_project(project, settings)
    from geomatch import manage_runs
    from geomatch.cli import run_tables

    found = manage_runs.prunable(opened, names or (), best)
    if not as_json and found:
        run_tables.show_list("to be deleted", found)
    run_tables.warn(found)
    deleted = bool(found) and (yes or (not as_json and _agreed(len(found))))
    if deleted:
        manage_runs.prune_runs(opened, [run.name for run in found])
    if as_json:
        console.data({"deleted": deleted, "runs": [run.as_json() for run in found]})
    elif not found:
        console.note("no run is to be deleted")
    else:
        console.note(run_tables.freed(found) if deleted else "nothing was deleted")


def _agreed(count: int) -> bool:
    """Whether a person agrees to delete runs; nobody is asked where there is no terminal."""
    if not sys.stdin.isatty():
        return False
    return typer.confirm(f"delete {'this run' if count == 1 else f'these {count} runs'}?")

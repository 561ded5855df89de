"""All that people see in a terminal: progress, tables, one-line errors. Data go to stdout."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from geomatch.errors import GeomatchError
from geomatch.progress import Reporter

# Piped into a file, a table has all the width it needs.
out = Console(width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True)

PLAIN_SECONDS = 15.0
"""Between progress lines where there is no terminal."""


@contextlib.contextmanager
def progress(quiet: bool = False) -> Iterator[Reporter]:
    """A reporter: live bars in a terminal, plain lines elsewhere, nothing when `quiet`."""
    if quiet:
        yield lambda task, done=0, total=0, detail="": None
    elif not err.is_terminal:
        yield _plain()
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
        )
        with Progress(*columns, console=err, transient=False) as bars:
            tasks: dict[str, TaskID] = {}

            def live(task: str, done: int = 0, total: int = 0, detail: str = "") -> None:
                if not total:
                    bars.console.print(escape(task), highlight=False)
                    return
                if task not in tasks or done < bars.tasks[tasks[task]].completed:
                    tasks[task] = bars.add_task(escape(task), total=total, detail="")
                bars.update(tasks[task], completed=done, total=total, detail=escape(detail))

            yield live


def _plain() -> Reporter:
    started: dict[str, tuple[float, int]] = {}
    shown: dict[str, float] = {}

    def line(task: str, done: int = 0, total: int = 0, detail: str = "") -> None:
        now = time.monotonic()
        if not total:
            print(task, file=sys.stderr, flush=True)
            return
        begun, first = started.setdefault(task, (now, done))
        finished = done >= total
        if not finished and now - shown.get(task, begun) < PLAIN_SECONDS:
            return
        shown[task] = now
        left = ""
        if not finished and done > first:
            seconds = (now - begun) / (done - first) * (total - done)
            left = f", {seconds / 60:.1f} min left" if seconds >= 60 else f", {seconds:.0f} s left"
        print(f"{task}: {done}/{total} {detail}{left}".rstrip(), file=sys.stderr, flush=True)
        if finished:
            started.pop(task, None)
            shown.pop(task, None)

    return line


def failure(error: GeomatchError) -> None:
    """One line of what is wrong, one of what to do."""
    err.print(f"[bold red]error:[/] {escape(error.message)}", highlight=False, soft_wrap=True)
    if error.hint:
        err.print(f"[bold]hint:[/] {escape(error.hint)}", highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """A remark beside the data, on stderr."""
    err.print(escape(text), highlight=False, soft_wrap=True)


def data(value: Any) -> None:
    """JSON on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[str] = ()
) -> None:
    """A table on stdout; `numbers` names the columns to align right."""
    shown = Table(
        title=escape(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in columns:
        shown.add_column(column, justify="right" if column in numbers else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*(escape(_text(value)) for value in row))
    out.print(shown)


def facts(values: Mapping[str, Any]) -> None:
    """Names and values on stdout, a line each."""
    width = max(len(name) for name in values)
    for name, value in values.items():
        text = f"[bold]{escape(name):<{width}}[/]  {escape(_text(value))}"
        out.print(text, highlight=False, soft_wrap=True)


def overview(found: Mapping[str, Any]) -> None:
    """A project's `info`."""
    lines: dict[str, Any] = {"project": found["project"]}
    tiles = found["tiles"]
    if tiles is None:
        lines["tiles"] = "none yet"
    else:
        channels = tiles["channels"]
        where = f"on {tiles['grid']} ({tiles['placement']} placement)"
        if tiles["placement"] == "none":
            where = f"of {tiles['grid']}, without a ground"
        lines["tiles"] = f"{tiles['tiles']} {where}"
        if tiles["years"]:
            lines["years"] = ", ".join(
                f"{year} ({facts['files']} files{', labels' if facts['labels'] else ''})"
                for year, facts in tiles["years"].items()
            )
        if tiles["classes"]:
            lines["places" if tiles["years"] else "classes"] = tiles["classes"]
        lines["channels"] = f"{channels['image']} image, {channels['label']} label"
        lines["splits"] = ", ".join(f"{name} {n}" for name, n in tiles["splits"].items())
    for run in found["runs"]:
        score = (
            "" if run["map@5"] is None else f", best step {run['best']} mAP@5 {run['map@5']:.3f}"
        )
        state = "finished" if run["finished"] else f"at step {run['last'] or 0}, unfinished"
        other = ", on tiles that changed since" if run["other_tiles"] else ""
        lines[f"run {run['name']}"] = f"{run['trunk']}, {state}{score}{other}"
    for what in ("embeddings", "indexes"):
        for entry in found[what]:
            stale = "stale: made from tiles or weights that changed" if entry["stale"] else "fresh"
            lines[f"{what} {entry['name']}"] = stale
    lines["devices"] = ", ".join(found["devices"])
    lines["next"] = found["next"]
    facts(lines)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)

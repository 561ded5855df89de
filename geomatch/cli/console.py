"""What people see in a terminal: progress, tables and errors. Data go to stdout."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from geomatch.errors import GeomatchError
from geomatch.progress import ProgressCallback, duration, silent

# In a pipe or a file, tables are as wide as they need to be.
out = Console(width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True)

PLAIN_SECONDS = 15.0
"""Seconds between lines of progress where there is no terminal."""
WIDTH, CELL = 80, 26
"""Largest width in characters of the panel of progress values, and the width of one of them."""


@contextlib.contextmanager
def progress(quiet: bool = False) -> Iterator[ProgressCallback]:
    """A progress callback: live bars in a terminal, plain lines elsewhere, nothing if `quiet`."""
    if quiet:
        yield silent
    elif not err.is_terminal:
        yield _plain()
    else:
        with _Live() as live:
            yield live


class _Live(Progress):
    """A bar per task, and above them a panel for the task that has values."""

    def __init__(self) -> None:
        self._panel: Panel | None = None
        self._bars: dict[str, TaskID] = {}
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            _Time(),
            TextColumn("{task.fields[detail]}"),
            console=err,
            # Data that go elsewhere must not end up among the bars.
            redirect_stdout=out.is_terminal,
        )

    def get_renderables(self) -> Iterator[RenderableType]:
        if self._panel is not None:
            yield self._panel
        yield self.make_tasks_table(self.tasks)

    def __call__(
        self,
        task: str,
        done: int = 0,
        total: int = 0,
        detail: str = "",
        values: Mapping[str, str] | None = None,
    ) -> None:
        if not total:
            self.console.print(escape(task), highlight=False)
        elif values is not None:
            self._panel = _panel(task, done, total, values)
        else:
            if task not in self._bars:
                self._bars[task] = self.add_task(escape(task), total=total, detail="")
            bar = self._bars[task]
            if done < self.tasks[bar].completed:
                self.reset(bar)
            self.update(bar, completed=done, total=total, detail=escape(detail))


def _panel(task: str, done: int, total: int, values: Mapping[str, str]) -> Panel:
    width = min(WIDTH, err.width)
    across = max(1, width // CELL)
    grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
    for _ in range(across):
        grid.add_column(ratio=1, no_wrap=True)
    cells = [f"[dim]{escape(name)}[/] {escape(value)}" for name, value in values.items()]
    for start in range(0, len(cells), across):
        grid.add_row(*cells[start : start + across])
    parts = Group(grid, ProgressBar(total, done))
    return Panel(parts, title=escape(f"{task}: {done}/{total}"), title_align="left", width=width)


class _Time(ProgressColumn):
    """The time that is left, or the time that a finished task took."""

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(f"in {duration(task.finished_time or 0)}")
        left = task.time_remaining
        return Text("" if left is None else f"{duration(left)} left")


def _plain() -> ProgressCallback:
    started: dict[str, tuple[float, int]] = {}
    shown: dict[str, float] = {}

    def line(
        task: str,
        done: int = 0,
        total: int = 0,
        detail: str = "",
        values: Mapping[str, str] | None = None,
    ) -> None:
        now = time.monotonic()
        if not total:
            print(task, file=sys.stderr, flush=True)
            return
        begun, first = started.setdefault(task, (now, done))
        finished = done >= total
        if not finished and now - shown.get(task, begun) < PLAIN_SECONDS:
            return
        shown[task] = now
        parts = [f"{task}: {done}/{total} {detail}".rstrip()]
        if values is not None:
            parts += [f"{name} {value}" for name, value in values.items()]
        elif not finished and done > first:
            parts.append(f"{duration((now - begun) / (done - first) * (total - done))} left")
        print(", ".join(parts), file=sys.stderr, flush=True)
        if finished:
            started.pop(task, None)
            shown.pop(task, None)

    return line


def failure(error: GeomatchError) -> None:
    """Print a line on what is wrong and a line on what to do, to stderr."""
    err.print(f"[bold red]error:[/] {escape(error.message)}", highlight=False, soft_wrap=True)
    if error.hint:
        err.print(f"[bold]hint:[/] {escape(error.hint)}", highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """Print a remark to stderr."""
    err.print(escape(text), highlight=False, soft_wrap=True)


def line(text: str) -> None:
    """Print a line to stdout, for other programs too."""
    print(text, flush=True)


def data(value: Any, line: bool = False) -> None:
    """Print JSON to stdout, as one line if it is one of several values."""
    print(json.dumps(value, indent=None if line else 2, allow_nan=False), flush=line)


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[str] = ()
) -> None:
    """Print a table to stdout; the columns in `numbers` are aligned right."""
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


def key_values(values: Mapping[str, Any]) -> None:
    """Print names and values to stdout, one per line."""
    width = max(len(name) for name in values)
    for name, value in values.items():
        text = f"[bold]{escape(name):<{width}}[/]  {escape(_text(value))}"
        out.print(text, highlight=False, soft_wrap=True)


def overview(found: Mapping[str, Any]) -> None:
    """Print what `info` found."""
    lines: dict[str, Any] = {"project": found["project"]}
    tiles = found["tiles"]
    if tiles is None:
        lines["tiles"] = "none yet"
    else:
        channels = tiles["channels"]
        where = f"on {tiles['grid']} ({tiles['placement']} placement)"
        if tiles["placement"] == "none":
            where = f"of {tiles['grid']}, without georeference"
        lines["tiles"] = f"{tiles['tiles']} {where}"
        if tiles["years"]:
            lines["years"] = ", ".join(
                f"{year} ({source['files']} files{', labels' if source['labels'] else ''})"
                for year, source in tiles["years"].items()
            )
        if tiles["classes"]:
            lines["places" if tiles["years"] else "classes"] = tiles["classes"]
        lines["channels"] = f"{channels['image']} image, {channels['label']} label"
        if tiles["label_classes"]:
            lines["labels"] = ", ".join(
                f"{name} {share:.2%}" for name, share in tiles["label_classes"].items()
            )
        for layer, count in (tiles["broken"] or {}).items():
            lines[f"left out of {layer}"] = f"{count} broken shapes"
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
    key_values(lines)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)

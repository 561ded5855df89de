"""Runs in a terminal and on a page: lists, and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geomatch import config
from geomatch.cli import console
from geomatch.manage_runs import RunComparison, RunSummary
from geomatch.progress import size_text
from geomatch.report.run_page import write_run_page


def show_list(title: str, runs: Sequence[RunSummary]) -> None:
    """Print a line for each run."""
    rows = [
        (
            run.name,
            (run.started or "-").partition("T")[0],
            run.trunk,
            _state(run),
            run.best,
            run.map5,
            size_text(run.size),
            ", ".join(run.tags) or "-",
            ", ".join(run.used_by) or "-",
        )
        for run in runs
    ]
    total = size_text(sum(run.size for run in runs))
    console.table(
        f"{title}: {len(runs)}, {total}",
        ("run", "started", "trunk", "state", "best", "mAP@5", "size", "tags", "used by"),
        rows,
        numbers=("best", "mAP@5", "size"),
    )


def _state(run: RunSummary) -> str:
    if run.trunk is None:
        return "damaged"
    state = "finished" if run.finished else f"at step {run.last or 0}"
    return f"{state}, other tiles" if run.other_tiles else state


def warn(runs: Sequence[RunSummary]) -> None:
    """Say what was made by runs that are to be deleted."""
    for run in runs:
        if run.used_by:
            console.note(
                f"warning: {', '.join(run.used_by)} came from {run.name}: without it, image files "
                "cannot be searched for"
            )


def freed(runs: Sequence[RunSummary]) -> str:
    """What was deleted."""
    names = ", ".join(run.name for run in runs)
    return f"deleted {names}: {size_text(sum(run.size for run in runs))}"


def show_comparison(found: RunComparison) -> None:
    """Print the metrics of runs and the settings that differ."""
    for title, rows in (("metrics", _metrics(found)), ("settings that differ", _settings(found))):
        console.table(
            title if rows else f"{title}: none",
            ("", *found.runs),
            [(name, *values) for name, values in rows.items()],
        )


def write_page(path: Path, found: RunComparison) -> None:
    """Write the page of a comparison."""
    write_run_page(path, found.runs, _metrics(found), _settings(found), found.curves)


METRICS = {
    "validation mAP@5": "map@5",
    "at step": "best",
    "untrained": "untrained",
    "test mAP@5": "test/map@5",
    "epochs": "epochs",
    "loss": "loss",
    "images/s": "images_per_s",
}
"""Titles of rows, and their names in JSON."""


def _metrics(found: RunComparison) -> dict[str, list[str]]:
    values = [metrics.as_json() for metrics in found.metrics]
    return {title: [_number(each[key]) for each in values] for title, key in METRICS.items()}


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _settings(found: RunComparison) -> dict[str, list[str]]:
    return {
        key: ["-" if value is None else config.toml(value) for value in values]
        for key, values in found.settings.items()
    }

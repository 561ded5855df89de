"""How a stage tells what it is doing, without knowing who listens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class ProgressCallback(Protocol):
    """Receives progress of a task, or a note when `total` is not given.

    `values` are what a long task is followed by: names and values, as text, in order.
    """

    def __call__(
        self,
        task: str,
        done: int = 0,
        total: int = 0,
        detail: str = "",
        values: Mapping[str, str] | None = None,
    ) -> None: ...


def silent(
    task: str,
    done: int = 0,
    total: int = 0,
    detail: str = "",
    values: Mapping[str, str] | None = None,
) -> None:
    """The reporter of library callers who want none."""


def duration(seconds: float) -> str:
    """A time as people say it: "50 s", "12 min", "3 h 05 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"

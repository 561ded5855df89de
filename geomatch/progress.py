"""How a stage tells what it is doing, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Receives progress of a task, or a note when `total` is not given."""

    def __call__(self, task: str, done: int = 0, total: int = 0, detail: str = "") -> None: ...


def silent(task: str, done: int = 0, total: int = 0, detail: str = "") -> None:
    """The reporter of library callers who want none."""

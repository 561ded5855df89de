"""How a stage says what it is doing, without knowing who listens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class ProgressCallback(Protocol):
    """Receives the progress of a task, or a note if `total` is 0.

    `values` describe a long task while it runs, such as its loss: text by name, in order.
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
    """The callback that shows nothing."""


def duration(seconds: float) -> str:
    """A duration as text: "50 s", "12 min", "3 h 05 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def size_text(size: int) -> str:
    """A number of bytes as text: "3 kB", "45 MB", "1.2 GB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= 0.995 * scale:
            return f"{size / scale:.{1 if unit == 'GB' else 0}f} {unit}"
    return f"{size / 1e3:.0f} kB"

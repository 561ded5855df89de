"""The shifts that `tile --check` measured, in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from geomatch.cli import console
from geomatch.data.registration import LARGE, YearPair
from geomatch.errors import listed

NAMED = 3
"""Pairs of years that a warning names."""

COLUMNS = {
    "places": "places",
    "answered": "answered",
    "flat": "flat",
    "changed": "changed",
    "median px": "median_px",
    "95 % px": "p95_px",
    "median m": "median_m",
    "95 % m": "p95_m",
    "east": "east_px",
    "north": "north_px",
}
"""Titles of columns, and their names in JSON."""


def show(pairs: Sequence[YearPair]) -> None:
    """Print a line for each pair of years."""
    rows = [
        [_name(pair), *(_text(values[name]) for name in COLUMNS.values())]
        for pair, values in ((pair, pair.as_json()) for pair in pairs)
    ]
    title = "shift of the later year: median and 95th percentile, and medians east and north in px"
    console.table(title, ("years", *COLUMNS), rows, numbers=tuple(COLUMNS))


def warn(pairs: Sequence[YearPair]) -> None:
    """Say which years are shifted, and whose shift is unknown."""
    half, some, unknown = {}, {}, {}
    for pair in pairs:
        shift = pair.shift()
        if shift is None:
            counted = f"{pair.answered.sum()} of {len(pair)} places answered"
            unknown[_name(pair)] = counted if len(pair) else "no window is whole in both"
        elif shift[0] > LARGE:
            half[_name(pair)] = f"{shift[0]:.1f} px"
        elif shift[1] > LARGE:
            some[_name(pair)] = f"{shift[1]:.1f} px"
    for what, found in (
        (f"shifted by more than {LARGE:g} px", half),
        (f"shifted by more than {LARGE:g} px at one place in twenty or more", some),
        ("whose shift is unknown", unknown),
    ):
        if found:
            named = [f"{years} ({detail})" for years, detail in found.items()]
            console.note(f"warning: years {what}: {listed(named, NAMED)}")


def _name(pair: YearPair) -> str:
    return " to ".join(pair.years)


def _text(value: int | float | None) -> Any:
    return f"{value:.2f}" if isinstance(value, float) else value

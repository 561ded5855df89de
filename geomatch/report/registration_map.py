"""The shifts between years as arrows on a map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from geomatch.data.registration import YearPair

INK, GREY, LINE = "#24292f", "#57606a", "#d0d7de"
ARROW, FLAT, CHANGED = "#0072b2", "#d0d7de", "#e69f00"
PANELS = 12
"""Largest number of pairs drawn: those of the largest shifts."""
PANEL, DPI = 3.2, 120
"""Side of a panel in inches, and pixels per inch."""
LONGEST = 0.2
"""Length of the 95th percentile's arrow, as a share of the side of a panel."""


def draw(pairs: Sequence[YearPair], path: Path) -> None:
    """Draw an arrow for each place that gave an answer and a dot for each other one, as a PNG."""
    shown = sorted(pairs, key=lambda pair: -(pair.shift() or (math.inf,))[0])[:PANELS]
    cols = min(len(shown), 4)
    rows = -(-len(shown) // cols)
    figure = Figure((PANEL * cols, PANEL * rows + 0.5), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    for number, pair in enumerate(shown, 1):
        _panel(figure.add_subplot(rows, cols, number), pair)
    lines = ["arrow: shift of the later year", "orange: no answer, changed; grey: flat"]
    if left_out := len(pairs) - len(shown):
        lines.append(f"not drawn: {left_out} pairs with smaller shifts")
    figure.text(0.02, 0.01, "\n".join(lines), fontsize=7, color=GREY)
    figure.tight_layout(rect=(0, 0.5 / (PANEL * rows + 0.5), 1, 1))
    canvas.print_png(path)


def _panel(axes: Axes, pair: YearPair) -> None:
    shift, (x, y) = pair.shift(), pair.xy.T
    text = "unknown" if shift is None else f"median {shift[0]:.1f} px, 95 % {shift[1]:.1f} px"
    axes.set_title(f"{pair.years[0]} to {pair.years[1]}\n{text}", fontsize=8, color=INK)
    degrees = pair.xy is pair.lonlat
    axes.set_aspect(1 / math.cos(math.radians(y.mean())) if degrees and len(y) else 1, "datalim")
    axes.set(xticks=[], yticks=[])
    axes.margins(0.15)
    for spine in axes.spines.values():
        spine.set_color(LINE)
    for of_reason, colour in ((pair.flat, FLAT), (pair.changed, CHANGED)):
        axes.scatter(x[of_reason], y[of_reason], 6, colour, linewidths=0)
    answered = pair.answered
    if not answered.any():
        return
    longest = max(np.quantile(np.hypot(*pair.east_north[answered].T), 0.95), 0.1)
    arrows = axes.quiver(
        x[answered],
        y[answered],
        *pair.east_north[answered].T,
        color=ARROW,
        scale=longest / LONGEST,
        scale_units="width",
        width=0.006,
    )
    unit = float(f"{longest:.1g}")
    metres = "" if pair.gsd is None else f", {unit * pair.gsd:.2g} m"
    axes.quiverkey(
        arrows,
        0.7,
        -0.05,
        unit,
        f"{unit:g} px{metres}",
        labelpos="W",
        fontproperties={"size": 7},
        labelcolor=GREY,
    )

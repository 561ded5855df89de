"""A map of how far places moved, beside the two years of those that moved furthest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.project import Project, replacing
from geomatch.report.contact_sheet import rgb

INK, GREY, LINE = "#24292f", "#57606a", "#d0d7de"
COLOURS = "YlOrBr"
MOST = 400
"""Largest number of squares along a side of the map; each has the largest score within it."""
MAP, TILE, GAP, TEXT = 6.0, 1.4, 0.08, 0.36
"""Widths in inches of the map and of a tile, and what is beside and above a tile."""
EDGE, BAR = 0.2, 0.5
"""Inches around the map, and for the colours below it."""
DPI = 120

Float64Array = NDArray[np.float64]


def draw(
    project: Project,
    rows: NDArray[np.int64],
    score: Float64Array,
    centres: tuple[Float64Array, float] | None,
    captions: Sequence[tuple[str, str]],
    years: tuple[str, str],
    path: Path,
) -> None:
    """Draw a map of all places, and the tiles of the first ones side by side, as a PNG.

    Args:
        rows: (n, 2) rows of the catalogue, of either year, the furthest moved place first.
        score: (n,) of the places.
        centres: (n, 2) of the places, and the distance between neighbours in the same unit; None
            for no map.
        captions: for each of the places to show, a text over its tile of either year.
    """
    shown = rows[: len(captions)]
    scores = None if centres is None else _squares(*centres, score)
    left, below = (0.0, 0.0) if scores is None else (MAP, scores.tall + 2 * EDGE + BAR)
    across = min(2, len(shown))
    width = left + 2 * across * (TILE + GAP)
    height = max(-(-len(shown) // across) * (TILE + TEXT), below)
    figure = Figure((width, height), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)

    def axes(x: float, top: float, wide: float, tall: float) -> Axes:
        """Axes at a place in inches from the upper left corner."""
        y = height - top - tall
        return figure.add_axes((x / width, y / height, wide / width, tall / height))

    if scores is not None:
        drawn = _map(axes(EDGE, EDGE, scores.wide, scores.tall), scores, len(shown))
        bar = axes(EDGE, EDGE + scores.tall + 0.1, MAP / 2, 0.1)
        figure.colorbar(drawn, cax=bar, orientation="horizontal")
        bar.set_xlabel("movement, relative to the place in the middle", fontsize=7, color=GREY)
        bar.tick_params(labelsize=7, colors=GREY)
    tiles, channels = TileTable.load(project.catalogue), project.tile_manifest().channels.image
    pixels = TileStore.open(project.pixels).read(tiles.store_row[shown.ravel()])[..., :channels]
    for number, image in enumerate(pixels):
        place, which = divmod(number, 2)
        x = left + (2 * (place % across) + which) * (TILE + GAP)
        panel = axes(x, place // across * (TILE + TEXT) + TEXT, TILE, TILE)
        panel.imshow(rgb(image))
        panel.set_axis_off()
        text = f"{captions[place][which]}\n{years[which]}"
        panel.set_title(text, fontsize=6, color=INK, loc="left", pad=2)
    with replacing(path) as temporary:
        canvas.print_png(temporary)


class _Squares(NamedTuple):
    """The largest score (rows, cols) of places in squares, and the square (n, 2) of each place.

    Attributes:
        wide, tall: of the map in inches.
    """

    score: Float64Array
    at: NDArray[np.int64]
    wide: float
    tall: float


def _squares(xy: Float64Array, step: float, score: Float64Array) -> _Squares:
    size = max(step, float(np.ptp(xy, axis=0).max()) / MOST)
    at = np.rint((xy - xy.min(axis=0)) / size).astype(np.int64)
    cols, rows = (at.max(axis=0) + 1).tolist()
    largest = np.full((rows, cols), np.nan)
    np.fmax.at(largest, (at[:, 1], at[:, 0]), score)
    inches = (MAP - 2 * EDGE) / max(rows, cols)
    return _Squares(largest, at, cols * inches, rows * inches)


def _map(axes: Axes, squares: _Squares, numbered: int) -> AxesImage:
    """Draw the scores of places, with the numbers of the first ones."""
    drawn = axes.imshow(squares.score, COLOURS, origin="lower", aspect="auto")
    for number, (x, y) in enumerate(squares.at[:numbered].tolist(), 1):
        axes.annotate(
            str(number),
            (x, y),
            (4, 4),
            textcoords="offset points",
            fontsize=6,
            color=INK,
            bbox={"boxstyle": "circle,pad=0.15", "fc": "white", "ec": GREY, "lw": 0.4},
        )
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color(LINE)
    return drawn

"""A map of how far places moved, beside the two years of those that moved furthest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
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
EDGE, BAR = 0.2, 0.6
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
    across = min(2, len(shown))
    down = -(-len(shown) // across)
    beside, left = 2 * across * (TILE + GAP), MAP if centres else 0.0
    height = max(down * (TILE + TEXT), left)
    figure = Figure((left + beside, height), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    if centres:
        _map(figure, *centres, score, len(shown))
    tiles, channels = TileTable.load(project.catalogue), project.tile_manifest().channels.image
    pixels = TileStore.open(project.pixels).read(tiles.store_row[shown.ravel()])[..., :channels]
    for number, image in enumerate(pixels):
        place, which = divmod(number, 2)
        x = left + (2 * (place % across) + which) * (TILE + GAP)
        y = height - (place // across + 1) * (TILE + TEXT)
        width, tall = left + beside, height
        axes = figure.add_axes((x / width, y / tall, TILE / width, TILE / tall))
        axes.imshow(rgb(image))
        axes.set_axis_off()
        text = f"{captions[place][which]}\n{years[which]}"
        axes.set_title(text, fontsize=6, color=INK, loc="left", pad=2)
    with replacing(path) as temporary:
        canvas.print_png(temporary)


def _map(figure: Figure, xy: Float64Array, step: float, score: Float64Array, numbered: int) -> None:
    """Draw the scores of places, with the numbers of the first ones, and what colours mean."""
    low = xy.min(axis=0)
    size = max(step, float(np.ptp(xy, axis=0).max()) / MOST)
    col, row = np.rint((xy - low) / size).astype(np.int64).T
    squares = np.full((row.max() + 1, col.max() + 1), np.nan)
    np.fmax.at(squares, (row, col), score)
    (width, height), side = figure.get_size_inches(), MAP - 2 * EDGE - BAR
    wide, tall = np.array(squares.shape[::-1]) * side / max(squares.shape)
    bottom = height - EDGE - tall
    axes = figure.add_axes((EDGE / width, bottom / height, wide / width, tall / height))
    drawn = axes.imshow(squares, COLOURS, origin="lower")
    for number in range(numbered):
        axes.annotate(
            str(number + 1),
            (float(col[number]), float(row[number])),
            (4, 4),
            textcoords="offset points",
            fontsize=6,
            color=INK,
            bbox={"boxstyle": "circle,pad=0.15", "fc": "white", "ec": GREY, "lw": 0.4},
        )
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color(LINE)
    below = figure.add_axes((EDGE / width, (bottom - 0.2) / height, side / 2 / width, 0.1 / height))
    figure.colorbar(drawn, cax=below, orientation="horizontal")
    below.set_xlabel("movement, relative to the place in the middle", fontsize=7, color=GREY)
    below.tick_params(labelsize=7, colors=GREY)

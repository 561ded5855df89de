"""Why an answer is confirmed: the query beside it, with lines between what they have in common."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from geomatch.project import replacing
from geomatch.report.contact_sheet import INK, PAPER, RIGHT, UNKNOWN, rgb

SIDE, GAP, LINE, EDGE = 360, 12, 20, 3
"""Height of an image in pixels, and what is around it."""
MOST = 24
"""Pairs of images in a picture at most."""
LINES = 150
"""Lines between two images at most."""
DPI, WIDTH = 120, 7.0
GREY, ARROW = "#57606a", "#cf222e"


@dataclass(frozen=True)
class Pair:
    """A query and the ground around an answer.

    Attributes:
        query, reference: (h, w, c) uint8.
        query_points, reference_points: (n, 2) of the inliers, in pixels of these.
        caption: a line of text.
        is_confirmed: whether the query lies there.
    """

    query: NDArray[np.uint8]
    reference: NDArray[np.uint8]
    query_points: NDArray[np.float64]
    reference_points: NDArray[np.float64]
    caption: str
    is_confirmed: bool


def draw_pairs(pairs: Sequence[Pair], path: Path) -> None:
    """Draw pairs below each other as a PNG, with a line from each inlier to where it lies."""
    drawn = [_drawn(pair) for pair in pairs[:MOST]]
    width = max(image.width for image in drawn) + 2 * GAP
    canvas = Image.new("RGB", (width, GAP + sum(image.height + GAP for image in drawn)), PAPER)
    top = GAP
    for image in drawn:
        canvas.paste(image, (GAP, top))
        top += image.height + GAP
    with replacing(path) as temporary:
        canvas.save(temporary, format="PNG")


def _drawn(pair: Pair) -> Image.Image:
    images, factors = [], []
    for pixels in (pair.query, pair.reference):
        factor = SIDE / pixels.shape[0]
        image = Image.fromarray(np.ascontiguousarray(rgb(pixels)))
        images.append(image.resize((round(pixels.shape[1] * factor), SIDE)))
        factors.append(factor)
    right = images[0].width + GAP
    whole = Image.new("RGB", (right + images[1].width, SIDE + LINE), PAPER)
    whole.paste(images[0], (0, 0))
    whole.paste(images[1], (right, 0))
    pen = ImageDraw.Draw(whole)
    at, to = pair.query_points * factors[0], pair.reference_points * factors[1] + [right, 0]
    shown = np.unique(np.linspace(0, max(len(at) - 1, 0), min(len(at), LINES)).astype(int))
    for k in shown.tolist() if len(at) else []:
        hue = colorsys.hsv_to_rgb(k / len(at), 0.9, 1.0)
        colour = tuple(round(255 * part) for part in hue)
        pen.line((*at[k], *to[k]), fill=colour)
        for x, y in (at[k], to[k]):
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), outline=colour)
    frame = RIGHT if pair.is_confirmed else UNKNOWN
    pen.rectangle((right, 0, whole.width - 1, SIDE - 1), outline=frame, width=EDGE)
    pen.text((0, SIDE + 2), pair.caption, INK, ImageFont.load_default(13))
    return whole


def draw_residuals(
    image: NDArray[np.uint8],
    points: NDArray[np.float64],
    residuals: NDArray[np.float64],
    caption: str,
    path: Path,
) -> None:
    """Draw the residuals of ground control points as arrows on their image, as a PNG.

    Args:
        image: (h, w, c) uint8.
        points: (n, 2) as shares of its width and height, from the upper left.
        residuals: (n, 2) metres along the image's x and y.
    """
    height, width = image.shape[:2]
    figure = Figure((WIDTH, WIDTH * height / width + 0.6), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1 - 0.6 / figure.get_figheight()))
    axes.imshow(rgb(image), extent=(0, width, height, 0))
    axes.set_axis_off()
    x, y = (points * [width, height]).T
    axes.scatter(x, y, 8, ARROW, linewidths=0)
    unit = float(f"{max(float(np.median(np.hypot(*residuals.T))), 1e-3):.1g}")
    arrows = axes.quiver(
        x, y, *residuals.T, color=ARROW, angles="xy", scale_units="width", scale=25 * unit,
        width=0.003,
    )  # fmt: skip
    font = {"size": 8}
    axes.quiverkey(arrows, 0.78, 1.03, unit, f"{unit:g} m", labelpos="E", fontproperties=font)
    figure.text(0.02, 1 - 0.35 / figure.get_figheight(), caption, fontsize=8, color=GREY)
    with replacing(path) as temporary:
        canvas.print_png(temporary)

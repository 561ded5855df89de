"""Contact sheets of thumbnails: each query beside its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

RIGHT, WRONG, UNKNOWN, QUERY = "#1a7f37", "#cf222e", "#8c959f", "#0969da"
PAPER, INK = "#ffffff", "#24292f"
EDGE, GAP, LINES = 4, 10, 34
ENTRY, LINE = 150, 18
"""Width of an entry of a legend, and height of a line of them."""

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True)
class Thumbnail:
    """A tile to show.

    Attributes:
        pixels: (h, w, c) uint8, image channels first.
        caption: lines of text below it.
        right: whether it shows the query's place; None if that is unknown.
    """

    pixels: NDArray[np.uint8]
    caption: Sequence[str]
    right: bool | None = None


def sheet(
    rows: Sequence[Sequence[Thumbnail]],
    path: Path | IO[bytes],
    side: int = 128,
    *,
    first: str = QUERY,
    legend: Sequence[tuple[str, tuple[int, int, int]]] = (),
) -> None:
    """Draw rows of thumbnails, each a query followed by its answers, as a PNG.

    Args:
        first: colour of the frames of the first column.
        legend: names and colours, listed below the rows.
    """
    cell_width, cell_height = side + 2 * EDGE + GAP, side + 2 * EDGE + GAP + LINES
    width = max(len(row) for row in rows) * cell_width + GAP
    font = ImageFont.load_default(12)
    columns = max(1, (width - GAP) // ENTRY)
    height = len(rows) * cell_height + GAP
    below = LINE * -(-len(legend) // columns)
    canvas = Image.new("RGB", (width, height + below + (GAP if legend else 0)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for k, (name, colour) in enumerate(legend):
        x, y = GAP + k % columns * ENTRY, height + k // columns * LINE
        draw.rectangle((x, y, x + 11, y + 11), fill=colour)
        draw.text((x + 18, y - 1), _fitting(name, font, ENTRY - 24), INK, font)
    for i, row in enumerate(rows):
        for j, thumbnail in enumerate(row):
            x, y = GAP + j * cell_width, GAP + i * cell_height
            frame = {None: UNKNOWN, True: RIGHT, False: WRONG}[thumbnail.right] if j else first
            draw.rectangle((x, y, x + side + 2 * EDGE - 1, y + side + 2 * EDGE - 1), fill=frame)
            canvas.paste(picture(thumbnail.pixels, side), (x + EDGE, y + EDGE))
            lines = [_fitting(line, font, side + 2 * EDGE) for line in thumbnail.caption]
            under = (x, y + side + 2 * EDGE + 2)
            draw.multiline_text(under, "\n".join(lines), INK, font)
    canvas.save(path, format="PNG")


def answers(
    found: Sequence[Mapping[str, Any]], pixels: NDArray[np.uint8], places: Sequence[str], place: str
) -> list[Thumbnail]:
    """Thumbnails of the answers to a query.

    Args:
        found: answers in order of rank, as in `query --json`.
        pixels: (n, h, w, c) uint8, of the answers.
        places: of the answers.
        place: of the query; "" if it is unknown.
    """
    thumbnails = []
    for match, image, answer_place in zip(found, pixels, places, strict=True):
        away = match["distance_m"]
        metres = "" if away is None else f"{away:.0f} m" if away < 1e4 else f"{away / 1e3:.0f} km"
        origin = ", ".join(filter(None, (match["year"] or answer_place, metres)))
        caption = (f"{match['rank']}: {match['score']:.3f}", origin)
        thumbnails.append(Thumbnail(image, caption, answer_place == place if place else None))
    return thumbnails


def _fitting(text: str, font: Font, width: int) -> str:
    """Shorten `text` at its start to fit, since file names differ at their end."""
    kept = text
    while font.getlength(kept) > width:
        kept = "…" + kept.removeprefix("…")[1:]
    return kept


def rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(h, w, 3) the first three channels, or the first in grey."""
    return pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, -1)


def picture(pixels: NDArray[np.uint8], side: int) -> Image.Image:
    """An image of the first three channels, or of the first in grey; small tiles stay pixelated."""
    image = Image.fromarray(np.ascontiguousarray(rgb(pixels)))
    small = 2 * max(image.size) < side
    kind = Image.Resampling.NEAREST if small else Image.Resampling.BILINEAR
    return image.resize((side, side), kind)

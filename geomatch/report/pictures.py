"""Pictures of matches: each query beside its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

RIGHT, WRONG, QUERY, PAPER, INK = "#1a7f37", "#cf222e", "#0969da", "#ffffff", "#24292f"
EDGE, GAP, LINES = 4, 10, 34


@dataclass(frozen=True)
class Thumbnail:
    """A tile to show.

    Attributes:
        pixels: (h, w, c) uint8, the image channels first.
        caption: lines below it.
        right: whether it is the place asked for; None for the query itself.
    """

    pixels: NDArray[np.uint8]
    caption: Sequence[str]
    right: bool | None = None


def sheet(rows: Sequence[Sequence[Thumbnail]], path: Path, side: int = 128) -> None:
    """Draw rows of thumbnails, each a query and its answers, as a PNG."""
    cell_width, cell_height = side + 2 * EDGE + GAP, side + 2 * EDGE + GAP + LINES
    width = max(len(row) for row in rows) * cell_width + GAP
    canvas = Image.new("RGB", (width, len(rows) * cell_height + GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(12)
    for i, row in enumerate(rows):
        for j, thumbnail in enumerate(row):
            x, y = GAP + j * cell_width, GAP + i * cell_height
            colour = {None: QUERY, True: RIGHT, False: WRONG}[thumbnail.right]
            draw.rectangle((x, y, x + side + 2 * EDGE - 1, y + side + 2 * EDGE - 1), fill=colour)
            canvas.paste(_picture(thumbnail.pixels, side), (x + EDGE, y + EDGE))
            text = "\n".join(thumbnail.caption)
            draw.multiline_text((x, y + side + 2 * EDGE + 2), text, INK, font)
    canvas.save(path, format="PNG")


def _picture(pixels: NDArray[np.uint8], side: int) -> Image.Image:
    """The first three channels as colour, or the first as grey."""
    channels = pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, -1)
    image = Image.fromarray(np.ascontiguousarray(channels))
    return image.resize((side, side), Image.Resampling.BILINEAR)

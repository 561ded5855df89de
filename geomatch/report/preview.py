"""A preview of tiles: places drawn at random, their years side by side, labels laid over them."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.project import Project, replacing
from geomatch.report import contact_sheet
from geomatch.report.contact_sheet import Thumbnail, rgb, sheet

SIDE = 192
"""Side of a tile in pixels."""
ACROSS = 6
"""Images of a class that are shown where tiles have no years."""
GREYS = 24
"""Greys are shown as classes if they are at most so many."""

Pixels = NDArray[np.uint8]
Legend = list[tuple[str, tuple[int, int, int]]]


def preview(project: Project, places: int, path: Path) -> None:
    """Draw places as a PNG: a row for each, with the tile of every year, bare and with its labels.

    Args:
        places: how many, drawn by a fixed seed from those that the most years show.
    """
    manifest = project.tile_manifest()
    tiles = TileTable.load(project.catalogue)
    place = tiles.places()
    counts = np.bincount(place)
    best = np.flatnonzero(counts == counts.max()) if tiles.dated else np.flatnonzero(counts)
    chosen = np.random.default_rng(0).permutation(best)[:places]
    rows = [np.flatnonzero(place == code) for code in np.sort(chosen)]
    if not tiles.dated:
        rows = [row[:ACROSS] for row in rows]
    rows = [row[np.argsort(tiles.year[row], kind="stable")] for row in rows]
    shown = np.concatenate(rows)
    pixels = TileStore.open(project.pixels).read(tiles.store_row[shown])
    channels = manifest.channels.image
    images, labels = pixels[..., :channels], pixels[..., channels:]
    painted, legend = _painted(labels, tuple(manifest.label_classes or ()))
    names, start = tiles.select(shown).ids(), 0
    drawn = []
    for row in rows:
        thumbnails = []
        for i in range(start, start + len(row)):
            thumbnails.append(Thumbnail(images[i], (names[i],)))
            if labels.size:
                over = _over(rgb(images[i]), painted[i], labels[i])
                thumbnails.append(Thumbnail(over, ("labels",)))
        drawn.append(thumbnails)
        start += len(row)
    with replacing(path) as temporary:
        sheet(drawn, temporary, SIDE, first=contact_sheet.UNKNOWN, legend=legend)


def _over(image: Pixels, painted: Pixels, labels: Pixels) -> Pixels:
    """(h, w, 3) the labels over the image, half transparent; the image where nothing is known."""
    known = (labels > 0).any(axis=-1, keepdims=True)
    mixed = (image.astype(np.uint16) + painted) // 2
    return np.where(known, mixed, image).astype(np.uint8)


def _painted(labels: Pixels, classes: tuple[str, ...]) -> tuple[Pixels, Legend]:
    """(n, h, w, 3) labels in colour, and the colour of each class or grey."""
    if labels.shape[-1] != 1:
        return labels, []
    codes, names = range(1, len(classes) + 1), classes
    if not classes:
        greys = np.unique(labels[labels > 0]).tolist()
        if len(greys) > GREYS:
            return np.repeat(labels, 3, axis=-1), []
        codes, names = greys, tuple(f"value {grey}" for grey in greys)
    palette = np.zeros((256, 3), np.uint8)
    palette[list(codes)] = _colours(len(names))
    legend = [
        (name, tuple(palette[code].tolist())) for code, name in zip(codes, names, strict=True)
    ]
    return palette[labels[..., 0]], legend


def _colours(count: int) -> Pixels:
    """(count, 3) colours around the circle, as the network's are at first."""
    hues = [colorsys.hsv_to_rgb(i / max(count, 1), 1, 1) for i in range(count)]
    return np.rint(255 * np.array(hues).reshape(count, 3)).astype(np.uint8)

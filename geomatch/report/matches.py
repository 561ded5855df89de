"""The answers to a query as a picture, with the pixels of a project's tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.project import Project, replacing
from geomatch.report.pictures import Thumbnail, answers, sheet


def match_row(
    tiles: TileTable,
    store: TileStore,
    channels: int,
    found: Sequence[Mapping[str, Any]],
    rows: Sequence[int],
    query: int | NDArray[np.uint8],
    name: str,
) -> list[Thumbnail]:
    """A query and its answers, side by side.

    Args:
        channels: of the image.
        found: in order of rank, as `query --json` gives them.
        rows: of the answers in the pixel store.
        query: its row, or the pixels (h, w, c) of an image.
        name: of the query.
    """
    shown = tiles.select(np.searchsorted(tiles.store_row, np.asarray(rows, np.int64)))
    pixels = store.read(np.asarray(rows, np.int64))[..., :channels]
    if isinstance(query, int):
        asked = tiles.select(np.searchsorted(tiles.store_row, [query]))
        place = asked.cells()[0]
        caption = f"query {place}", asked.years[asked.year[0]] or name
        own = store.read(np.array([query]))[0]
    else:
        place, caption, own = "", ("query", name), query
    return [Thumbnail(own[..., :channels], caption), *answers(found, pixels, shown.cells(), place)]


def match_sheet(
    project: Project,
    found: Sequence[Mapping[str, Any]],
    rows: Sequence[int],
    query: int | NDArray[np.uint8],
    name: str,
    path: Path,
) -> None:
    """Draw a query and its answers as a PNG; see `match_row`."""
    tiles, store = TileTable.load(project.catalogue), TileStore.open(project.pixels)
    channels = project.tile_facts()["channels"]["image"]
    row = match_row(tiles, store, channels, found, rows, query, name)
    with replacing(path) as temporary:
        sheet([row], temporary)

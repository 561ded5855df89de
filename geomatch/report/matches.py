"""The answers to queries as pictures, with the pixels of a project's tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch.data.queries import QueryTable
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


def match_folder(
    project: Project,
    tiles: TileTable,
    queries: QueryTable,
    chosen: Mapping[str, Sequence[int]],
    folder: Path,
) -> None:
    """Draw queries of an evaluation, each a PNG such as "worst-2.png"; earlier ones are removed.

    A match that is not among the first answers comes after them, with its rank.

    Args:
        chosen: indices into `queries` by what they are.
    """
    for old in folder.glob("*.png"):
        old.unlink()
    store = TileStore.open(project.pixels)
    channels = project.tile_facts()["channels"]["image"]

    def answer(tile: int, rank: int, score: float, metres: float) -> dict[str, Any]:
        year = tiles.years[tiles.year[tile]]
        away = None if np.isnan(metres) else float(metres)
        return {"rank": rank, "score": float(score), "year": year, "distance_m": away}

    for name, rows in chosen.items():
        for number, row in enumerate(rows, 1):
            shown = queries.top[row][queries.top[row] >= 0].tolist()
            found = [
                answer(tile, i + 1, queries.top_score[row, i], queries.distance_m[row, i])
                for i, tile in enumerate(shown)
            ]
            match, rank = int(queries.match[row]), int(queries.rank[row])
            if match not in shown:
                shown.append(match)
                found.append(answer(match, rank, queries.match_score[row], np.nan))
            query = int(tiles.store_row[queries.tile[row]])
            own = tiles.select(queries.tile[[row]]).ids()[0]
            stored = tiles.store_row[shown].tolist()
            drawn = match_row(tiles, store, channels, found, stored, query, own)
            with replacing(folder / f"{name}-{number}.png") as temporary:
                sheet([drawn], temporary)

"""Pictures of queries and their answers, from the pixels of a project's tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from geomatch.data.query_results import QueryTable
from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.project import Project, replacing
from geomatch.report.contact_sheet import Thumbnail, answers, sheet


@dataclass(frozen=True)
class TilePictures:
    """Tiles with their pixels.

    Attributes:
        channels: number of image channels, which come before the label channels.
    """

    tiles: TileTable
    store: TileStore
    channels: int

    @classmethod
    def of(cls, project: Project) -> Self:
        """Open all tiles of a project."""
        channels = project.tile_manifest().channels.image
        return cls(TileTable.load(project.catalogue), TileStore.open(project.pixels), channels)

    def row(
        self,
        found: Sequence[Mapping[str, Any]],
        rows: Sequence[int],
        query: int | NDArray[np.uint8],
        name: str,
    ) -> list[Thumbnail]:
        """Thumbnails of a query and its answers.

        Args:
            found: answers in order of rank, as in `query --json`.
            rows: of the answers in the pixel store.
            query: row of the query in the pixel store, or pixels (h, w, c) of an image.
            name: of the query.
        """
        shown = self._at(rows)
        pixels = self.store.read(np.asarray(rows, np.int64))[..., : self.channels]
        if isinstance(query, int):
            tile = self._at([query])
            place = tile.cells()[0]
            caption = f"query {place}", tile.years[tile.year[0]] or name
            query_pixels = self.store.read(np.array([query]))[0]
        else:
            place, caption, query_pixels = "", ("query", name), query
        first = Thumbnail(query_pixels[..., : self.channels], caption)
        return [first, *answers(found, pixels, shown.cells(), place)]

    def _at(self, rows: Sequence[int]) -> TileTable:
        """Tiles at rows of the pixel store."""
        return self.tiles.select(np.searchsorted(self.tiles.store_row, rows))


Shown = tuple[Sequence[Mapping[str, Any]], Sequence[int], int | NDArray[np.uint8], str]
"""Arguments of `TilePictures.row`."""


def match_sheet(project: Project, found: Sequence[Shown], path: Path) -> None:
    """Draw queries and their answers as a PNG, one row each; see `TilePictures.row`."""
    pictures = TilePictures.of(project)
    with replacing(path) as temporary:
        sheet([pictures.row(*each) for each in found], temporary)


def match_folder(
    pictures: TilePictures, queries: QueryTable, chosen: Mapping[str, Sequence[int]], folder: Path
) -> None:
    """Draw queries of an evaluation as PNGs such as "worst-2.png", in place of earlier ones.

    A match that is not among the first answers is drawn after them, with its rank.

    Args:
        chosen: indices into `queries` by the name of the selection, such as "worst".
    """
    for old in folder.glob("*.png"):
        old.unlink()
    tiles = pictures.tiles

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
            query_id = tiles.select(queries.tile[[row]]).ids()[0]
            stored = tiles.store_row[shown].tolist()
            drawn = pictures.row(found, stored, query, query_id)
            with replacing(folder / f"{name}-{number}.png") as temporary:
                sheet([drawn], temporary)

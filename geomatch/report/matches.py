"""The answers to queries as pictures, with the pixels of a project's tiles."""

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
    """What a project's tiles look like.

    Attributes:
        channels: of the image, which come before those of the labels.
    """

    tiles: TileTable
    store: TileStore
    channels: int

    @classmethod
    def of(cls, project: Project) -> Self:
        """Of all tiles of a project."""
        channels = project.tile_manifest().channels.image
        return cls(TileTable.load(project.catalogue), TileStore.open(project.pixels), channels)

    def row(
        self,
        found: Sequence[Mapping[str, Any]],
        rows: Sequence[int],
        query: int | NDArray[np.uint8],
        name: str,
    ) -> list[Thumbnail]:
        """A query and its answers, side by side.

        Args:
            found: in order of rank, as `query --json` gives them.
            rows: of the answers in the pixel store.
            query: its row, or the pixels (h, w, c) of an image.
            name: of the query.
        """
        shown = self._at(rows)
        pixels = self.store.read(np.asarray(rows, np.int64))[..., : self.channels]
        if isinstance(query, int):
            asked = self._at([query])
            place = asked.cells()[0]
            caption = f"query {place}", asked.years[asked.year[0]] or name
            own = self.store.read(np.array([query]))[0]
        else:
            place, caption, own = "", ("query", name), query
        asking = Thumbnail(own[..., : self.channels], caption)
        return [asking, *answers(found, pixels, shown.cells(), place)]

    def _at(self, rows: Sequence[int]) -> TileTable:
        """Tiles at rows of the pixel store."""
        return self.tiles.select(np.searchsorted(self.tiles.store_row, rows))


def match_sheet(
    project: Project,
    found: Sequence[Mapping[str, Any]],
    rows: Sequence[int],
    query: int | NDArray[np.uint8],
    name: str,
    path: Path,
) -> None:
    """Draw a query and its answers as a PNG; see `TilePictures.row`."""
    row = TilePictures.of(project).row(found, rows, query, name)
    with replacing(path) as temporary:
        sheet([row], temporary)


def match_folder(
    pictures: TilePictures, queries: QueryTable, chosen: Mapping[str, Sequence[int]], folder: Path
) -> None:
    """Draw queries of an evaluation, each a PNG such as "worst-2.png"; earlier ones are removed.

    A match that is not among the first answers comes after them, with its rank.

    Args:
        chosen: indices into `queries` by what they are.
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
            own = tiles.select(queries.tile[[row]]).ids()[0]
            stored = tiles.store_row[shown].tolist()
            drawn = pictures.row(found, stored, query, own)
            with replacing(folder / f"{name}-{number}.png") as temporary:
                sheet([drawn], temporary)

"""The one definition of a match, for training and for evaluation alike.

Same cell in another year: positive. Same cell in the same year, or an overlapping cell in any
year: neutral, neither a match nor its opposite. All the rest: negative. Without years a place is
a class: the same class is positive, the tile itself neutral.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomatch.data.tiles import TileTable

Ints = NDArray[np.int64]


def by_place(tiles: TileTable) -> Ints:
    """(places, years) index of the tile of each place in each year, -1 where there is none."""
    place = tiles.places()
    table = np.full((int(place.max(initial=-1)) + 1, len(tiles.years)), -1, np.int64)
    table[place, tiles.year] = np.arange(len(tiles))
    return table


@dataclass(frozen=True)
class Task:
    """Queries of one year against a database of another, all as indices into a TileTable.

    Attributes:
        years: codes of the queries' year and of the database's.
        queries: (q,) tiles that have a match in the database.
        database: (d,) tiles searched.
        query_place, database_place: (q,), (d,) codes of their places; without years, what is of
            the query's place and not neutral is a match.
        truth: (q,) position in `database` of each query's one match; None without years.
        neutral: positions in `database` to leave out, as parallel (query, position) arrays.
    """

    years: tuple[int, int]
    queries: Ints
    database: Ints
    query_place: Ints
    database_place: Ints
    truth: Ints | None
    neutral: tuple[Ints, Ints]


def tasks(
    tiles: TileTable,
    queries: NDArray[np.bool_],
    database: NDArray[np.bool_],
    same_year: bool = False,
) -> list[Task]:
    """Every ordered pair of years that has queries; without years, one task of all tiles.

    Args:
        queries: (n,) which tiles may ask.
        database: (n,) which tiles are searched.
        same_year: search the queries' own year too; there the place itself is neutral.
    """
    place = tiles.places()
    if not tiles.dated:
        return _of_classes(place, queries, database)
    found = []
    for a in range(len(tiles.years)):
        for b in range(len(tiles.years)):
            if a == b:
                continue
            own = (tiles.year == a) if same_year else np.zeros(len(tiles), bool)
            searched = np.flatnonzero(database & ((tiles.year == b) | own))
            asking = np.flatnonzero(queries & (tiles.year == a))
            truth = _position(place, searched, tiles.year[searched] == b)[place[asking]]
            asking, truth = asking[truth >= 0], truth[truth >= 0]
            if not len(asking):
                continue
            rows, positions = overlapping(tiles, asking, searched)
            self_found = _position(place, searched, tiles.year[searched] == a)[place[asking]]
            itself = np.flatnonzero(self_found >= 0)
            neutral = (
                np.concatenate([rows, itself]),
                np.concatenate([positions, self_found[itself]]),
            )
            places = place[asking], place[searched]
            found.append(Task((a, b), asking, searched, *places, truth, neutral))
    return found


def _of_classes(place: Ints, queries: NDArray[np.bool_], database: NDArray[np.bool_]) -> list[Task]:
    """The task of every tile that has another of its class in the database."""
    held = np.bincount(place[database], minlength=int(place.max(initial=-1)) + 1)
    asking = np.flatnonzero(queries & (held[place] > database))
    if not len(asking):
        return []
    searched = np.flatnonzero(database)
    itself = np.flatnonzero(database[asking])
    neutral = itself, np.searchsorted(searched, asking[itself])
    return [Task((0, 0), asking, searched, place[asking], place[searched], None, neutral)]


def _position(place: Ints, searched: Ints, among: NDArray[np.bool_]) -> Ints:
    """Position in `searched` of each place's tile `among` them, -1 where there is none."""
    position = np.full(int(place.max(initial=-1)) + 1, -1, np.int64)
    where = np.flatnonzero(among)
    position[place[searched[where]]] = where
    return position


def overlapping(tiles: TileTable, queries: Ints, database: Ints) -> tuple[Ints, Ints]:
    """Pairs of a query and a database position whose cells overlap without being the same.

    Returns:
        Parallel arrays: index into `queries`, position in `database`.
    """
    reach = 0 if tiles.grid is None else tiles.grid.reach
    if not reach or not len(database):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    keys = _keys(tiles, tiles.col, tiles.row)
    order = np.argsort(keys[database], kind="stable")
    ordered = keys[database][order]
    rows, positions = [], []
    for dc in range(-reach, reach + 1):
        for dr in range(-reach, reach + 1):
            if dc == dr == 0:
                continue
            wanted = _keys(tiles, tiles.col + dc, tiles.row + dr)[queries]
            # A database of one year holds a cell once; of several, up to once a year.
            low = np.searchsorted(ordered, wanted, "left")
            high = np.searchsorted(ordered, wanted, "right")
            for extra in range(int((high - low).max(initial=0))):
                hit = np.flatnonzero(low + extra < high)
                rows.append(hit)
                positions.append(order[low[hit] + extra])
    return (
        np.concatenate([np.empty(0, np.int64), *rows]),
        np.concatenate([np.empty(0, np.int64), *positions]),
    )


def are_neutral(tiles: TileTable, a: Ints, b: Ints) -> NDArray[np.bool_]:
    """(n,) whether tiles `a` and `b` (indices, broadcast) lie on common ground, or in one class."""
    if tiles.grid is None:
        same: NDArray[np.bool_] = tiles.label[a] == tiles.label[b]
        return same
    reach = tiles.grid.reach
    near: NDArray[np.bool_] = (
        (tiles.epsg[a] == tiles.epsg[b])
        & (np.abs(tiles.col[a] - tiles.col[b]) <= reach)
        & (np.abs(tiles.row[a] - tiles.row[b]) <= reach)
    )
    return near


def _keys(tiles: TileTable, col: Ints, row: Ints) -> Ints:
    """One integer a cell. Cells of the Earth at a metre a step stay far below 2**26."""
    zone = np.unique(tiles.epsg, return_inverse=True)[1].reshape(-1)
    keys: Ints = (zone.astype(np.int64) << 54) + ((col + 2**26) << 27) + (row + 2**26)
    return keys

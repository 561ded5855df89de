"""The definition of a match, shared by training and evaluation.

The same cell in another year is positive. The same cell in the same year and an overlapping cell
in any year are neutral: neither positive nor negative. All other tiles are negative. Without
years, a place is a class: the same class is positive, and the tile itself is neutral.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from geomatch.data.tiles import TileTable
from geomatch.geo.grid import cell_keys

Ints = NDArray[np.int64]


def by_place(tiles: TileTable) -> Ints:
    """Index (places, years) of the tile of each place in each year, -1 if it has none."""
    place = tiles.places()
    table = np.full((int(place.max(initial=-1)) + 1, len(tiles.years)), -1, np.int64)
    table[place, tiles.year] = np.arange(len(tiles))
    return table


@dataclass(frozen=True)
class Task:
    """Queries of one year against a database of another, as indices into a TileTable.

    Attributes:
        years: codes of the year of the queries and of the year of the database.
        queries: (q,) tiles that have a match in the database.
        database: (d,) tiles that are searched.
        query_place, database_place: (q,), (d,) codes of their places. Without years, every tile of
            the query's place that is not neutral is a match.
        truth: (q,) position in `database` of the single match of each query; None without years.
        neutral: positions in `database` to leave out of the ranking, as parallel arrays (query,
            position).
    """

    years: tuple[int, int]
    queries: Ints
    database: Ints
    query_place: Ints
    database_place: Ints
    truth: Ints | None
    neutral: tuple[Ints, Ints]

    def of(self, kept: NDArray[np.bool_]) -> Task:
        """The task with the queries of a mask (q,) alone."""
        query, position = self.neutral
        inside, number = kept[query], np.cumsum(kept) - 1
        return replace(
            self,
            queries=self.queries[kept],
            query_place=self.query_place[kept],
            truth=None if self.truth is None else self.truth[kept],
            neutral=(number[query[inside]], position[inside]),
        )


def tasks(
    tiles: TileTable,
    queries: NDArray[np.bool_],
    database: NDArray[np.bool_],
    same_year: bool = False,
) -> list[Task]:
    """One task per ordered pair of years that has queries; without years, one task in all.

    Args:
        queries: (n,) mask of the tiles that may be queries.
        database: (n,) mask of the tiles that are searched.
        same_year: also search the year of the queries, where their own place is neutral.
    """
    place = tiles.places()
    if not tiles.dated:
        return _class_tasks(place, queries, database)
    found = []
    for a in range(len(tiles.years)):
        in_a = tiles.year == a
        for b in range(len(tiles.years)):
            if a == b:
                continue
            in_b = tiles.year == b
            searched = np.flatnonzero(database & (in_b | in_a if same_year else in_b))
            rows = np.flatnonzero(queries & in_a)
            truth = _positions(place, searched, in_b[searched])[place[rows]]
            rows, truth = rows[truth >= 0], truth[truth >= 0]
            if not len(rows):
                continue
            neighbours, neighbour_at = overlapping(tiles, rows, searched)
            self_at = _positions(place, searched, in_a[searched])[place[rows]]
            itself = np.flatnonzero(self_at >= 0)
            neutral = (
                np.concatenate([neighbours, itself]),
                np.concatenate([neighbour_at, self_at[itself]]),
            )
            places = place[rows], place[searched]
            found.append(Task((a, b), rows, searched, *places, truth, neutral))
    return found


def drawn(tasks: Sequence[Task], most: int) -> list[Task]:
    """The tasks with at most `most` of all their queries, drawn with a fixed seed.

    Databases stay whole. Each query is as likely as any other, so that the mean over those drawn
    estimates the mean over all. A task of which none is drawn is left out.
    """
    counts = [len(task.queries) for task in tasks]
    total = sum(counts)
    if total <= most:
        return list(tasks)
    chosen = np.zeros(total, bool)
    chosen[np.random.default_rng(0).choice(total, most, replace=False)] = True
    parts = np.split(chosen, np.cumsum(counts)[:-1])
    return [task.of(part) for task, part in zip(tasks, parts, strict=True) if part.any()]


def _class_tasks(
    place: Ints, queries: NDArray[np.bool_], database: NDArray[np.bool_]
) -> list[Task]:
    """The task of every query with another tile of its class in the database."""
    count = np.bincount(place[database], minlength=int(place.max(initial=-1)) + 1)
    rows = np.flatnonzero(queries & (count[place] > database))
    if not len(rows):
        return []
    searched = np.flatnonzero(database)
    itself = np.flatnonzero(database[rows])
    neutral = itself, np.searchsorted(searched, rows[itself])
    return [Task((0, 0), rows, searched, place[rows], place[searched], None, neutral)]


def _positions(place: Ints, searched: Ints, mask: NDArray[np.bool_]) -> Ints:
    """Position (places,) in `searched` of each place's tile where `mask` holds, -1 if none."""
    position = np.full(int(place.max(initial=-1)) + 1, -1, np.int64)
    where = np.flatnonzero(mask)
    position[place[searched[where]]] = where
    return position


def overlapping(tiles: TileTable, queries: Ints, database: Ints) -> tuple[Ints, Ints]:
    """Pairs of a query and a database tile whose cells overlap but are not the same.

    Returns:
        Parallel arrays: positions in `queries` and in `database`.
    """
    reach = 0 if tiles.grid is None else tiles.grid.reach
    if not reach or not len(database):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    keys = cell_keys(tiles.epsg, tiles.col, tiles.row)
    order = np.argsort(keys[database], kind="stable")
    ordered = keys[database][order]
    rows, positions = [], []
    for dc in range(-reach, reach + 1):
        for dr in range(-reach, reach + 1):
            if dc == dr == 0:
                continue
            shifted = cell_keys(tiles.epsg, tiles.col + dc, tiles.row + dr)[queries]
            # A database holds each cell at most once per year.
            low = np.searchsorted(ordered, shifted, "left")
            high = np.searchsorted(ordered, shifted, "right")
            for extra in range(int((high - low).max(initial=0))):
                hit = np.flatnonzero(low + extra < high)
                rows.append(hit)
                positions.append(order[low[hit] + extra])
    return (
        np.concatenate([np.empty(0, np.int64), *rows]),
        np.concatenate([np.empty(0, np.int64), *positions]),
    )


def are_neutral(tiles: TileTable, a: Ints, b: Ints) -> NDArray[np.bool_]:
    """Whether tiles `a` and `b` (indices, broadcast) share some ground, or a class."""
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

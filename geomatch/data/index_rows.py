"""What an index says of each of its tiles, of which a query reads the few rows that it needs.

`tiles.parquet` has a row per vector, in the same order. `keys.npy` (2, n) has the hashed ids in
order, and the row of each.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from geomatch.data.filters import Box, Filter
from geomatch.data.tiles import TileTable
from geomatch.errors import StaleError

ROWS = 16_384
"""Rows per group, the least that is read."""
ROW = pa.schema(
    [
        ("id", pa.string()),
        ("year", pa.string()),
        ("split", pa.int8()),
        ("lon", pa.float64()),
        ("lat", pa.float64()),
        ("epsg", pa.int64()),
        ("x", pa.float64()),
        ("y", pa.float64()),
        ("store_row", pa.int64()),
    ]
)

Ints = NDArray[np.int64]
Float64Array = NDArray[np.float64]


Degrees = Callable[[Ints, Float64Array], Float64Array]
"""Maps EPSG codes (n,) and points (n, 2) to longitude and latitude (n, 2)."""


def columns_of(tiles: TileTable, lonlat: Degrees) -> pa.Table:
    """Id, year, split, centre and row in the pixel store of each tile, as `ROW` says.

    Values that a tile lacks are null.
    """
    columns: dict[str, Any] = {
        "id": tiles.ids(),
        "year": [tiles.years[code] or None for code in tiles.year.tolist()],
        "split": tiles.split.astype(np.int8),
        "store_row": tiles.store_row,
    }
    if tiles.grid is not None:
        centres = tiles.centres()
        degrees = lonlat(tiles.epsg, centres)
        columns |= {"lon": degrees[:, 0], "lat": degrees[:, 1], "epsg": tiles.epsg}
        columns |= {"x": centres[:, 0], "y": centres[:, 1]}
    nulls = pa.nulls(len(tiles))
    return pa.table([columns.get(name, nulls) for name in ROW.names], schema=ROW)


def in_parts(tiles: TileTable) -> Iterator[TileTable]:
    """The tiles by year, a few at a time, in the order of the rows of an index."""
    order = np.argsort(tiles.year, kind="stable")
    for start in range(0, len(order), ROWS):
        yield tiles.select(order[start : start + ROWS])


def write(folder: Path, tiles: TileTable, lonlat: Degrees) -> None:
    """Write the rows of tiles, sorted by year."""
    keys = np.empty(len(tiles), np.uint64)
    start = 0
    with pq.ParquetWriter(folder / "tiles.parquet", ROW, compression="zstd") as writer:
        for part in in_parts(tiles):
            table = columns_of(part, lonlat)
            keys[start : start + len(part)] = [_key(name) for name in table["id"].to_pylist()]
            start += len(part)
            writer.write_table(table)
    by_key = np.argsort(keys, kind="stable")
    np.save(folder / "keys.npy", np.stack([keys[by_key], by_key.astype(np.uint64)]))


def _key(name: str) -> int:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Rows(Protocol):
    """What an index says of its tiles."""

    def find(self, name: str) -> int | None:
        """The row of the tile with an id; None if there is none."""

    def take(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The values of a few rows by column, in their order."""

    def within(self, point: Callable[[int], tuple[float, float]], reach: float) -> list[int]:
        """Rows of tiles whose centre is at most `reach` metres from a point along both axes.

        Args:
            point: maps the EPSG code of a tile to the point (x, y) in that CRS.
        """

    def passing(self, wanted: Filter) -> list[int]:
        """Rows of tiles that pass a filter, in order."""

    def extent(self) -> Box:
        """West, south, east and north of the centres of all tiles, which have a place."""


class IndexRows:
    """The rows of an index on disk, read when they are asked for.

    Args:
        counts: number of tiles of each year, which follow one another.

    Raises:
        StaleError: a file is damaged or missing.
    """

    def __init__(self, folder: Path, counts: Sequence[int]) -> None:
        try:
            self._file = pq.ParquetFile(folder / "tiles.parquet", memory_map=True)
            self._keys = np.load(folder / "keys.npy", mmap_mode="r")
        except (OSError, EOFError, ValueError, pa.ArrowException) as error:
            raise StaleError(f"{folder} cannot be read: {error}", "Run: geomatch index") from error
        self._groups = [
            self._file.metadata.row_group(group) for group in range(self._file.num_row_groups)
        ]
        self._starts = [0, *accumulate(group.num_rows for group in self._groups)]
        self._years = [0, *accumulate(counts)]
        if self._starts[-1] != self._years[-1]:
            raise StaleError(f"{folder} is incomplete", "Run: geomatch index")

    def find(self, name: str) -> int | None:
        """See `Rows.find`."""
        key = np.uint64(_key(name))
        low, high = (np.searchsorted(self._keys[0], key, side) for side in ("left", "right"))
        for row in self._keys[1, low:high].tolist():
            if self.take([row])[0]["id"] == name:
                return int(row)
        return None

    def take(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """See `Rows.take`."""
        group_of = [bisect_right(self._starts, row) - 1 for row in rows]
        read = {group: self._file.read_row_group(group) for group in set(group_of)}
        # Slices, since to look at an array that it is given, pyarrow imports pandas.
        return [
            read[group].slice(row - self._starts[group], 1).to_pylist()[0]
            for group, row in zip(group_of, rows, strict=True)
        ]

    def within(self, point: Callable[[int], tuple[float, float]], reach: float) -> list[int]:
        """See `Rows.within`."""
        found: list[int] = []
        for group, start in enumerate(self._starts[:-1]):
            least, most = self._bounds(group, "epsg")
            if (
                least is not None
                and least == most
                and not self._reaches(group, point(least), reach)
            ):
                continue
            columns = self._read(group, ["epsg", "x", "y"])
            for code in np.unique(columns["epsg"]).tolist():
                px, py = point(code)
                away = np.maximum(np.abs(columns["x"] - px), np.abs(columns["y"] - py))
                found += (
                    start + np.flatnonzero((columns["epsg"] == code) & (away <= reach))
                ).tolist()
        return found

    def passing(self, wanted: Filter) -> list[int]:
        """See `Rows.passing`."""
        found: list[int] = np.flatnonzero(self.select(wanted)).tolist()
        return found

    def extent(self) -> Box:
        """See `Rows.extent`."""
        bounds = [
            [self._bounds(group, name) for group in range(len(self._groups))]
            for name in ("lon", "lat")
        ]
        west, south = (min(least for least, _ in column) for column in bounds)
        east, north = (max(most for _, most in column) for column in bounds)
        return west, south, east, north

    def select(self, wanted: Filter) -> NDArray[np.bool_]:
        """Which rows (n,) pass a filter. Only groups that it divides are read."""
        chosen = np.zeros(self._starts[-1], np.bool_)
        years = range(len(self._years) - 1) if wanted.years is None else wanted.years
        for year in years:
            chosen[self._years[year] : self._years[year + 1]] = True
        for group in range(len(self._groups)) if wanted.columns else ():
            part = chosen[self._starts[group] : self._starts[group + 1]]
            if not part.any():
                continue
            bounds = {name: self._bounds(group, name) for name in wanted.columns}
            if not wanted.may_pass(bounds):
                part[:] = False
            elif not wanted.is_far(bounds):
                part &= wanted.passing(self._read(group, wanted.columns))
        chosen[list(wanted.without)] = False
        return chosen

    def _read(self, group: int, names: list[str]) -> Mapping[str, NDArray[Any]]:
        table = self._file.read_row_group(group, columns=names)
        # Not `to_numpy`, which imports pandas.
        return {name: np.from_dlpack(table[name].combine_chunks()) for name in names}

    def _reaches(self, group: int, point: tuple[float, float], reach: float) -> bool:
        """Whether a group may have centres so near to a point."""
        bounds = (self._bounds(group, name) for name in ("x", "y"))
        return all(
            least is None or (least - reach <= at <= most + reach)
            for (least, most), at in zip(bounds, point, strict=True)
        )

    def _bounds(self, group: int, column: str) -> tuple[Any, Any]:
        """The least and the largest value of a column in a group; None where unknown."""
        statistics = self._groups[group].column(ROW.get_field_index(column)).statistics
        known = statistics is not None and statistics.has_min_max
        return (statistics.min, statistics.max) if known else (None, None)

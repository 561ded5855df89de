"""What an index says of each of its tiles, of which a query reads the few rows that it needs.

`tiles.parquet` has a row per vector, in the same order. `keys.npy` (2, n) has the hashed ids in
order, and the row of each; an index of an earlier version is without, and its ids are scanned.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from geomatch.data.tiles import TileTable
from geomatch.errors import StaleError

ROWS = 16_384
"""Rows per group, the least that is read."""
ROW = pa.schema(
    [
        ("id", pa.string()),
        ("year", pa.string()),
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


def write(
    folder: Path, tiles: TileTable, lonlat: Callable[[Ints, Float64Array], Float64Array]
) -> None:
    """Write id, year, centre and row in the pixel store of each tile, sorted by year.

    Values that a tile lacks are null.

    Args:
        lonlat: maps EPSG codes (n,) and centres (n, 2) to longitude and latitude (n, 2).
    """
    order = np.argsort(tiles.year, kind="stable")
    keys = np.empty(len(tiles), np.uint64)
    with pq.ParquetWriter(folder / "tiles.parquet", ROW, compression="zstd") as writer:
        for start in range(0, len(order), ROWS):
            part = tiles.select(order[start : start + ROWS])
            ids = part.ids()
            keys[start : start + len(part)] = [_key(name) for name in ids]
            columns = {
                "id": ids,
                "year": [part.years[code] or None for code in part.year.tolist()],
                "store_row": part.store_row,
            }
            if part.grid is not None:
                centres = part.centres()
                degrees = lonlat(part.epsg, centres)
                columns |= {"lon": degrees[:, 0], "lat": degrees[:, 1], "epsg": part.epsg}
                columns |= {"x": centres[:, 0], "y": centres[:, 1]}
            nulls = pa.nulls(len(part))
            writer.write_table(
                pa.table([columns.get(name, nulls) for name in ROW.names], schema=ROW)
            )
    by_key = np.argsort(keys, kind="stable")
    np.save(folder / "keys.npy", np.stack([keys[by_key], by_key.astype(np.uint64)]))


def _key(name: str) -> int:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class IndexRows:
    """The rows of an index, read when they are asked for.

    Raises:
        StaleError: the file is damaged or missing.
    """

    def __init__(self, folder: Path) -> None:
        path, keys = folder / "tiles.parquet", folder / "keys.npy"
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
            self._keys = np.load(keys, mmap_mode="r") if keys.exists() else None
        except (OSError, EOFError, ValueError, pa.ArrowException) as error:
            raise StaleError(f"{folder} cannot be read: {error}", "Run: geomatch index") from error
        self._groups = [
            self._file.metadata.row_group(group) for group in range(self._file.num_row_groups)
        ]
        self._starts = [0, *accumulate(group.num_rows for group in self._groups)]

    def find(self, name: str) -> int | None:
        """The row of the tile with an id; None if there is none."""
        for row in self._candidates(name):
            if self.take([row])[0]["id"] == name:
                return row
        return None

    def _candidates(self, name: str) -> list[int]:
        """Rows of tiles that may have an id, in order."""
        if self._keys is None:
            found = []
            for group, start in enumerate(self._starts[:-1]):
                ids = self._file.read_row_group(group, columns=["id"])["id"].to_pylist()
                found += [start + i for i, each in enumerate(ids) if each == name]
            return found
        key = np.uint64(_key(name))
        low, high = (np.searchsorted(self._keys[0], key, side) for side in ("left", "right"))
        return [int(row) for row in self._keys[1, low:high]]

    def take(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The values of a few rows by column, in their order."""
        group_of = [bisect_right(self._starts, row) - 1 for row in rows]
        read = {group: self._file.read_row_group(group) for group in set(group_of)}
        # Slices, since to look at an array that it is given, pyarrow imports pandas.
        return [
            read[group].slice(row - self._starts[group], 1).to_pylist()[0]
            for group, row in zip(group_of, rows, strict=True)
        ]

    def within(self, point: Callable[[int], tuple[float, float]], reach: float) -> list[int]:
        """Rows of tiles whose centre is at most `reach` metres from a point along both axes.

        Args:
            point: maps the EPSG code of a tile to the point (x, y) in that CRS.
        """
        found: list[int] = []
        for group, start in enumerate(self._starts[:-1]):
            least, most = self._bounds(group, "epsg")
            if (
                least is not None
                and least == most
                and not self._reaches(group, point(least), reach)
            ):
                continue
            part = self._file.read_row_group(group, columns=["epsg", "x", "y"])
            # Not `to_numpy`, which imports pandas.
            columns: list[NDArray[Any]] = [
                np.from_dlpack(column.combine_chunks()) for column in part.columns
            ]
            epsg, x, y = columns
            for code in np.unique(epsg).tolist():
                px, py = point(code)
                near = np.maximum(np.abs(x - px), np.abs(y - py)) <= reach
                found += (start + np.flatnonzero((epsg == code) & near)).tolist()
        return found

    def inside(self, west: float, south: float, east: float, north: float) -> list[int]:
        """Rows of tiles whose centre is in a box of degrees; past 180, west is more than east."""
        width = east - west if east >= west else east - west + 360
        found: list[int] = []
        for group, start in enumerate(self._starts[:-1]):
            least, most = self._bounds(group, "lat")
            if least is not None and (most < south or least > north):
                continue
            part = self._file.read_row_group(group, columns=["lon", "lat"])
            columns: list[NDArray[Any]] = [
                np.from_dlpack(column.combine_chunks()) for column in part.columns
            ]
            lon, lat = columns
            past_west = (lon - west) % 360 <= width
            inside = past_west & (lat >= south) & (lat <= north)
            found += (start + np.flatnonzero(inside)).tolist()
        return found

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

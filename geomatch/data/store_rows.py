"""What each row of the pixel store was cut from, so that a later `tile` can keep it.

The catalogue has the tiles that are used; here are all that were planned.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from geomatch.errors import StaleError
from geomatch.geo.grid import ROW_BITS, Grid, Ints, cell_keys

FOOTER = "geomatch"
COLUMNS = {
    "epsg": np.int32,
    "col": np.int32,
    "row": np.int32,
    "year": np.int16,
    "split": np.int8,
    "key": np.uint64,
    "valid": np.float32,
    "source": np.int32,
    "sheets": np.int16,
    "changed": np.float32,
}


@dataclass(frozen=True)
class StoreRows:
    """The rows of a pixel store, as parallel arrays of length n in their order.

    Attributes:
        grid: the ground grid.
        years: labels; `year` holds their codes.
        sources: file names; `source` holds their codes.
        epsg, col, row: the cell.
        split: code into `data.tiles.SPLITS`.
        key: of the files that a tile was cut from, and of how; the same key, the same pixels.
        valid: share of valid pixels.
        sheets: number of files that are seen in it.
        changed: share of changed ground, NaN where it is unknown.
        shards: JSON values that concern whole shards of the store, in their order.
        rule: fingerprint of the rule by which splits were drawn.
        block: side in metres of the blocks of ground that were drawn, where they were.
        first: path of the raster that decided what the settings of the grid leave open.
    """

    grid: Grid
    years: tuple[str, ...]
    sources: tuple[str, ...]
    epsg: Ints
    col: Ints
    row: Ints
    year: Ints
    split: Ints
    key: NDArray[np.uint64]
    valid: NDArray[np.float32]
    source: Ints
    sheets: Ints
    changed: NDArray[np.float32]
    shards: tuple[dict[str, Any], ...]
    rule: str
    block: float
    first: str

    def __len__(self) -> int:
        return len(self.col)

    def save(self, path: Path) -> None:
        """Write Parquet."""
        names = ("years", "sources", "shards", "rule", "block", "first")
        values = {"grid": asdict(self.grid), **{name: getattr(self, name) for name in names}}
        columns = {name: getattr(self, name).astype(kind) for name, kind in COLUMNS.items()}
        table = pa.table(columns).replace_schema_metadata({FOOTER: json.dumps(values)})
        pq.write_table(table, path, compression="zstd")

    @classmethod
    def load(cls, path: Path) -> StoreRows:
        """Read what `save` wrote.

        Raises:
            StaleError: the file is missing or damaged.
        """
        try:
            table = pq.read_table(path)
            values = json.loads(table.schema.metadata[FOOTER.encode()])
            columns: dict[str, Any] = {name: table[name].to_numpy() for name in COLUMNS}
            values |= {"grid": Grid(**values["grid"])}
            values |= {name: tuple(values[name]) for name in ("years", "sources", "shards")}
            return cls(**columns, **values)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise StaleError(f"{path} cannot be read: {error}", "Run: geomatch tile") from error

    def find(self, year: str, epsg: Ints, col: Ints, row: Ints) -> Ints:
        """The row (n,) of each cell of a year, or -1."""
        if year not in self.years:
            return np.full(len(col), -1, np.int64)
        keys, rows = self._by_year[self.years.index(year)]
        return _look_up(keys, rows, self._cells(epsg, col, row))

    def splits_of(self, epsg: Ints, col: Ints, row: Ints) -> Ints:
        """The split (n,) of each place, or -1."""
        keys, first = np.unique(self._cells(self.epsg, self.col, self.row), return_index=True)
        return _look_up(keys, self.split[first].astype(np.int64), self._cells(epsg, col, row))

    @cached_property
    def _zones(self) -> Ints:
        return np.unique(self.epsg).astype(np.int64)

    def _cells(self, epsg: Ints, col: Ints, row: Ints) -> Ints:
        """One integer per cell, -1 in zones that the store has not."""
        zone = np.searchsorted(self._zones, epsg)
        known = self._zones[np.minimum(zone, len(self._zones) - 1)] == epsg
        keys = cell_keys(np.zeros(len(col), np.int64), col.astype(np.int64), row.astype(np.int64))
        return np.where(known, keys + (zone.astype(np.int64) << 2 * ROW_BITS), -1)

    @cached_property
    def _by_year(self) -> Sequence[tuple[Ints, Ints]]:
        """Sorted cells of each year, and the rows that they are in."""
        found = []
        for code in range(len(self.years)):
            rows = np.flatnonzero(self.year == code)
            keys = self._cells(self.epsg[rows], self.col[rows], self.row[rows])
            order = np.argsort(keys)
            found.append((keys[order], rows[order]))
        return found


def _look_up(keys: Ints, values: Ints, wanted: Ints) -> Ints:
    """The value of each key among sorted ones, or -1."""
    if not len(keys):
        return np.full(len(wanted), -1, np.int64)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], -1)

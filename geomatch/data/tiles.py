"""The catalogue of tiles: parallel arrays, saved as GeoParquet."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from geomatch.data import geoparquet
from geomatch.errors import GeomatchError, UsageError
from geomatch.geo.grid import Float64Array, Grid, cell_keys

SPLITS = ("train", "validation", "test")

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("cell", pa.string()),
        ("col", pa.int64()),
        ("row", pa.int64()),
        ("year", pa.string()),
        ("datetime", pa.timestamp("ms", tz="UTC")),
        ("source", pa.string()),
        ("geometry", pa.binary()),
        ("bbox", geoparquet.BBOX),
        ("valid", pa.float32()),
        ("changed", pa.float32()),
        ("split", pa.string()),
        ("class", pa.string()),
        ("store_row", pa.int64()),
    ]
)
ROW_GROUP = 65_536

Footprint = Callable[[NDArray[np.int64], Float64Array], Float64Array]
"""Maps EPSG codes (n,) and bounds (n, 4) to closed rings (n, 5, 2) in the CRS of the file."""


@dataclass(frozen=True)
class TileTable:
    """Tiles as parallel arrays of length n, in the order of the pixel store.

    Attributes:
        grid: the ground grid; None for images without georeference, whose place is their class.
        years: labels in time order, `("",)` without years; `year` holds their codes.
        sources: file names; `source` holds their codes.
        classes: names; `label` holds their codes, -1 on the ground.
        epsg: EPSG code of the CRS of each tile's cell; 0 without georeference.
        col, row: the cell; 0 without georeference.
        split: code into `SPLITS`.
        valid: share of valid pixels.
        store_row: position in the pixel store.
        changed: share of changed ground, NaN where no mask covers it; None without masks.
    """

    grid: Grid | None
    years: tuple[str, ...]
    sources: tuple[str, ...]
    classes: tuple[str, ...]
    label: NDArray[np.int64]
    epsg: NDArray[np.int64]
    col: NDArray[np.int64]
    row: NDArray[np.int64]
    year: NDArray[np.int64]
    split: NDArray[np.int64]
    source: NDArray[np.int64]
    valid: NDArray[np.float32]
    store_row: NDArray[np.int64]
    changed: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.col)

    def select(self, rows: NDArray[Any] | slice) -> TileTable:
        """The tiles at `rows` (indices, a mask or a slice)."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {
            name: value[rows] for name, value in values.items() if isinstance(value, np.ndarray)
        }
        return replace(self, **chosen)

    def check_years(self, years: Sequence[str]) -> None:
        """Check that there are tiles of some years.

        Raises:
            UsageError: there are none of one.
        """
        if unknown := [year for year in years if year not in self.years]:
            raise UsageError(
                f"there are no tiles of {', '.join(unknown)}",
                f"Available: {', '.join(self.years)}.",
            )

    @property
    def dated(self) -> bool:
        """Whether tiles have years."""
        return self.years != ("",)

    def cells(self) -> list[str]:
        """The place of each tile: "COL_ROW", or "EPSG_COL_ROW" in a "utm" grid.

        Without georeference, the place is the class.
        """
        if self.grid is None:
            return [self.classes[code] for code in self.label.tolist()]
        pairs = zip(self.col.tolist(), self.row.tolist(), strict=True)
        if self.grid.crs != "utm":
            return [f"{col}_{row}" for col, row in pairs]
        return [f"{e}_{c}_{r}" for e, (c, r) in zip(self.epsg.tolist(), pairs, strict=True)]

    def ids(self) -> list[str]:
        """The id of each tile: "CELL@YEAR"; without years, the image's path within its set."""
        if not self.dated:
            return [self.sources[code] for code in self.source.tolist()]
        years = [self.years[code] for code in self.year.tolist()]
        return [f"{cell}@{year}" for cell, year in zip(self.cells(), years, strict=True)]

    def places(self) -> NDArray[np.int64]:
        """Code (n,) of the place of each tile, the same for all tiles of a cell or class."""
        return self.label if self.grid is None else self._cell_codes

    @cached_property
    def _cell_codes(self) -> NDArray[np.int64]:
        keys = cell_keys(self.epsg, self.col, self.row)
        return np.unique(keys, return_inverse=True)[1].reshape(-1).astype(np.int64)

    def bounds(self) -> Float64Array:
        """Bounds (n, 4) in metres in the CRS of each tile; NaN without georeference."""
        if self.grid is None:
            return np.full((len(self), 4), np.nan)
        return self.grid.bounds(self.col, self.row)

    def centres(self) -> Float64Array:
        """Centres (n, 2) in metres in the CRS of each tile; NaN without georeference."""
        if self.grid is None:
            return np.full((len(self), 2), np.nan)
        return self.grid.centres(self.col, self.row)

    def arrow(self, footprint: Footprint | None, rows: slice = slice(None)) -> pa.Table:
        """The catalogue's columns for `rows`; null where tiles lack a value."""
        part = self.select(rows)
        n = len(part)
        years = np.asarray([year or None for year in part.years], object)[part.year]
        dates = {year or None: date_of(year) for year in part.years}
        nowhere = part.grid is None
        rings = None if footprint is None else footprint(part.epsg, part.bounds())
        columns = {
            "id": part.ids(),
            "cell": part.cells(),
            "col": pa.nulls(n, pa.int64()) if nowhere else part.col,
            "row": pa.nulls(n, pa.int64()) if nowhere else part.row,
            "year": years,
            "datetime": pa.array(
                np.asarray([dates[year] for year in years], "datetime64[ms]"),
                pa.timestamp("ms", tz="UTC"),
            ),
            "source": np.asarray(part.sources, object)[part.source],
            **geoparquet.geometry_columns(rings, n),
            "valid": part.valid,
            "changed": pa.nulls(n, pa.float32())
            if part.changed is None
            else pa.array(part.changed, from_pandas=True),
            "split": np.asarray(SPLITS, object)[part.split],
            "class": pa.array(part.cells()) if nowhere else pa.nulls(n, pa.string()),
            "store_row": part.store_row,
        }
        return pa.table({name: columns[name] for name in SCHEMA.names}).cast(SCHEMA)

    def save(self, path: Path, footprint: Footprint | None, crs: dict[str, Any] | None) -> None:
        """Write GeoParquet.

        Args:
            footprint: None without georeference.
            crs: PROJJSON of the CRS of the footprints; None for CRS84.
        """
        starts = range(0, len(self), ROW_GROUP)
        grid = None if self.grid is None else asdict(self.grid)
        geoparquet.write(
            path,
            SCHEMA,
            (self.arrow(footprint, slice(start, start + ROW_GROUP)) for start in starts),
            crs,
            {"geomatch": {"grid": grid, "years": self.years, "classes": self.classes}},
        )

    @classmethod
    def load(cls, path: Path) -> TileTable:
        """Read what `save` wrote.

        Raises:
            StaleError: the file is damaged.
        """
        footer = geoparquet.read_footer(path, "geomatch", "geomatch tile")
        grid = None if footer["grid"] is None else Grid(**footer["grid"])
        years, classes = tuple(footer["years"]), tuple(footer["classes"])
        names = ["col", "row", "year", "source", "valid", "split", "store_row", "changed"]
        if grid is None:
            names.append("class")
        elif grid.crs == "utm":
            names.append("cell")
        # Strings that repeat are read as their codes: most of the memory otherwise.
        texts = ["year", "source", "split", "class"]
        table = pq.read_table(path, columns=names, read_dictionary=texts)
        n, (sources, source) = len(table), _codes(table["source"])
        nothing = np.zeros(n, np.int64)
        if grid is None:
            epsg = nothing
        elif grid.crs == "utm":
            codes, code = _codes(pa.compute.replace_substring_regex(table["cell"], "_.*", ""))
            epsg = np.asarray([int(c) for c in codes], np.int64)[code]
        else:
            epsg = np.full(n, int(grid.crs.removeprefix("EPSG:")), np.int64)
        return cls(
            grid=grid,
            years=years,
            sources=sources,
            classes=classes,
            label=nothing - 1 if grid else _codes(table["class"], classes)[1],
            epsg=epsg,
            col=table["col"].to_numpy() if grid else nothing,
            row=table["row"].to_numpy() if grid else nothing,
            year=nothing if years == ("",) else _codes(table["year"], years)[1],
            split=_codes(table["split"], SPLITS)[1],
            source=source,
            valid=table["valid"].to_numpy(),
            store_row=table["store_row"].to_numpy(),
            changed=_changed(table),
        )


def find_ids(catalogue: Path, text: str, year: str | None, most: int) -> list[str]:
    """Ids of the first tiles that have a text in them, whatever its case.

    Args:
        catalogue: what `TileTable.save` wrote; it is read in parts.
        year: of the tiles; any by default.
    """
    found: list[str] = []
    for part in pq.ParquetFile(catalogue).iter_batches(ROW_GROUP, columns=["id", "year"]):
        fits = pa.compute.match_substring(part["id"], text, ignore_case=True)
        if year is not None:
            fits = pa.compute.and_(fits, pa.compute.equal(part["year"], year))
        found += part.filter(fits)["id"].to_pylist()[: most - len(found)]
        if len(found) == most:
            break
    return found


def _changed(table: pa.Table) -> NDArray[np.float32] | None:
    """The column `changed`, None if all of it is null."""
    if table["changed"].null_count == len(table):
        return None
    shares: NDArray[np.float32] = table["changed"].to_numpy()
    return shares


def _codes(
    column: pa.ChunkedArray, order: Sequence[str] | None = None
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The distinct values of a string column, and its codes into them.

    Args:
        order: all values in the order of their codes; by default the order of appearance.

    Raises:
        GeomatchError: the column has other values than `order`.
    """
    encoded = column.unify_dictionaries().combine_chunks()
    if not isinstance(encoded, pa.DictionaryArray):
        encoded = encoded.dictionary_encode()
    values = tuple(encoded.dictionary.to_pylist())
    codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    if order is None:
        return values, codes
    if unknown := set(values) - set(order):
        raise GeomatchError(
            f"the catalogue has unknown values: {', '.join(unknown)}", "Run: geomatch tile"
        )
    place = {value: i for i, value in enumerate(order)}
    position = np.asarray([place[v] for v in values], np.int64)
    return tuple(order), position[codes] if len(codes) else codes


def date_of(label: str) -> np.datetime64 | None:
    """The first day of the year, month or day in a label ("2015", "2015-06-03"), or None."""
    match = re.fullmatch(r"(\d{4})(?:-?(\d{2})(?:-?(\d{2}))?)?", label)
    if match is None:
        return None
    year, month, day = (part or "01" for part in match.groups())
    try:
        return np.datetime64(f"{year}-{month}-{day}", "ms")
    except ValueError:
        return None


def in_time_order(labels: Sequence[str]) -> tuple[str, ...]:
    """Labels sorted by date if all of them are dates, otherwise in the order given."""
    dates = [date_of(label) for label in labels]
    if any(date is None for date in dates):
        return tuple(labels)
    return tuple(label for _, label in sorted(zip(dates, labels, strict=True)))

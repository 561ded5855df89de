"""Results of the queries of an evaluation: parallel arrays, saved as Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import StaleError

Ints = NDArray[np.int64]
Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]

ROW_GROUP = 65_536

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("place", pa.string()),
        ("split", pa.string()),
        ("year", pa.string()),
        ("database_year", pa.string()),
        ("rank", pa.int64()),
        ("match", pa.string()),
        ("match_score", pa.float32()),
        ("first", pa.string()),
        ("first_score", pa.float32()),
        ("distance_m", pa.float64()),
        ("top", pa.list_(pa.string())),
        ("top_scores", pa.list_(pa.float32())),
        ("top_distances_m", pa.list_(pa.float64())),
        ("lon", pa.float64()),
        ("lat", pa.float64()),
        ("row", pa.int64()),
        ("match_row", pa.int64()),
        ("top_rows", pa.list_(pa.int64())),
    ]
)
"""`place` is the cell or the class, `distance_m` that of the first answer; undefined values are
null. `row`, `match_row` and `top_rows` are rows of the catalogue."""

LISTS = ("rows", "scores", "distances_m")
"""Columns with one value per answer, as `top_rows`."""


@dataclass(frozen=True)
class QueryTable:
    """Queries as parallel arrays of length n; tiles are given as rows of the catalogue.

    A query has the split, year and place of its tile; the year searched is that of its match.

    Attributes:
        tile: (n,) the query's tile.
        match: (n,) the tile of its place in the year searched; the best one of several.
        match_score: (n,) cosine similarity, or negative distance: higher is better.
        rank: (n,) rank of the match.
        top: (n, k) the first answers in order of rank, padded with -1. The match comes after
            answers that tie with it.
        top_score: (n, k) their scores, padded with NaN.
        distance_m: (n, k) metres between the centres of the query and of these answers; NaN without
            a real place.
        lon, lat: (n,) degrees; NaN without georeference.
    """

    tile: Ints
    match: Ints
    match_score: Float32Array
    rank: Ints
    top: Ints
    top_score: Float32Array
    distance_m: Float64Array
    lon: Float64Array
    lat: Float64Array

    def __len__(self) -> int:
        return len(self.tile)

    def select(self, rows: NDArray[np.int64] | NDArray[np.bool_] | slice) -> QueryTable:
        """The queries at `rows` (indices, a mask or a slice)."""
        return QueryTable(*(getattr(self, f.name)[rows] for f in fields(self)))

    @classmethod
    def join(cls, parts: Sequence[QueryTable]) -> QueryTable:
        """Concatenate tables; of none, an empty one."""
        none, nothing = np.empty(0, np.int64), np.empty(0)
        scores = np.empty(0, np.float32)
        empty = cls(
            tile=none,
            match=none,
            match_score=scores,
            rank=none,
            top=none.reshape(0, 1),
            top_score=scores.reshape(0, 1),
            distance_m=nothing.reshape(0, 1),
            lon=nothing,
            lat=nothing,
        )
        tables = [part for part in parts if len(part)] or [empty]
        return cls(*(np.concatenate([getattr(t, f.name) for t in tables]) for f in fields(cls)))

    def save(self, path: Path, tiles: TileTable) -> None:
        """Write Parquet in blocks of `ROW_GROUP` rows."""
        metadata = {"top": str(self.top.shape[1])}
        with pq.ParquetWriter(path, SCHEMA.with_metadata(metadata), compression="zstd") as writer:
            for start in range(0, len(self), ROW_GROUP):
                part = self.select(slice(start, start + ROW_GROUP))
                writer.write_table(part.arrow(tiles).replace_schema_metadata(metadata))

    def arrow(self, tiles: TileTable) -> pa.Table:
        """The columns of the file."""
        query_tiles, matches = tiles.select(self.tile), tiles.select(self.match)
        found = self.top >= 0
        answers = tiles.select(self.top[found])
        first = np.full(len(self), None, object)
        first[found[:, 0]] = tiles.select(self.top[found[:, 0], 0]).ids()
        offsets = pa.array(np.concatenate([[0], found.sum(axis=1).cumsum()]), pa.int32())
        years = np.asarray([year or None for year in tiles.years], object)
        columns = {
            "id": query_tiles.ids(),
            "place": query_tiles.cells(),
            "split": np.asarray(SPLITS, object)[query_tiles.split],
            "year": years[query_tiles.year],
            "database_year": years[matches.year],
            "rank": self.rank,
            "match": matches.ids(),
            "match_score": _or_null(self.match_score),
            "first": first,
            "first_score": _or_null(self.top_score[:, 0]),
            "distance_m": _or_null(self.distance_m[:, 0]),
            "top": pa.ListArray.from_arrays(offsets, pa.array(answers.ids(), pa.string())),
            "top_scores": pa.ListArray.from_arrays(offsets, pa.array(self.top_score[found])),
            "top_distances_m": pa.ListArray.from_arrays(offsets, _or_null(self.distance_m[found])),
            "lon": _or_null(self.lon),
            "lat": _or_null(self.lat),
            "row": self.tile,
            "match_row": self.match,
            "top_rows": pa.ListArray.from_arrays(offsets, pa.array(self.top[found])),
        }
        return pa.table(columns).cast(SCHEMA)

    @classmethod
    def load(cls, path: Path) -> QueryTable:
        """Read what `save` wrote.

        Raises:
            StaleError: the file is damaged or missing.
        """
        names = ["row", "match_row", "match_score", "rank", "lon", "lat"]
        try:
            table = pq.read_table(path, columns=[*names, *(f"top_{name}" for name in LISTS)])
        except (OSError, pa.ArrowException) as error:
            raise StaleError(f"{path} cannot be read: {error}", "Run: geomatch eval") from error
        k = int(table.schema.metadata[b"top"])
        lists = [table[f"top_{name}"].combine_chunks() for name in LISTS]
        found = np.arange(k) < lists[0].value_lengths().to_numpy()[:, None]
        shape = len(table), k
        top, top_score = np.full(shape, -1), np.full(shape, np.nan, np.float32)
        distance_m = np.full(shape, np.nan)
        for values, column in zip((top, top_score, distance_m), lists, strict=True):
            values[found] = column.flatten().to_numpy(zero_copy_only=False)
        return cls(
            tile=table["row"].to_numpy(),
            match=table["match_row"].to_numpy(),
            match_score=table["match_score"].to_numpy(),
            rank=table["rank"].to_numpy(),
            top=top,
            top_score=top_score,
            distance_m=distance_m,
            lon=table["lon"].to_numpy(),
            lat=table["lat"].to_numpy(),
        )


def _or_null(values: NDArray[np.floating]) -> pa.Array:
    """Values with null in place of NaN."""
    return pa.array(values, from_pandas=True)

"""Hard pairs: queries that the current descriptors answer wrongly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class HardPairs:
    """Hard queries as parallel arrays of tile indices.

    Attributes:
        query: (n,) tile that is asked for.
        match: (n,) its tile in the other year.
        negatives: (n, k) wrong answers, nearest first, then -1.
        asked: how many queries were looked at.
    """

    query: Ints
    match: Ints
    negatives: Ints
    asked: int

    @property
    def share(self) -> float | None:
        """Share of the queries looked at that are hard."""
        return len(self.query) / self.asked if self.asked else None

    def save(self, path: Path) -> None:
        """Write Parquet, a row a hard query."""
        table = pa.table(
            {"query": self.query, "match": self.match, "negatives": self.negatives.tolist()},
            schema=pa.schema(
                [
                    ("query", pa.int64()),
                    ("match", pa.int64()),
                    ("negatives", pa.list_(pa.int64())),
                ],
                metadata={"asked": str(self.asked), "k": str(self.negatives.shape[1])},
            ),
        )
        pq.write_table(table, path, compression="zstd")

    @classmethod
    def load(cls, path: Path) -> HardPairs:
        """Read what `save` wrote."""
        table = pq.read_table(path)
        metadata = table.schema.metadata
        negatives = np.asarray(table["negatives"].to_pylist(), np.int64)
        return cls(
            table["query"].to_numpy(),
            table["match"].to_numpy(),
            negatives.reshape(len(table), int(metadata[b"k"])),
            int(metadata[b"asked"]),
        )


def hard_queries(
    queries: Ints,
    database: Ints,
    truth: Ints,
    neighbours: Ints,
    neutral: tuple[Ints, Ints],
    truth_within: int,
) -> HardPairs:
    """S1's rule: hard is a query whose match is not among its first `truth_within` neighbours.

    Its hard negatives are its neighbours less the match and less neutral tiles.

    Args:
        queries: (q,) tiles.
        database: (d,) tiles.
        truth: (q,) position of each match in `database`.
        neighbours: (q, k) positions in `database`, nearest first.
        neutral: parallel (query, position) arrays that are neither match nor negative.
    """
    size = max(len(database), 1)
    left_out = np.isin(
        np.arange(len(queries))[:, None] * size + neighbours, neutral[0] * size + neutral[1]
    )
    is_match = neighbours == truth[:, None]
    # Neutral tiles do not push the match down.
    place = np.cumsum(~left_out, axis=1)
    found = (is_match & (place <= truth_within)).any(axis=1)
    wrong = ~is_match & ~left_out
    hard = np.flatnonzero(~found & wrong.any(axis=1))
    # Wrong answers first, in their order.
    order = np.argsort(~wrong[hard], axis=1, kind="stable")
    negatives = np.take_along_axis(database[neighbours[hard]], order, axis=1)
    counts = wrong[hard].sum(axis=1, keepdims=True)
    negatives = np.where(np.arange(neighbours.shape[1]) < counts, negatives, -1)
    return HardPairs(queries[hard], database[truth[hard]], negatives, len(queries))


def join(parts: list[HardPairs], k: int) -> HardPairs:
    """The hard pairs of several pairs of years, padded to `k` negatives."""

    def padded(negatives: Ints) -> Ints:
        return np.pad(negatives, ((0, 0), (0, k - negatives.shape[1])), constant_values=-1)

    none = np.empty(0, np.int64)
    return HardPairs(
        np.concatenate([none, *(p.query for p in parts)]),
        np.concatenate([none, *(p.match for p in parts)]),
        np.concatenate([np.empty((0, k), np.int64), *(padded(p.negatives) for p in parts)]),
        sum(p.asked for p in parts),
    )

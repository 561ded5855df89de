"""An exact index on disk: FAISS flat indexes, a few segments a year, mapped into memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from geomatch.errors import StaleError
from geomatch.search.exact import Metric, as_database, as_queries, scores

Float32Array = NDArray[np.float32]
Ints = NDArray[np.int64]

SEGMENT = 262_144
"""Vectors of one file: what building holds in memory."""


def write(folder: Path, year: int, parts: Iterable[Float32Array], metric: Metric) -> None:
    """Write one year's descriptors, given part by part, in order, as what is searched."""
    pending: list[Float32Array] = []
    number = 0

    def flush() -> None:
        nonlocal number
        vectors = np.concatenate(pending)
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        faiss.write_index(index, str(folder / f"year{year}-{number:04d}.faiss"))
        pending.clear()
        number += 1

    for part in parts:
        if len(part):
            pending.append(as_database(part, metric))
        if sum(map(len, pending)) >= SEGMENT:
            flush()
    if pending:
        flush()


class FlatIndex:
    """Searches some years of an index; nothing is read before it is needed.

    Args:
        counts: vectors of each year; a vector's position counts through the years in order.
        metric: that it was written for.
    """

    def __init__(self, folder: Path, counts: Sequence[int], metric: Metric) -> None:
        self._folder, self._metric = folder, metric
        self._offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def _segments(self, year: int) -> list[tuple[int, faiss.Index]]:
        """(position of its first vector, segment) of a year."""
        found, start = [], int(self._offsets[year])
        for path in sorted(self._folder.glob(f"year{year}-*.faiss")):
            try:
                # Of FAISS's ways to map a file, the one that leaves flat vectors on disk.
                segment = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
            except RuntimeError as error:
                raise StaleError(f"{path} cannot be read", "Run: geomatch index") from error
            found.append((start, segment))
            start += segment.ntotal
        if start != self._offsets[year + 1]:
            raise StaleError(f"{self._folder} is incomplete", "Run: geomatch index")
        return found

    def vector(self, position: int) -> Float32Array:
        """(d,) the descriptor at a position; for the cosine its direction."""
        year = int(np.searchsorted(self._offsets, position, "right")) - 1
        start, segment = [s for s in self._segments(year) if s[0] <= position][-1]
        vector: Float32Array = segment.reconstruct(position - start)
        # A Euclidean index has half the square of the length beside each vector.
        return vector if self._metric == "cosine" else vector[:-1]

    def search(
        self, query: Float32Array, years: Sequence[int], k: int
    ) -> tuple[Float32Array, Ints]:
        """The k nearest to a descriptor (d,).

        Returns:
            Scores and positions, best first, at most k.
        """
        row = as_queries(query[None], self._metric)
        found, positions = [np.empty(0, np.float32)], [np.empty(0, np.int64)]
        for year in years:
            for start, segment in self._segments(year):
                near, where = segment.search(row, min(k, segment.ntotal))
                found.append(near[0])
                positions.append(where[0] + start)
        products, all_positions = np.concatenate(found), np.concatenate(positions)
        order = np.argsort(-products, kind="stable")[:k]
        best = scores(products[None, order], query[None], self._metric)[0]
        return best, all_positions[order]

"""An exact index on disk: FAISS flat indexes, a few segments a year, mapped into memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from geomatch.errors import StaleError
from geomatch.search.exact import unit

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

SEGMENT = 262_144
"""Vectors of one file: what building holds in memory."""


def write(folder: Path, year: int, parts: Iterable[Floats]) -> None:
    """Write the unit vectors of one year's descriptors, given part by part, in order."""
    pending: list[Floats] = []
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
            pending.append(unit(part))
        if sum(map(len, pending)) >= SEGMENT:
            flush()
    if pending:
        flush()


class FlatIndex:
    """Searches some years of an index; nothing is read before it is needed.

    Args:
        counts: vectors of each year; a vector's position counts through the years in order.
    """

    def __init__(self, folder: Path, counts: Sequence[int]) -> None:
        self._folder = folder
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

    def vector(self, position: int) -> Floats:
        """(d,) the unit vector at a position."""
        year = int(np.searchsorted(self._offsets, position, "right")) - 1
        start, segment = [s for s in self._segments(year) if s[0] <= position][-1]
        vector: Floats = segment.reconstruct(position - start)
        return vector

    def search(self, query: Floats, years: Sequence[int], k: int) -> tuple[Floats, Ints]:
        """The k nearest to a descriptor (d,) by cosine.

        Returns:
            Scores and positions, best first, at most k.
        """
        row = unit(query[None])
        scores, positions = [np.empty(0, np.float32)], [np.empty(0, np.int64)]
        for year in years:
            for start, segment in self._segments(year):
                near, where = segment.search(row, min(k, segment.ntotal))
                scores.append(near[0])
                positions.append(where[0] + start)
        all_scores, all_positions = np.concatenate(scores), np.concatenate(positions)
        order = np.argsort(-all_scores, kind="stable")[:k]
        return all_scores[order], all_positions[order]

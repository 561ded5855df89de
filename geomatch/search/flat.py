"""An exact index on disk: memory-mapped FAISS flat indexes, a few segments per year."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from geomatch.errors import StaleError
from geomatch.search.exact import Metric, as_database, as_queries, scores

Float32Array = NDArray[np.float32]
Ints = NDArray[np.int64]

SEGMENT = 65_536
"""Vectors per file, which bounds the memory of building an index, and of searching it: the pages of
a file that was searched stay mapped until the next one is opened."""


def write(folder: Path, year: int, parts: Iterable[Float32Array], metric: Metric) -> None:
    """Write the descriptors of one year, given part by part in order, as index segments."""
    index, number = None, 0
    for part in parts:
        if not len(part):
            continue
        vectors = as_database(part, metric)
        index = index or faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        if index.ntotal >= SEGMENT:
            faiss.write_index(index, str(_segment(folder, year, number)))
            index, number = None, number + 1
    if index:
        faiss.write_index(index, str(_segment(folder, year, number)))


def _segment(folder: Path, year: int, number: int) -> Path:
    return folder / f"year{year}-{number:04d}.faiss"


class FlatIndex:
    """An index of several years, each read when it is first searched.

    Args:
        counts: number of vectors of each year. Positions run through the years in order.
        metric: the metric that the index was written for.
    """

    def __init__(self, folder: Path, counts: Sequence[int], metric: Metric) -> None:
        self._folder, self._metric = folder, metric
        self._offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def _segments(self, year: int) -> Iterator[tuple[int, faiss.Index]]:
        """Segments of a year, each with the position of its first vector, opened one by one."""
        start = int(self._offsets[year])
        for path in sorted(self._folder.glob(f"year{year}-*.faiss")):
            try:
                # The only mapping mode of FAISS that leaves flat vectors on disk.
                segment = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
            except RuntimeError as error:
                raise StaleError(f"{path} cannot be read", "Run: geomatch index") from error
            yield start, segment
            start += segment.ntotal
            del segment
        if start != self._offsets[year + 1]:
            raise StaleError(f"{self._folder} is incomplete", "Run: geomatch index")

    def vector(self, position: int) -> Float32Array:
        """The descriptor (d,) at a position; its direction if the metric is cosine."""
        year = int(np.searchsorted(self._offsets, position, "right")) - 1
        for start, segment in self._segments(year):
            if position < start + segment.ntotal:
                vector: Float32Array = segment.reconstruct(position - start)
                # Euclidean segments have an extra column; see `exact.as_database`.
                return vector if self._metric == "cosine" else vector[:-1]
        raise AssertionError(f"no vector {position}")

    def search(
        self, query: Float32Array, years: Sequence[int], k: int
    ) -> tuple[Float32Array, Ints]:
        """Find the k nearest vectors of some years to a descriptor (d,).

        Returns:
            Scores and positions, best first; at most k of each.
        """
        row = as_queries(query[None], self._metric)
        found, positions = [np.empty(0, np.float32)], [np.empty(0, np.int64)]
        for year in years:
            for start, segment in self._segments(year):
                near, where = segment.search(row, min(k, segment.ntotal))
                found.append(near[0])
                positions.append(where[0] + start)
                del segment
        products, all_positions = np.concatenate(found), np.concatenate(positions)
        order = np.argsort(-products, kind="stable")[:k]
        best = scores(products[None, order], query[None], self._metric)[0]
        return best, all_positions[order]

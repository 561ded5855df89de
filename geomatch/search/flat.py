"""Vectors on disk, searched exactly: memory-mapped files of bounded size."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from geomatch.errors import StaleError
from geomatch.search.exact import BLOCK, Metric, best_of, unit

Float32Array = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Dtype = Literal["float32", "float16", "int8"]

SEGMENT_BYTES = 32 * 2**20
"""Of a file, which bounds the memory of writing it, and of searching it: the pages of a file that
was searched stay mapped until the next one is opened."""
BATCH = 8
"""Queries from which on vectors are decoded once for all of them."""


def comparable(vectors: Float32Array, metric: Metric) -> Float32Array:
    """Vectors in the form in which an index holds them: of unit length if the metric is cosine."""
    return unit(vectors) if metric == "cosine" else np.ascontiguousarray(vectors, np.float32)


def empty(dtype: Dtype, sample: Float32Array, metric: Metric) -> Any:
    """A FAISS index without vectors, which stores them as `dtype`.

    Args:
        sample: (n, d) `comparable` vectors; int8 divides their range, for each dimension apart.
    """
    measure = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
    if dtype == "float32":
        return faiss.IndexFlat(sample.shape[1], measure)
    kind = {"float16": "QT_fp16", "int8": "QT_8bit"}[dtype]
    index = faiss.IndexScalarQuantizer(
        sample.shape[1], getattr(faiss.ScalarQuantizer, kind), measure
    )
    index.train(sample)
    return index


def write(
    folder: Path, parts: Iterable[Float32Array], first: int, form: Any, size: int
) -> list[int]:
    """Write vectors, given part by part in order, as files of `size` vectors.

    Args:
        parts: (n_i, d) `comparable` vectors.
        first: position of the first one.
        form: see `empty`.

    Returns:
        The position of the first vector of each file.
    """
    index: Any = faiss.clone_index(form)
    starts: list[int] = []

    def finish() -> None:
        starts.append(first + size * len(starts))
        faiss.write_index(index, str(path_of(folder, starts[-1])))
        index.reset()

    for part in parts:
        while len(part):
            room = size - index.ntotal
            index.add(part[:room])
            part = part[room:]
            if index.ntotal == size:
                finish()
    if index.ntotal:
        finish()
    return starts


def path_of(folder: Path, start: int) -> Path:
    """The file of the vectors from a position on."""
    return folder / f"vectors-{start:012d}.faiss"


def read(path: Path, flags: int = 0) -> Any:
    """Open a FAISS index in a file that stays there.

    Raises:
        StaleError: the file is damaged or missing.
    """
    try:
        # The only mapping mode of FAISS that leaves flat vectors on disk.
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC | flags)
    except RuntimeError as error:
        raise StaleError(f"{path} cannot be read", "Run: geomatch index") from error


class FlatVectors:
    """Vectors (n, d) in files, each opened when it is first needed.

    Args:
        starts: position of the first vector of each file.
        total: number of vectors.
        metric: the metric that they were written for.
    """

    def __init__(self, folder: Path, starts: Sequence[int], total: int, metric: Metric) -> None:
        self._folder, self._metric = folder, metric
        self._edges = [*starts, total]
        self._opened: dict[int, Any] = {}

    def open(self, number: int) -> Any:
        """A file of vectors."""
        start, stop = self._edges[number : number + 2]
        segment = read(path_of(self._folder, start))
        if segment.ntotal != stop - start:
            raise StaleError(f"{self._folder} is incomplete", "Run: geomatch index")
        return segment

    def file_from(self, start: int) -> Any:
        """The file whose first vector is at a position."""
        return self.open(self._edges.index(start))

    def take(self, positions: Ints) -> Float32Array:
        """The vectors (n, d) at positions; their directions if the metric is cosine."""
        numbers = np.array([bisect_right(self._edges, p) - 1 for p in positions.tolist()], np.int64)
        found: list[tuple[Bools, Float32Array]] = []
        for number in np.unique(numbers).tolist():
            here = numbers == number
            rows = positions[here] - self._edges[number]
            # Kept open, since of each of them few pages are touched.
            if number not in self._opened:
                self._opened[number] = self.open(number)
            found.append((here, self._opened[number].reconstruct_batch(rows)))
        if not found:
            return np.empty((0, self.open(0).d), np.float32)
        vectors = np.empty((len(positions), found[0][1].shape[1]), np.float32)
        for here, values in found:
            vectors[here] = values
        return vectors

    def search(self, queries: Float32Array, k: int, chosen: Bools) -> tuple[Float32Array, Ints]:
        """Find the k nearest of the chosen vectors to each query, exactly.

        Args:
            queries: (q, d) `comparable` descriptors.
            chosen: (n,) whether a vector may be an answer; files without any are not opened.

        Returns:
            Scores (cosine similarity or negative distance, higher is better) and positions, both
            (q, k), best first; k is at most the number of chosen vectors.
        """
        best = nothing(len(queries))
        for number, start in enumerate(self._edges[:-1]):
            part = chosen[start : self._edges[number + 1]]
            if part.any():
                best = nearest(best, self._search_file(queries, k, number, part), k)
        return best

    def _search_file(
        self, queries: Float32Array, k: int, number: int, chosen: Bools
    ) -> tuple[Float32Array, Ints]:
        segment, start = self.open(number), self._edges[number]
        if len(queries) < BATCH or (chosen.all() and isinstance(segment, faiss.IndexFlat)):
            count = min(k, int(np.count_nonzero(chosen)))
            raw, rows = segment.search(queries, count, params=selecting(chosen))
            return as_scores(raw, self._metric), rows + start
        best, rows = nothing(len(queries)), np.flatnonzero(chosen)
        for block in (rows[i : i + BLOCK] for i in range(0, len(rows), BLOCK)):
            vectors = segment.reconstruct_batch(block)
            raw, found = faiss.knn(queries, vectors, min(k, len(block)), segment.metric_type)
            best = nearest(best, (as_scores(raw, self._metric), block[found] + start), k)
        return best


def selecting(chosen: Bools, kind: str = "SearchParameters", **values: Any) -> Any:
    """Parameters of a FAISS search, of the kind of its index, among the chosen vectors (n,)."""
    if not chosen.all():
        select: Any = faiss.IDSelectorBitmap
        values["sel"] = select(np.packbits(chosen, bitorder="little"))
    return getattr(faiss, kind)(**values)


def as_scores(raw: Float32Array, metric: Metric) -> Float32Array:
    """Scores from inner products of unit vectors, or from squared distances."""
    if metric == "cosine":
        return raw
    negative: Float32Array = -np.sqrt(np.maximum(raw, 0))
    return negative


def nothing(queries: int) -> tuple[Float32Array, Ints]:
    """No answers to so many queries: scores and positions (q, 0)."""
    return np.empty((queries, 0), np.float32), np.empty((queries, 0), np.int64)


def nearest(
    a: tuple[Float32Array, Ints], b: tuple[Float32Array, Ints], k: int
) -> tuple[Float32Array, Ints]:
    """The k best of two lists of scores and positions (q, ...), best first."""
    return best_of(np.concatenate([a[0], b[0]], axis=1), np.concatenate([a[1], b[1]], axis=1), k)

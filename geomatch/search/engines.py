"""An index of vectors on disk: how it is built, and how it is searched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal, Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from geomatch.data.filters import Filter
from geomatch.data.index_rows import IndexRows
from geomatch.manifests import IndexEngine, IndexManifest
from geomatch.search import approximate, flat
from geomatch.search.exact import BLOCK, Metric, Rows

Float32Array = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Kind = Literal["exact", "ivfpq", "hnsw"]

QUERIES = 256
"""Descriptors of the index whose answers are compared with those of exact search."""
RANGE = 65_536
"""Vectors whose values set the range of int8."""
SAMPLE_BYTES = 128 * 2**20
"""Of the vectors that an index is fitted to, at most."""
DEPTH = 5
"""Of the recall that is measured."""
SAFETY = 0.01
"""What recall on a sample is asked for above what is wanted."""


class Vectors(Protocol):
    """The descriptors of an index, which are searched."""

    def vector(self, position: int) -> Float32Array:
        """The descriptor (d,) at a position; its direction if the metric is cosine."""

    def search(self, queries: Float32Array, k: int, wanted: Filter) -> tuple[Float32Array, Ints]:
        """Find the k nearest descriptors that pass a filter to each query (q, d).

        Returns:
            Scores (cosine similarity or negative distance, higher is better) and positions, both
            (q, k), best first; k is at most the number of descriptors that pass.
        """


class Searcher(Protocol):
    def take(self, positions: Ints) -> Float32Array: ...

    def search(self, queries: Float32Array, k: int, chosen: Bools) -> tuple[Float32Array, Ints]: ...


class LocalVectors:
    """The `Vectors` of an index folder.

    Args:
        rows: says which of them pass a filter.
    """

    def __init__(self, folder: Path, manifest: IndexManifest, rows: IndexRows) -> None:
        self._metric, self._rows = manifest.metric, rows
        total = sum(manifest.counts)
        self._searcher = searcher(folder, manifest.engine, total, manifest.metric)

    def vector(self, position: int) -> Float32Array:
        """See `Vectors.vector`."""
        found: Float32Array = self._searcher.take(np.array([position]))[0]
        return found

    def search(self, queries: Float32Array, k: int, wanted: Filter) -> tuple[Float32Array, Ints]:
        """See `Vectors.search`."""
        chosen = self._rows.select(wanted)
        return self._searcher.search(flat.comparable(queries, self._metric), k, chosen)


def searcher(folder: Path, engine: IndexEngine, total: int, metric: Metric) -> Searcher:
    vectors = flat.FlatVectors(folder, engine.segments, total, metric)
    if engine.kind not in ("ivfpq", "hnsw"):
        return vectors
    return approximate.ApproximateVectors(
        folder, engine.kind, engine.parts, vectors, engine.effort, metric
    )


@dataclass(frozen=True)
class Wanted:
    """What an index is to be.

    Attributes:
        dtype: of the vectors.
        memory: bytes that an approximate index may take while it is built.
        recall: recall@5 that an approximate search is set to reach.
    """

    kind: Kind
    dtype: flat.Dtype
    metric: Metric
    memory: float
    recall: float


def build(
    folder: Path,
    descriptors: Rows,
    order: Ints,
    counts: Sequence[int],
    wanted: Wanted,
    progress: Callable[[str, int, int], None],
) -> IndexEngine:
    """Write an index of descriptors, in bounded memory.

    Args:
        descriptors: (n, d), which may be in a file.
        order: (n,) rows of `descriptors` in the order of the index, year by year.
        counts: number of descriptors of each year.
        progress: called with a task, what is done of it, and its total.
    """
    total = len(order)
    edges = [0, *accumulate(counts)]

    def read(positions: Ints) -> Float32Array:
        return flat.comparable(descriptors[order[positions]], wanted.metric)

    sample = read(_spread(total, _sample_size(wanted, descriptors[:1].nbytes)))
    form = flat.empty(wanted.dtype, sample, wanted.metric)
    size = max(1, flat.SEGMENT_BYTES // form.code_size)
    plan = None
    if wanted.kind != "exact":
        plan = approximate.plan(wanted.kind, total, sample.shape[1], wanted.memory)
        size = plan.part if wanted.kind == "hnsw" else size
    truth = None if wanted.kind == "exact" and wanted.dtype == "float32" else _Truth(read, edges)

    def of_year(start: int, stop: int) -> Iterable[Float32Array]:
        for first in range(start, stop, BLOCK):
            last = min(first + BLOCK, stop)
            vectors = read(np.arange(first, last))
            if truth:
                truth.compare(vectors, first)
            yield vectors
            progress("index", last, total)

    segments: list[int] = []
    for start, stop in pairwise(edges):
        segments += flat.write(folder, of_year(start, stop), start, form, size)
    vectors = flat.FlatVectors(folder, segments, total, wanted.metric)
    engine = IndexEngine(
        kind=wanted.kind,
        dtype=wanted.dtype,
        segments=tuple(segments),
        parts=(),
        effort=0,
        recall=1.0,
        queries=0,
    )
    if plan:
        ranges = list(pairwise([*segments, total]))
        if plan.kind == "ivfpq":
            ranges = [
                (first, min(first + plan.part, stop))
                for start, stop in pairwise(edges)
                for first in range(start, stop, plan.part)
            ]
        parts = approximate.build(
            folder, plan, ranges, vectors, form, sample, lambda n: progress(wanted.kind, n, total)
        )
        engine = replace(engine, parts=tuple(parts))
    if truth is None:
        return engine
    for effort in approximate.EFFORTS if plan else (0,):
        engine = replace(engine, effort=effort)
        recall = truth.recall(searcher(folder, engine, total, wanted.metric))
        engine = replace(engine, recall=recall, queries=len(truth.positions))
        if recall >= min(1.0, wanted.recall + SAFETY):
            break
    return engine


def _sample_size(wanted: Wanted, row: int) -> int:
    """Vectors of so many bytes that an index is fitted to."""
    if wanted.kind != "exact":
        return min(approximate.TRAINING, SAMPLE_BYTES // row)
    return 1 if wanted.dtype == "float32" else min(RANGE, SAMPLE_BYTES // row)


def _spread(total: int, most: int) -> Ints:
    """At most so many positions, evenly spread."""
    return np.unique(np.linspace(0, total - 1, min(most, total)).astype(np.int64))


class _Truth:
    """The nearest neighbours of some descriptors of an index in its other years.

    Without other years, in the index itself, where a descriptor does not find itself.

    Attributes:
        positions: (q,) of the descriptors.
    """

    def __init__(self, read: Callable[[Ints], Float32Array], edges: Sequence[int]) -> None:
        self._edges = np.asarray(edges)
        self.positions = _spread(int(self._edges[-1]), QUERIES)
        self._queries = read(self.positions)
        self._year = self._years_of(self.positions)
        self._alone = len(edges) == 2
        self._best = flat.nothing(len(self.positions))

    def _years_of(self, positions: Ints) -> Ints:
        return np.searchsorted(self._edges, positions, "right") - 1

    def compare(self, vectors: Float32Array, first: int) -> None:
        """Take vectors (n, d) of one year, from a position on, into account."""
        where = first + np.arange(len(vectors))
        # Distances rank unit vectors as cosines do.
        k = min(DEPTH + 1, len(vectors))
        raw, rows = faiss.knn(self._queries, vectors, k, faiss.METRIC_L2)
        scores, positions = -raw, where[rows]
        own = self._year == self._years_of(where[:1]) if not self._alone else None
        out = own[:, None] if own is not None else positions == self.positions[:, None]
        scores = np.where(out, -np.inf, scores)
        self._best = flat.nearest(self._best, (scores, positions), DEPTH)

    def recall(self, searcher: Searcher) -> float:
        """The share of the nearest neighbours that a search finds."""
        found = hits = 0
        for year in np.unique(self._year).tolist():
            mine = np.flatnonzero(self._year == year)
            chosen = np.ones(self._edges[-1], np.bool_)
            if not self._alone:
                chosen[self._edges[year] : self._edges[year + 1]] = False
            positions = searcher.search(self._queries[mine], DEPTH + 1, chosen)[1]
            for i, answers in zip(mine, positions, strict=True):
                truth = self._best[1][i][np.isfinite(self._best[0][i])]
                answers = answers[answers != self.positions[i]][:DEPTH]
                found += len(truth)
                hits += len(np.intersect1d(truth, answers))
        return hits / found if found else 1.0

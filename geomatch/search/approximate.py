"""Approximate search: candidates from an inverted file or from graphs, ranked again by vectors.

An inverted file (IVF) has cells of vectors whose codes are products of small codebooks (PQ); a
query looks at the nearest cells (Jégou et al., Product Quantization for Nearest Neighbor Search,
2011). A hierarchical navigable small world graph (HNSW) is walked towards the query (Malkov and
Yashunin, 2018); its nodes are the vectors of a file of `search.flat`.

One number, the effort, says how far a search goes: the cells that it looks at, from which it takes
four times as many candidates, or half the nodes that a walk keeps in view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np

from geomatch.search.exact import BLOCK, Metric
from geomatch.search.flat import (
    Bools,
    FlatVectors,
    Float32Array,
    Ints,
    as_scores,
    nearest,
    nothing,
    read,
    selecting,
)

Kind = Literal["ivfpq", "hnsw"]
EFFORTS = (32, 64, 128, 256, 512, 1024)
"""From the quickest to the most careful."""
SPARSE = 0.05
"""Share of a file's vectors below which the chosen ones are searched exactly."""
TRAINING = 262_144
"""Vectors that the cells and codebooks are fitted to."""
PER_CELL = 40
"""Vectors that a cell is fitted to at least."""
CANDIDATES = 4
"""Candidates that are ranked again for each cell that is looked at, and for each answer."""


@dataclass(frozen=True)
class Plan:
    """The parameters of an approximate index.

    Attributes:
        part: vectors of a file.
        code: bytes of a vector's code (IVF).
        links: links of a node (HNSW).
    """

    kind: Kind
    part: int
    code: int = 0
    links: int = 0


def plan(kind: Kind, total: int, dimension: int, memory: float) -> Plan:
    """Parameters for a number of vectors (n, d), and bytes of memory to build the index in.

    A code is as long as lets all of them fit, so that they stay in memory while they are searched;
    what does not fit even so is divided into files.
    """
    if kind == "hnsw":
        # Of a node in the lowest layer, with its vector in one byte a value, and its lock.
        sizes = {links: 8 * links + dimension + 48 for links in (32, 16)}
        links = next((n for n, size in sizes.items() if total * size <= memory), 16)
        return Plan(kind, max(1, int(memory / sizes[links])), links=links)
    codes = [_divisor(dimension, dimension // share) for share in (2, 4, 8)]
    code = next((n for n in codes if total * (n + 8) <= memory), codes[-1])
    return Plan(kind, max(1, int(memory / (code + 8))), code=code)


def _divisor(dimension: int, most: int) -> int:
    """The largest divisor of a dimension up to a number, at least 1."""
    return next(n for n in range(max(1, most), 0, -1) if dimension % n == 0)


def build(
    folder: Path,
    plan: Plan,
    ranges: Sequence[tuple[int, int]],
    vectors: FlatVectors,
    form: Any,
    sample: Float32Array,
    progress: Callable[[int], None],
) -> list[int]:
    """Write an approximate index of vectors that `search.flat` wrote, file by file.

    Args:
        ranges: first position and end of each file; in a graph's, those of a file of `vectors`.
        form: that `vectors` were written in, without vectors.
        sample: (n, d) vectors that cells and codebooks are fitted to.
        progress: called with the number of vectors that were added.

    Returns:
        The position of the first vector of each file.
    """
    inverted = None
    if plan.kind == "ivfpq":
        inverted = _inverted_file(plan, max(stop - start for start, stop in ranges), sample)
    for start, stop in ranges:
        index = _graph(plan, form) if inverted is None else faiss.clone_index(inverted)
        for first in range(start, stop, BLOCK):
            last = min(first + BLOCK, stop)
            index.add(vectors.take(np.arange(first, last)))
            progress(last)
        save: Any = faiss.write_index
        # Without the vectors of its nodes, which are in their own file.
        flags = faiss.IO_FLAG_SKIP_STORAGE if inverted is None else 0
        save(index, str(_path(folder, start)), flags)
    return [start for start, _ in ranges]


def _inverted_file(plan: Plan, largest: int, sample: Float32Array) -> Any:
    cells = max(1, min(int(4 * np.sqrt(largest)), len(sample) // PER_CELL))
    # A codebook has 256 entries unless there are too few vectors to fit them.
    bits = min(8, max(1, int(np.log2(max(2, len(sample) // PER_CELL)))))
    # Distances, which rank unit vectors as their products do: with products, cells with long
    # centroids would attract all vectors.
    # "np": codes are not put in order for Hamming distances, which would take most of the time.
    form: Any = faiss.index_factory(sample.shape[1], f"IVF{cells},PQ{plan.code}x{bits}np")
    # Codes of vectors, not of what is left of them in their cell: one table of distances serves a
    # query, where every cell would need its own, of which FAISS makes 64 KB each on opening.
    form.by_residual = False
    for fit in (form.cp, form.pq.cp):
        fit.min_points_per_centroid, fit.max_points_per_centroid, fit.niter = 1, 64, 10
    form.train(sample)
    return form


def _graph(plan: Plan, form: Any) -> Any:
    storage: Any = faiss.clone_index(form)
    graph: Any = faiss.IndexHNSW(storage, plan.links)
    graph.hnsw.efConstruction = 100
    return graph


def _path(folder: Path, start: int) -> Path:
    return folder / f"approximate-{start:012d}.faiss"


class ApproximateVectors:
    """Vectors (n, d) of `search.flat`, with an approximate index of them.

    Where a filter leaves few vectors of a file, they are searched exactly, and so is everything
    for a query that would else get too few answers.

    Args:
        starts: position of the first vector of each file of the index.
        effort: see the module.
        metric: that of `vectors`.
    """

    def __init__(
        self,
        folder: Path,
        kind: Kind,
        starts: Sequence[int],
        vectors: FlatVectors,
        effort: int,
        metric: Metric,
    ) -> None:
        self._folder, self._kind, self._starts = folder, kind, starts
        self._vectors, self._metric = vectors, metric
        self.effort = effort
        self._opened: dict[int, tuple[Any, Any]] = {}

    def take(self, positions: Ints) -> Float32Array:
        """See `FlatVectors.take`."""
        return self._vectors.take(positions)

    def search(self, queries: Float32Array, k: int, chosen: Bools) -> tuple[Float32Array, Ints]:
        """Find about the k nearest of the chosen vectors; see `FlatVectors.search`.

        There are as many answers as an exact search has.
        """
        best = nothing(len(queries))
        for start, stop in pairwise([*self._starts, len(chosen)]):
            part = chosen[start:stop]
            count = int(np.count_nonzero(part))
            if not count:
                continue
            if count < max(SPARSE * len(part), CANDIDATES * k):
                alone = np.zeros_like(chosen)
                alone[start:stop] = part
                found = self._vectors.search(queries, k, alone)
            else:
                found = self._search_file(queries, k, start, part, count)
            best = nearest(best, found, k)
        few = (best[1] < 0).any(axis=1)
        if few.any():
            best[0][few], best[1][few] = self._vectors.search(queries[few], k, chosen)
        return best

    def _search_file(
        self, queries: Float32Array, k: int, start: int, chosen: Bools, count: int
    ) -> tuple[Float32Array, Ints]:
        """Scores and positions (q, k), padded with -inf and -1."""
        index = self._open(start)
        # What a filter leaves out is passed on the way.
        effort = max(self.effort, k) * len(chosen) // count
        if self._kind == "hnsw":
            parameters = selecting(chosen, "SearchParametersHNSW", efSearch=2 * effort)
            raw, rows = index.search(queries, k, params=parameters)
            scores = np.where(rows < 0, -np.inf, as_scores(raw, self._metric))
            return scores.astype(np.float32), np.where(rows < 0, -1, rows + start)
        parameters = selecting(chosen, "SearchParametersIVF", nprobe=min(effort, index.nlist))
        wanted = min(CANDIDATES * max(self.effort, k), count)
        candidates = index.search(queries, wanted, params=parameters)[1]
        best = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        for i, rows in enumerate(candidates):
            positions = rows[rows >= 0] + start
            scores = self._scores(queries[i], self.take(positions))
            order = np.argsort(-scores, kind="stable")[:k]
            best[0][i, : len(order)], best[1][i, : len(order)] = scores[order], positions[order]
        return best

    def _scores(self, query: Float32Array, vectors: Float32Array) -> Float32Array:
        if self._metric == "cosine":
            return vectors @ query
        difference = vectors - query
        return as_scores(np.einsum("nd,nd->n", difference, difference), self._metric)

    def _open(self, start: int) -> Any:
        if start not in self._opened:
            graph = self._kind == "hnsw"
            index = read(_path(self._folder, start), faiss.IO_FLAG_SKIP_STORAGE if graph else 0)
            nodes = self._vectors.file_from(start) if graph else None
            if nodes is not None:
                index.storage = nodes
            self._opened[start] = index, nodes
        return self._opened[start][0]

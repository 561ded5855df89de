"""Nearest neighbours by inner product, in blocks: exact, or approximate in a large database.

The cosine is the inner product of unit vectors. The squared Euclidean distance is an inner product
up to a factor and a constant: |q - x|^2 = |q|^2 - 2 (q, 1) . (x, -|x|^2 / 2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
Ints = NDArray[np.int64]
Metric = Literal["cosine", "euclidean"]


class Rows(Protocol):
    """Vectors (n, d) that are read by a slice or by indices: an array, or what a file holds."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | Ints, /) -> Float32Array: ...


BLOCK = 16_384
"""Vectors in memory at a time, for queries and database each."""
PROBES = 32
"""Cells of the inverted file that are searched for each query."""


def unit(vectors: Float32Array) -> Float32Array:
    """Scale rows to unit length, so that inner products are cosines; zero rows stay zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled: Float32Array = (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
    return scaled


def as_queries(vectors: Float32Array, metric: Metric) -> Float32Array:
    """Descriptors (n, d) in the form of queries, to be compared by inner product."""
    if metric == "cosine":
        return unit(vectors)
    return np.pad(vectors.astype(np.float32), ((0, 0), (0, 1)), constant_values=1)


def as_database(vectors: Float32Array, metric: Metric) -> Float32Array:
    """Descriptors (n, d) in the form of a database, to be compared by inner product."""
    if metric == "cosine":
        return unit(vectors)
    vectors = vectors.astype(np.float32)
    half = -0.5 * np.einsum("nd,nd->n", vectors, vectors)
    return np.concatenate([vectors, half[:, None]], axis=1)


def scores(products: Float32Array, queries: Float32Array, metric: Metric) -> Float32Array:
    """Convert inner products (q, k) to scores: cosine similarity, or negative distance.

    Args:
        queries: (q, d) descriptors, not in the form of `as_queries`.
    """
    if metric == "cosine":
        return products
    squares = np.einsum("qd,qd->q", queries, queries)[:, None] - 2 * products
    negative: Float32Array = -np.sqrt(np.maximum(squares, 0)).astype(np.float32)
    return negative


def neighbours(queries: Float32Array, database: Float32Array, k: int) -> tuple[Float32Array, Ints]:
    """The k rows of `database` (n, d) with the largest inner product to each query (q, d).

    Returns:
        Inner products and positions, (q, min(k, n)), best first.
    """
    k = min(k, len(database))
    products, positions = faiss.knn(queries, database, k, metric=faiss.METRIC_INNER_PRODUCT)
    return products, positions


def search(
    vectors: Rows, queries: Ints, database: Ints, k: int, metric: Metric, exact_up_to: int
) -> Iterator[tuple[slice, Float32Array, Ints]]:
    """Find the nearest neighbours of some rows of `vectors` among others, block by block.

    Args:
        vectors: (n, d) descriptors, which may stay in a file.
        queries, database: rows of `vectors`.
        exact_up_to: largest database that is searched exactly; a larger one is searched with an
            inverted file and 8-bit scalar quantisation.

    Yields:
        A slice of `queries` with its inner products and positions in `database`, both (q, min(k,
        n)), best first. Position -1 where an approximate search found fewer.
    """
    k = min(k, len(database))
    index = _inverted(vectors, database, metric) if len(database) > exact_up_to else None
    for part in _blocks(len(queries)):
        if index is None:
            rows = as_queries(vectors[queries[part]], metric)
            best = np.empty((len(rows), 0), np.float32), np.empty((len(rows), 0), np.int64)
            for block in _blocks(len(database)):
                found = neighbours(rows, as_database(vectors[database[block]], metric), k)
                best = best_of(
                    np.concatenate([best[0], found[0]], axis=1),
                    np.concatenate([best[1], found[1] + block.start], axis=1),
                    k,
                )
        else:
            positions = index.search(_comparable(vectors[queries[part]], metric), k)[1]
            exact = products(
                vectors, np.repeat(queries[part], k), database[positions.reshape(-1)], metric
            ).reshape(positions.shape)
            best = best_of(np.where(positions < 0, -np.inf, exact), positions, k)
        yield part, *best


def best_of(products: Float32Array, positions: Ints, k: int) -> tuple[Float32Array, Ints]:
    """The k columns with the largest products of each row, best first."""
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(products, order, 1), np.take_along_axis(positions, order, 1)


def products(vectors: Rows, a: Ints, b: Ints, metric: Metric) -> Float32Array:
    """Inner products (n,) of rows `a` as queries with rows `b` as database, block by block."""
    parts = [
        np.einsum(
            "nd,nd->n",
            as_queries(vectors[a[part]], metric),
            as_database(vectors[b[part]], metric),
        )
        for part in _blocks(len(a))
    ]
    return np.concatenate([np.empty(0, np.float32), *parts])


def _blocks(count: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


def _comparable(vectors: Float32Array, metric: Metric) -> Float32Array:
    """Vectors whose Euclidean distances rank as the metric does."""
    return unit(vectors) if metric == "cosine" else vectors.astype(np.float32)


def _inverted(vectors: Rows, database: Ints, metric: Metric) -> Any:
    """A FAISS inverted file with 8-bit scalar quantisation.

    It uses Euclidean distances: with inner products, cells with long centroids would attract all
    vectors.
    """
    lists = int(4 * np.sqrt(len(database)))
    sample = _comparable(vectors[database[:: max(1, len(database) // (64 * lists))]], metric)
    index: Any = faiss.index_factory(sample.shape[1], f"IVF{lists},SQ8", faiss.METRIC_L2)
    index.train(sample)
    for part in _blocks(len(database)):
        index.add(_comparable(vectors[database[part]], metric))
    index.nprobe = PROBES
    return index

"""Neighbours by inner product, in blocks: exact, or approximate among many.

The cosine is an inner product of unit vectors. So is, but for a constant, the Euclidean distance:
|q - x|^2 = |q|^2 - 2 (q, 1) . (x, -|x|^2 / 2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
Ints = NDArray[np.int64]
Metric = Literal["cosine", "euclidean"]

BLOCK = 16_384
"""Vectors that are in memory at one time, of queries and of the database each."""
PROBES = 32


def unit(vectors: Float32Array) -> Float32Array:
    """Rows of unit length, so that an inner product is the cosine; zero rows stay zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled: Float32Array = (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
    return scaled


def as_queries(vectors: Float32Array, metric: Metric) -> Float32Array:
    """Descriptors (n, d) as queries for inner products."""
    if metric == "cosine":
        return unit(vectors)
    return np.pad(vectors.astype(np.float32), ((0, 0), (0, 1)), constant_values=1)


def as_database(vectors: Float32Array, metric: Metric) -> Float32Array:
    """Descriptors (n, d) as what is searched by inner products."""
    if metric == "cosine":
        return unit(vectors)
    vectors = vectors.astype(np.float32)
    half = -0.5 * np.einsum("nd,nd->n", vectors, vectors)
    return np.concatenate([vectors, half[:, None]], axis=1)


def scores(products: Float32Array, queries: Float32Array, metric: Metric) -> Float32Array:
    """Scores of inner products (q, k): the cosine, or the negative distance.

    Args:
        queries: (q, d) descriptors.
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
    vectors: Float32Array, queries: Ints, database: Ints, k: int, metric: Metric, exact_up_to: int
) -> Iterator[tuple[slice, Float32Array, Ints]]:
    """Neighbours of some rows of `vectors` among others, a block of queries at a time.

    Args:
        vectors: (n, d) descriptors, which may be mapped from a file.
        queries, database: rows of `vectors`.
        exact_up_to: size of the database beyond which neighbours are approximate, from an
            inverted file with vectors of eight bits a value.

    Yields:
        Which queries, and their inner products and positions in `database`, (q, min(k, n)) each,
        best first; position -1 where an approximate search found fewer.
    """
    k = min(k, len(database))
    index = _inverted(vectors, database, metric) if len(database) > exact_up_to else None
    for part in _blocks(len(queries)):
        if index is None:
            asked = as_queries(vectors[queries[part]], metric)
            best = np.empty((len(asked), 0), np.float32), np.empty((len(asked), 0), np.int64)
            for mine in _blocks(len(database)):
                found = neighbours(asked, as_database(vectors[database[mine]], metric), k)
                best = _best(
                    np.concatenate([best[0], found[0]], axis=1),
                    np.concatenate([best[1], found[1] + mine.start], axis=1),
                    k,
                )
        else:
            positions = index.search(_comparable(vectors[queries[part]], metric), k)[1]
            exactly = products(
                vectors, np.repeat(queries[part], k), database[positions.reshape(-1)], metric
            ).reshape(positions.shape)
            best = _best(np.where(positions < 0, -np.inf, exactly), positions, k)
        yield part, *best


def _best(products: Float32Array, positions: Ints, k: int) -> tuple[Float32Array, Ints]:
    """The k columns with the largest products of each row, best first."""
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(products, order, 1), np.take_along_axis(positions, order, 1)


def products(vectors: Float32Array, a: Ints, b: Ints, metric: Metric) -> Float32Array:
    """(n,) inner products of rows `a` as queries with rows `b`, a block at a time."""
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
    """Vectors whose Euclidean distances are in the order of the metric."""
    return unit(vectors) if metric == "cosine" else vectors.astype(np.float32)


def _inverted(vectors: Float32Array, database: Ints, metric: Metric) -> Any:
    """A FAISS index of cells, of which `PROBES` are searched.

    Its distances are Euclidean: by inner products, the cells of long vectors would take all.
    """
    lists = int(4 * np.sqrt(len(database)))
    index: Any = faiss.index_factory(vectors.shape[1], f"IVF{lists},SQ8", faiss.METRIC_L2)
    sample = database[:: max(1, len(database) // (64 * lists))]
    index.train(_comparable(vectors[sample], metric))
    for part in _blocks(len(database)):
        index.add(_comparable(vectors[database[part]], metric))
    index.nprobe = PROBES
    return index

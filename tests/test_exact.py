"""Neighbours by inner product, against brute force in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from geomatch.search import exact
from geomatch.search.exact import as_database, as_queries, neighbours, products, scores, search

METRICS = ["cosine", "euclidean"]
EVER = 10**9
"""No database is so large that its neighbours were approximate."""


def drawn(count, dimension=12, seed=0, clusters=0):
    """Descriptors of many lengths, in clusters if asked for."""
    rng = np.random.default_rng(seed)
    if clusters:
        centres = rng.normal(0, 1, (clusters, dimension)) * rng.uniform(0.5, 3, (clusters, 1))
        vectors = centres[rng.integers(clusters, size=count)]
        vectors = vectors + rng.normal(0, 0.2, (count, dimension))
    else:
        vectors = rng.normal(0, 1, (count, dimension)) * rng.uniform(0.2, 3, (count, 1))
    return vectors.astype(np.float32)


def by_hand(queries, database, metric):
    """(q, n) scores in double precision."""
    queries, database = queries.astype(float), database.astype(float)
    if metric == "cosine":
        lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(database, axis=1)
        return queries @ database.T / lengths
    return -np.linalg.norm(queries[:, None] - database[None], axis=-1)


def found_by(vectors, queries, database, k, metric, exact_up_to):
    """All blocks of a search, which follow each other without a gap."""
    parts = list(search(vectors, queries, database, k, metric, exact_up_to))
    assert [part.start for part, _, _ in parts[1:]] == [part.stop for part, _, _ in parts[:-1]]
    assert (parts[0][0].start, parts[-1][0].stop) == (0, len(queries))
    return tuple(np.concatenate([part[i] for part in parts]) for i in (1, 2))


@pytest.mark.parametrize("metric", METRICS)
def test_scores_and_their_order_are_those_of_the_metric(metric):
    queries, database = drawn(9), drawn(40, seed=1)
    found = neighbours(as_queries(queries, metric), as_database(database, metric), 40)
    wanted = by_hand(queries, database, metric)
    np.testing.assert_array_equal(found[1], np.argsort(-wanted, axis=1))
    np.testing.assert_allclose(
        scores(found[0], queries, metric), -np.sort(-wanted, axis=1), atol=1e-5
    )


@pytest.mark.parametrize("metric", METRICS)
def test_a_descriptor_finds_itself(metric):
    vectors = drawn(30)
    found = neighbours(as_queries(vectors, metric), as_database(vectors, metric), 1)
    assert found[1][:, 0].tolist() == list(range(30))
    own = scores(found[0], vectors, metric)
    # A root of what is lost of squares of some ten.
    np.testing.assert_allclose(own, 1 if metric == "cosine" else 0, atol=1e-2)
    assert own.max() <= (1 + 1e-6 if metric == "cosine" else 0)


def test_lengths_count_for_distances_alone():
    query = np.array([[1, 0]], np.float32)
    database = np.array([[9, 0], [1, 0.5]], np.float32)
    for metric, first in (("cosine", 0), ("euclidean", 1)):
        found = neighbours(as_queries(query, metric), as_database(database, metric), 2)
        assert found[1][0, 0] == first
        value = scores(found[0], query, metric)[0, 0]
        assert value == pytest.approx(1.0 if metric == "cosine" else -0.5)


def test_a_descriptor_of_zeros_is_like_none():
    vectors = np.array([[0, 0], [1, 2]], np.float32)
    found, positions = neighbours(as_queries(vectors, "cosine"), as_database(vectors, "cosine"), 2)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0], [0, 0])
    np.testing.assert_allclose(found[1], [1, 0], atol=1e-6)
    assert positions[1].tolist() == [1, 0]


def test_there_are_no_more_neighbours_than_there_are_vectors():
    vectors = drawn(3)
    assert neighbours(vectors, vectors, 5)[1].shape == (3, 3)
    found = found_by(vectors, np.arange(2), np.arange(3), 5, "cosine", EVER)
    assert found[0].shape == found[1].shape == (2, 3)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("block", [1, 7, 25, 1000])
def test_searching_in_blocks_gives_what_brute_force_gives(monkeypatch, metric, block):
    monkeypatch.setattr(exact, "BLOCK", block)
    vectors = drawn(120)
    rng = np.random.default_rng(3)
    queries, database = rng.permutation(120)[:23], rng.permutation(120)[:75]
    found, positions = found_by(vectors, queries, database, 6, metric, EVER)
    assert len(list(search(vectors, queries, database, 6, metric, EVER))) == -(-23 // block)
    wanted = by_hand(vectors[queries], vectors[database], metric)
    np.testing.assert_array_equal(positions, np.argsort(-wanted, axis=1)[:, :6])
    best = -np.sort(-wanted, axis=1)[:, :6]
    # A distance is a root: near 0, what inner products lose is larger.
    mine = scores(found, vectors[queries], metric)
    np.testing.assert_allclose(mine, best, atol=1e-5 if metric == "cosine" else 3e-3)


@pytest.mark.parametrize("metric", METRICS)
def test_descriptors_may_be_in_a_file(tmp_path, metric):
    vectors = drawn(60)
    mapped = np.memmap(tmp_path / "vectors", np.float32, "w+", shape=vectors.shape)
    mapped[:] = vectors
    rows = np.arange(60)
    for limit in (EVER, 0):
        found, wanted = (found_by(v, rows, rows, 3, metric, limit) for v in (mapped, vectors))
        for mine, theirs in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("block", [1000, exact.BLOCK])
def test_approximate_neighbours_are_nearly_all_of_the_exact_ones(monkeypatch, metric, block):
    monkeypatch.setattr(exact, "BLOCK", block)
    vectors = drawn(12_000, 32, clusters=300)
    rng = np.random.default_rng(4)
    order = rng.permutation(12_000)
    queries, database = order[:600], order[600:]
    _, wanted = found_by(vectors, queries, database, 5, metric, len(database))
    found, positions = found_by(vectors, queries, database, 5, metric, len(database) - 1)
    shared = [
        len(set(a) & set(b)) for a, b in zip(positions.tolist(), wanted.tolist(), strict=True)
    ]
    assert 0.9 < sum(shared) / wanted.size < 1
    # The products are exact, whatever was searched.
    again = np.take_along_axis(by_hand(vectors[queries], vectors[database], metric), positions, 1)
    mine = scores(found, vectors[queries], metric)
    np.testing.assert_allclose(mine, again, atol=1e-5 if metric == "cosine" else 3e-3)
    assert (np.diff(found, axis=1) <= 0).all()


def test_an_approximate_search_says_where_it_found_fewer():
    # Nearly all descriptors are one, in one cell; the others' cells are the first to be searched.
    vectors = np.concatenate([drawn(700, 8), np.full((3000, 8), 50, np.float32)])
    found, positions = found_by(vectors, np.arange(5), np.arange(3700), 600, "euclidean", 0)
    missing = positions < 0
    assert missing.any()
    assert (found[missing] == -np.inf).all()
    assert np.isfinite(found[~missing]).all()
    for row in positions:
        kept = row[row >= 0]
        assert len(set(kept.tolist())) == len(kept)
        assert (row[len(kept) :] == -1).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("block", [4, 1000])
def test_products_of_pairs_are_those_of_a_search(monkeypatch, metric, block):
    monkeypatch.setattr(exact, "BLOCK", block)
    vectors = drawn(50)
    rng = np.random.default_rng(5)
    a, b = rng.integers(50, size=(2, 33))
    found = products(vectors, a, b, metric)
    assert found.dtype == np.float32
    whole = as_queries(vectors, metric) @ as_database(vectors, metric).T
    np.testing.assert_allclose(found, whole[a, b], rtol=1e-4, atol=1e-5)
    mine = scores(found[:, None], vectors[a], metric)[:, 0]
    wanted = by_hand(vectors, vectors, metric)[a, b]
    np.testing.assert_allclose(mine, wanted, atol=1e-5 if metric == "cosine" else 3e-3)
    assert products(vectors, a[:0], b[:0], metric).shape == (0,)

"""PCA-whitening of descriptors."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from geomatch.errors import GeomatchError
from geomatch.search.whitening import whitening


def vectors(count=200, size=12, seed=0):
    """Correlated vectors around a mean."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(size, size)) * np.linspace(0.2, 3, size)
    return (rng.normal(size=(count, size)) @ mixing + rng.normal(size=size)).astype(np.float32)


def one_group(rows):
    return np.zeros(len(rows), np.int64)


@pytest.mark.parametrize("size", [1, 5, 12])
def test_whitened_vectors_are_uncorrelated_and_of_unit_variance(size):
    rows = vectors()
    kernel, bias = whitening(rows, one_group(rows), size)
    assert (kernel.shape, bias.shape) == ((12, size), (size,))
    assert (kernel.dtype, bias.dtype) == (np.float32, np.float32)
    white = rows @ kernel + bias
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-5)
    covariance = white.T.astype(float) @ white / (len(rows) - 1)
    np.testing.assert_allclose(covariance, np.eye(size), atol=1e-4)


@pytest.mark.parametrize("size", [3, 12])
def test_one_group_is_whitened_as_by_scikit_learn(size):
    rows, others = vectors(), vectors(seed=1)
    kernel, bias = whitening(rows, one_group(rows), size)
    wanted = PCA(size, whiten=True, svd_solver="full").fit(rows.astype(float)).transform(others)
    found = others @ kernel + bias
    signs = np.sign((found * wanted).sum(axis=0))
    np.testing.assert_allclose(found * signs, wanted, atol=2e-3)


def test_directions_come_by_their_variance():
    rows = vectors()
    kernel, _ = whitening(rows, one_group(rows), 6)
    # A direction is scaled by the inverse of its deviation.
    assert (np.diff(np.linalg.norm(kernel, axis=0)) > 0).all()


def test_what_a_group_shares_has_no_part_in_the_projection():
    rows = vectors()
    groups = np.arange(len(rows)) % 3
    apart = rows + 50 * vectors(3, seed=2)[groups]
    kernel, _ = whitening(rows, groups, 5)
    found, bias = whitening(apart, groups, 5)
    signs = np.sign((found * kernel).sum(axis=0))
    np.testing.assert_allclose(found * signs, kernel, atol=1e-3 * np.abs(kernel).max())
    # As one group, they are what varies most.
    merged, _ = whitening(apart, one_group(rows), 5)
    assert np.abs(merged[:, 0]).max() < 0.1 * np.abs(kernel[:, 0]).max()
    # The mean of all goes to zero.
    np.testing.assert_allclose((apart @ found + bias).mean(axis=0), 0, atol=1e-3)


def test_each_group_is_centred_by_its_own_mean():
    rows = vectors()
    groups = (np.arange(len(rows)) % 4 == 0).astype(int)
    centred = rows.astype(float)
    for group in (0, 1):
        members = [i for i in range(len(rows)) if groups[i] == group]
        centred[members] -= sum(centred[i] for i in members) / len(members)
    kernel, _ = whitening(rows + 9 * groups[:, None].astype(np.float32), groups, 4)
    white = centred @ kernel
    np.testing.assert_allclose(white.T @ white / (len(rows) - 1), np.eye(4), atol=1e-3)


@pytest.mark.parametrize(
    ("count", "size", "wanted", "most"), [(5, 12, 5, 4), (200, 12, 13, 12), (1, 12, 1, 1)]
)
def test_too_few_vectors_or_values_are_refused(count, size, wanted, most):
    rows = vectors(count, size)
    with pytest.raises(GeomatchError, match=f"{wanted} values .* {count} .* of {size}") as error:
        whitening(rows, one_group(rows), wanted)
    assert f"model.descriptor={most}" in error.value.hint


def test_as_many_as_there_can_be_are_given():
    rows = vectors(5)
    kernel, bias = whitening(rows, one_group(rows), 4)
    white = rows @ kernel + bias
    np.testing.assert_allclose(white.T @ white / 4, np.eye(4), atol=1e-3)


@pytest.mark.parametrize("fixed", [1, 6])
def test_values_that_never_vary_are_left_alone(fixed):
    rows = vectors()
    rows[:, :fixed] = 7
    kernel, bias = whitening(rows, one_group(rows), 12)
    assert np.isfinite(kernel).all()
    assert np.isfinite(bias).all()
    # The last directions have nothing to scale.
    np.testing.assert_array_equal(kernel[:, 12 - fixed :], 0)
    white = rows @ kernel + bias
    np.testing.assert_allclose(white.std(axis=0, ddof=1)[: 12 - fixed], 1, atol=1e-3)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_vectors_all_alike_become_zero():
    rows = np.full((20, 6), 3, np.float32)
    kernel, bias = whitening(rows, one_group(rows), 4)
    np.testing.assert_array_equal(rows @ kernel + bias, np.zeros((20, 4)))


def test_what_rounding_leaves_of_a_mean_is_no_direction():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1000, 20)) @ rng.normal(size=(20, 512)) + 5
    groups = np.arange(1000) % 2
    # More directions are asked for than there are.
    kernel, _ = whitening(rows.astype(np.float32), groups, 40)
    np.testing.assert_array_equal(kernel[:, 20:], 0)
    assert (np.abs(kernel[:, :20]).max(axis=0) > 0).all()


def test_the_same_vectors_give_the_same_projection():
    rows = vectors()
    first, again = (whitening(rows, one_group(rows), 5) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    kept = rows.copy()
    whitening(rows, np.arange(len(rows)) % 2, 5)
    np.testing.assert_array_equal(rows, kept)

"""Pooling, against plain loops."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geomatch.nn.pooling import Pool, rmac_regions

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def maps(height=5, width=6, channels=3, seed=0):
    """(2, h, w, c) float32, a third of them zero, as after a ReLU."""
    drawn = np.random.default_rng(seed).normal(0.5, 1, (2, height, width, channels))
    return np.maximum(drawn, 0).astype(np.float32)


def pooled(kind, x, bins=1, **params):
    """(b, r, d), and what is learned first."""
    pool = Pool(kind, bins)
    variables = {"params": {name: jnp.float32(value) for name, value in params.items()}}
    return np.asarray(jax.jit(pool.apply)(variables, x))


def at_unit_norm(vector):
    return vector / math.sqrt(sum(float(v) ** 2 for v in vector))


def each_channel(x, rule):
    """(b, 1, c): a rule of the list of values of each tile and channel."""
    b, h, w, c = x.shape
    found = np.zeros((b, 1, c))
    for tile in range(b):
        for channel in range(c):
            values = [float(x[tile, i, j, channel]) for i in range(h) for j in range(w)]
            found[tile, 0, channel] = rule(values)
    return found


def generalised_mean(power):
    def rule(values):
        total = sum(max(v, 1e-6) ** power for v in values)
        return (total / len(values)) ** (1 / power)

    return rule


@pytest.mark.parametrize(
    ("kind", "rule"),
    [("max", max), ("mean", lambda values: sum(values) / len(values)), ("sum", sum)],
)
def test_a_map_becomes_one_value_of_each_channel(kind, rule):
    x = maps() - 0.4
    np.testing.assert_allclose(pooled(kind, x), each_channel(x, rule), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("power", [1.0, 2.5, 3.0, 9.0, 20.0])
@pytest.mark.parametrize("scale", [0.01, 1, 1000])
def test_gem_is_the_generalised_mean(power, scale):
    x = scale * maps()
    # As floats of twice the width, whose powers stay in range.
    wanted = each_channel(x, generalised_mean(power))
    np.testing.assert_allclose(pooled("gem", x, power=power), wanted, rtol=1e-4)


def test_the_power_of_gem_begins_at_three_and_is_learned():
    x = maps()
    pool = Pool("gem", 1)
    variables = pool.init(jax.random.key(0), x)
    assert variables == {"params": {"power": 3.0}}
    slope = jax.grad(lambda v: pool.apply(v, x).sum())(variables)["params"]["power"]
    step = 1e-4
    ends = [each_channel(x, generalised_mean(3 + sign * step)).sum() for sign in (-1, 1)]
    assert float(slope) == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-3)


@pytest.mark.parametrize("power", [1.0, 3.0, 7.0, 12.0])
def test_gem_has_finite_gradients_at_zeros(power):
    x = maps()
    # A channel that nothing has excited, and a dark tile.
    x[0, ..., 1] = 0
    x[1] = 0
    pool, variables = Pool("gem", 1), {"params": {"power": jnp.float32(power)}}
    gradients = jax.grad(lambda v, x: pool.apply(v, x).sum(), (0, 1))(variables, x)
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient).all()
    assert np.abs(gradients[1][0, ..., 0]).max() > 0.01
    assert np.abs(gradients[0]["params"]["power"]) > 1e-3


def test_gem_s_gradient_is_that_of_the_generalised_mean():
    x = maps(3, 2, 1) + 0.1
    pool, variables = Pool("gem", 1), {"params": {"power": jnp.float32(2.5)}}
    gradient = jax.grad(lambda x: pool.apply(variables, x).sum())(x)
    step = 1e-3
    for place in np.ndindex(*x.shape):
        ends = []
        for sign in (-1, 1):
            moved = x.astype(float)
            moved[place] += sign * step
            ends.append(each_channel(moved, generalised_mean(2.5)).sum())
        assert gradient[place] == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-2)


def test_flatten_keeps_every_value_in_place():
    x = maps()
    found = pooled("flatten", x)
    assert found.shape == (2, 1, 5 * 6 * 3)
    for b, i, j, c in np.ndindex(*x.shape):
        assert found[b, 0, (i * 6 + j) * 3 + c] == x[b, i, j, c]


REGIONS = {
    # side of the map: side of the regions and their beginnings, for 1 x 1, 2 x 2 and 3 x 3
    7: [(7, [0]), (4, [0, 3]), (3, [0, 2, 4])],
    8: [(8, [0]), (5, [0, 3]), (4, [0, 2, 4])],
    16: [(16, [0]), (10, [0, 6]), (8, [0, 4, 8])],
    2: [(2, [0]), (1, [0, 1]), (1, [0, 0, 1])],
    1: [(1, [0]), (1, [0, 0]), (1, [0, 0, 0])],
}


def squares(side):
    """(top, left, size) of each region, by the table."""
    return [(i, j, size) for size, starts in REGIONS[side] for i in starts for j in starts]


@pytest.mark.parametrize("side", REGIONS)
def test_regions_of_three_scales_spread_to_the_borders(side):
    found = list(rmac_regions(side))
    assert found == squares(side)
    assert len(found) == 1 + 4 + 9
    seen = np.zeros((side, side), int)
    for top, left, size in found[1:]:
        assert top + size <= side
        assert left + size <= side
        seen[top : top + size, left : left + size] += 1
    assert (seen > 0).all()


@pytest.mark.parametrize("side", [7, 8, 2])
def test_rmac_is_the_maximum_of_each_region_at_unit_norm(side):
    x = maps(side, side, 4)
    found = pooled("rmac", x)
    assert found.shape == (2, 14, 4)
    for b in range(2):
        for region, (top, left, size) in enumerate(squares(side)):
            window = x[b, top : top + size, left : left + size]
            wanted = np.array([max(window[..., c].ravel()) for c in range(4)])
            if wanted.any():
                wanted = at_unit_norm(wanted)
            np.testing.assert_allclose(found[b, region], wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("height", "width", "bins"), [(8, 8, 4), (7, 7, 3), (6, 5, 2), (5, 6, 1), (3, 3, 8), (2, 9, 4)]
)
def test_grid_is_the_mean_of_each_bin_at_unit_norm(height, width, bins):
    x = maps(height, width, 4) + 0.01
    rows, cols = min(bins, height), min(bins, width)
    found = pooled("grid", x, bins=bins)
    assert found.shape == (2, 1, rows * cols * 4)
    found = found.reshape(2, rows, cols, 4)
    for b, i, j in np.ndindex(2, rows, cols):
        window = x[
            b,
            math.floor(i * height / rows) : math.ceil((i + 1) * height / rows),
            math.floor(j * width / cols) : math.ceil((j + 1) * width / cols),
        ]
        wanted = at_unit_norm(np.array([np.mean(window[..., c]) for c in range(4)]))
        np.testing.assert_allclose(found[b, i, j], wanted, rtol=1e-5)


def normalised_by_hand(x):
    """Each tile's channels less their mean, over their deviation plus 0.1."""
    found = np.zeros_like(x, np.float64)
    for b, c in np.ndindex(len(x), x.shape[-1]):
        values = x[b, :, :, c].astype(float)
        mean = values.mean()
        found[b, :, :, c] = (values - mean) / (math.sqrt(((values - mean) ** 2).mean()) + 0.1)
    return found


def grid_of_normalised(x, bins):
    return np.asarray(jax.jit(Pool("grid", bins, instance_norm=True).apply)({}, x))


def test_a_grid_of_a_normalised_map():
    x = maps(6, 6, 4)
    wanted = pooled("grid", normalised_by_hand(x).astype(np.float32), bins=3)
    np.testing.assert_allclose(grid_of_normalised(x, 3), wanted, atol=1e-4)


def test_light_that_shifts_a_channel_of_the_map_changes_no_normalised_grid():
    x = maps(6, 6, 4)
    shifted = x + np.float32([3, 0, -2, 1])
    np.testing.assert_allclose(grid_of_normalised(shifted, 3), grid_of_normalised(x, 3), atol=1e-4)
    assert np.abs(pooled("grid", shifted, bins=3) - pooled("grid", x, bins=3)).max() > 0.1


def test_a_map_without_contrast_has_a_finite_gradient():
    def total(x):
        return (Pool("grid", 2, instance_norm=True).apply({}, x) ** 2).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(jnp.ones((1, 4, 4, 3)))
    assert float(value) == 0
    assert np.isfinite(np.asarray(gradient)).all()


def test_the_gradient_of_a_maximum_goes_to_one_place_that_has_it():
    # Cut at 1, so that channels have several maxima.
    x = np.minimum(maps(), 1)
    dy = np.random.default_rng(1).normal(size=(2, 1, 3)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda x: (Pool("max", 1).apply({}, x) * dy).sum()))(x)
    most = x.max(axis=(1, 2), keepdims=True)
    assert ((x == most).sum(axis=(1, 2)) > 1).any()
    assert (np.asarray(gradient)[x != most] == 0).all()
    assert ((gradient != 0).sum(axis=(1, 2)) == 1).all()
    np.testing.assert_allclose(gradient.sum(axis=(1, 2)), dy[:, 0])


@pytest.mark.parametrize("kind", ["max", "mean", "sum", "gem", "rmac", "flatten", "grid"])
def test_every_tile_is_pooled_on_its_own(kind):
    x = maps(8, 8)
    params = {"power": 3.0} if kind == "gem" else {}
    together = pooled(kind, x, 4, **params)
    alone = pooled(kind, x[1:], 4, **params)
    np.testing.assert_allclose(together[1:], alone, rtol=1e-6)
    assert not np.allclose(together[0], together[1])


@pytest.mark.parametrize("kind", ["max", "mean", "sum", "rmac", "flatten", "grid"])
def test_only_gem_has_parameters(kind):
    assert Pool(kind, 2).init(jax.random.key(0), maps(4, 4)) == {}

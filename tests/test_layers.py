"""The fast formulations of `geomatch.nn.fast` against the plain operations and plain loops."""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geomatch.nn import fast, layers, trunks
from geomatch.nn.encoder import Encoder

pytest_plugins = ["small_fixtures"]

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
"""Largest difference, relative to the largest value."""


def close(found, wanted, dtype="float32"):
    found, wanted = (np.asarray(value, np.float32) for value in (found, wanted))
    assert found.shape == wanted.shape
    scale = max(np.abs(wanted).max(initial=0), 1e-3)
    np.testing.assert_allclose(found / scale, wanted / scale, rtol=0, atol=TOLERANCE[dtype])


def values(shape, seed, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.dtype(dtype))


def wide(*arrays):
    return [array.astype(jnp.float32) for array in arrays]


CONVOLUTIONS = [
    # height, width, kernel, stride, edge
    (12, 12, 1, 1, 0),
    (11, 13, 1, 2, 0),
    (9, 11, 3, 1, 0),
    (13, 10, 3, 2, 1),
    (12, 12, 3, 2, 1),
    (8, 8, 3, 2, 0),
    (16, 16, 7, 2, 3),
    (13, 9, 7, 2, 3),
    (4, 4, 3, 1, 1),
    (3, 5, 3, 2, 1),
    (1, 1, 3, 1, 1),
    (1, 1, 3, 2, 1),
    (4, 6, 3, 1, 0),
]


@partial(jax.jit, static_argnums=0)
def with_gradients(function, arguments, dy):
    """What a function gives, and the gradient of each argument for that of the result."""
    result, pull = jax.vjp(function, *arguments)
    return result, pull(dy.astype(result.dtype))


def compare(fast, plain, arguments, shape, dtype):
    """See that both agree, `plain` computing in float32."""
    dy = values(shape, 9, dtype)
    found, gradients = with_gradients(fast, arguments, dy)
    wanted, wanted_gradients = with_gradients(plain, wide(*arguments), *wide(dy))
    assert found.dtype == arguments[0].dtype
    close(found, wanted, dtype)
    for mine, theirs, of in zip(gradients, wanted_gradients, arguments, strict=True):
        assert mine.dtype == of.dtype
        close(mine, theirs, dtype)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [(form, "float32") for form in CONVOLUTIONS]
    + [(form, "bfloat16") for form in CONVOLUTIONS if form[2] == 3],
)
def test_conv_equals_the_plain_one_with_its_gradients(form, dtype):
    height, width, k, stride, edge = form
    arguments = values((2, height, width, 3), 0, dtype), values((k, k, 3, 4), 1, dtype)
    out = [(size + 2 * edge - k) // stride + 1 for size in (height, width)]
    compare(
        lambda x, w: fast.conv(x, w, stride, edge),
        lambda x, w: fast.conv_plain(x, w, stride, edge),
        arguments,
        (2, *out, 4),
        dtype,
    )


def test_conv_equals_plain_loops():
    x, kernel = values((1, 5, 6, 2), 0), values((3, 3, 2, 3), 1)
    padded = np.zeros((7, 8, 2))
    padded[1:-1, 1:-1] = x[0]
    wanted = np.zeros((1, 3, 3, 3))
    for i in range(3):
        for j in range(3):
            for f in range(3):
                window = padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
                wanted[0, i, j, f] = (window * np.asarray(kernel[..., f])).sum()
    close(fast.conv(x, kernel, 2, 1), wanted)
    close(fast.conv_plain(x, kernel, 2, 1), wanted)


def normalised(x, scale, bias):
    """BatchNorm in two passes over the batch."""
    mean = x.mean((0, 1, 2))
    variance = ((x - mean) ** 2).mean((0, 1, 2))
    return (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(4, 6, 5, 3), (8, 1, 1, 4), (3, 9, 9, 1)])
def test_batch_norm_equals_two_passes_with_its_gradients(shape, dtype):
    x = 2 * values(shape, 0, dtype) + jnp.asarray(1.5, dtype)
    scale, bias = values(shape[-1:], 1), values(shape[-1:], 2)
    compare(
        lambda *a: fast.batch_norm(*a, 1e-5, None)[0], normalised, (x, scale, bias), shape, dtype
    )


def test_batch_norm_gives_the_statistics_it_used():
    x = values((3, 4, 5, 2), 0) * 3 + 1
    _, mean, variance = fast.batch_norm(x, jnp.ones(2), jnp.zeros(2), 1e-5, None)
    close(mean, np.asarray(x).mean((0, 1, 2)))
    close(variance, np.asarray(x).var((0, 1, 2)))


@pytest.mark.parametrize("form", [fast.batch_norm, fast.batch_norm_plain])
def test_batch_norm_on_two_devices_is_that_of_the_global_batch(form):
    x, weights = values((8, 3, 3, 4), 0) * 2 + 1, values((8, 3, 3, 4), 1)
    scale, bias = values((4,), 2), values((4,), 3)

    def step(x, weights, scale, bias):
        def loss(x, scale, bias):
            y, *_ = form(x, scale, bias, 1e-5, "devices")
            return (y * weights).mean(), y

        (_, y), (dx, dscale, dbias) = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(
            x, scale, bias
        )
        return y, dx, *(jax.lax.pmean(g, "devices") for g in (dscale, dbias))

    halves = [array.reshape(2, 4, *array.shape[1:]) for array in (x, weights)]
    y, dx, dscale, dbias = jax.pmap(step, "devices", in_axes=(0, 0, None, None))(
        *halves, scale, bias
    )

    def whole(x, scale, bias):
        return (normalised(x, scale, bias) * weights).mean()

    wanted = jax.grad(whole, (0, 1, 2))(x, scale, bias)
    close(y.reshape(x.shape), normalised(x, scale, bias))
    # The global loss is the mean of the devices', so theirs have twice the gradient.
    close(dx.reshape(x.shape) / 2, wanted[0])
    close(dscale[0], wanted[1])
    close(dbias[0], wanted[2])
    # Statistics of each half alone would give something else.
    local = jnp.concatenate([normalised(half, scale, bias) for half in halves[0]])
    assert np.abs(y.reshape(x.shape) - local).max() > 0.01


def test_batch_norm_follows_the_statistics_and_infers_with_them():
    x = values((4, 3, 3, 2), 0) * 2 + 5
    training, inferring = layers.BatchNorm(train=True), layers.BatchNorm(train=False)
    variables = training.init(jax.random.key(0), x)
    fresh = {
        "params": variables["params"],
        "batch_stats": {"mean": jnp.zeros(2), "var": jnp.ones(2)},
    }
    _, changed = training.apply(fresh, x, mutable=["batch_stats"])
    mean = 0.1 * np.asarray(x).mean((0, 1, 2))
    variance = 0.9 + 0.1 * np.asarray(x).var((0, 1, 2))
    close(changed["batch_stats"]["mean"], mean)
    close(changed["batch_stats"]["var"], variance)
    y = inferring.apply({**fresh, **changed}, x)
    close(y, (np.asarray(x) - mean) / np.sqrt(variance + 1e-5))


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (6, 5), (2, 2), (1, 1), (1, 4)])
def test_max_pool_equals_flax_with_its_gradient(size):
    # All values differ (from the zeros around, too), so that the gradient has one place to go.
    numbers = np.random.default_rng(0).permutation(2 * math.prod(size) * 3) + 1
    x = jnp.asarray(numbers.reshape(2, *size, 3), jnp.float32)

    def wanted(x):
        return nn.max_pool(x, (3, 3), (2, 2), padding=[(1, 1), (1, 1)])

    y, pull = jax.vjp(fast.max_pool_3x3, x)
    plain, pull_plain = jax.vjp(wanted, x)
    np.testing.assert_array_equal(y, plain)
    dy = values(y.shape, 1)
    close(pull(dy)[0], pull_plain(dy)[0])


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (6, 6), (7, 7), (5, 9), (12, 4), (3, 2), (2, 8)])
def test_mean_pool_follows_the_adaptive_rule(size):
    height, width = size
    x = np.asarray(values((2, height, width, 3), 0))
    rows, cols = min(4, height), min(4, width)
    wanted = np.zeros((2, rows, cols, 3))
    for i in range(rows):
        for j in range(cols):
            top, bottom = math.floor(i * height / rows), math.ceil((i + 1) * height / rows)
            left, right = math.floor(j * width / cols), math.ceil((j + 1) * width / cols)
            wanted[:, i, j] = x[:, top:bottom, left:right].mean(axis=(1, 2))
    close(layers.mean_pool_to(jnp.asarray(x), 4), wanted)


def tiny(**options):
    return trunks.ResNet(block=trunks.Bottleneck, stages=(1,), width=4, **options)


def test_both_backends_have_the_same_variables_and_results(monkeypatch):
    monkeypatch.setitem(trunks.TRUNKS, "tiny", tiny)
    encoder = Encoder("tiny", "pool", "max", 8, False, 3, 0)
    tiles = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)), jnp.uint8)

    def init_and_apply(variables=None):
        init, apply = (partial(f, train=True) for f in (encoder.init, encoder.apply))
        shapes = jax.eval_shape(init, jax.random.key(0), tiles)
        variables = variables or jax.jit(init)(jax.random.key(0), tiles)
        return (
            shapes,
            variables,
            *jax.jit(partial(apply, mutable=["batch_stats"]))(variables, tiles),
        )

    shapes, variables, found, changed = init_and_apply()
    monkeypatch.setattr(layers, "_on_cpu", lambda: False)
    plain_shapes, _, wanted, wanted_changed = init_and_apply(variables)
    assert plain_shapes == shapes
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(*map(jax.tree.leaves, (changed, wanted_changed)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)

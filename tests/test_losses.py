"""Losses against plain loops, and the loss of a batch from its descriptors."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geomatch.nn.losses import binary_cross_entropy, head_penalty, info_nce


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_bce_equals_plain_loops():
    logits = [-3.0, -0.2, 0.0, 0.7, 4.0, 1.5]
    matching = [0, 1, 1, 0, 1, 0]
    terms = [
        -math.log(sigmoid(x)) if y else -math.log(1 - sigmoid(x))
        for x, y in zip(logits, matching, strict=True)
    ]
    found = binary_cross_entropy(jnp.array(logits), jnp.array(matching, float))
    assert float(found) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_bce_does_not_overflow():
    logits = jnp.array([1000.0, -1000.0, 1000.0, -1000.0])
    matching = jnp.array([1.0, 0.0, 0.0, 1.0])
    loss, gradient = jax.value_and_grad(binary_cross_entropy)(logits, matching)
    assert float(loss) == pytest.approx((0 + 0 + 1000 + 1000) / 4)
    np.testing.assert_allclose(gradient, [0, 0, 0.25, -0.25], atol=1e-6)


def test_bce_gradient_is_the_error_of_the_probability():
    logits, matching = [-2.0, 0.3, 1.1], [1.0, 0.0, 1.0]
    gradient = jax.grad(binary_cross_entropy)(jnp.array(logits), jnp.array(matching))
    wanted = [(sigmoid(x) - y) / 3 for x, y in zip(logits, matching, strict=True)]
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5)


def test_head_penalty_is_s1_s_at_512_px_alone():
    rng = np.random.default_rng(0)
    conv, dense = rng.normal(size=(3, 3, 2, 4)), rng.normal(size=(5, 6))
    head = {
        "Conv_0": {"kernel": jnp.array(conv), "bias": jnp.full(4, 9.0)},
        "Dense_0": {"kernel": jnp.array(dense), "bias": jnp.full(6, 9.0)},
    }
    params = {"encoder": {"head": head, "trunk": {"stem": {"kernel": jnp.ones(3)}}}}
    squares = 2e-4 * sum(v * v for v in conv.ravel()) + 1e-3 * sum(v * v for v in dense.ravel())
    assert float(head_penalty(params, 512)) == pytest.approx(squares, rel=1e-5)
    assert float(head_penalty(params, 256)) == 0
    assert float(head_penalty({"encoder": {}}, 512)) == 0


def test_info_nce_equals_plain_loops():
    rng = np.random.default_rng(0)
    queries, candidates = rng.normal(size=(3, 4)), rng.normal(size=(5, 4))
    match, temperature = [1, 0, 4], 0.3
    neutral = np.zeros((3, 5), bool)
    # A match may itself be marked as common ground; query 1 leaves out candidate 3.
    neutral[0, 1] = neutral[1, 3] = True
    total = 0.0
    for i in range(3):
        weights = [
            math.exp(float(queries[i] @ candidates[j]) / temperature)
            if j == match[i] or not neutral[i, j]
            else 0.0
            for j in range(5)
        ]
        total -= math.log(weights[match[i]] / sum(weights))
    found = info_nce(
        jnp.array(queries),
        jnp.array(candidates),
        jnp.array(match),
        jnp.array(neutral),
        jnp.array(temperature),
    )
    assert float(found) == pytest.approx(total / 3, rel=1e-5)


def test_info_nce_has_a_finite_gradient_beside_neutral_candidates():
    rows = jnp.eye(3)
    neutral = jnp.array([[True, True, True], [False, True, False], [False, False, True]])

    def loss(rows):
        return info_nce(rows, rows, jnp.arange(3), neutral, jnp.array(0.01))

    value, gradient = jax.value_and_grad(loss)(rows)
    assert np.isfinite(float(value))
    assert np.isfinite(np.asarray(gradient)).all()

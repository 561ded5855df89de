"""Optimizers and learning rates, recomputed by hand."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from geomatch.config import TrainConfig
from geomatch.nn.optimizers import optimizer, schedule

OPTIMIZERS = ("adam", "adamw", "sgd", "ranger")


def tree(seed=0):
    """Parameters of each kind, as host arrays."""
    rng = np.random.default_rng(seed)
    return {
        "conv": {"kernel": rng.normal(size=(3, 3, 2, 4)), "bias": rng.normal(size=4)},
        "norm": {"scale": rng.normal(size=4), "bias": rng.normal(size=4)},
        "dense": {"kernel": rng.normal(size=(4, 3))},
        "temperature": rng.normal(size=()),
    }


def arrays(values):
    return jax.tree.map(lambda v: jnp.array(v, jnp.float32), values)


def parameters_after(train, gradients, scales=None, steps=100, steps_per_epoch=10):
    """Parameters after each gradient."""
    rule = optimizer(train, steps, steps_per_epoch, scales)
    update = jax.jit(rule.update)
    params = arrays(tree())
    state, passed = rule.init(params), []
    for gradient in gradients:
        updates, state = update(arrays(gradient), state, params)
        params = optax.apply_updates(params, updates)
        passed.append(params)
    return passed


def assert_trees_close(found, wanted, rtol=2e-5, atol=2e-6):
    jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, rtol, atol), found, wanted)


def decayed(values, weight):
    """`weight` times kernels, 0 for the rest."""
    return jax.tree.map(lambda v: weight * v * (np.ndim(v) >= 2), values)


def add(*trees):
    return jax.tree.map(lambda *values: sum(values), *trees)


def adam_directions(gradients):
    """Adam's steps for a learning rate of 1."""
    m = v = jax.tree.map(np.zeros_like, gradients[0])
    for t, gradient in enumerate(gradients, 1):
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradient)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, gradient)
        c, d = 1 - 0.9**t, 1 - 0.999**t
        yield jax.tree.map(lambda m, v, c=c, d=d: -(m / c) / (np.sqrt(v / d) + 1e-8), m, v)


def test_adam_by_hand():
    gradients = [tree(seed) for seed in range(1, 5)]
    params, lr = tree(), 0.01
    for direction in adam_directions(gradients):
        params = add(params, jax.tree.map(lambda u: lr * u, direction))
    assert_trees_close(parameters_after(TrainConfig(lr=lr), gradients)[-1], params)


def test_weight_decay_of_adam_is_a_gradient_of_kernels():
    gradient, lr, weight = tree(1), 0.01, 0.5
    (direction,) = adam_directions([add(gradient, decayed(tree(), weight))])
    wanted = add(tree(), jax.tree.map(lambda u: lr * u, direction))
    (found,) = parameters_after(TrainConfig(lr=lr, weight_decay=weight), [gradient])
    assert_trees_close(found, wanted)


def test_weight_decay_of_adamw_is_decoupled_and_of_kernels():
    gradients = [tree(seed) for seed in range(1, 5)]
    params, lr, weight = tree(), 0.01, 0.5
    for direction in adam_directions(gradients):
        moved = jax.tree.map(lambda u: lr * u, direction)
        params = add(params, moved, decayed(params, -lr * weight))
    train = TrainConfig(lr=lr, optimizer="adamw", weight_decay=weight)
    found = parameters_after(train, gradients)[-1]
    assert_trees_close(found, params)
    plain = parameters_after(dataclasses.replace(train, weight_decay=0), gradients)[-1]
    assert_trees_close(found["norm"], plain["norm"], rtol=0, atol=0)
    assert not np.allclose(found["conv"]["kernel"], plain["conv"]["kernel"])


def test_sgd_has_nesterov_momentum_by_hand():
    gradients = [tree(seed) for seed in range(1, 5)]
    lr, momentum, weight = 0.01, 0.8, 0.3
    params, trace = tree(), jax.tree.map(np.zeros_like, tree())
    for gradient in gradients:
        gradient = add(gradient, decayed(params, weight))
        trace = jax.tree.map(lambda t, g: momentum * t + g, trace, gradient)
        step = jax.tree.map(lambda t, g: -lr * (g + momentum * t), trace, gradient)
        params = add(params, step)
    train = TrainConfig(lr=lr, optimizer="sgd", momentum=momentum, weight_decay=weight)
    assert_trees_close(parameters_after(train, gradients)[-1], params)


@pytest.mark.parametrize("clip", [0.0, 0.1, 1000.0])
def test_clip_is_the_largest_norm_of_all_gradients_together(clip):
    gradient, lr = tree(1), 0.1
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
    assert 0.1 < norm < 1000
    factor = clip / norm if clip == 0.1 else 1
    wanted = jax.tree.map(lambda p, g: p - lr * factor * g, tree(), gradient)
    train = TrainConfig(lr=lr, optimizer="sgd", momentum=0.0, clip=clip)
    assert_trees_close(parameters_after(train, [gradient])[0], wanted)


@pytest.mark.parametrize(("scaled", "weight"), [(False, 0.0), (True, 0.0), (True, 0.5)])
def test_ranger_goes_back_half_of_every_six_steps_of_radam(scaled, weight):
    gradients = [tree(seed) for seed in range(1, 21)]
    lr = 0.02
    scales = jax.tree.map(lambda _: 1.0, tree())
    if scaled:
        scales["conv"]["kernel"], scales["dense"]["kernel"] = 0.1, 0.0
    radam = optax.radam(lr)
    update = jax.jit(radam.update)
    fast = slow = arrays(tree())
    state, wanted = radam.init(fast), []
    for number, gradient in enumerate(gradients, 1):
        updates, state = update(arrays(gradient), state, fast)
        updates = add(updates, decayed(fast, -lr * weight))
        fast = add(fast, jax.tree.map(jnp.multiply, updates, scales))
        if number % 6 == 0:
            fast = slow = jax.tree.map(lambda s, f: s + 0.5 * (f - s), slow, fast)
        wanted.append(fast)
    train = TrainConfig(lr=lr, optimizer="ranger", weight_decay=weight)
    found = parameters_after(train, gradients, scales if scaled else None)
    for one, other in zip(found, wanted, strict=True):
        assert_trees_close(one, other)
    if scaled:
        kernels = [params["dense"]["kernel"] for params in (found[-1], arrays(tree()))]
        np.testing.assert_array_equal(*kernels)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scales_multiply_the_updates(name):
    train = TrainConfig(lr=0.01, optimizer=name, weight_decay=0.1, clip=1.0)
    scales = jax.tree.map(lambda _: 1.0, tree())
    scales["conv"]["kernel"], scales["norm"]["scale"] = 0.0, 3.0
    (plain,), (found,) = (parameters_after(train, [tree(1)], s) for s in (None, scales))
    start = arrays(tree())
    moved = jax.tree.map(lambda after, before, s: (after - before) * s, plain, start, scales)
    assert_trees_close(found, add(start, moved))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_has_one_form_whatever_the_settings(name):
    params = arrays(tree())
    scales = jax.tree.map(lambda _: 0.5, params)
    forms = set()
    for settings in (
        {},
        {"weight_decay": 0.1},
        {"clip": 1.0},
        {"schedule": "cosine", "warmup": 1.5},
        {"schedule": "exponential"},
    ):
        for factors in (None, scales):
            rule = optimizer(TrainConfig(optimizer=name, **settings), 100, 10, factors)
            state = rule.init(params)
            assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
            abstract = jax.eval_shape(rule.init, params)
            for one, other in zip(*map(jax.tree.leaves, (state, abstract)), strict=True):
                assert (one.shape, one.dtype) == (other.shape, other.dtype)
            forms |= {jax.tree.structure(state), jax.tree.structure(abstract)}
            updated = rule.update(arrays(tree(1)), state, params)[1]
            forms.add(jax.tree.structure(updated))
    assert len(forms) == 1


def test_the_slow_weights_are_no_buffers_of_the_parameters():
    rule = optimizer(TrainConfig(optimizer="ranger"), 100, 10)
    params = arrays(tree())
    state = rule.init(params)

    def step(params, state, gradient):
        updates, state = rule.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    # Donated twice, a buffer is an error.
    params, _ = jax.jit(step, donate_argnums=(0, 1))(params, state, arrays(tree(1)))
    assert np.isfinite(np.asarray(params["temperature"]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_orbax_keeps_the_state(name, tmp_path):
    rule = optimizer(TrainConfig(optimizer=name, weight_decay=0.1), 100, 10)
    params = arrays(tree())
    _, state = rule.update(arrays(tree(1)), rule.init(params), params)
    state = jax.tree.map(np.asarray, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        again = checkpointer.restore(tmp_path / "state", jax.eval_shape(rule.init, params))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def rates(train, *counts):
    """Learning rates of a run of 10 epochs of 20 steps, after so many steps."""
    rate = schedule(train, 200, 20)
    return [float(rate(jnp.array(count))) for count in counts]


def test_a_constant_rate():
    assert rates(TrainConfig(lr=0.3), 0, 1, 199) == pytest.approx([0.3] * 3)
    found = rates(TrainConfig(lr=0.3, warmup=2.0), 0, 1, 10, 40, 41, 199)
    assert found == pytest.approx([0, 0.3 / 40, 0.3 / 4, 0.3, 0.3, 0.3])


def test_a_cosine_falls_to_0_over_what_warm_up_leaves():
    assert rates(TrainConfig(lr=0.3, schedule="cosine"), 0, 50, 100, 200, 220) == pytest.approx(
        [0.3, 0.15 * (1 + math.cos(math.pi / 4)), 0.15, 0, 0], abs=1e-7
    )
    found = rates(TrainConfig(lr=0.3, schedule="cosine", warmup=0.5), 0, 5, 10, 105, 200)
    assert found == pytest.approx([0, 0.15, 0.3, 0.15, 0], abs=1e-7)


def test_an_exponential_falls_by_a_factor_each_epoch():
    train = TrainConfig(lr=0.3, schedule="exponential", decay=0.8)
    assert rates(train, 0, 10, 20, 200) == pytest.approx(
        [0.3, 0.3 * 0.8**0.5, 0.3 * 0.8, 0.3 * 0.8**10]
    )
    found = rates(dataclasses.replace(train, warmup=1.0), 0, 10, 20, 40, 200)
    assert found == pytest.approx([0, 0.15, 0.3, 0.3 * 0.8, 0.3 * 0.8**9])


def test_a_warm_up_longer_than_the_run_is_never_over():
    train = TrainConfig(lr=0.3, schedule="cosine", warmup=20.0)
    assert rates(train, 0, 200) == pytest.approx([0, 0.15])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_follow_the_schedule(name):
    # At a rate of 0, which warm-up begins with, nothing moves; weight decay neither.
    train = TrainConfig(lr=0.01, optimizer=name, warmup=1.0, weight_decay=0.1)
    first, second = parameters_after(train, [tree(1), tree(2)])
    assert_trees_close(first, arrays(tree()), rtol=0, atol=0)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first, second)
    assert min(jax.tree.leaves(moved)) > 0

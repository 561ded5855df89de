"""One training step: its loss from descriptors by hand, and the same on one and two devices."""

from __future__ import annotations

import dataclasses
import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geomatch import config
from geomatch.nn.encoder import Siamese
from geomatch.nn.step import TileForm, abstract_state, build, initial_state, make_step
from geomatch.nn.trunks import TRUNKS, BasicBlock, ResNet

pytest_plugins = ["small_fixtures"]

FORM = TileForm(16, 3, 1)
STILL = config.Augment(flips=False, turns=False, brightness=0.0, contrast=0.0, label_dropout=0.0)


@pytest.fixture(scope="module", autouse=True)
def _tiny():
    """A trunk that compiles quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRUNKS, "tiny", partial(ResNet, block=BasicBlock, stages=(1,), width=8))
        yield


def configured(loss="bce", changes=STILL, **train):
    return config.Config(
        model=config.Model(trunk="tiny", head="pool"),  # type: ignore[arg-type]
        train=config.Train(loss=loss, lr=1e-3, **train),
        augment=changes,
    )


def random_batch(roles, batch=4, seed=0):
    """Tiles (roles, batch, h, w, c), and cells (roles, batch, 3) all apart but for matches."""
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, 256, (roles, batch, 16, 16, 4), dtype=np.uint8)
    cells = np.zeros((roles, batch, 3), np.int32)
    cells[..., 0] = 32630
    cells[..., 1] = np.arange(roles)[:, None] * 1000 + np.arange(batch) * 10
    return tiles, cells


def shared(values, devices):
    """(roles, batch, ...) as (devices, roles, batch / devices, ...)."""
    roles, batch = values.shape[:2]
    parts = values.reshape(roles, devices, batch // devices, *values.shape[2:])
    return np.moveaxis(parts, 0, 1)


@functools.cache
def prepared(settings):
    model = build(settings, FORM)
    return model, initial_state(model, settings, FORM), make_step(model, settings, FORM, reach=1)


def run_step(settings, tiles, cells, devices=1):
    model, state, step = prepared(settings)
    after, loss = step(state, shared(tiles, devices), shared(cells, devices), np.uint32(0))
    return model, state, jax.tree.map(np.asarray, after), np.asarray(loss)


def gradient(after):
    """The gradient of a first step, from Adam's mean of it."""
    return jax.tree.map(lambda mean: np.asarray(mean) / 0.1, after.optimizer[0].mu)


def one_device(model):
    """The model outside of pmap, its BatchNorm over the batch it is given."""
    return Siamese(dataclasses.replace(model.encoder, axis_name=None))


def trained_descriptors(model, state, tiles):
    """(roles, batch, d) as the step sees them, and the BatchNorm statistics after."""
    flat = jnp.asarray(tiles.reshape(-1, *tiles.shape[2:]))
    apply = partial(one_device(model).apply, train=True, mutable=["batch_stats"])
    found, changed = jax.jit(apply)(state.variables, flat)
    return np.array(found).reshape(*tiles.shape[:2], -1), changed["batch_stats"]


def assert_near(found, wanted, tolerance=1e-4):
    """Trees of arrays, to a tolerance relative to the largest value of each array."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(("roles", "devices"), [(3, 2), (6, 1)])
def test_bce_of_a_batch_by_hand(roles, devices):
    tiles, cells = random_batch(roles)
    model, state, after, loss = run_step(configured(), tiles, cells, devices)
    rows, statistics = trained_descriptors(model, state, tiles)
    head = state.params["pair_head"]
    terms = []
    for first in range(0, roles, 3):
        for i in range(4):
            for other, match in ((first + 1, True), (first + 2, False)):
                apart = np.abs(rows[first, i] - rows[other, i])
                logit = float(head["bias"][0])
                for weight, value in zip(head["kernel"][:, 0], apart, strict=True):
                    logit += float(weight) * float(value)
                p = 1 / (1 + math.exp(-logit))
                terms.append(-math.log(p if match else 1 - p))
    assert len(terms) == 2 * 4 * roles // 3
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert_near(after.batch_stats, jax.tree.map(np.asarray, dict(statistics)))


@pytest.mark.parametrize("roles", [2, 5])
def test_info_nce_of_a_batch_by_hand(roles):
    tiles, cells = random_batch(roles)
    # An anchor's cell and its match's are one; item 0 of the first anchors lies beside item 1.
    pairs = [(0, 1)] if roles == 2 else [(0, 1), (2, 3)]
    for a, b in pairs:
        cells[b] = cells[a]
    cells[:2, 1] = cells[:2, 0] + [0, 1, 0]
    model, state, _, loss = run_step(configured("infonce"), tiles, cells)
    rows, _ = trained_descriptors(model, state, tiles)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    temperature = math.exp(float(state.params["log_temperature"]))

    def one_way(asking, answering, extra):
        terms = []
        for role, answer in zip(asking, answering, strict=True):
            for i in range(4):
                weights = []
                for other in (*answering, *extra):
                    for j in range(4):
                        delta = np.abs(cells[role, i] - cells[other, j])
                        own = other == answer and i == j
                        if own or delta[0] or delta[1] > 1 or delta[2] > 1:
                            cosine = float(rows[role, i] @ rows[other, j])
                            weights.append((own, math.exp(cosine / temperature)))
                terms.append(
                    -math.log(sum(w for own, w in weights if own) / sum(w for _, w in weights))
                )
        return sum(terms) / len(terms)

    anchors, positives = zip(*pairs, strict=True)
    wanted = one_way(anchors, positives, (4,) if roles == 5 else ())
    wanted = (wanted + one_way(positives, anchors, ())) / 2
    assert loss == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(("loss", "roles"), [("bce", 6), ("infonce", 5)])
def test_two_devices_take_the_step_of_one(loss, roles):
    tiles, cells = random_batch(roles)
    _, _, single, loss_of_one = run_step(configured(loss), tiles, cells)
    _, _, double, losses = run_step(configured(loss), tiles, cells, devices=2)
    assert losses.shape == (2,)
    assert losses == pytest.approx(np.full(2, loss_of_one[0]), rel=1e-5)
    assert_near(gradient(double), gradient(single))
    assert_near(double.batch_stats, single.batch_stats)


def test_the_gradient_is_that_of_the_whole_batch():
    tiles, cells = random_batch(3)
    model, state, after, _ = run_step(configured(), tiles, cells, devices=2)
    alone = one_device(model)

    @jax.jit
    @jax.grad
    def wanted(params):
        rows, _ = alone.apply(
            {"params": params, "batch_stats": state.batch_stats},
            tiles.reshape(-1, *tiles.shape[2:]),
            train=True,
            mutable=["batch_stats"],
        )
        anchor, positive, negative = rows.reshape(3, 4, -1)
        head = params["pair_head"]
        total = 0.0
        for other, sign in ((positive, 1), (negative, -1)):
            logits = jnp.abs(anchor - other) @ head["kernel"][:, 0] + head["bias"][0]
            total -= jax.nn.log_sigmoid(sign * logits).sum()
        return total / 8

    assert_near(gradient(after), jax.tree.map(np.asarray, wanted(state.params)))


def test_adam_moves_by_the_learning_rate_against_the_gradient():
    tiles, cells = random_batch(6)
    _, before, after, _ = run_step(configured(), tiles, cells)
    slopes = jax.tree.leaves(gradient(after))
    moved = [
        b - a for a, b in zip(*map(jax.tree.leaves, (before.params, after.params)), strict=True)
    ]
    clear = [np.abs(g) > 1e-3 for g in slopes]
    assert sum(c.sum() for c in clear) > 50
    for g, m, c in zip(slopes, moved, clear, strict=True):
        np.testing.assert_allclose(m[c], -1e-3 * np.sign(g[c]), rtol=0.01)


def test_randomness_is_of_the_seed_and_the_step_number():
    tiles, cells = random_batch(3)

    _, state, _ = prepared(configured())

    def losses(seed, *numbers):
        _, _, step = prepared(configured(changes=config.Augment(), seed=seed))
        batch = shared(tiles, 1), shared(cells, 1)
        return [float(step(state, *batch, np.uint32(number))[1][0]) for number in numbers]

    first, again, other = losses(0, 3, 3, 4)
    assert first == again
    assert len({first, other, *losses(1, 3)}) == 3


def test_abstract_state_has_the_shapes_of_the_initial_one():
    settings = configured()
    model, real, _ = prepared(settings)
    shapes = abstract_state(model, settings, FORM)
    assert jax.tree.structure(real) == jax.tree.structure(shapes)
    for leaf, shape in zip(jax.tree.leaves(real), jax.tree.leaves(shapes), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)


def test_the_seed_decides_the_weights():
    settings = configured()
    model, first, _ = prepared(settings)
    again = initial_state(model, settings, FORM)
    for a, b in zip(*map(jax.tree.leaves, (first, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    _, other, _ = prepared(configured(changes=config.Augment(), seed=1))
    kernels = [s.params["encoder"]["trunk"]["stem"]["kernel"] for s in (first, other)]
    assert not np.array_equal(*kernels)

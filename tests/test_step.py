"""One training step: its loss from descriptors by hand, and the same on one and two devices."""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_network import add_trunk, network

from geomatch import config
from geomatch.errors import UsageError
from geomatch.nn import step as step_module
from geomatch.nn.encoder import Siamese, TileForm, build
from geomatch.nn.objective import MatchRule
from geomatch.nn.step import (
    RunLength,
    abstract_state,
    initial_state,
    learning_rate_scales,
    make_step,
    replicate,
    with_params,
)
from geomatch.training.sampler import compares_whole_batch

FORM = TileForm(16, 3, 1)
MATCH_RULE, LENGTH = MatchRule(dated=True, reach=1), RunLength(steps=10, steps_per_epoch=5)
STILL = config.AugmentConfig(
    flips=False, turns=False, brightness=0.0, contrast=0.0, label_dropout=0.0
)


@pytest.fixture(scope="module", autouse=True)
def _tiny_trunks(module_patch):
    add_trunk(module_patch, width=8)
    add_trunk(module_patch, width=8, name="two", blocks=(1, 1))


POOL = {"trunk": "tiny", "head": "pool"}
MLP = {"head": "mlp", "hidden": (6,), "descriptor": 5, "dropout": 0.0}
BLOCKS = {"trunk": "two", **MLP}
SMALL = {"trunk": "convnet", "stage": 1, **MLP}


def configured(loss="bce", changes=STILL, model=POOL, **train):
    return config.Config(
        model=config.ModelConfig(**model),
        train=config.TrainConfig(**{"loss": loss, "lr": 1e-3, "dtype": "float32", **train}),
        augment=changes,
    )


def random_batch(roles, batch=4, seed=0):
    """Tiles (roles, batch, h, w, c), and places (roles, batch, 4) all apart but for matches."""
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, 256, (roles, batch, 16, 16, 4), dtype=np.uint8)
    places = np.zeros((roles, batch, 4), np.int32)
    places[..., 0] = 32630
    places[..., 1] = np.arange(roles)[:, None] * 1000 + np.arange(batch) * 10
    places[..., 3] = np.arange(roles)[:, None] % 2
    return tiles, places


def shared(values, devices):
    """(roles, batch, ...) as (devices, roles, batch / devices, ...)."""
    roles, batch = values.shape[:2]
    parts = values.reshape(roles, devices, batch // devices, *values.shape[2:])
    return np.moveaxis(parts, 0, 1)


@functools.cache
def prepared(settings):
    model = build(settings, FORM)
    return model, initial_state(model, settings, FORM), stepping(model, settings)


def stepping(model, settings, match_rule=MATCH_RULE):
    views = settings.train.views if compares_whole_batch(settings.train, settings.mining) else 0
    return make_step(model, settings, FORM, match_rule, LENGTH, views)


def run_step(settings, tiles, places, devices=1, state=None):
    model, first, step = prepared(settings)
    state = state or first
    # A step takes its state, which is asked for again.
    own = jax.tree.map(np.array, state)
    after, metrics = step(own, shared(tiles, devices), shared(places, devices), np.uint32(0))
    return model, state, jax.tree.map(np.asarray, after), np.asarray(metrics)[:, 0]


def gradient(after):
    """The gradient of a first step, from Adam's mean of it."""
    return jax.tree.map(lambda mean: np.asarray(mean) / 0.1, optax.tree.get(after.optimizer, "mu"))


def one_device(model):
    """The model outside of pmap, its BatchNorm over the batch it is given."""
    shared = dataclasses.replace(model.encoder.shared, axis_name=None)
    return Siamese(model.encoder.clone(shared=shared))


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


def bce_by_hand(rows, head):
    """The loss of descriptors (roles, batch, d): triplets of an anchor, its match and another."""
    terms = []
    for first in range(0, len(rows), 3):
        for i in range(rows.shape[1]):
            for other, match in ((first + 1, True), (first + 2, False)):
                apart = np.abs(rows[first, i] - rows[other, i])
                logit = float(head["bias"][0])
                for weight, value in zip(head["kernel"][:, 0], apart, strict=True):
                    logit += float(weight) * float(value)
                p = 1 / (1 + math.exp(-logit))
                terms.append(-math.log(p if match else 1 - p))
    assert len(terms) == 2 * rows.shape[1] * len(rows) // 3
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("model", "roles", "devices"), [(POOL, 3, 2), (POOL, 6, 1), (SMALL, 3, 2)])
def test_bce_of_a_batch_by_hand(model, roles, devices):
    tiles, places = random_batch(roles)
    model, state, after, loss = run_step(configured(model=model), tiles, places, devices)
    rows, statistics = trained_descriptors(model, state, tiles)
    assert loss == pytest.approx(bce_by_hand(rows, state.params["pair_head"]), rel=1e-4)
    assert_near(after.batch_stats, jax.tree.map(np.asarray, dict(statistics)))


@pytest.mark.parametrize("roles", [2, 5])
def test_info_nce_of_a_batch_by_hand(roles):
    tiles, places = random_batch(roles)
    # An anchor's cell and its match's are one; item 0 of the first anchors lies beside item 1.
    pairs = [(0, 1)] if roles == 2 else [(0, 1), (2, 3)]
    for a, b in pairs:
        places[b] = places[a]
    places[:2, 1] = places[:2, 0] + [0, 1, 0, 0]
    model, state, _, loss = run_step(configured("infonce"), tiles, places)
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
                        delta = np.abs(places[role, i] - places[other, j])
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


@pytest.mark.parametrize(
    ("loss", "roles", "model", "changes"),
    [
        ("bce", 6, POOL, STILL),
        ("infonce", 5, POOL, STILL),
        # What is drawn at random is of a tile's place in the batch.
        ("infonce", 2, {**SMALL, "dropout": 0.5}, config.AugmentConfig()),
    ],
)
def test_two_devices_take_the_step_of_one(loss, roles, model, changes):
    tiles, places = random_batch(roles)
    settings = configured(loss, changes, model=model)
    _, _, single, loss_of_one = run_step(settings, tiles, places)
    _, _, double, losses = run_step(settings, tiles, places, devices=2)
    assert losses.shape == (2,)
    assert losses == pytest.approx(np.full(2, loss_of_one[0]), rel=1e-5)
    assert_near(gradient(double), gradient(single))
    assert_near(double.batch_stats, single.batch_stats)


def test_the_gradient_is_that_of_the_whole_batch():
    tiles, places = random_batch(3)
    model, state, after, _ = run_step(configured(), tiles, places, devices=2)
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
    tiles, places = random_batch(6)
    _, before, after, _ = run_step(configured(), tiles, places)
    slopes = jax.tree.leaves(gradient(after))
    moved = [
        b - a for a, b in zip(*map(jax.tree.leaves, (before.params, after.params)), strict=True)
    ]
    clear = [np.abs(g) > 1e-3 for g in slopes]
    assert sum(c.sum() for c in clear) > 50
    for g, m, c in zip(slopes, moved, clear, strict=True):
        np.testing.assert_allclose(m[c], -1e-3 * np.sign(g[c]), rtol=0.01)


@pytest.mark.parametrize(
    ("loss", "roles", "devices", "more"),
    [
        ("bce", 6, 2, {}),
        ("triplet", 3, 1, {}),
        ("infonce", 5, 2, {"distil": 0.5}),
        ("multi-similarity", 2, 1, {}),
        ("in-batch", 2, 2, {}),
    ],
)
def test_micro_batches_give_the_gradient_of_the_batch(loss, roles, devices, more):
    """Statistics are frozen, since those of micro-batches differ."""
    tiles, places = random_batch(roles, batch=8)
    places[: 2 * (roles != 3), :, 1] = np.arange(8) * 10

    def of(accumulate):
        settings = configured(
            "triplet" if loss == "in-batch" else loss,
            config.AugmentConfig(),
            accumulate=accumulate,
            freeze=("batch_norm",),
            **more,
        )
        if loss == "in-batch":
            settings = dataclasses.replace(settings, mining=config.MiningConfig(rule="in-batch"))
        return run_step(settings, tiles, places, devices)

    (_, before, whole, wanted), (_, _, parts, found) = of(1), of(4)
    assert wanted[0] > 0
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert_near(gradient(parts), gradient(whole), 1e-5)
    assert np.abs(gradient(whole)["encoder"]["trunk"]["stem"]["kernel"]).max() > 0
    for ours, theirs in zip(
        jax.tree.leaves(parts.batch_stats), jax.tree.leaves(before.batch_stats), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_micro_batches_keep_the_mean_of_their_statistics():
    tiles, places = random_batch(3)
    _, state, after, loss = run_step(configured(accumulate=2), tiles, places)
    model, halves = build(configured(), FORM), (tiles[:, :2], tiles[:, 2:])
    rows, stats = zip(*(trained_descriptors(model, state, half) for half in halves), strict=True)
    by_hand = [bce_by_hand(half, state.params["pair_head"]) for half in rows]
    assert loss == pytest.approx(np.mean(by_hand), rel=1e-4)
    assert_near(after.batch_stats, jax.tree.map(lambda a, b: np.asarray(a + b) / 2, *stats))


@pytest.mark.parametrize(
    "trunk",
    [
        "convnet",
        *(pytest.param(t, marks=pytest.mark.slow) for t in ("two", "efficientnet_lite0", "vgg16")),
    ],
)
def test_activations_computed_again_give_the_same_step_and_fewer_are_kept(trunk):
    tiles, places = random_batch(2)
    model = {"trunk": trunk, "stage": 2, "head": "pool"}
    (_, _, plain, wanted), (_, _, again, found) = (
        run_step(configured("infonce", model=model, remat=remat), tiles, places, devices=2)
        for remat in (False, True)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert_near(gradient(again), gradient(plain), 1e-5)
    if trunk in ("two", "efficientnet_lite0"):
        assert_near(again.batch_stats, plain.batch_stats, 1e-6)

    def kept(remat):
        network = one_device(build(configured(model=model, remat=remat), FORM))
        variables = jax.eval_shape(network.init, jax.random.key(0), tiles[0])

        def pull(variables, tiles):
            def loss(params):
                apply = partial(network.apply, train=True, mutable=["batch_stats"])
                return apply({**variables, "params": params}, tiles)[0].sum()

            return jax.vjp(loss, variables["params"])[1]

        found = jax.eval_shape(pull, variables, tiles[0])
        return sum(leaf.size for leaf in jax.tree.leaves(found) if leaf.shape[:1] == (4,))

    assert kept(True) < kept(False)


def test_distillation_keeps_the_similarities_of_the_first_network():
    """A strong one holds back what a loss alone would change; the teacher stays as it was."""
    tiles, places = random_batch(2, batch=8)
    places[..., 1] = np.arange(8) * 10

    def features(model, variables):
        flat = tiles.reshape(-1, *tiles.shape[2:])
        apply = partial(one_device(model).apply, method=Siamese.features)
        rows = np.asarray(jax.jit(apply)(variables, flat)).reshape(2, 8, -1)
        rows = rows - rows.mean(axis=(0, 1))
        rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
        return rows[0] @ rows[1].T

    def trained(distil):
        settings = configured("infonce", lr=3e-2, distil=distil)
        model, first, step = prepared(settings)
        state = first
        for number in range(12):
            own = jax.tree.map(np.array, state)
            state, _ = step(own, shared(tiles, 1), shared(places, 1), np.uint32(number))
        for ours, theirs in zip(
            jax.tree.leaves(state.teacher), jax.tree.leaves(first.teacher), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
        assert bool(first.teacher) == (distil > 0)
        return np.abs(features(model, state.variables) - features(model, first.variables)).mean()

    assert trained(30.0) < 0.5 * trained(0.0)


@pytest.mark.parametrize("devices", [1, 2])
def test_memory_used_again_changes_nothing(monkeypatch, devices):
    """Batches of two sizes in turn, with all activations kept and with none."""
    settings = configured()
    batches = [random_batch(roles=3, batch=size, seed=size) for size in (4, 4, 2, 4)]

    def trained(least):
        monkeypatch.setattr(step_module, "MIN_KEPT_BYTES", least)
        model = build(settings, FORM)
        state, step = initial_state(model, settings, FORM), stepping(model, settings)
        metrics = []
        for number, (tiles, places) in enumerate(batches):
            state, told = step(
                state, shared(tiles, devices), shared(places, devices), np.uint32(number)
            )
            metrics.append(np.asarray(told)[:, 0])
        return metrics, jax.tree.map(np.asarray, state.variables)

    assert_near(trained(least=0), trained(least=2**40), 1e-5)


def test_compiled_programs_can_be_freed():
    """Each has hundreds of memory maps, and a process that trains many runs has few."""

    def living():
        state, step = initial_state(model, settings, FORM), stepping(model, settings)
        step(state, shared(tiles, 2), shared(places, 2), np.uint32(0))
        with_step = len(client.live_executables())
        del step, state
        jax.clear_caches()
        gc.collect()
        return with_step, len(client.live_executables())

    settings, client = configured(), jax.local_devices()[0].client
    model, (tiles, places) = build(settings, FORM), random_batch(3)
    _, before = living()
    with_step, after = living()
    assert with_step > before
    assert after == before


def test_what_is_kept_is_of_the_images():
    weights, tiles = jnp.ones((8, 8)), jnp.ones((4, 8))
    _, pull = jax.vjp(lambda w: jnp.sin(tiles @ w).sum(), weights)
    kept = step_module._activations(pull, 4)
    assert {x.shape for x in kept} <= {(4, 8)}
    _, pull = jax.vjp(lambda w: jnp.sin(jnp.ones((4, 2**16)) * w).sum(), 1.0)
    assert {x.shape for x in step_module._activations(pull, 4)} == {(4, 2**16)}
    assert step_module._activations(pull, 5) == []


def test_randomness_is_of_the_seed_and_the_step_number():
    tiles, places = random_batch(3)

    _, state, _ = prepared(configured())

    def losses(seed, *numbers):
        _, _, step = prepared(configured(changes=config.AugmentConfig(), seed=seed))
        batch = shared(tiles, 1), shared(places, 1)
        own = partial(jax.tree.map, np.array, state)
        return [float(step(own(), *batch, np.uint32(number))[1][0, 0]) for number in numbers]

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
    _, other, _ = prepared(configured(changes=config.AugmentConfig(), seed=1))
    kernels = [s.params["encoder"]["trunk"]["stem"]["kernel"] for s in (first, other)]
    assert not np.array_equal(*kernels)


def losses_of_steps(settings, numbers, devices=1, alike=False):
    """The loss of a first step under several numbers; `alike`: each device has the same tiles."""
    tiles, places = random_batch(3)
    _, state, step = prepared(settings)
    own = partial(jax.tree.map, np.array, state)
    batch = [shared(values, 1 if alike else devices) for values in (tiles, places)]
    if alike:
        batch = [np.repeat(values, devices, axis=0) for values in batch]
    return [float(step(own(), *batch, np.uint32(number))[1][0, 0]) for number in numbers]


def test_dropout_is_of_the_seed_and_the_step_number():
    settings = configured(model={**SMALL, "dropout": 0.5})
    first, again, other = losses_of_steps(settings, (3, 3, 4))
    assert first == again
    reseeded = dataclasses.replace(settings.train, seed=1)
    state = prepared(settings)[1]
    step = stepping(prepared(settings)[0], dataclasses.replace(settings, train=reseeded))
    batch = [shared(values, 1) for values in random_batch(3)]
    elsewhere = float(step(jax.tree.map(np.array, state), *batch, np.uint32(3))[1][0, 0])
    assert len({first, other, elsewhere}) == 3
    # All else stands still.
    still = losses_of_steps(configured(model=SMALL), (3, 4))
    assert still[0] == still[1]


def test_every_device_drops_values_of_its_own():
    dropping, still = configured(model={**SMALL, "dropout": 0.5}), configured(model=SMALL)
    # Were both to drop the same, two devices with the same tiles would have the loss of one.
    for settings, same in ((dropping, False), (still, True)):
        (one,), (both,) = (
            losses_of_steps(settings, (0,), devices, alike=True) for devices in (1, 2)
        )
        assert (abs(one - both) < 1e-5 * one) == same


# Parts that do not learn, or not as fast.


def drawn_state(settings, seed=0):
    """A state whose every parameter has a gradient; initial residual branches are silent."""
    _, state, _ = prepared(settings)
    model = {key: getattr(settings.model, key) for key in BLOCKS}
    _, variables = network(FORM, seed, **model)
    return with_params(state, settings, variables["params"], variables["batch_stats"])


def named(tree):
    """Leaves by their path: "encoder/trunk/stem/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


@functools.cache
def movements(**train):
    """How far a first step moves each parameter and statistic of the same state."""
    settings = configured(model=BLOCKS, lr=1e-2, **train)
    state = drawn_state(settings)
    _, _, after, _ = run_step(settings, *random_batch(3), state=state)
    before, after = (
        {**named(each.params), **{f"{k} of batches": v for k, v in named(each.batch_stats).items()}}
        for each in (state, after)
    )
    assert all(np.isfinite(leaf).all() for leaf in after.values())
    return {name: after[name] - before[name] for name in before}


def test_all_learns_that_the_loss_depends_on():
    moved = {name for name, by in movements().items() if by.any()}
    assert movements().keys() - moved == {"log_temperature"}
    assert {name for name in moved if name.endswith("of batches")} >= {
        "encoder/trunk/stage2_block1/shortcut/var of batches",
        "encoder/head/BatchNorm_0/mean of batches",
    }


@pytest.mark.parametrize(
    ("freeze", "kept"),
    [
        (("trunk",), ("encoder/trunk/",)),
        (("trunk/stem", "trunk/stage1"), ("encoder/trunk/stem/", "encoder/trunk/stage1_block1/")),
        (("head", "fusion", "pair_head"), ("encoder/head/", "encoder/fusion/", "pair_head/")),
    ],
)
def test_frozen_parts_stay_as_they_are_and_the_rest_learns(freeze, kept):
    moved = movements(freeze=freeze)
    free = {name for name, by in movements().items() if by.any()}
    frozen = {name for name in free if name.startswith(kept)}
    assert frozen
    assert {name for name, by in moved.items() if by.any()} == free - frozen


def test_frozen_statistics_alone_stay_and_all_weights_learn():
    moved = {name for name, by in movements(freeze=("batch_norm",)).items() if by.any()}
    free = {name for name, by in movements().items() if by.any()}
    assert moved == {name for name in free if not name.endswith("of batches")}


def test_frozen_parts_stay_over_many_steps_on_two_devices():
    settings = configured(model=BLOCKS, lr=1e-2, freeze=("trunk",))
    step = prepared(settings)[2]
    state = drawn_state(settings)
    batch = [shared(values, 2) for values in random_batch(3)]
    now = replicate(state)
    for number in range(3):
        now, _ = step(now, *batch, np.uint32(number))
    for before, after in ((state.params, now.params), (state.batch_stats, now.batch_stats)):
        trunk, found = before["encoder"]["trunk"], after["encoder"]["trunk"]
        for a, b in zip(*map(jax.tree.leaves, (trunk, found)), strict=True):
            np.testing.assert_array_equal(a, b)
        assert any(
            not np.array_equal(a, b)
            for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)
        )


def test_a_frozen_trunk_is_trained_on_as_it_infers():
    tiles, places = random_batch(3)
    settings = configured(freeze=("trunk",))
    model, state, _, loss = run_step(settings, tiles, places)
    rows = np.asarray(jax.jit(model.apply)(state.variables, tiles.reshape(-1, 16, 16, 4)))
    wanted = bce_by_hand(rows.reshape(3, 4, -1), state.params["pair_head"])
    assert loss == pytest.approx(wanted, rel=1e-4)
    trained, _ = trained_descriptors(prepared(configured())[0], state, tiles)
    assert abs(bce_by_hand(trained, state.params["pair_head"]) - wanted) > 1e-3 * wanted


def test_what_was_frozen_learns_once_thawed():
    settings = configured(model=BLOCKS, lr=1e-2, freeze=("trunk",))
    thawed = build(settings, FORM, frozen=False)
    step = stepping(thawed, settings)
    state = drawn_state(settings)
    batch = [shared(values, 1) for values in random_batch(3)]
    after, _ = step(jax.tree.map(np.array, state), *batch, np.uint32(0))
    found, before = named(after.params), named(state.params)
    for name, by in movements().items():
        if not name.endswith("of batches"):
            np.testing.assert_allclose(found[name] - before[name], by, atol=1e-4)
    stem = (each.batch_stats["encoder"]["trunk"]["stem"]["mean"] for each in (state, after))
    assert not np.array_equal(*stem)


@pytest.mark.parametrize(
    ("scales", "freeze", "wanted"),
    [
        # The narrowest part decides.
        (
            ("trunk=0.1", "trunk/stage1=3", "head=0", "fusion=2"),
            (),
            {
                "encoder/trunk/stage1_": 3,
                "encoder/trunk/": 0.1,
                "encoder/head/": 0,
                "encoder/fusion/": 2,
            },
        ),
        (
            ("trunk=2",),
            ("trunk/stem", "trunk/stage1"),
            {"encoder/trunk/stem/": 0, "encoder/trunk/stage1_": 0, "encoder/trunk/": 2},
        ),
    ],
)
def test_a_part_s_learning_rate_is_scaled(scales, freeze, wanted):
    # Of the same frozen statistics, which are no matter of the rate.
    plain = movements(freeze=freeze) if freeze else movements()
    found = movements(lr_scale=scales, freeze=freeze)
    checked = set()
    for name, by in plain.items():
        part = next((part for part in wanted if name.startswith(part)), None)
        scale = wanted.get(part, 1)
        if name.endswith("of batches"):
            scale = 1
        else:
            checked.add(part)
        # Values are near 1, of which a float keeps seven digits.
        np.testing.assert_allclose(found[name], scale * by, rtol=1e-3, atol=1e-6)
    assert checked == {*wanted, None}


def test_the_narrowest_part_decides_whichever_comes_first():
    def scales(*texts):
        settings = configured(model=BLOCKS, lr_scale=texts)
        model, state, _ = prepared(settings)
        return learning_rate_scales(model, settings, state.params)

    assert scales("trunk=0.1", "trunk/stage1=3") == scales(" trunk/stage1 = 3", "trunk=0.1")
    assert scales("trunk=0.1", "trunk/stage1=3") != scales("trunk=0.1")


@pytest.mark.parametrize(
    "scale", ["trunk", "trunk=", "trunk=fast", "trunk=-1", "trunk=nan", "trunk=inf"]
)
def test_a_scale_that_is_not_a_number_is_refused(scale):
    settings = configured(lr_scale=(scale,))
    with pytest.raises(UsageError, match="lr_scale") as error:
        stepping(build(settings, FORM), settings)
    assert repr(scale) in error.value.message
    assert "trunk=0.1" in error.value.hint


@pytest.mark.parametrize(
    ("setting", "value", "part"),
    [
        ("lr_scale", "trnk=0.1", "trnk"),
        ("lr_scale", "=1", ""),
        # It names statistics, which have no rate.
        ("lr_scale", "batch_norm=0.1", "batch_norm"),
        ("freeze", "trunk/stage9", "trunk/stage9"),
        # The "pool" head has no parameters.
        ("freeze", "head", "head"),
    ],
)
def test_a_part_that_the_network_has_not_is_refused_and_those_it_has_are_named(
    setting, value, part
):
    settings = configured(**{setting: (value,)})
    with pytest.raises(UsageError, match=f"train.{setting}") as error:
        stepping(build(settings, FORM), settings)
    assert repr(part) in error.value.message
    assert "fusion, log_temperature, pair_head, trunk;" in error.value.hint


# What a network is built from.


def test_batch_norm_s_epsilon_is_the_trunk_s_unless_given():
    def epsilon(**model):
        return build(configured(model=model), FORM).encoder.shared.epsilon

    assert epsilon(trunk="resnet50") == 1e-5
    assert epsilon(trunk="efficientnet_lite0") == 1e-3
    assert epsilon(trunk="efficientnet_lite0", epsilon=0.01) == 0.01


@pytest.mark.parametrize("labels", [0, 3])
def test_classes_are_of_labels_of_one_band(labels):
    settings = configured(model={**POOL, "label_classes": 4})
    with pytest.raises(UsageError, match=f"label_classes = 4.* {labels} label channels"):
        build(settings, TileForm(16, 3, labels))


def test_classes_are_learned_from():
    settings = configured(model={**POOL, "label_classes": 2})
    tiles, places = random_batch(3)
    tiles[..., -1] %= 3
    model, state, after, loss = run_step(settings, tiles, places)
    rows, _ = trained_descriptors(model, state, tiles)
    assert loss == pytest.approx(bce_by_hand(rows, state.params["pair_head"]), rel=1e-4)
    before, after = (each.params["encoder"]["fusion"]["kernel"] for each in (state, after))
    assert before.shape == (5, 3)
    assert (before != after)[3:].all()


def test_a_network_without_batch_norm_learns():
    settings = configured(model={"trunk": "convnet", "stage": 2, "head": "pool"})
    _, state, after, loss = run_step(settings, *random_batch(3))
    assert np.isfinite(loss).all()
    assert jax.tree.structure(after) == jax.tree.structure(state)
    kernels = (each.params["encoder"]["trunk"]["stage1"]["kernel"] for each in (state, after))
    assert not np.array_equal(*kernels)


@pytest.mark.usefixtures("programs_are_not_stored")
def test_a_step_in_bfloat16_is_near_the_one_in_float32():
    tiles, places = random_batch(3)
    model = {**POOL, "pooling": "mean"}
    steps = [
        run_step(configured(model=model, dtype=dtype), tiles, places)
        for dtype in ("float32", "bfloat16")
    ]
    (_, _, wanted, loss), (_, _, found, half_loss) = steps
    assert half_loss == pytest.approx(loss, rel=0.02)
    assert not np.array_equal(half_loss, loss)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {np.dtype("float32")}
    slopes = (
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient(after))])
        for after in (found, wanted)
    )
    mine, theirs = (slope / np.linalg.norm(slope) for slope in slopes)
    assert mine @ theirs > 0.97


def test_other_weights_begin_with_a_fresh_optimizer():
    settings = configured()
    _, state, after, _ = run_step(settings, *random_batch(3))
    begun = with_params(after, settings, after.params, after.batch_stats)
    assert any(leaf.any() for leaf in jax.tree.leaves(after.optimizer))
    for a, b in zip(*map(jax.tree.leaves, (begun.optimizer, state.optimizer)), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(*map(jax.tree.leaves, (begun.params, after.params)), strict=True):
        np.testing.assert_array_equal(a, b)

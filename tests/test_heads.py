"""Heads, against plain numpy."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_network import add_trunk, assert_near, network, tiles

from geomatch.config import ModelConfig
from geomatch.nn.encoder import Encoder, TileForm, resolve
from geomatch.nn.heads import HEADS
from geomatch.nn.layers import SharedSettings

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.fixture(scope="module", autouse=True)
def _tiny_trunks(module_patch):
    add_trunk(module_patch, width=4)


def values(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def drawn(kind, shared, x, *call, **model):
    """A head and random variables of it."""
    head = HEADS[kind](ModelConfig(head=kind, **model), shared)
    shapes = jax.eval_shape(lambda key: head.init(key, x, *call, False), jax.random.key(0))
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        deviation = np.sqrt(1 / np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.3
        return rng.normal(0, deviation, leaf.shape).astype(np.float32)

    return head, jax.tree_util.tree_map_with_path(draw, shapes)


def at_unit_norm(rows):
    return rows / np.sqrt((rows**2).sum(axis=-1, keepdims=True))


def dense(x, params):
    """A Dense layer, value by value."""
    kernel = np.asarray(params["kernel"], float)
    y = np.zeros((*x.shape[:-1], kernel.shape[1]))
    for place in np.ndindex(*y.shape):
        y[place] = sum(x[place[:-1]] * kernel[:, place[-1]])
    return y + params.get("bias", 0)


def normalised(x, mean, variance, params):
    """BatchNorm by given statistics."""
    return (x - mean) / np.sqrt(variance + 1e-5) * params["scale"] + params["bias"]


def test_dense_is_one_layer_of_what_pooling_gives():
    x = values((4, 1, 6))
    head, variables = drawn("dense", SharedSettings(), x, descriptor=5)
    assert jax.tree.map(np.shape, variables["params"]) == {
        "Dense_0": {"kernel": (6, 5), "bias": (5,)}
    }
    found = jax.jit(head.apply, static_argnums=2)(variables, x, False)
    assert_near(found, dense(x[:, 0], variables["params"]["Dense_0"]))


HIDDEN = (7, 5)


def blocks(variables, x, train):
    """The MLP head without its dropout, in plain numpy; and the batch's statistics."""
    params, y, statistics = variables["params"], x[:, 0].astype(float), []
    for i in range(len(HIDDEN)):
        y = dense(y, params[f"Dense_{i}"])
        kept = variables["batch_stats"][f"BatchNorm_{i}"]
        mean, variance = (y.mean(0), y.var(0)) if train else (kept["mean"], kept["var"])
        statistics.append((mean, variance))
        y = np.maximum(normalised(y, mean, variance, params[f"BatchNorm_{i}"]), 0)
    return dense(y, params[f"Dense_{len(HIDDEN)}"]), statistics


def mlp(dropout=0.0):
    x = values((9, 1, 6))
    return x, *drawn("mlp", SharedSettings(), x, descriptor=3, hidden=HIDDEN, dropout=dropout)


def test_mlp_has_a_layer_for_each_width_without_the_bias_that_batch_norm_has():
    _, _, variables = mlp()
    shapes = jax.tree.map(np.shape, variables["params"])
    assert shapes == {
        "Dense_0": {"kernel": (6, 7)},
        "BatchNorm_0": {"scale": (7,), "bias": (7,)},
        "Dense_1": {"kernel": (7, 5)},
        "BatchNorm_1": {"scale": (5,), "bias": (5,)},
        "Dense_2": {"kernel": (5, 3), "bias": (3,)},
    }


def test_mlp_infers_with_the_running_statistics():
    x, head, variables = mlp(dropout=0.5)
    # Nothing random is asked for.
    found = jax.jit(head.apply, static_argnums=2)(variables, x, False)
    assert_near(found, blocks(variables, x, train=False)[0])


def test_mlp_trains_with_the_batch():
    x, head, variables = mlp()
    apply = partial(head.apply, train=True, mutable=["batch_stats"])
    found, changed = jax.jit(apply)(variables, x)
    wanted, statistics = blocks(variables, x, train=True)
    assert_near(found, wanted)
    for i, (mean, variance) in enumerate(statistics):
        before, after = (tree["batch_stats"][f"BatchNorm_{i}"] for tree in (variables, changed))
        assert_near(after["mean"], 0.9 * before["mean"] + 0.1 * mean)
        assert_near(after["var"], 0.9 * before["var"] + 0.1 * variance)


def dropping(dropout, train):
    """A function of a seed: one block's values, which the last layer passes on; they are > 0."""
    x, width = values((300, 1, 4)), 40
    head, variables = drawn(
        "mlp", SharedSettings(), x, descriptor=width, hidden=(width,), dropout=dropout
    )
    variables["params"]["Dense_1"] = {"kernel": np.eye(width), "bias": np.zeros(width)}
    variables["params"]["BatchNorm_0"]["bias"] = np.full(width, 20.0)
    apply = jax.jit(partial(head.apply, train=train, mutable=["batch_stats"]))
    return lambda seed: np.asarray(apply(variables, x, rngs={"dropout": jax.random.key(seed)})[0])


@pytest.mark.parametrize("dropout", [0.2, 0.5])
def test_dropout_silences_its_share_in_training_and_keeps_the_mean(dropout):
    found, whole = dropping(dropout, True)(0), dropping(0.0, True)(0)
    assert (whole > 0).all()
    share = (found == 0).mean()
    # Of 12,000 draws; five deviations.
    assert abs(share - dropout) < 5 * np.sqrt(dropout * (1 - dropout) / found.size)
    kept = found != 0
    assert_near(found[kept], whole[kept] / (1 - dropout))
    # Each tile and each value on its own.
    assert len({tuple(row) for row in kept}) == len(kept)


def test_dropout_is_of_its_seed():
    draw = dropping(0.5, True)
    np.testing.assert_array_equal(draw(3), draw(3))
    assert ((draw(3) == 0) != (draw(4) == 0)).mean() > 0.4


def test_nothing_is_dropped_outside_training():
    draw = dropping(0.5, False)
    assert (draw(3) > 0).all()
    np.testing.assert_array_equal(draw(3), draw(4))


def test_pca_projects_vectors_of_unit_norm():
    x = 9 * values((4, 1, 6))
    head, variables = drawn("pca", SharedSettings(), x, descriptor=5)
    assert list(variables["params"]) == ["whiten"]
    found = jax.jit(head.apply, static_argnums=2)(variables, x, False)
    assert_near(found, dense(at_unit_norm(x[:, 0]), variables["params"]["whiten"]))


def test_pca_adds_up_regions_each_whitened_and_at_unit_norm():
    x = 9 * values((4, 14, 6))
    head, variables = drawn("pca", SharedSettings(), x, descriptor=5)
    wanted = np.zeros((4, 5))
    for region in range(14):
        white = dense(at_unit_norm(x[:, region]), variables["params"]["whiten"])
        wanted += at_unit_norm(white)
    assert_near(jax.jit(head.apply, static_argnums=2)(variables, x, False), wanted)


def convolved(x, params, stride, edge):
    """A 3x3 convolution with its bias."""
    x = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    rows, cols = ((size - 3) // stride + 1 for size in x.shape[1:3])
    windows = np.zeros((len(x), rows, cols, 9 * x.shape[3]), np.float32)
    for b, i, j in np.ndindex(*windows.shape[:3]):
        window = x[b, i * stride : i * stride + 3, j * stride : j * stride + 3]
        windows[b, i, j] = window.ravel()
    kernel = params["kernel"]
    return windows @ kernel.reshape(-1, kernel.shape[-1]) + params["bias"]


@pytest.mark.parametrize(
    ("tile_size", "side", "left"),
    # Without edges 9 becomes 7 and 5, of which four bins are made; with them 6 stays 6.
    [(256, 8, 4), (256, 9, 4), (64, 2, 2), (128, 4, 4), (300, 6, 4)],
)
def test_conv_head_matches_plain_loops(tile_size, side, left):
    x = values((2, side, side, 3))
    head, variables = drawn("conv", SharedSettings(), x, tile_size, descriptor=5)
    params, statistics = variables["params"], variables["batch_stats"]
    assert set(params) == {"Conv_0", "BatchNorm_0", "Conv_1", "BatchNorm_1", "Dense_0"}
    y = x
    for i in range(2):
        y = np.tanh(convolved(y, params[f"Conv_{i}"], 1, 0 if tile_size == 256 else 1))
        kept = statistics[f"BatchNorm_{i}"]
        y = normalised(y, kept["mean"], kept["var"], params[f"BatchNorm_{i}"])
    assert y.shape[1] == (side - 4 if tile_size == 256 else side)
    bins = np.zeros((2, left, left, 512))
    for i, j in np.ndindex(left, left):
        rows, cols = (
            slice(k * y.shape[1] // left, -(-(k + 1) * y.shape[1] // left)) for k in (i, j)
        )
        bins[:, i, j] = y[:, rows, cols].mean(axis=(1, 2))
    last = params["Dense_0"]
    wanted = bins.reshape(2, -1) @ last["kernel"] + last["bias"]
    assert_near(jax.jit(head.apply, static_argnums=(2, 3))(variables, x, tile_size, False), wanted)


def test_conv_head_at_512_px_matches_plain_loops():
    x = values((1, 16, 16, 3))
    head, variables = drawn("conv", SharedSettings(), x, 512, descriptor=5)
    params = variables["params"]
    assert set(params) == {"Conv_0", "Conv_1", "Conv_2", "Dense_0"}
    y = x
    for i, (stride, side) in enumerate([(2, 7), (1, 5), (1, 3)]):
        y = np.tanh(convolved(y, params[f"Conv_{i}"], stride, 0))
        assert y.shape[1:] == (side, side, (1024, 512, 256)[i])
    last = params["Dense_0"]
    wanted = y.reshape(1, -1) @ last["kernel"] + last["bias"]
    assert_near(jax.jit(head.apply, static_argnums=(2, 3))(variables, x, 512, False), wanted)


def test_conv_trains_with_the_batch():
    x = values((3, 4, 4, 3))
    head, variables = drawn("conv", SharedSettings(), x, 64, descriptor=5)
    apply = jax.jit(partial(head.apply, tile_size=64, train=True, mutable=["batch_stats"]))
    _, changed = apply(variables, x)
    y = np.tanh(convolved(x, variables["params"]["Conv_0"], 1, 1))
    before, after = (tree["batch_stats"]["BatchNorm_0"] for tree in (variables, changed))
    assert_near(after["mean"], 0.9 * before["mean"] + 0.1 * y.mean((0, 1, 2)))
    assert_near(after["var"], 0.9 * before["var"] + 0.1 * y.var((0, 1, 2)))


# Within the encoder.

FORM = TileForm(32, 3, 0)
POOLED = {"max": 4, "mean": 4, "sum": 4, "gem": 4, "rmac": 4, "flatten": 8 * 8 * 4, "grid": 9 * 4}
"""Values that each pooling gives of the tiny trunk's map, 8 x 8 x 4, with three bins a side."""


@pytest.mark.parametrize("head", ["dense", "mlp", "pca", "conv"])
@pytest.mark.parametrize("size", [2, 128, 256, 512])
def test_descriptors_have_the_requested_size(head, size):
    encoder = Encoder(resolve(ModelConfig(trunk="tiny", head=head, descriptor=size)), 3, 0)
    some = jax.ShapeDtypeStruct((2, 32, 32, 3), np.uint8)
    output, _ = jax.eval_shape(encoder.init_with_output, jax.random.key(0), some)
    assert (output.shape, output.dtype) == ((2, size), jnp.float32)


@pytest.mark.parametrize("pooling", POOLED)
@pytest.mark.parametrize("head", ["pool", "dense", "pca"])
def test_every_head_takes_every_pooling(pooling, head):
    model = ModelConfig(trunk="tiny", head=head, pooling=pooling, bins=3, descriptor=11)
    some = jax.ShapeDtypeStruct((2, 32, 32, 3), np.uint8)
    output, variables = jax.eval_shape(
        Encoder(resolve(model), 3, 0).init_with_output, jax.random.key(0), some
    )
    assert output.shape == (2, POOLED[pooling] if head == "pool" else 11)
    kernels = jax.tree.leaves(variables["params"].get("head", {}))
    assert [leaf.shape for leaf in kernels if len(leaf.shape) == 2] == (
        [] if head == "pool" else [(POOLED[pooling], 11)]
    )


@pytest.mark.parametrize("head", ["pool", "dense", "mlp", "pca", "conv"])
def test_normalise_gives_unit_length_in_the_same_direction(head):
    options = {"trunk": "tiny", "head": head, "descriptor": 6, "hidden": (5,)}
    siamese, variables = network(FORM, **options)
    other, _ = network(FORM, normalise=True, **options)
    some = tiles(FORM, 3)
    plain, found = (np.asarray(jax.jit(each.apply)(variables, some)) for each in (siamese, other))
    assert_near(found, at_unit_norm(plain))
    assert (np.abs(np.linalg.norm(plain, axis=1) - 1) > 0.01).all()


@pytest.mark.parametrize("head", ["dense", "mlp"])
def test_a_head_is_given_what_pooling_gives(head):
    siamese, variables = network(FORM, trunk="tiny", head=head, descriptor=6, hidden=HIDDEN)
    some = tiles(FORM, 3)
    own = {kind: tree["encoder"] for kind, tree in variables.items()}
    features = siamese.encoder.apply(own, some, method=Encoder.features)
    inside = {kind: tree.get("head", {}) for kind, tree in own.items()}
    module = HEADS[head](siamese.encoder.model, siamese.encoder.shared)
    assert_near(jax.jit(siamese.apply)(variables, some), module.apply(inside, features, False))

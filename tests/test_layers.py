"""The fast formulations of `geomatch.nn.cpu_ops` against the plain operations and plain loops."""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_network import add_trunk, network, tiles

from geomatch.nn import cpu_ops, layers
from geomatch.nn.encoder import Siamese, TileForm
from geomatch.nn.layers import SharedSettings

pytestmark = pytest.mark.usefixtures("strict_dtypes", "programs_are_not_stored")


@pytest.fixture(scope="module", autouse=True)
def _tiny_trunks(module_patch):
    add_trunk(module_patch, width=4, blocks=(1, 1))


TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
"""Largest difference, relative to the largest value."""


def close(found, wanted, dtype="float32"):
    found, wanted = (np.asarray(value, np.float32) for value in (found, wanted))
    assert found.shape == wanted.shape
    scale = max(np.abs(wanted).max(initial=0), 1e-3)
    np.testing.assert_allclose(found / scale, wanted / scale, rtol=0, atol=TOLERANCE[dtype])


def values(shape, seed, dtype="float32"):
    drawn = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(drawn.astype(np.float32).astype(jnp.dtype(dtype)))


def wide(*arrays):
    return [jnp.asarray(np.asarray(array, np.float32)) for array in arrays]


CONVOLUTIONS = [
    # height, width, kernel, stride, zeros before and after
    (12, 12, 1, 1, (0, 0)),
    (11, 13, 1, 2, (0, 0)),
    (9, 11, 3, 1, (0, 0)),
    (13, 10, 3, 2, (1, 1)),
    (8, 8, 3, 2, (0, 0)),
    (16, 16, 7, 2, (3, 3)),
    (12, 10, 3, 2, (0, 1)),
    (13, 9, 5, 2, (1, 2)),
    # Maps hardly larger than the kernel.
    (4, 4, 3, 1, (1, 1)),
    (3, 5, 3, 2, (0, 1)),
    (1, 1, 3, 1, (1, 1)),
    (1, 1, 3, 2, (1, 1)),
    (4, 6, 3, 1, (0, 0)),
]
CASES = [
    # form, channels in and out, dtypes
    *[(form, (3, 4), "float32") for form in CONVOLUTIONS],
    *[(form, (3, 4), "bfloat16") for form in CONVOLUTIONS if form[2] == 3],
    *[((16, 16, 7, 2, (3, 3)), (3, 20), dtype) for dtype in TOLERANCE],
    # Matrix products of their own.
    *[
        (form, channels, dtype)
        for form in (
            (12, 12, 1, 1, (0, 0)),
            (11, 13, 1, 2, (0, 0)),
            (9, 11, 3, 1, (1, 1)),
            (12, 10, 3, 2, (0, 1)),
            (3, 5, 3, 2, (0, 1)),
        )
        for channels in ((16, 24), (24, 16))
        for dtype in TOLERANCE
    ],
]


@partial(jax.jit, static_argnums=0)
def with_gradients(function, arguments, dy):
    """What a function gives, and the gradient of each argument for that of the result."""
    result, pull = jax.vjp(function, *arguments)
    return result, pull(dy.astype(result.dtype))


def compare(fast, plain, arguments, shape, dtype):
    """See that both agree, `plain` computing in float32."""
    dy = values(shape, 9, dtype)
    found, gradients = with_gradients(fast, tuple(arguments), dy)
    wanted, wanted_gradients = with_gradients(plain, tuple(wide(*arguments)), *wide(dy))
    assert found.dtype == arguments[0].dtype
    close(found, wanted, dtype)
    for mine, theirs, of in zip(gradients, wanted_gradients, arguments, strict=True):
        assert mine.dtype == of.dtype
        close(mine, theirs, dtype)


def sides(form):
    """Height and width of the result."""
    height, width, k, stride, edge = form
    return [(size + sum(edge) - k) // stride + 1 for size in (height, width)]


@pytest.mark.parametrize(("form", "channels", "dtype"), CASES)
def test_conv_matches_flax_with_its_gradients(form, channels, dtype):
    height, width, k, stride, edge = form
    arguments = (
        values((2, height, width, channels[0]), 0, dtype),
        values((k, k, *channels), 1, dtype),
    )
    compare(
        lambda x, w: cpu_ops.conv(x, w, stride, (edge, edge)),
        lambda x, w: cpu_ops.conv_plain(x, w, stride, (edge, edge)),
        arguments,
        (2, *sides(form), channels[1]),
        dtype,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_conv_has_edges_of_its_own_on_every_side(dtype):
    arguments = values((2, 9, 8, 16), 0, dtype), values((3, 3, 16, 17), 1, dtype)
    edges = ((2, 0), (0, 1))
    compare(
        lambda x, w: cpu_ops.conv(x, w, 2, edges),
        lambda x, w: cpu_ops.conv_plain(x, w, 2, edges),
        arguments,
        (2, 5, 4, 17),
        dtype,
    )


def convolved(x, kernel, stride, edges):
    """Convolution of (b, h, w, c) with (k, k, c, f), in plain loops."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    k, (vertical, horizontal) = kernel.shape[0], edges
    padded = np.zeros(
        (len(x), x.shape[1] + sum(vertical), x.shape[2] + sum(horizontal), x.shape[3])
    )
    top, left = vertical[0], horizontal[0]
    padded[:, top : top + x.shape[1], left : left + x.shape[2]] = x
    rows, cols = ((size - k) // stride + 1 for size in padded.shape[1:3])
    result = np.zeros((len(x), rows, cols, kernel.shape[3]))
    for b, i, j, f in np.ndindex(*result.shape):
        top, left = i * stride, j * stride
        window = padded[b, top : top + k, left : left + k]
        result[b, i, j, f] = (window * kernel[..., f]).sum()
    return result


@pytest.mark.parametrize("form", [cpu_ops.conv, cpu_ops.conv_plain])
@pytest.mark.parametrize("edges", [((1, 1), (1, 1)), ((0, 1), (2, 0)), ((0, 0), (0, 0))])
def test_conv_matches_plain_loops(form, edges):
    x, kernel = values((2, 7, 8, 2), 0), values((3, 3, 2, 3), 1)
    close(form(x, kernel, 2, edges), convolved(x, kernel, 2, edges))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "form",
    [
        (9, 8, 3, 1, (1, 1)),
        (9, 8, 3, 2, (1, 1)),
        (8, 10, 3, 2, (0, 1)),
        (9, 8, 5, 1, (2, 2)),
        (8, 10, 5, 2, (1, 2)),
        (2, 3, 5, 1, (2, 2)),
        (1, 1, 3, 2, (1, 1)),
    ],
)
def test_depthwise_matches_a_grouped_convolution_with_its_gradients(form, dtype):
    height, width, k, stride, edge = form
    arguments = values((2, height, width, 6), 0, dtype), values((k, k, 1, 6), 1, dtype)
    compare(
        lambda x, w: cpu_ops.depthwise(x, w, stride, (edge, edge)),
        lambda x, w: cpu_ops.depthwise_plain(x, w, stride, (edge, edge)),
        arguments,
        (2, *sides(form), 6),
        dtype,
    )


@pytest.mark.parametrize("form", [cpu_ops.depthwise, cpu_ops.depthwise_plain])
def test_depthwise_matches_plain_loops(form):
    x, kernel = values((1, 5, 6, 3), 0), values((3, 3, 1, 3), 1)
    edges = ((1, 1), (0, 1))
    wanted = [convolved(x[..., [c]], kernel[..., [c]], 2, edges) for c in range(3)]
    close(form(x, kernel, 2, edges), np.concatenate(wanted, axis=-1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("most", "plain"), [(None, jax.nn.relu), (6.0, jax.nn.relu6)])
def test_relu_matches_jax_with_its_gradient(most, plain, dtype):
    x = 6 * values((4, 5, 6), 0, dtype)
    assert (x > 6).any()
    compare(lambda x: cpu_ops.relu(x, most), plain, (x,), x.shape, dtype)
    # Nothing flows where the result is cut.
    cut = jnp.array([0.0, -0.0, -1.0, *([7.0] if most else [])])
    np.testing.assert_array_equal(jax.grad(lambda x: cpu_ops.relu(x, most).sum())(cut), 0 * cut)


def normalised(x, scale, bias):
    """BatchNorm in two passes over the batch."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    variance = ((x - mean) ** 2).mean(axes)
    return (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(4, 6, 5, 3), (8, 1, 1, 4), (3, 9, 9, 1), (16, 4)])
def test_batch_norm_matches_two_passes_with_its_gradients(shape, dtype):
    x = 2 * values(shape, 0, dtype) + jnp.asarray(1.5, dtype)
    scale, bias = values(shape[-1:], 1), values(shape[-1:], 2)
    compare(
        lambda *a: cpu_ops.batch_norm(*a, 1e-5, None)[0], normalised, (x, scale, bias), shape, dtype
    )


def test_batch_norm_gives_the_statistics_it_used():
    x = values((3, 4, 5, 2), 0) * 3 + 1
    _, mean, variance = cpu_ops.batch_norm(x, jnp.ones(2), jnp.zeros(2), 1e-5, None)
    close(mean, np.asarray(x).mean((0, 1, 2)))
    close(variance, np.asarray(x).var((0, 1, 2)))


@pytest.mark.parametrize("form", [cpu_ops.batch_norm, cpu_ops.batch_norm_plain])
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


@pytest.mark.parametrize("shape", [(4, 3, 3, 2), (16, 2)])
def test_batch_norm_follows_the_statistics_and_infers_with_them(shape):
    x = values(shape, 0) * 2 + 5
    axes = tuple(range(len(shape) - 1))
    training, inferring = layers.BatchNorm(train=True), layers.BatchNorm(train=False)
    fresh = {
        "params": {"scale": jnp.ones(2), "bias": jnp.zeros(2)},
        "batch_stats": {"mean": jnp.zeros(2), "var": jnp.ones(2)},
    }
    _, changed = training.apply(fresh, x, mutable=["batch_stats"])
    mean = 0.1 * np.asarray(x).mean(axes)
    variance = 0.9 + 0.1 * np.asarray(x).var(axes)
    close(changed["batch_stats"]["mean"], mean)
    close(changed["batch_stats"]["var"], variance)
    y = inferring.apply({**fresh, **changed}, x)
    close(y, (np.asarray(x) - mean) / np.sqrt(variance + 1e-5))


EPSILON = 0.1
"""Large enough to be seen in a result."""
CONV_NORMS = [
    {"filters": 5, "size": 3},
    {"filters": 5, "size": 3, "stride": 2, "padding": "same"},
    {"filters": 5, "size": 1, "stride": 2},
    {"filters": 5, "size": 3, "padding": 0},
    {"filters": 4, "size": 5, "depthwise": True},
    {"filters": 4, "size": 3, "stride": 2, "padding": "same", "depthwise": True},
]


def conv_norm(options, train, **shared):
    """A layer, random variables of it, an input, and its convolution alone in plain loops."""
    layer = layers.ConvNorm(
        train=train, shared=SharedSettings(epsilon=EPSILON, **shared), **options
    )
    x = values((3, 8, 7, 4), 0) + 1
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    rng = np.random.default_rng(1)
    drawn = jax.tree.map(lambda leaf: rng.uniform(-1, 1, leaf.shape), shapes)
    drawn["batch_stats"]["var"] = rng.uniform(0.1, 2, options["filters"])
    drawn = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), drawn)
    kernel, k, stride = drawn["params"]["kernel"], options["size"], options.get("stride", 1)
    if options.get("padding") == "same":
        # SAME: as many results as strides have begun; what is odd comes after.
        totals = [(-(-n // stride) - 1) * stride + k - n for n in (8, 7)]
        edges = tuple((total // 2, total - total // 2) for total in totals)
        assert {(0, 1), (1, 1)} == set(edges)
    else:
        edge = options.get("padding", k // 2)
        edges = ((edge, edge), (edge, edge))
    if options.get("depthwise"):
        parts = [convolved(x[..., [c]], kernel[..., [c]], stride, edges) for c in range(4)]
        y = np.concatenate(parts, axis=-1)
    else:
        y = convolved(x, kernel, stride, edges)
    return layer, drawn, x, y


def affine(y, mean, variance, params):
    """BatchNorm by given statistics."""
    return (y - mean) / np.sqrt(variance + EPSILON) * params["scale"] + params["bias"]


@pytest.mark.parametrize("options", CONV_NORMS)
def test_conv_norm_infers_with_the_running_statistics(options):
    layer, variables, x, y = conv_norm(options, train=False)
    statistics = variables["batch_stats"]
    wanted = affine(y, statistics["mean"], statistics["var"], variables["params"])
    close(jax.jit(layer.apply)(variables, x), wanted)


@pytest.mark.parametrize("options", CONV_NORMS)
def test_conv_norm_trains_with_the_batch(options):
    layer, variables, x, y = conv_norm(options, train=True)
    found, changed = jax.jit(partial(layer.apply, mutable=["batch_stats"]))(variables, x)
    mean, variance = y.mean((0, 1, 2)), y.var((0, 1, 2))
    close(found, affine(y, mean, variance, variables["params"]))
    before, after = variables["batch_stats"], changed["batch_stats"]
    close(after["mean"], 0.9 * before["mean"] + 0.1 * mean)
    close(after["var"], 0.9 * before["var"] + 0.1 * variance)


def test_conv_norm_with_frozen_statistics_still_has_gradients():
    options = CONV_NORMS[0]
    layer, variables, x, y = conv_norm(options, train=True, frozen=("batch_norm",))
    statistics, params = variables["batch_stats"], variables["params"]
    dy = values(y.shape, 2)

    def loss(params):
        found = layer.apply({"params": params, "batch_stats": statistics}, x)
        return (found * dy).sum()

    gradients = jax.jit(jax.grad(loss))(params)
    factor = 1 / np.sqrt(np.asarray(statistics["var"]) + EPSILON)
    close(gradients["bias"], np.asarray(dy).sum((0, 1, 2)))
    close(gradients["scale"], ((y - statistics["mean"]) * factor * dy).sum((0, 1, 2)))
    assert (np.abs(gradients["kernel"]) > 0).all()


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [(7, 8), (1, 2)])
def test_same_edges_match_xla(size, stride, side):
    x = values((2, *side, 3), 0)
    layer = layers.Conv(4, size, stride=stride, padding="same", use_bias=True)
    kernel, bias = values((size, size, 3, 4), 1), values((4,), 2)
    found = jax.jit(layer.apply)({"params": {"kernel": kernel, "bias": bias}}, x)
    wanted = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    close(found, wanted + bias)


BATCH_NORMS = {"stem", "stage1_block1", "stage2_block1"}


@pytest.mark.parametrize(
    ("frozen", "kept"),
    [
        ((), set()),
        (("trunk",), BATCH_NORMS),
        (("trunk/stage1",), {"stage1_block1"}),
        (("trunk/stem", "trunk/stage2"), {"stem", "stage2_block1"}),
        (("trunk/stage2_block1/conv1",), {"stage2_block1/conv1"}),
        (("batch_norm",), BATCH_NORMS | {"head"}),
        (("head",), {"head"}),
        (("fusion", "pair_head"), set()),
    ],
)
def test_frozen_parts_keep_their_statistics_in_training(frozen, kept):
    form = TileForm(32, 3, 0)
    siamese, variables = network(form, trunk="tiny", head="mlp", hidden=(5,), dropout=0.0)
    encoder = siamese.encoder.clone(shared=SharedSettings(frozen=frozen))
    train = jax.jit(partial(Siamese(encoder).apply, train=True, mutable=["batch_stats"]))
    _, changed = train(variables, tiles(form, 3))
    before, after = (
        jax.tree_util.tree_leaves_with_path(tree["batch_stats"]["encoder"])
        for tree in (variables, changed)
    )
    assert len(before) == len(after) == 2 * (1 + 2 + 3 + 1)
    for (path, old), (same_path, new) in zip(before, after, strict=True):
        assert path == same_path
        names = [key.key for key in path]
        within = {names[0], names[1], "/".join(names[1:3])}
        assert np.array_equal(old, new) == bool(within & kept)


def test_with_all_statistics_frozen_training_computes_as_inference():
    form = TileForm(32, 3, 0)
    siamese, variables = network(form, trunk="tiny", head="pool")
    encoder = siamese.encoder.clone(shared=SharedSettings(frozen=("batch_norm",)))
    found = jax.jit(partial(Siamese(encoder).apply, train=True))(variables, tiles(form, 3))
    close(found, jax.jit(siamese.apply)(variables, tiles(form, 3)))


SIZES = [(8, 8), (7, 9), (6, 5), (2, 2), (1, 1), (1, 4)]


def different(size, negative):
    """(2, *size, 3) values that all differ, so that a maximum's gradient has one place to go."""
    numbers = np.random.default_rng(0).permutation(2 * math.prod(size) * 3) + 1
    if negative:
        # An odd number of them, all of them below zero in places.
        numbers = numbers - len(numbers) // 3 * 2
    return jnp.asarray(numbers.reshape(2, *size, 3), jnp.float32)


def compare_exactly(form, plain, x):
    dy = values([x.shape[0], *(-(-size // 2) for size in x.shape[1:3]), x.shape[3]], 1)
    found, gradient = with_gradients(form, (x,), dy)
    wanted, wanted_gradient = with_gradients(plain, (x,), dy)
    np.testing.assert_array_equal(found, wanted)
    close(gradient[0], wanted_gradient[0])


@pytest.mark.parametrize("size", SIZES)
def test_max_pool_3x3_matches_flax_with_its_gradient(size):
    compare_exactly(
        cpu_ops.max_pool_3x3,
        lambda x: nn.max_pool(x, (3, 3), (2, 2), padding=[(1, 1), (1, 1)]),
        different(size, negative=False),
    )


@pytest.mark.parametrize("size", SIZES)
def test_max_pool_2x2_matches_flax_with_its_gradient(size):
    x = different(size, negative=True)
    assert (x < 0).any()
    compare_exactly(
        cpu_ops.max_pool_2x2, lambda x: nn.max_pool(x, (2, 2), (2, 2), padding="SAME"), x
    )


def test_max_pool_2x2_of_values_below_zero_pads_with_none():
    x = -1 - jnp.arange(9.0).reshape(1, 3, 3, 1)
    found = cpu_ops.max_pool_2x2(x)[0, ..., 0]
    np.testing.assert_array_equal(found, [[-1, -3], [-7, -9]])


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


def test_unit_vectors_have_length_one_and_zero_stays_zero():
    x = values((3, 4, 5), 0).at[1, 2].set(0)
    found = np.asarray(layers.unit(x))
    for place in np.ndindex(3, 4):
        length = math.sqrt(sum(float(v) ** 2 for v in x[place]))
        close(found[place], np.asarray(x[place]) / (length or 1))
    slope = jax.jit(jax.grad(lambda x: layers.unit(x).sum()))(x)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize(
    ("trunk", "stage", "labels"),
    [("tiny", 2, 1), ("efficientnet_lite0", 2, 0), ("vgg16", 1, 0), ("convnet", 2, 0)],
)
def test_both_backends_have_the_same_results_and_gradients(monkeypatch, trunk, stage, labels):
    form = TileForm(16, 3, labels)
    siamese, variables = network(form, trunk=trunk, stage=stage, head="pool", pooling="mean")
    siamese = Siamese(siamese.encoder.clone(shared=SharedSettings()))
    some = tiles(form, 4)

    def trained():
        @partial(jax.value_and_grad, has_aux=True)
        def loss(params):
            apply = partial(siamese.apply, train=True, mutable=["batch_stats"])
            found, changed = apply({**variables, "params": params}, some)
            return (found * values(found.shape, 3)).sum(), (found, changed)

        init = partial(siamese.init, method=Siamese.encode_and_pair)
        shapes = jax.eval_shape(init, jax.random.key(0), some)
        return shapes, jax.jit(loss)(variables["params"])

    fast_shapes, found = trained()
    monkeypatch.setattr(layers, "use_cpu_ops", lambda: False)
    plain_shapes, wanted = trained()
    assert plain_shapes == fast_shapes
    for some_found, some_wanted in zip(found, wanted, strict=True):
        most = max(np.abs(leaf).max() for leaf in jax.tree.leaves(some_wanted))
        for mine, theirs in zip(*map(jax.tree.leaves, (some_found, some_wanted)), strict=True):
            # A gradient that BatchNorm takes away is noise.
            scale = max(np.abs(theirs).max(), most / 100)
            np.testing.assert_allclose(mine / scale, theirs / scale, rtol=0, atol=1e-3)

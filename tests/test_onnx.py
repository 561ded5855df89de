"""The ONNX graph of an encoder, run by onnxruntime, against JAX."""

from __future__ import annotations

import sys
from collections import Counter
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from jax import lax
from small_network import network, tiles

from geomatch.errors import GeomatchError
from geomatch.nn.encoder import TileForm, with_dtype
from geomatch.nn.onnx_export import to_onnx

pytestmark = pytest.mark.usefixtures("strict_dtypes")

RNG = np.random.default_rng(0)


def by_onnxruntime(graph, tiles):
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (descriptors,) = session.run(["descriptors"], {"tiles": tiles})
    return descriptors


def check(forward, shape, make_tiles):
    """The graph gives what the function does, for batches of several sizes."""
    graph = to_onnx(forward, shape)
    onnx.checker.check_model(onnx.load_from_string(graph), full_check=True)
    some = make_tiles(5)
    wanted = np.asarray(jax.jit(forward)(some))
    for count in (1, 2, 5):
        found = by_onnxruntime(graph, some[:count])
        assert found.dtype == np.float32
        assert found.shape == (count, wanted.shape[1])
        assert np.abs(found - wanted[:count]).max() <= 1e-4 * np.abs(wanted).max()
    # Else anything would agree.
    assert wanted.std(axis=0).max() > 1e-3 * np.abs(wanted).max()
    return onnx.load_from_string(graph).graph


def check_network(form, **model):
    siamese, variables = network(form, **model)
    return check(
        partial(siamese.apply, variables),
        (form.size, form.size, form.channels),
        partial(tiles, form),
    )


LARGE = [
    pytest.param(trunk, marks=pytest.mark.slow)
    for trunk in ("resnet18", "resnet34", "resnet50", "resnet101")
]


@pytest.mark.parametrize("trunk", ["resnet10", "vgg16", "efficientnet_lite0", "convnet", *LARGE])
def test_every_trunk(trunk):
    check_network(TileForm(64, 3, 0), trunk=trunk, head="pool", pooling="mean", normalise=True)


@pytest.mark.parametrize("pooling", ["max", "mean", "sum", "gem", "rmac", "flatten", "grid"])
@pytest.mark.parametrize("head", ["pool", "pca"])
def test_every_pooling(pooling, head):
    check_network(
        TileForm(48, 3, 0),
        trunk="convnet",
        stage=2,
        pooling=pooling,
        bins=5,
        head=head,
        descriptor=8,
    )


def test_a_normalised_map():
    check_network(
        TileForm(48, 3, 0),
        trunk="convnet",
        stage=2,
        pooling="grid",
        bins=5,
        instance_norm=True,
        head="pca",
        descriptor=8,
    )


@pytest.mark.parametrize("head", ["pool", "dense", "mlp", "pca", "conv"])
def test_every_head_with_fused_labels(head):
    check_network(TileForm(64, 3, 1), trunk="resnet10", head=head, hidden=(12, 8), descriptor=16)


@pytest.mark.parametrize("preprocessing", ["torch", "caffe", "lite", "none"])
@pytest.mark.parametrize("labels", [0, 3])
def test_every_preprocessing(preprocessing, labels):
    check_network(
        TileForm(16, 3, labels), trunk="convnet", stage=1, head="pool", preprocessing=preprocessing
    )


@pytest.mark.parametrize("labels", ["one-hot", "grey", "colour"])
def test_classes_of_labels(labels):
    form = TileForm(16, 3, 1)

    def labelled(count):
        some = tiles(form, count)
        some[..., -1] //= 50
        return some

    siamese, variables = network(
        form, trunk="convnet", stage=1, head="pool", label_classes=4, labels=labels
    )
    check(partial(siamese.apply, variables), (16, 16, 4), labelled)


@pytest.mark.parametrize("stride_in", ["1x1", "3x3"])
def test_bottlenecks(stride_in):
    check_network(TileForm(32, 3, 0), trunk="resnet50", stage=2, stride_in=stride_in, head="pool")


def test_batch_norm_and_preprocessing_are_within_the_convolutions():
    graph = check_network(TileForm(32, 3, 1), trunk="resnet10", head="pool", normalise=False)
    count = Counter(node.op_type for node in graph.node)
    assert count["Transpose"] == 1
    assert count["Add"] == 4  # of the shortcuts
    assert count["Conv"] == 13  # with the fusion
    assert not count.keys() & {"Mul", "Sub", "Div"}
    assert all(len(node.input) == 3 for node in graph.node if node.op_type == "Conv")
    assert not {node.op_type for node in graph.node} & {"Max", "Min"}


def test_relu6_is_a_clip():
    form = TileForm(32, 3, 0)
    graph = check_network(form, trunk="efficientnet_lite0", stage=2, head="pool")
    count = Counter(node.op_type for node in graph.node)
    assert count["Clip"] == 6
    assert not count.keys() & {"Relu", "Min"}


def test_input_and_output_are_declared():
    form = TileForm(16, 3, 1)
    siamese, variables = network(form, trunk="convnet", stage=1, head="pool")
    model = onnx.load_from_string(to_onnx(partial(siamese.apply, variables), (16, 16, 4)))
    (given,), (made,) = model.graph.input, model.graph.output
    assert (given.name, made.name) == ("tiles", "descriptors")
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert made.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    sizes = [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim]
    assert sizes == ["n", 16, 16, 4]
    assert [dim.dim_param or dim.dim_value for dim in made.type.tensor_type.shape.dim] == ["n", 32]


def test_a_graph_is_of_float32_whatever_the_network_computes_in():
    form = TileForm(16, 3, 0)
    siamese, variables = network(form, trunk="convnet", stage=2, head="pool")
    graph = to_onnx(partial(with_dtype(siamese, "bfloat16").apply, variables), (16, 16, 3))
    types = {tensor.data_type for tensor in onnx.load_from_string(graph).graph.initializer}
    assert types <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    some = tiles(form, 3)
    wanted, found = siamese.apply(variables, some), by_onnxruntime(graph, some)
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


def vectors(x):
    """(n, h, w, c) to (n, d)."""
    return x.reshape(len(x), -1)


def mean_pool(x):
    # Flax divides by counts, which are integers.
    with jax.numpy_dtype_promotion("standard"):
        return nn.avg_pool(x, (3, 2), (2, 1), "SAME")


WEIGHTS = {
    shape: RNG.normal(size=shape).astype(np.float32) for shape in [(3, 4), (4, 3), (3,), (5,)]
}
KERNEL = RNG.normal(size=(3, 3, 3, 6)).astype(np.float32)
GROUPED = RNG.normal(size=(3, 2, 1, 6)).astype(np.float32)


def conv(x, kernel=KERNEL, strides=(1, 1), padding="SAME", **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=numbers, **options
    )


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (doubled(x), None), lambda _, dy: (2 * dy,))

FUNCTIONS = {
    # (n, 6, 8, 3) float32 from 0 to 1
    "arithmetic": lambda x: (x + 1) * (2 - x) / (x + 3) - x,
    "channels": lambda x: (1 - x) * WEIGHTS[3,] + WEIGHTS[3,] / (x + 1),
    "functions": lambda x: (
        jnp.exp(-x) + jnp.tanh(x) + jnp.log(x + 1) + jnp.log1p(x) + jnp.abs(x - 0.5)
    ),
    "more functions": lambda x: (
        nn.sigmoid(x) + nn.gelu(x, approximate=False) + nn.silu(x) + nn.softplus(x) + lax.erf(x)
    ),
    "roots": lambda x: jnp.sqrt(x) + lax.rsqrt(x + 1) + jnp.square(x) + x**3 + x**-1 * 0 + x**1.7,
    "limits": lambda x: jnp.clip(x, 0.2, 0.7) + lax.clamp(0.1, x, 0.5) + jnp.minimum(x, 0.3),
    "either": lambda x: jnp.where((x > 0.5) & ~(x >= 0.9) | (x < 0.1), x, -x),
    "comparisons": lambda x: (
        (x <= 0.5).astype(x.dtype) * x + (x == 1).astype(x.dtype) * 3.0 + (x != 1).astype(x.dtype)
    ),
    "convolution": lambda x: conv(x, strides=(2, 1), padding=((0, 2), (1, 0))),
    "dilated": lambda x: conv(x, rhs_dilation=(2, 1)),
    "depthwise": lambda x: conv(x, GROUPED, feature_group_count=3),
    "scaled convolution": lambda x: (conv(x) * 3 - RNG_6) / RNG_6 + 1,
    "used twice": lambda x: (y := conv(x)) + (y + RNG_6) + nn.relu(y),
    "relu6": lambda x: nn.relu6(8 * conv(x)),
    "max pool": lambda x: nn.max_pool(x, (3, 2), (2, 2), ((1, 1), (0, 1))),
    "mean pool": mean_pool,
    "reductions": lambda x: x.max(1) + x.sum(1) + x.min(1),
    "channel reductions": lambda x: x.max((1, 3)) + x.mean((1, 3)) + conv(x).min((1, 3)),
    "unit": lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
    "broadcast": lambda x: jnp.broadcast_to(x[:, :, None], (len(x), 6, 5, 8, 3)),
    "spread": lambda x: x - jnp.broadcast_to(x.mean((1, 2), keepdims=True), x.shape),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 1), (2, 0)), constant_values=0.5),
    "parts": lambda x: x[:, 1:5:2, ::3, ::-1],
    "one row": lambda x: x[:, 2, :, 1],
    "join": lambda x: jnp.concatenate([x, conv(x), nn.relu(x)], axis=3),
    "stack": lambda x: jnp.stack([x.max((1, 2)), x.min((1, 2))], axis=1),
    "transpose": lambda x: x.transpose(0, 3, 2, 1) @ WEIGHTS[3, 4].reshape(-1)[:6].reshape(6, 1),
    "dense": lambda x: x @ WEIGHTS[3, 4] + 1,
    "dense of vectors": lambda x: (
        (x.mean((1, 2)) @ WEIGHTS[3, 4] + 1) @ WEIGHTS[4, 3] * WEIGHTS[3,]
    ),
    "einsum": lambda x: jnp.einsum("bhwc,bhwd,cd,de->bhe", x, x, jnp.eye(3), jnp.ones((3, 2))),
    "own gradient": lambda x: doubled(x) - 1,
    "constants": lambda x: jnp.maximum(0, x - jnp.full((len(x), 1, 1, 3), 0.5) * WEIGHTS[3,]),
    "reshape": lambda x: x.reshape(len(x), 3, 16, 3).sum(axis=2),
}
RNG_6 = RNG.uniform(1, 2, 6).astype(np.float32)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operations(name):
    function = FUNCTIONS[name]

    def some(count):
        return np.random.default_rng(1).integers(1, 256, (count, 6, 8, 3), np.uint8)

    check(lambda x: vectors(function(x.astype(jnp.float32) / 255)), (6, 8, 3), some)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: jnp.cumsum(x, axis=1), "cumsum"),
        (lambda x: jnp.sort(x, axis=1), "sort"),
        (lambda x: x.astype(jnp.int32).astype(jnp.float32), "convert_element_type"),
        (lambda x: x[::-1], "rev"),
        (lambda x: x[:1], "slice"),
        (lambda x: x - x.max(axis=0), "reduce_max"),
        (lambda x: jnp.concatenate([x, jnp.ones_like(x)], axis=3), "concatenate"),
        (lambda x: conv(x, padding=((1, 1), (1, 1)), lhs_dilation=(2, 2)), "conv_general_dilated"),
        (
            lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 2), (1, 2, 2, 1), "SAME"),
            "reduce_window_sum",
        ),
    ],
)
def test_what_has_no_translation_is_named(function, name):
    with pytest.raises(GeomatchError, match=f"cannot be written as ONNX: {name}$") as caught:
        to_onnx(lambda x: vectors(function(x.astype(jnp.float32))), (6, 8, 3))
    assert "--engine jax" in caught.value.hint


def test_arithmetic_of_bytes_is_refused():
    with pytest.raises(GeomatchError, match=r": div$"):
        to_onnx(lambda x: vectors((x // 2).astype(jnp.float32)), (6, 8, 3))


def test_without_onnx_there_is_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(GeomatchError) as caught:
        to_onnx(vectors, (6, 8, 3))
    assert "pip install 'geomatch[onnx]'" in caught.value.hint

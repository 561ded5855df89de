"""The encoder: shapes, published sizes, fusion, heads."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geomatch.nn.encoder import Encoder, Siamese, fusion_init
from geomatch.nn.trunks import TRUNKS, BasicBlock, ResNet

pytest_plugins = ["small_fixtures"]

WIDTH = 16
"""Channels of the trunk "tiny", which compiles quickly."""


@pytest.fixture(scope="module", autouse=True)
def _tiny():
    with pytest.MonkeyPatch.context() as patch:
        tiny = partial(ResNet, block=BasicBlock, stages=(1,), width=WIDTH)
        patch.setitem(TRUNKS, "tiny", tiny)
        yield


def encoder(trunk="tiny", head="pool", image=3, label=0, **options):
    form = {"pooling": "max", "descriptor": 16, "normalise": False, **options}
    return Encoder(trunk=trunk, head=head, image_channels=image, label_channels=label, **form)


def shapes(network, size, channels=3, batch=2):
    """Variables and output, as shapes and dtypes."""
    tiles = jax.ShapeDtypeStruct((batch, size, size, channels), np.uint8)
    variables = jax.eval_shape(partial(network.init, train=False), jax.random.key(0), tiles)
    return variables, jax.eval_shape(partial(network.apply, train=False), variables, tiles)


def tiles_of(channels, seed=0, size=32, batch=3):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (batch, size, size, channels), dtype=np.uint8)


def described(network, variables, tiles):
    return np.asarray(jax.jit(partial(network.apply, train=False))(variables, tiles))


@pytest.fixture(scope="module")
def pooled(_tiny):
    """Variables of the plain colour encoder with the "pool" head."""
    return jax.jit(partial(encoder().init, train=False))(jax.random.key(0), tiles_of(3))


@pytest.mark.parametrize("size", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("head", "wanted"), [("pool", 192), ("conv", 24)])
def test_descriptors_are_float32_of_the_head_s_size(head, wanted, dtype, size):
    variables, output = shapes(encoder("resnet10", head, descriptor=24, dtype=dtype), size)
    assert output.shape == (2, wanted)
    assert output.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("trunk", "width"),
    [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048), ("resnet101", 2048)],
)
def test_the_pool_head_has_the_trunk_s_width(trunk, width):
    assert shapes(encoder(trunk), 64)[1].shape == (2, width)


@pytest.mark.parametrize("trunk", ["resnet18", "resnet50"])
@pytest.mark.parametrize(
    # At 512 px the map of 16 becomes 7, 5 and 3.
    ("size", "flat"),
    [(64, 2 * 2 * 512), (128, 4 * 4 * 512), (256, 4 * 4 * 512), (512, 3 * 3 * 256)],
)
def test_the_conv_head_flattens_to_the_published_size(trunk, size, flat):
    variables, output = shapes(encoder(trunk, "conv", descriptor=128), size)
    head = variables["params"]["head"]
    assert head["Dense_0"]["kernel"].shape == (flat, 128)
    filters = [head[f"Conv_{i}"]["kernel"].shape[-1] for i in range(2 + (size == 512))]
    assert filters == ([1024, 512, 256] if size == 512 else [1024, 512])
    assert output.shape == (2, 128)


@pytest.mark.parametrize(
    ("trunk", "published"),
    [
        ("resnet18", 11_176_512),
        ("resnet34", 21_284_672),
        ("resnet50", 23_508_032),
        ("resnet101", 42_500_160),
    ],
)
def test_trunks_have_the_published_number_of_parameters(trunk, published):
    variables = jax.eval_shape(
        lambda key: TRUNKS[trunk]().init(key, jnp.zeros((1, 64, 64, 3)), False), jax.random.key(0)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == published


@pytest.mark.parametrize(
    ("image", "label", "wanted"),
    [
        (3, 1, [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5], [0.5, 0.5, 0.5]]),
        (3, 3, [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]] * 2),
        (1, 0, [[1, 1, 1]]),
        (4, 0, [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]),
        (1, 1, [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]),
    ],
)
def test_fusion_starts_as_s1_s(image, label, wanted):
    weights = fusion_init(image, label)(jax.random.key(0), (1, 1, image + label, 3))
    np.testing.assert_array_equal(weights[0, 0], np.array(wanted, np.float32))


def test_the_network_has_the_fusion_with_bias_0():
    network, tiles = encoder(label=1), tiles_of(4)
    params = jax.jit(partial(network.init, train=False))(jax.random.key(0), tiles)["params"]
    wanted = fusion_init(3, 1)(jax.random.key(0), (1, 1, 4, 3))
    np.testing.assert_array_equal(params["fusion"]["kernel"], wanted)
    np.testing.assert_array_equal(params["fusion"]["bias"], np.zeros(3))


def test_colour_without_labels_has_no_fusion(pooled):
    assert "fusion" not in pooled["params"]


@pytest.mark.parametrize("label", [1, 3])
@pytest.mark.parametrize("known", [True, False])
def test_an_image_and_labels_are_described_as_their_mean(pooled, label, known):
    image, labels = (values // 2 * 2 for values in (tiles_of(3), tiles_of(label, 1)))
    labels *= known
    network = encoder(label=label)
    both = np.concatenate([image, labels], axis=-1)
    fusion = {"kernel": fusion_init(3, label)(None, (1, 1, 3 + label, 3)), "bias": jnp.zeros(3)}
    variables = {**pooled, "params": {**pooled["params"], "fusion": fusion}}
    found = described(network, variables, both)
    wanted = described(encoder(), pooled, image // 2 + labels // 2)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_preprocessing_is_imagenet_s(pooled):
    seen = []

    def see(function, arguments, keywords, context):
        if context.module.name == "trunk" and context.method_name == "__call__":
            seen.append(arguments[0])
        return function(*arguments, **keywords)

    tiles = tiles_of(3)
    with nn.intercept_methods(see):
        encoder().apply(pooled, tiles, False)
    wanted = (tiles / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(seen[0], wanted, atol=1e-5)


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_the_pool_head_pools_the_trunk_s_map(pooled, pooling):
    tiles = tiles_of(3)
    found, state = encoder(pooling=pooling).apply(
        pooled, tiles, False, capture_intermediates=True, mutable=["intermediates"]
    )
    feature_map = np.asarray(state["intermediates"]["trunk"]["__call__"][0])
    assert feature_map.shape == (3, 8, 8, WIDTH)
    wanted = feature_map.max((1, 2)) if pooling == "max" else feature_map.mean((1, 2))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_normalise_gives_unit_length_in_the_same_direction(pooled):
    tiles = tiles_of(3)
    plain = described(encoder(), pooled, tiles)
    unit = described(encoder(normalise=True), pooled, tiles)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), rtol=1e-4, atol=1e-6
    )
    assert not np.allclose(np.linalg.norm(plain, axis=1), 1)


def test_inference_does_not_depend_on_the_rest_of_the_batch(pooled):
    tiles = tiles_of(3)
    together, alone = (described(encoder(), pooled, some) for some in (tiles, tiles[:1]))
    np.testing.assert_allclose(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near_float32(pooled):
    tiles = tiles_of(3)
    wanted = described(encoder(), pooled, tiles)
    found = described(encoder(dtype=jnp.bfloat16), pooled, tiles)
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


def test_the_pair_head_is_symmetric_and_starts_as_the_nearer_the_more_alike():
    siamese = Siamese(encoder())
    init = jax.jit(partial(siamese.init, method=Siamese.both))
    variables = init(jax.random.key(0), tiles_of(3))
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4, WIDTH)).astype(np.float32)
    pair = partial(siamese.apply, variables, method=Siamese.pair)
    np.testing.assert_allclose(pair(a, b), pair(b, a), rtol=1e-6)
    np.testing.assert_allclose(pair(a, a), 0.5, rtol=1e-6)
    nearer, farther = pair(a, a + 0.1 * (b - a)), pair(a, b)
    assert (farther < nearer).all()
    assert (nearer < 0.5).all()

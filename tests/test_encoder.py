"""The encoder: what is left to the trunk, stages, published sizes, fusion, preprocessing."""

from __future__ import annotations

from colorsys import hsv_to_rgb
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_network import add_trunk, assert_near, network, tiles

from geomatch.config import ModelConfig
from geomatch.errors import UsageError
from geomatch.nn.encoder import Encoder, Siamese, TileForm, fusion_init, resolve, with_dtype
from geomatch.nn.layers import ConvNorm, SharedSettings
from geomatch.nn.trunks import TRUNKS, Bottleneck

pytestmark = pytest.mark.usefixtures("strict_dtypes")

WIDTH = 16
"""Channels of the trunk "tiny", which compiles quickly."""


@pytest.fixture(scope="module", autouse=True)
def _tiny_trunks(module_patch):
    add_trunk(module_patch, WIDTH)


def encoder(trunk="tiny", head="pool", image=3, label=0, dtype=jnp.float32, **model):
    settings = ModelConfig(trunk=trunk, head=head, **{"descriptor": 16, **model})
    return Encoder(resolve(settings), image, label, SharedSettings(dtype=dtype))


def shapes(network, size, channels=3, batch=2, **call):
    """Variables and what a call gives, as shapes and dtypes."""
    tiles = jax.ShapeDtypeStruct((batch, size, size, channels), np.uint8)
    init = partial(network.init_with_output, **call)
    output, variables = jax.eval_shape(init, jax.random.key(0), tiles)
    return variables, output


def drawn(channels=3, label=0, **model):
    """An encoder with random variables, and tiles that it tells apart."""
    form = TileForm(32, channels - label, label)
    siamese, variables = network(form, **{"trunk": "tiny", "head": "pool", **model})
    own = {kind: tree.get("encoder", {}) for kind, tree in variables.items()}
    return siamese.encoder, own, tiles(form, 3)


def described(network, variables, tiles):
    return np.asarray(jax.jit(network.apply)(variables, tiles))


def seen_by_trunk(network, variables, tiles):
    """What a trunk is given."""
    seen = []

    def see(function, arguments, keywords, context):
        if context.module.name == "trunk" and context.method_name == "__call__":
            seen.append(np.asarray(arguments[0]))
        return function(*arguments, **keywords)

    with nn.intercept_methods(see):
        network.apply(variables, tiles)
    (given,) = seen
    return given


# What is left to the trunk.


@pytest.mark.parametrize(
    ("trunk", "stage", "preprocessing", "epsilon"),
    [
        ("resnet10", 4, "torch", 1e-5),
        ("resnet18", 4, "torch", 1e-5),
        ("resnet34", 4, "torch", 1e-5),
        ("resnet50", 4, "torch", 1e-5),
        ("resnet101", 4, "torch", 1e-5),
        ("vgg16", 5, "torch", 1e-5),
        ("efficientnet_lite0", 8, "lite", 1e-3),
        ("convnet", 5, "lite", 1e-5),
    ],
)
def test_what_is_left_to_the_trunk_is_filled_in(trunk, stage, preprocessing, epsilon):
    model = resolve(ModelConfig(trunk=trunk))
    found = model.stage, model.preprocessing, model.epsilon, model.stride_in
    assert found == (stage, preprocessing, epsilon, "3x3")


def test_what_is_given_stays():
    given = ModelConfig(
        trunk="resnet50", stage=2, preprocessing="caffe", epsilon=1.001e-5, stride_in="1x1"
    )
    assert resolve(given) == given
    assert resolve(resolve(ModelConfig())) == resolve(ModelConfig())


@pytest.mark.parametrize(("trunk", "stage"), [("resnet50", 5), ("vgg16", 6), ("convnet", 9)])
def test_a_stage_past_the_last_is_refused(trunk, stage):
    with pytest.raises(UsageError, match=f"model.stage = {stage}") as error:
        resolve(ModelConfig(trunk=trunk, stage=stage))
    assert f"{trunk} has {TRUNKS[trunk].stages} stages" in error.value.hint


@pytest.mark.parametrize("pooling", ["mean", "flatten", "rmac"])
def test_a_normalised_map_of_another_pooling_is_refused(pooling):
    with pytest.raises(UsageError, match=r"model\.instance_norm") as error:
        resolve(ModelConfig(pooling=pooling, instance_norm=True))
    assert "model.pooling=grid" in error.value.hint
    assert resolve(ModelConfig(pooling="grid", instance_norm=True)).instance_norm


# Trunks.

MAPS = {
    # stride and channels of each stage
    "resnet10": [(4, 24), (8, 48), (16, 96), (32, 192)],
    "resnet18": [(4, 64), (8, 128), (16, 256), (32, 512)],
    "resnet50": [(4, 256), (8, 512), (16, 1024), (32, 2048)],
    "vgg16": [(2, 64), (4, 128), (8, 256), (16, 512), (32, 512)],
    "efficientnet_lite0": [
        *[(2, 16), (4, 24), (8, 40), (16, 80), (16, 112), (32, 192), (32, 320), (32, 1280)]
    ],
    "convnet": [(2, 32), (4, 64), (8, 128), (16, 256), (32, 11)],
}


@pytest.mark.parametrize(
    ("trunk", "stage", "stride", "channels"),
    [(trunk, i, *form) for trunk, stages in MAPS.items() for i, form in enumerate(stages, 1)],
)
def test_every_stage_gives_its_map(trunk, stage, stride, channels):
    network = encoder(trunk, stage=stage, descriptor=11)
    # 75, 38, 19, 10, 5, 3: padding keeps what is left over of an odd size.
    _, found = shapes(network, 75, method=Encoder.feature_map)
    side = -(-75 // stride)
    assert found.shape == (2, side, side, channels)


@pytest.mark.parametrize(
    ("trunk", "width"),
    [("resnet34", 512), ("resnet101", 2048), ("vgg16", 512), ("efficientnet_lite0", 1280)],
)
def test_all_stages_are_computed_unless_one_is_named(trunk, width):
    assert shapes(encoder(trunk), 64)[1].shape == (2, width)


@pytest.mark.parametrize(
    ("trunk", "published"),
    [
        ("resnet18", 11_176_512),
        ("resnet34", 21_284_672),
        ("resnet50", 23_508_032),
        ("resnet101", 42_500_160),
        ("vgg16", 14_714_688),
        # Without the layer to 1000 classes.
        ("efficientnet_lite0", 4_652_008 - 1_281_000),
    ],
)
def test_trunks_have_the_published_number_of_parameters(trunk, published):
    variables, _ = shapes(encoder(trunk), 64)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"]["trunk"])) == published


def test_a_trunk_cut_at_a_stage_is_the_beginning_of_the_whole():
    whole, variables, some = drawn(trunk="resnet10", stage=3)
    cut = whole.clone(model=resolve(ModelConfig(trunk="resnet10", stage=2)))
    inside = partial(whole.apply, capture_intermediates=True, mutable=["intermediates"])
    _, seen = jax.jit(inside)(variables, some)
    wanted = seen["intermediates"]["trunk"]["stage2_block1"]["__call__"][0]
    found = jax.jit(partial(cut.apply, method=Encoder.feature_map))(variables, some)
    assert found.shape == (3, 4, 4, 48)
    assert_near(found, wanted)


@pytest.mark.parametrize(("stride_in", "blind"), [("1x1", True), ("3x3", False)])
def test_the_stride_is_in_the_named_convolution(stride_in, blind):
    block = Bottleneck(4, 2, partial(ConvNorm, train=False), stride_in)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 8, 8, 6)).astype(np.float32)
    variables = jax.eval_shape(block.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.2, 1, leaf.shape), variables)
    changed = x.copy()
    changed[:, 1::2] += 1
    found, other = (np.asarray(block.apply(variables, values)) for values in (x, changed))
    assert found.shape == (1, 4, 4, 16)
    # A 1x1 convolution with a stride passes over every second row.
    assert np.array_equal(found, other) == blind


def test_both_strides_have_the_same_parameters():
    found, wanted = (
        shapes(encoder("resnet50", stride_in=stride_in), 64)[0] for stride_in in ("1x1", "3x3")
    )
    assert found == wanted


def test_stride_in_reaches_the_trunk():
    network, variables, some = drawn(trunk="resnet50", stage=2, stride_in="1x1")
    other = network.clone(model=resolve(ModelConfig(trunk="resnet50", stage=2, head="pool")))
    found, wanted = (described(each, variables, some) for each in (network, other))
    assert np.abs(found - wanted).max() > 0.01 * np.abs(wanted).max()


# Heads (see test_heads) at the sizes of real tiles.


@pytest.mark.parametrize("size", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("head", "wanted"), [("pool", 192), ("conv", 24), ("mlp", 24)])
def test_descriptors_are_float32_of_the_head_s_size(head, wanted, dtype, size):
    variables, output = shapes(encoder("resnet10", head, descriptor=24, dtype=dtype), size)
    assert output.shape == (2, wanted)
    assert output.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


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


# Fusion.


@pytest.mark.parametrize(
    ("image", "label", "wanted"),
    [
        (3, 1, [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5], [0.5, 0.5, 0.5]]),
        (3, 3, [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]] * 2),
        (1, 0, [[1, 1, 1]]),
        (2, 0, [[1, 1, 1], [0, 0, 0]]),
        (4, 0, [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]),
        (4, 1, [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5], [0, 0, 0], [0.5, 0.5, 0.5]]),
        (1, 1, [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]),
        # Red, yellow, green, cyan, blue, magenta.
        (
            1,
            6,
            [
                [0.5, 0.5, 0.5],
                *[[0.5, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0], [0, 0.5, 0.5], [0, 0, 0.5]],
                [0.5, 0, 0.5],
            ],
        ),
    ],
)
def test_fusion_starts_as_in_the_cross_year_original(image, label, wanted):
    weights = fusion_init(image, label)(jax.random.key(0), (image + label, 3))
    np.testing.assert_allclose(weights, np.array(wanted, np.float32), atol=1e-7)


@pytest.mark.parametrize("label", [2, 4, 5, 12, 40])
def test_every_plane_has_a_colour_of_its_own(label):
    weights = np.asarray(fusion_init(3, label)(None, (3 + label, 3)))[3:]
    apart = np.abs(weights[:, None] - weights[None]).max(axis=2)
    assert (apart[~np.eye(label, dtype=bool)] > 0.03).all()
    # Pure colours: half of the full scale, and none of some other.
    np.testing.assert_allclose(weights.max(axis=1), 0.5)
    np.testing.assert_allclose(weights.min(axis=1), 0, atol=1e-7)


@pytest.mark.parametrize(
    ("image", "label", "classes", "rows"),
    [(3, 1, 0, 4), (3, 3, 0, 6), (1, 0, 0, 1), (4, 0, 0, 4), (3, 1, 7, 10), (4, 1, 2, 6)],
)
def test_the_network_has_the_fusion_with_bias_0(image, label, classes, rows):
    network = encoder(image=image, label=label, label_classes=classes)
    some = np.zeros((1, 16, 16, image + label), np.uint8)
    params = jax.jit(network.init)(jax.random.key(0), some)["params"]
    wanted = fusion_init(image, classes or label)(None, (rows, 3))
    np.testing.assert_array_equal(params["fusion"]["kernel"], wanted)
    np.testing.assert_array_equal(params["fusion"]["bias"], np.zeros(3))


def test_colour_without_labels_has_no_fusion():
    assert "fusion" not in shapes(encoder(), 32)[0]["params"]


@pytest.mark.parametrize("label", [1, 3])
@pytest.mark.parametrize("known", [True, False])
def test_an_image_and_labels_are_described_as_their_mean(label, known):
    plain, variables, image = drawn()
    image, labels = image // 2 * 2, tiles(TileForm(32, label, 0), 3, seed=1) // 2 * 2
    labels *= known
    fusion = {"kernel": fusion_init(3, label)(None, (3 + label, 3)), "bias": jnp.zeros(3)}
    fused = {**variables, "params": {**variables["params"], "fusion": fusion}}
    both = np.concatenate([image, labels], axis=-1)
    found = described(encoder(label=label), fused, both)
    assert_near(found, described(plain, variables, image // 2 + labels // 2))


def test_near_infrared_begins_as_if_it_were_not_there():
    plain, variables, image = drawn()
    infrared = tiles(TileForm(32, 1, 0), 3, seed=1)
    fusion = {"kernel": fusion_init(4, 0)(None, (4, 3)), "bias": jnp.zeros(3)}
    fused = {**variables, "params": {**variables["params"], "fusion": fusion}}
    found = described(encoder(image=4), fused, np.concatenate([image, infrared], axis=-1))
    assert_near(found, described(plain, variables, image))


CLASSES = 5


def classes(seed=0):
    """(3, 32, 32) codes from 0, unknown, to one past the last class."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, CLASSES + 2, (3, 32, 32)).astype(np.uint8)


def test_classes_are_fused_as_planes():
    network, variables, some = drawn(4, 1, label_classes=CLASSES, preprocessing="none")
    some[..., -1] = classes()
    kernel, bias = (variables["params"]["fusion"][name] for name in ("kernel", "bias"))
    assert kernel.shape == (3 + CLASSES, 3)
    wanted = np.zeros((3, 32, 32, 3))
    for place in np.ndindex(3, 32, 32):
        for colour in range(3):
            total = bias[colour] + some[place][:3] @ kernel[:3, colour]
            code = some[place][3]
            if 1 <= code <= CLASSES:
                total += 255 * kernel[2 + code, colour]
            wanted[(*place, colour)] = total
    assert_near(seen_by_trunk(network, variables, some), wanted)


def test_classes_are_described_as_planes_fed_by_hand():
    network, variables, some = drawn(4, 1, label_classes=CLASSES)
    some[..., -1] = classes()
    by_hand = encoder(label=CLASSES)
    planes = 255 * (some[..., -1:] == np.arange(1, CLASSES + 1)).astype(np.uint8)
    found = described(network, variables, some)
    wanted = described(by_hand, variables, np.concatenate([some[..., :3], planes], axis=-1))
    assert_near(found, wanted, 1e-5)
    other = described(by_hand, variables, np.concatenate([some[..., :3], 0 * planes], axis=-1))
    assert np.abs(other - wanted).max() > 0.01 * np.abs(wanted).max()


@pytest.mark.parametrize("form", ["grey", "colour"])
def test_classes_are_described_as_an_image_fed_by_hand(form):
    """Greys evenly up to 255, or colours evenly around the circle; black where unknown."""
    network, variables, some = drawn(4, 1, label_classes=CLASSES, labels=form, preprocessing="none")
    codes = some[..., -1] = classes()
    values = np.zeros((256, 1 if form == "grey" else 3), np.float32)
    for code in range(1, CLASSES + 1):
        hue = (code - 1) / CLASSES
        values[code] = (
            255 * code / CLASSES if form == "grey" else 255 * np.array(hsv_to_rgb(hue, 1, 1))
        )
    kernel, bias = (variables["params"]["fusion"][name] for name in ("kernel", "bias"))
    fused = np.concatenate([some[..., :3], values[codes]], axis=-1) @ np.asarray(kernel)
    assert_near(seen_by_trunk(network, variables, some), fused + np.asarray(bias), 1e-4)


# Preprocessing.


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (
            "torch",
            lambda x: (x / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225]),
        ),
        # Blue, green, red.
        (
            "caffe",
            lambda x: np.stack([x[..., 2] - 103.939, x[..., 1] - 116.779, x[..., 0] - 123.68], -1),
        ),
        ("lite", lambda x: (x - 127) / 128),
        ("none", lambda x: x),
    ],
)
def test_preprocessing_is_the_published_one(kind, wanted):
    network, variables, some = drawn(preprocessing=kind)
    found = seen_by_trunk(network, variables, some)
    assert_near(found, wanted(some.astype(float)), 1e-6)


# What descriptors depend on.


def test_inference_does_not_depend_on_the_rest_of_the_batch():
    network, variables, some = drawn()
    together, alone = (described(network, variables, part) for part in (some, some[:1]))
    assert_near(together[:1], alone)
    assert np.abs(together[1:] - alone).min(axis=0).max() > 0.01 * np.abs(alone).max()


@pytest.mark.usefixtures("programs_are_not_stored")
@pytest.mark.parametrize("trunk", ["tiny", "efficientnet_lite0", "vgg16"])
def test_bfloat16_is_near_float32(trunk):
    network, variables, some = drawn(trunk=trunk, stage=1, pooling="mean")
    wanted = described(network, variables, some)
    half = with_dtype(Siamese(network), jnp.bfloat16).encoder
    found = described(half, variables, some)
    assert found.dtype == np.float32
    assert_near(found, wanted, 0.05)
    # It is another computation.
    assert np.abs(found - wanted).max() > 1e-4 * np.abs(wanted).max()


# The siamese.


def test_the_pair_head_is_symmetric_and_starts_as_the_nearer_the_more_alike():
    siamese = Siamese(encoder())
    init = jax.jit(partial(siamese.init, method=Siamese.encode_and_pair))
    variables = init(jax.random.key(0), tiles(TileForm(32, 3, 0), 3))
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4, WIDTH)).astype(np.float32)
    pair = partial(siamese.apply, variables, method=Siamese.pair)
    np.testing.assert_allclose(pair(a, b), pair(b, a), rtol=1e-6)
    np.testing.assert_allclose(pair(a, a), 0.5, rtol=1e-6)
    nearer, farther = pair(a, a + 0.1 * (b - a)), pair(a, b)
    assert (farther < nearer).all()
    assert (nearer < 0.5).all()


@pytest.mark.parametrize(("pooling", "count"), [("mean", WIDTH), ("rmac", 14 * WIDTH)])
def test_features_are_what_the_head_is_given(pooling, count):
    form = TileForm(32, 3, 0)
    siamese, variables = network(form, trunk="tiny", head="pool", pooling=pooling)
    features = partial(siamese.apply, method=Siamese.features)
    found = np.asarray(jax.jit(features)(variables, tiles(form, 3)))
    assert found.shape == (3, count)
    # The "pool" head adds up regions.
    wanted = described(siamese, variables, tiles(form, 3))
    assert_near(found.reshape(3, -1, WIDTH).sum(axis=1), wanted)

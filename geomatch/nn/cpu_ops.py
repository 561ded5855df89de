"""Convolution, BatchNorm and pooling with formulations that are fast on XLA's CPU backend.

The results are those of the plain operations (`*_plain`). The main difference is the gradient:
the one that JAX derives is several times slower on this backend (measured in `tests/benchmarks`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from geomatch.nn import backend

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
SMALL_MAP = 6
"""A convolution of a padded map of up to this side is one matrix product."""

MIN_CHANNELS = 16
"""With fewer, a matrix product per kernel position is too small to be efficient."""

Padding = tuple[tuple[int, int], tuple[int, int]]
"""Zeros around a map: (above, below), (left, right)."""


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """Convolution of (b, h, w, c) with a square kernel (k, k, c, f)."""
    return _convolve(_padded(x, padding), kernel, stride)


def conv_plain(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """`conv` with JAX's own gradient."""
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=DIMENSIONS
    )


def _padded(x: jax.Array, padding: Padding) -> jax.Array:
    return jnp.pad(x, ((0, 0), *padding, (0, 0)))


def _conv_forward(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> Any:
    return conv(x, kernel, stride, padding), (x, kernel)


def _conv_backward(stride: int, padding: Padding, kept: Any, dy: jax.Array) -> Any:
    x, kernel = kept
    return _input_gradient(x, kernel, stride, padding, dy), _kernel_gradient(
        x, kernel, stride, padding, dy
    )


def _input_gradient(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, dy: jax.Array
) -> jax.Array:
    """Convolution of the output's gradient, dilated by the stride, with the flipped kernel."""
    k = kernel.shape[0]
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    # A 1x1 kernel is applied before dilation, so that the zeros cost no multiplication.
    if k == 1 and dy.dtype == jnp.float32:
        # A matrix product reads the kernel as stored; a convolution transposes it in memory first.
        dy = lax.dot_general(dy, kernel[0, 0], (((3,), (1,)), ((), ())))
    elif k == 1:
        dy = _convolve(dy, flipped, 1)
    pads = [(0, 0, 0)]
    for size, out, (before, _) in zip(x.shape[1:3], dy.shape[1:3], padding, strict=True):
        low = k - 1 - before
        dilated_size = (out - 1) * stride + 1
        pads.append((low, size + k - 1 - low - dilated_size, stride - 1))
    dilated = lax.pad(dy, jnp.zeros((), dy.dtype), [*pads, (0, 0, 0)])
    if k == 1:
        return dilated
    if stride > 1 and _xla_uses_onednn(dy.dtype):
        # Without it XLA makes a dilated convolution of this, which oneDNN does not support.
        dilated = lax.optimization_barrier(dilated)
    return _convolve(dilated, flipped, 1)


def _kernel_gradient(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, dy: jax.Array
) -> jax.Array:
    """Matrix products of the input at each kernel position with the output's gradient."""
    k, channels, filters = kernel.shape[1:]
    onednn = _xla_uses_onednn(dy.dtype)
    if channels < MIN_CHANNELS or (onednn and k > 1):
        _, pull = jax.vjp(lambda weights: conv_plain(x, weights, stride, padding), kernel)
        gradient: jax.Array = pull(dy)[0]
        return gradient
    shifted = _shifted(_padded(x, padding), k, stride)
    flat = dy.reshape(-1, filters)
    if _calls_onednn(dy.dtype):
        total = jnp.stack([_onednn_product(part, flat) for part in shifted])
    elif k == 1 and (onednn or channels <= filters):
        total = shifted[0].T @ flat
    else:
        total = _transposed(flat.T @ jnp.concatenate(shifted, axis=1))
    return total.reshape(kernel.shape).astype(kernel.dtype)


def _transposed(matrix: jax.Array) -> jax.Array:
    """(n, c) to (c, n), in memory: XLA would fold a plain transpose into the matrix product."""
    half = len(matrix) // 2
    return jnp.concatenate([matrix[:half].T, matrix[half:].T], axis=1)


def _convolve(padded: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolution without padding, by oneDNN, XLA's convolution or a matrix product.

    On maps hardly larger than the kernel, XLA's convolution falls back to naive loops that are
    sixty times slower.
    """
    k = kernel.shape[0]
    if _calls_onednn(kernel.dtype):
        return _onednn_convolution(padded, kernel, stride)
    if k > 1 and min(padded.shape[1:3]) <= SMALL_MAP and not _xla_uses_onednn(kernel.dtype):
        height, width = _outputs(padded, k, stride)
        columns = jnp.concatenate(_shifted(padded, k, stride), axis=1)
        total = columns @ kernel.reshape(-1, kernel.shape[-1])
        return total.reshape(len(padded), height, width, -1)
    return lax.conv_general_dilated(
        padded, kernel, (stride, stride), "VALID", dimension_numbers=DIMENSIONS
    )


def _onednn_convolution(padded: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolution without padding by oneDNN, for an XLA that does not use oneDNN itself."""
    data = {"batch_dim": 0, "feature_dim": 3, "spatial_dims": [1, 2]}
    config = {
        "dims": 4,
        "feature_groups": 1,
        "input": {"data": data},
        "kernel": {
            "filter": {
                "input_feature_dim": 2,
                "output_feature_dim": 3,
                "spatial_dims": [0, 1],
                "shape": kernel.shape,
            }
        },
        "output": {"data": data},
        "window": {
            "pad_left": [0, 0],
            "pad_right": [0, 0],
            "strides": [stride, stride],
            "window_dilations": [1, 1],
        },
    }
    shape = (len(padded), *_outputs(padded, len(kernel), stride), kernel.shape[-1])
    return _onednn_call("convolution", {"onednn_conv_config": config}, shape, padded, kernel)


def _onednn_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a.T @ b by oneDNN, for an XLA that does not use oneDNN itself."""
    config = {"onednn_matmul_config": {"transpose_a": True}}
    return _onednn_call("matmul", config, (a.shape[1], b.shape[1]), a, b)


def _onednn_call(
    name: str, config: dict[str, Any], shape: tuple[int, ...], *operands: Any
) -> jax.Array:
    """The result of XLA's oneDNN thunk; `config` is defined by XLA's `onednn_config.proto`."""
    call = jax.ffi.ffi_call(
        f"__onednn${name}",
        jax.ShapeDtypeStruct(shape, operands[0].dtype),
        custom_call_api_version=2,
        legacy_backend_config=json.dumps(config),
    )
    result: jax.Array = call(*operands)
    return result


def _outputs(padded: jax.Array, k: int, stride: int) -> tuple[int, int]:
    height, width = ((size - k) // stride + 1 for size in padded.shape[1:3])
    return height, width


def _xla_uses_onednn(dtype: Any) -> bool:
    return bool(dtype == jnp.bfloat16) and backend.xla_uses_onednn()


def _calls_onednn(dtype: Any) -> bool:
    return bool(dtype == jnp.bfloat16) and backend.calls_onednn()


def _shifted(padded: jax.Array, k: int, stride: int) -> list[jax.Array]:
    """The input at each kernel position, (b h w, c) each."""
    return [window.reshape(-1, padded.shape[-1]) for window in _windows(padded, k, stride)]


def _windows(padded: jax.Array, k: int, stride: int) -> Iterator[jax.Array]:
    """The input at each kernel position, (b, h, w, c) each."""
    height, width = ((size - k) // stride * stride + 1 for size in padded.shape[1:3])
    for i in range(k):
        for j in range(k):
            yield padded[:, i : i + height : stride, j : j + width : stride]


conv.defvjp(_conv_forward, _conv_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """Convolution of each channel of (b, h, w, c) with its own square kernel, (k, k, 1, c)."""
    weights = kernel.reshape(-1, kernel.shape[-1])
    windows = _windows(_padded(x, padding), kernel.shape[0], stride)
    return functools.reduce(jnp.add, map(jnp.multiply, windows, weights))


def _depthwise_forward(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> Any:
    return depthwise(x, kernel, stride, padding), (x, kernel)


def _depthwise_backward(stride: int, padding: Padding, kept: Any, dy: jax.Array) -> Any:
    x, kernel = kept
    return _depthwise_dx(dy, kernel, stride, padding, x.shape), _depthwise_dkernel(
        x, dy, kernel, stride, padding
    )


def _depthwise_dx(
    dy: jax.Array, kernel: jax.Array, stride: int, padding: Padding, shape: tuple[int, ...]
) -> jax.Array:
    """The input's gradient: for each position modulo the stride, a convolution with the weights
    that reach it; JAX's own would add each weight's share into a padded copy of the input.
    """
    k = kernel.shape[0]
    reach = (k - 1) // stride
    height, width = (-(-(shape[i + 1] + sum(padding[i])) // stride) for i in range(2))
    room = [(reach, height - dy.shape[1]), (reach, width - dy.shape[2])]
    padded = jnp.pad(dy, [(0, 0), *room, (0, 0)])

    def at(top: int, left: int) -> jax.Array:
        """(b, height, width, c) of the rows and columns that leave these remainders."""
        parts = [
            padded[:, y : y + height, x : x + width] * kernel[i, j, 0]
            for y, i in zip(range(reach, -1, -1), range(top, k, stride), strict=False)
            for x, j in zip(range(reach, -1, -1), range(left, k, stride), strict=False)
        ]
        return functools.reduce(jnp.add, parts)

    rows = [jnp.stack([at(i, j) for j in range(stride)], axis=3) for i in range(stride)]
    whole = jnp.stack(rows, axis=2).reshape(len(dy), height * stride, width * stride, -1)
    (top, _), (left, _) = padding
    return whole[:, top : top + shape[1], left : left + shape[2]]


def _depthwise_dkernel(
    x: jax.Array, dy: jax.Array, kernel: jax.Array, stride: int, padding: Padding
) -> jax.Array:
    """The kernel's gradient, one image after another, which stays in the cache meanwhile."""
    k = kernel.shape[0]

    def add(total: jax.Array, image: Any) -> tuple[jax.Array, None]:
        padded, gradient = (each.astype(jnp.float32) for each in image)
        windows = _windows(padded[None], k, stride)
        return total + jnp.stack([(w[0] * gradient).sum((0, 1)) for w in windows]), None

    zeros = jnp.zeros((k * k, x.shape[-1]), jnp.float32)
    total, _ = lax.scan(add, zeros, (_padded(x, padding), dy))
    return total.reshape(kernel.shape).astype(kernel.dtype)


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def depthwise_plain(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """`depthwise` as a grouped convolution."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=DIMENSIONS,
        feature_group_count=x.shape[-1],
    )


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis_name: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalise (..., c) by the statistics of the global batch.

    Gradients flow through the normalised batch only.

    Returns:
        The normalised batch, and the mean and variance (c,) of the global batch.
    """
    return batch_norm_plain(x, scale, bias, epsilon, axis_name)


def batch_norm_plain(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis_name: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`batch_norm` with JAX's own gradient."""
    wide = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    moments = jnp.stack([wide.mean(axes), (wide * wide).mean(axes)])
    if axis_name is not None:
        moments = lax.pmean(moments, axis_name)
    mean, variance = moments[0], jnp.maximum(moments[1] - moments[0] ** 2, 0.0)
    factor = scale * lax.rsqrt(variance + epsilon)
    y = (wide * factor + (bias - mean * factor)).astype(x.dtype)
    return y, mean, variance


def _batch_norm_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis_name: str | None
) -> Any:
    y, mean, variance = batch_norm_plain(x, scale, bias, epsilon, axis_name)
    return (y, mean, variance), (x, scale, mean, lax.rsqrt(variance + epsilon))


def _batch_norm_backward(epsilon: float, axis_name: str | None, kept: Any, gradients: Any) -> Any:
    x, scale, mean, inverse = kept
    # Otherwise XLA keeps the forward pass's float32 copy of a bfloat16 input alive until here.
    x = lax.optimization_barrier(x)
    dy = gradients[0].astype(jnp.float32)
    wide = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    dbias = dy.sum(axes)
    dscale = ((dy * wide).sum(axes) - mean * dbias) * inverse
    count = x.size // x.shape[-1]
    sums = jnp.stack([dbias, dscale])
    if axis_name is not None:
        # The input's gradient needs the sums over all devices; the gradients of scale and bias
        # stay local, since the training step averages them.
        sums = lax.psum(sums, axis_name)
        count = count * lax.psum(1, axis_name)
    total_bias, total_scale = sums / count
    slope = scale * inverse
    dx = dy * slope - wide * (slope * inverse * total_scale)
    dx = dx - slope * (total_bias - mean * inverse * total_scale)
    return dx.astype(x.dtype), dscale, dbias


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def relu(x: jax.Array, most: float | None) -> jax.Array:
    """ReLU clipped at `most`; its gradient needs the result only, which the next layer keeps."""
    if _xla_uses_onednn(x.dtype):
        # XLA fuses it into oneDNN's convolution and residual sum only if written in float32.
        return jnp.clip(x.astype(jnp.float32), 0, most).astype(x.dtype)
    return jnp.clip(x, 0, most)


def _relu_forward(x: jax.Array, most: float | None) -> Any:
    y = relu(x, most)
    return y, y


def _relu_backward(most: float | None, y: jax.Array, dy: jax.Array) -> Any:
    passes = y > 0 if most is None else (y > 0) & (y < most)
    return (jnp.where(passes, dy, 0),)


relu.defvjp(_relu_forward, _relu_backward)


@jax.custom_vjp
def max_pool_3x3(x: jax.Array) -> jax.Array:
    """3x3 max pooling with stride 2 of non-negative values, one axis after the other."""
    if x.dtype != jnp.bfloat16:
        return _max_of_3(_max_of_3(x, 1), 2)
    # Non-negative floats order like their bits, and integer comparisons are vectorised.
    bits = max_pool_3x3(lax.bitcast_convert_type(x, jnp.int16))
    return lax.bitcast_convert_type(bits, x.dtype)


def _max_of_3(x: jax.Array, axis: int) -> jax.Array:
    """Maximum over windows of 3 with stride 2, from pairs of rows that are adjacent in memory."""
    x = _pad_axis(x, axis, 0, x.shape[axis] % 2)
    pairs = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    even, odd = (lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in range(2))
    return jnp.maximum(jnp.maximum(even, odd), _pad_axis(odd, axis, 1, -1))


def _pad_axis(x: jax.Array, axis: int, before: int, after: int) -> jax.Array:
    """Zeros added along an axis, or rows cropped where `before` or `after` is negative."""
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (before, after, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), padding)


def _max_pool_forward(x: jax.Array) -> tuple[jax.Array, Any]:
    """The maximum over strided slices: slower forward, but with a faster gradient."""
    return jax.vjp(lambda x: _max_of_slices(_max_of_slices(x, 1), 2), x)


def _max_of_slices(x: jax.Array, axis: int) -> jax.Array:
    size = x.shape[axis]
    out = (size - 1) // 2 + 1
    padded = _pad_axis(x, axis, 1, 2 * out - size)
    first, second, third = (_strided(padded, i, out, axis) for i in range(3))
    return jnp.maximum(jnp.maximum(first, second), third)


def _max_pool_backward(pull: Any, dy: jax.Array) -> Any:
    return pull(dy)


max_pool_3x3.defvjp(_max_pool_forward, _max_pool_backward)


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """2x2 max pooling with stride 2, over strided slices along each axis; sizes are rounded up."""
    for axis in (1, 2):
        out = -(-x.shape[axis] // 2)
        padding = [(0, 0)] * 4
        padding[axis] = (0, 2 * out - x.shape[axis])
        # With an odd size the last row is compared with itself.
        padded = jnp.pad(x, padding, mode="edge")
        x = jnp.maximum(_strided(padded, 0, out, axis), _strided(padded, 1, out, axis))
    return x


def _strided(x: jax.Array, start: int, count: int, axis: int) -> jax.Array:
    return lax.slice_in_dim(x, start, start + 2 * (count - 1) + 1, 2, axis)

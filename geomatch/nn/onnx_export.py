"""The ONNX graph of an encoder, translated from its jaxpr.

The jaxpr is walked operation by operation. Values that do not depend on the tiles are evaluated;
a factor or shift per channel is folded into the convolution before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from string import ascii_lowercase
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from numpy.typing import NDArray

from geomatch.errors import GeomatchError
from geomatch.nn.layers import plain_ops

OPSET = 18
IR_VERSION = 8
"""The lowest for this opset, so that older runtimes read it."""

BATCH = 8191
"""Size of the traced batch: a prime that divides no other size, so that its multiples are the
dimensions that grow with the batch."""

CHANNELS_FIRST = (0, 3, 1, 2)
"""The axes of JAX's (b, h, w, c) in the order of ONNX's convolutions, (b, c, h, w)."""


def to_onnx(forward: Callable[[jax.Array], Any], shape: tuple[int, int, int]) -> bytes:
    """The ONNX graph of a function of tiles, for batches of any size, in float32.

    Args:
        forward: (n, h, w, c) uint8 to (n, d) float32, each tile independent of the others; it
            closes over its weights.
        shape: (h, w, c).

    Returns:
        A model with the input "tiles", (n, h, w, c) uint8, and the output "descriptors", (n, d)
        float32.

    Raises:
        GeomatchError: onnx is not installed, or an operation has no translation.
    """
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        raise GeomatchError(
            "writing an ONNX graph needs onnx, which is not installed",
            "Run: pip install 'geomatch[onnx]'",
        ) from None
    with plain_ops():
        closed = jax.make_jaxpr(forward)(jax.ShapeDtypeStruct((BATCH, *shape), np.uint8))
    graph = _Graph(helper.make_node)
    # Transposed while they are bytes; all numbers are float32 from here on.
    transposed = graph.node("Transpose", "tiles", perm=CHANNELS_FIRST)
    tiles = _Tensor(graph.node("Cast", transposed, to=TensorProto.FLOAT), CHANNELS_FIRST)
    (result,) = _walk(graph, closed.jaxpr, closed.consts, [tiles])
    graph.nodes.append(helper.make_node("Identity", [graph.name(result, (0, 1))], ["descriptors"]))
    nodes, constants = graph.needed("descriptors")
    (described,) = closed.out_avals
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "encoder",
            [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["n", *shape])],
            [
                helper.make_tensor_value_info(
                    "descriptors", TensorProto.FLOAT, ["n", described.shape[1]]
                )
            ],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        producer_name="geomatch",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    return model.SerializeToString()


@dataclass(frozen=True)
class _Tensor:
    """A value that depends on the tiles.

    Attributes:
        order: the JAX axis of each axis in the graph.
    """

    name: str
    order: tuple[int, ...]

    def position(self, axis: int) -> int:
        return self.order.index(axis)


_Value = _Tensor | NDArray[Any]


@dataclass(frozen=True)
class _Linear:
    """A convolution or matrix product with a kernel (outputs, ...) and a bias (outputs,)."""

    operation: str
    x: str
    kernel: NDArray[np.float32]
    bias: NDArray[np.float32]
    attributes: dict[str, Any]
    order: tuple[int, ...]

    def scaled(self, factor: NDArray[Any]) -> _Linear:
        spread = factor.reshape(-1, *[1] * (self.kernel.ndim - 1))
        return replace(self, kernel=self.kernel * spread, bias=self.bias * factor)

    def shifted(self, shift: NDArray[Any]) -> _Linear:
        return replace(self, bias=self.bias + shift)


class _Graph:
    """Nodes and constants, in the order in which they are added."""

    def __init__(self, make_node: Callable[..., Any]) -> None:
        self.make_node = make_node
        self.nodes: list[Any] = []
        self.producers: dict[str, Any] = {}
        self.constants: dict[str, NDArray[Any]] = {}
        self.linears: dict[str, _Linear] = {}

    def node(self, operation: str, *inputs: str | NDArray[Any], **attributes: Any) -> str:
        """Add a node.

        Returns:
            The name of its result.
        """
        names = [self.constant(x) if isinstance(x, np.ndarray) else x for x in inputs]
        result = f"{operation}_{len(self.nodes)}"
        made = self.make_node(operation, names, [result], name=result, **attributes)
        self.nodes.append(made)
        self.producers[result] = made
        return result

    def constant(self, value: NDArray[Any]) -> str:
        """Add a constant: bool and int64 (sizes and axes of ONNX) as they are, all else as float32.

        Returns:
            Its name.
        """
        name = f"constant_{len(self.constants)}"
        kept = value.dtype in (np.bool_, np.int64)
        self.constants[name] = np.array(value if kept else value.astype(np.float32), order="C")
        return name

    def name(self, value: _Value, order: tuple[int, ...]) -> str:
        """The name of a value with its axes in `order`; constants need that rank, or rank 0."""
        if isinstance(value, np.ndarray):
            value = _unbroadcast(value)
            return self.constant(value.transpose(order) if value.ndim else value)
        if value.order == order:
            return value.name
        return self.node("Transpose", value.name, perm=[value.position(axis) for axis in order])

    def elementwise(self, operation: str, *values: _Value, **attributes: Any) -> _Tensor:
        """Add an elementwise node."""
        orders = [value.order for value in values if isinstance(value, _Tensor)]
        order = max(orders)  # prefers channels first to JAX's order
        names = [self.name(value, order) for value in values]
        return _Tensor(self.node(operation, *names, **attributes), order)

    def linear(self, linear: _Linear) -> _Tensor:
        """Add a node into which a following factor or shift can be folded."""
        name = self.node(
            linear.operation, linear.x, linear.kernel, linear.bias, **linear.attributes
        )
        self.linears[name] = linear
        return _Tensor(name, linear.order)

    def needed(self, output: str) -> tuple[list[Any], dict[str, NDArray[Any]]]:
        """The nodes and constants that `output` depends on."""
        wanted, nodes = {output}, []
        for node in reversed(self.nodes):
            if node.output[0] in wanted:
                wanted.update(node.input)
                nodes.append(node)
        constants = {name: value for name, value in self.constants.items() if name in wanted}
        return nodes[::-1], constants


def _walk(
    graph: _Graph, jaxpr: Jaxpr, constants: Sequence[Any], inputs: Sequence[_Value]
) -> list[_Value]:
    """Add a function's operations to the graph; returns its results."""
    values: dict[Any, _Value] = dict(zip(jaxpr.constvars, map(np.asarray, constants), strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def value_of(atom: Any) -> _Value:
        return (
            np.asarray(atom.val, _aval(atom).dtype) if isinstance(atom, Literal) else values[atom]
        )

    for equation in jaxpr.eqns:
        operands = [value_of(atom) for atom in equation.invars]
        name = equation.primitive.name
        if name in CALLS:
            inner = equation.params[CALLS[name]]
            results = _walk(graph, inner.jaxpr, inner.consts, operands)
        elif not any(isinstance(operand, _Tensor) for operand in operands):
            results = _evaluate(equation, operands)
        elif name in TRANSLATIONS:
            results = [TRANSLATIONS[name](graph, equation, *operands)]
        else:
            raise _untranslatable(equation)
        values.update(zip(equation.outvars, results, strict=True))
    return [value_of(atom) for atom in jaxpr.outvars]


def _evaluate(equation: JaxprEqn, operands: Sequence[Any]) -> list[_Value]:
    """The results of an operation on constants."""
    params = equation.params
    if equation.primitive.name == "broadcast_in_dim":
        # As a view, since it may have the size of the traced batch.
        (operand,) = operands
        shape = np.ones(len(params["shape"]), int)
        shape[list(params["broadcast_dimensions"])] = operand.shape
        return [np.broadcast_to(operand.reshape(shape), params["shape"])]
    result = equation.primitive.bind(*operands, **params)
    results = result if equation.primitive.multiple_results else [result]
    return [np.asarray(result) for result in results]


def _unbroadcast(value: NDArray[Any]) -> NDArray[Any]:
    """A constant without repetition along axes, since ONNX's operations broadcast."""
    repeated = [
        stride == 0 or size == BATCH
        for stride, size in zip(value.strides, value.shape, strict=True)
    ]
    return value[tuple(slice(1) if repeats else slice(None) for repeats in repeated)]


def _aval(atom: Any) -> Any:
    """Shape and dtype of a value."""
    return atom.aval


def _untranslatable(equation: JaxprEqn) -> GeomatchError:
    return GeomatchError(
        f"the encoder has an operation that cannot be written as ONNX: {equation.primitive.name}",
        "Embed with --engine jax.",
    )


def _elementwise(operation: str) -> Callable[..., _Tensor]:
    def translate(graph: _Graph, equation: JaxprEqn, *operands: _Value) -> _Tensor:
        return graph.elementwise(operation, *operands)

    return translate


def _affine(operation: str) -> Callable[..., _Tensor]:
    """Add, Sub, Mul or Div, folded into the linear operation before it where possible."""

    def translate(graph: _Graph, equation: JaxprEqn, a: _Value, b: _Value) -> _Tensor:
        if np.issubdtype(_aval(equation.invars[0]).dtype, np.integer):  # integers wrap around
            raise _untranslatable(equation)
        if operation in ("Add", "Mul"):
            a, b = _tensor_first(a, b)
        if isinstance(a, _Tensor) and a.name in graph.linears and isinstance(b, np.ndarray):
            linear, constant = graph.linears[a.name], _unbroadcast(b)
            if constant.size == 1 or constant.size == constant.shape[-1] == len(linear.bias):
                channels = np.broadcast_to(constant.reshape(-1), linear.bias.shape)
                return graph.linear(_fold(linear, operation, channels))
        return graph.elementwise(operation, a, b)

    return translate


def _tensor_first(a: _Value, b: _Value) -> tuple[_Value, _Value]:
    return (b, a) if isinstance(a, np.ndarray) else (a, b)


def _fold(linear: _Linear, operation: str, channels: NDArray[Any]) -> _Linear:
    if operation == "Add":
        return linear.shifted(channels)
    if operation == "Sub":
        return linear.shifted(-channels)
    return linear.scaled(channels if operation == "Mul" else 1 / channels)


def _max(graph: _Graph, equation: JaxprEqn, a: _Value, b: _Value) -> _Tensor:
    a, b = _tensor_first(a, b)
    if isinstance(b, np.ndarray) and not b.any():
        return graph.elementwise("Relu", a)
    return graph.elementwise("Max", a, b)


def _min(graph: _Graph, equation: JaxprEqn, a: _Value, b: _Value) -> _Tensor:
    a, b = _tensor_first(a, b)
    if isinstance(a, _Tensor) and isinstance(b, np.ndarray) and b.ndim == 0:
        producer = graph.producers[a.name]
        if producer.op_type == "Relu":  # runtimes fuse a Clip, but not a Min, into a convolution
            clipped = graph.node("Clip", producer.input[0], np.zeros((), np.float32), b)
            return _Tensor(clipped, a.order)
    return graph.elementwise("Min", a, b)


def _square(graph: _Graph, equation: JaxprEqn, x: _Tensor) -> _Tensor:
    return graph.elementwise("Mul", x, x)


def _integer_pow(graph: _Graph, equation: JaxprEqn, x: _Tensor) -> _Tensor:
    power = equation.params["y"]
    if power == 2:
        return _square(graph, equation, x)
    return graph.elementwise("Pow", x, np.array(power, np.float32))


def _rsqrt(graph: _Graph, equation: JaxprEqn, x: _Tensor) -> _Tensor:
    return graph.elementwise("Reciprocal", graph.elementwise("Sqrt", x))


def _log1p(graph: _Graph, equation: JaxprEqn, x: _Tensor) -> _Tensor:
    return graph.elementwise("Log", graph.elementwise("Add", x, np.ones((), np.float32)))


def _erfc(graph: _Graph, equation: JaxprEqn, x: _Tensor) -> _Tensor:
    return graph.elementwise("Sub", np.ones((), np.float32), graph.elementwise("Erf", x))


def _unequal(graph: _Graph, equation: JaxprEqn, a: _Value, b: _Value) -> _Tensor:
    return graph.elementwise("Not", graph.elementwise("Equal", a, b))


def _select(graph: _Graph, equation: JaxprEqn, condition: _Value, *cases: _Value) -> _Tensor:
    if len(cases) != 2 or _aval(equation.invars[0]).dtype != np.bool_:
        raise _untranslatable(equation)
    return graph.elementwise("Where", condition, cases[1], cases[0])


def _clamp(graph: _Graph, equation: JaxprEqn, low: _Value, x: _Value, high: _Value) -> _Tensor:
    return graph.elementwise("Min", graph.elementwise("Max", x, low), high)


def _convert(graph: _Graph, equation: JaxprEqn, x: _Tensor) -> _Tensor:
    before, after = _aval(equation.invars[0]).dtype, equation.params["new_dtype"]
    if before == np.bool_:
        return graph.elementwise("Cast", x, to=1)  # TensorProto.FLOAT
    rounds = np.issubdtype(after, np.integer) and not np.issubdtype(before, np.integer)
    if rounds or after == np.bool_:
        raise _untranslatable(equation)
    return x


def _identity(graph: _Graph, equation: JaxprEqn, x: _Tensor) -> _Tensor:
    return x


def _reduce(operation: str) -> Callable[..., _Tensor]:
    def translate(graph: _Graph, equation: JaxprEqn, x: _Tensor) -> _Tensor:
        axes = equation.params["axes"]
        if 0 in axes:
            raise _untranslatable(equation)
        positions = np.array([x.position(axis) for axis in axes])
        return _Tensor(graph.node(operation, x.name, positions, keepdims=0), _without(x, axes))

    return translate


def _without(x: _Tensor, axes: Sequence[int]) -> tuple[int, ...]:
    """The order of the axes of `x` that remain after removing `axes`."""
    left = [axis for axis in x.order if axis not in axes]
    return tuple(sorted(left).index(axis) for axis in left)


def _squeeze(graph: _Graph, equation: JaxprEqn, x: _Tensor) -> _Tensor:
    axes = equation.params["dimensions"]
    positions = np.array([x.position(axis) for axis in axes])
    return _Tensor(graph.node("Squeeze", x.name, positions), _without(x, axes))


def _transpose(graph: _Graph, equation: JaxprEqn, x: _Tensor) -> _Tensor:
    """Adds no node; only the axes are renumbered."""
    permutation = equation.params["permutation"]
    return _Tensor(x.name, tuple(permutation.index(axis) for axis in x.order))


def _reshape(graph: _Graph, equation: JaxprEqn, x: _Tensor) -> _Tensor:
    sizes = equation.params["new_sizes"]
    shape = np.array([-1 if size % BATCH == 0 else size for size in sizes])
    if equation.params["dimensions"] is not None or (shape == -1).sum() != 1:
        raise _untranslatable(equation)
    rank = len(_aval(equation.invars[0]).shape)
    name = graph.node("Reshape", graph.name(x, tuple(range(rank))), shape)
    return _Tensor(name, tuple(range(len(sizes))))


def _broadcast_in_dim(graph: _Graph, equation: JaxprEqn, x: _Tensor) -> _Tensor:
    shape, axes = equation.params["shape"], equation.params["broadcast_dimensions"]
    order = CHANNELS_FIRST if len(shape) == 4 else tuple(range(len(shape)))
    name = graph.name(x, tuple(axes.index(axis) for axis in order if axis in axes))
    added = [i for i, axis in enumerate(order) if axis not in axes]
    if added:
        name = graph.node("Unsqueeze", name, np.array(added))
    before = np.ones(len(shape), int)
    before[list(axes)] = _aval(equation.invars[0]).shape
    if tuple(before) != shape:
        if BATCH not in before:
            raise _untranslatable(equation)
        # Expand keeps an axis whose size is given as 1, such as the batch.
        sizes = np.where(before == shape, 1, shape)
        name = graph.node("Expand", name, sizes[list(order)])
    return _Tensor(name, order)


def _slice(graph: _Graph, equation: JaxprEqn, x: _Tensor) -> _Tensor:
    shape, params = _aval(equation.invars[0]).shape, equation.params
    steps = params["strides"] or (1,) * len(shape)
    parts = list(zip(params["start_indices"], params["limit_indices"], steps, strict=True))
    changed = [a for a, part in enumerate(parts) if part != (0, shape[a], 1)]
    if any(shape[axis] % BATCH == 0 for axis in changed):
        raise _untranslatable(equation)
    starts, ends, strides = np.array([parts[axis] for axis in changed]).reshape(-1, 3).T
    positions = np.array([x.position(axis) for axis in changed], int)
    return _Tensor(graph.node("Slice", x.name, starts, ends, positions, strides), x.order)


def _reverse(graph: _Graph, equation: JaxprEqn, x: _Tensor) -> _Tensor:
    axis, *more = equation.params["dimensions"]
    if axis == 0 or more:
        raise _untranslatable(equation)
    backwards = np.arange(_aval(equation.invars[0]).shape[axis])[::-1]
    return _Tensor(graph.node("Gather", x.name, backwards, axis=x.position(axis)), x.order)


def _pad(graph: _Graph, equation: JaxprEqn, x: _Tensor, value: _Value) -> _Tensor:
    before, after, between = np.array(equation.params["padding_config"])[list(x.order)].T
    if between.any() or isinstance(value, _Tensor):
        raise _untranslatable(equation)
    return _Tensor(graph.node("Pad", x.name, np.append(before, after), value), x.order)


def _concatenate(graph: _Graph, equation: JaxprEqn, *parts: _Value) -> _Tensor:
    if any(isinstance(part, np.ndarray) for part in parts):  # would fix the batch size
        raise _untranslatable(equation)
    order = max(part.order for part in parts if isinstance(part, _Tensor))
    names = [graph.name(part, order) for part in parts]
    axis = order.index(equation.params["dimension"])
    return _Tensor(graph.node("Concat", *names, axis=axis), order)


def _stack(graph: _Graph, equation: JaxprEqn, *parts: _Value) -> _Tensor:
    if any(isinstance(part, np.ndarray) for part in parts):
        raise _untranslatable(equation)
    rank, axis = len(_aval(equation.invars[0]).shape), equation.params["axis"]
    names = [
        graph.node("Unsqueeze", graph.name(part, tuple(range(rank))), np.array([axis]))
        for part in parts
    ]
    return _Tensor(graph.node("Concat", *names, axis=axis), tuple(range(rank + 1)))


def _convolution(graph: _Graph, equation: JaxprEqn, x: _Value, kernel: _Value) -> _Tensor:
    params = equation.params
    numbers = params["dimension_numbers"]
    if (
        not isinstance(x, _Tensor)
        or isinstance(kernel, _Tensor)
        or not numbers.lhs_spec == numbers.out_spec == CHANNELS_FIRST
        or params["batch_group_count"] != 1
        or set(params["lhs_dilation"]) != {1}
    ):
        raise _untranslatable(equation)
    kernel = kernel.astype(np.float32).transpose(numbers.rhs_spec)
    attributes = {
        "kernel_shape": kernel.shape[2:],
        "strides": params["window_strides"],
        "pads": _pads(params["padding"]),
        "dilations": params["rhs_dilation"],
        "group": params["feature_group_count"],
    }
    bias = np.zeros(len(kernel), np.float32)
    name = graph.name(x, CHANNELS_FIRST)
    return graph.linear(_Linear("Conv", name, kernel, bias, attributes, CHANNELS_FIRST))


def _pads(padding: Sequence[tuple[int, int]]) -> list[int]:
    """ONNX's pads: the beginnings of all axes, then their ends."""
    return [before for before, _ in padding] + [after for _, after in padding]


def _dot_general(graph: _Graph, equation: JaxprEqn, a: _Value, b: _Value) -> _Tensor:
    contracted, batched = equation.params["dimension_numbers"]
    ranks = [len(_aval(atom).shape) for atom in equation.invars]
    if isinstance(a, _Tensor) and isinstance(b, np.ndarray) and ranks[1] == 2 and not batched[0]:
        kernel = b.astype(np.float32) if contracted[1] == (1,) else b.astype(np.float32).T
        bias = np.zeros(len(kernel), np.float32)
        if ranks[0] == 4 and contracted[0] == (3,):
            kernel = kernel[:, :, None, None]
            name = graph.name(a, CHANNELS_FIRST)
            return graph.linear(_Linear("Conv", name, kernel, bias, {}, CHANNELS_FIRST))
        if ranks[0] == 2 and contracted[0] == (1,):
            name = graph.name(a, (0, 1))
            return graph.linear(_Linear("Gemm", name, kernel, bias, {"transB": 1}, (0, 1)))
    return _einsum(graph, a, b, ranks, contracted, batched)


def _einsum(
    graph: _Graph,
    a: _Value,
    b: _Value,
    ranks: Sequence[int],
    contracted: Sequence[Sequence[int]],
    batched: Sequence[Sequence[int]],
) -> _Tensor:
    """Any other product: as an einsum, the order of axes in the graph does not matter."""
    left, right = list(ascii_lowercase[: ranks[0]]), list(ascii_lowercase[ranks[0] : sum(ranks)])
    for axes in (contracted, batched):
        for i, j in zip(*axes, strict=True):
            right[j] = left[i]
    batch = [left[axis] for axis in batched[0]]
    taken = {*batch, *(left[axis] for axis in contracted[0])}
    out = batch + [letter for letter in left + right if letter not in taken]
    names, terms = [], []
    for value, letters in ((a, left), (b, right)):
        if isinstance(value, _Tensor):
            names.append(value.name)
            terms.append("".join(letters[axis] for axis in value.order))
        else:
            names.append(graph.constant(value))
            terms.append("".join(letters))
    result = graph.node("Einsum", *names, equation=f"{','.join(terms)}->{''.join(out)}")
    return _Tensor(result, tuple(range(len(out))))


def _pool(graph: _Graph, equation: JaxprEqn, x: _Tensor) -> _Tensor:
    params = equation.params
    windows = [params[f"window_{what}"] for what in ("dimensions", "strides", "dilation")]
    batch, *padding, channel = params["padding"]
    if (
        any(window[0] != 1 or window[-1] != 1 for window in windows)
        or {batch, channel} != {(0, 0)}
        or set(params["base_dilation"]) != {1}
        or len(padding) != 2
    ):
        raise _untranslatable(equation)
    shape, strides, dilations = (window[1:-1] for window in windows)
    name = graph.name(x, CHANNELS_FIRST)
    attributes = {"kernel_shape": shape, "strides": strides, "pads": _pads(padding)}
    if equation.primitive.name == "reduce_window_max":
        pooled = graph.node("MaxPool", name, dilations=dilations, **attributes)
        return _Tensor(pooled, CHANNELS_FIRST)
    if set(dilations) != {1}:
        raise _untranslatable(equation)
    mean = graph.node("AveragePool", name, count_include_pad=1, **attributes)
    count = np.array(shape[0] * shape[1], np.float32)
    return graph.elementwise("Mul", _Tensor(mean, CHANNELS_FIRST), count)


CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
"""Primitives that call a function, and the parameter that holds it."""

TRANSLATIONS: dict[str, Callable[..., _Tensor]] = {
    "abs": _elementwise("Abs"),
    "add": _affine("Add"),
    "and": _elementwise("And"),
    "broadcast_in_dim": _broadcast_in_dim,
    "clamp": _clamp,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "convert_element_type": _convert,
    "copy": _identity,
    "div": _affine("Div"),
    "dot_general": _dot_general,
    "eq": _elementwise("Equal"),
    "erf": _elementwise("Erf"),
    "erfc": _erfc,
    "exp": _elementwise("Exp"),
    "ge": _elementwise("GreaterOrEqual"),
    "gt": _elementwise("Greater"),
    "integer_pow": _integer_pow,
    "le": _elementwise("LessOrEqual"),
    "log": _elementwise("Log"),
    "log1p": _log1p,
    "logistic": _elementwise("Sigmoid"),
    "lt": _elementwise("Less"),
    "max": _max,
    "min": _min,
    "mul": _affine("Mul"),
    "ne": _unequal,
    "neg": _elementwise("Neg"),
    "not": _elementwise("Not"),
    "or": _elementwise("Or"),
    "pad": _pad,
    "pow": _elementwise("Pow"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_window_max": _pool,
    "reduce_window_sum": _pool,
    "reshape": _reshape,
    "rev": _reverse,
    "rsqrt": _rsqrt,
    "select_n": _select,
    "slice": _slice,
    "sqrt": _elementwise("Sqrt"),
    "square": _square,
    "squeeze": _squeeze,
    "stack": _stack,
    "stop_gradient": _identity,
    "sub": _affine("Sub"),
    "tanh": _elementwise("Tanh"),
    "transpose": _transpose,
}
"""How each JAX primitive that depends on tiles is translated."""

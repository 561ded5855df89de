"""The graph of a network's operations, named by module, from its jaxpr."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import JaxprEqn, Literal

from geomatch.nn import param_groups
from geomatch.nn.layers import plain_ops


class Node(NamedTuple):
    """An operation or an array; `name` is a module path, `inputs` are the names of other nodes."""

    name: str
    operation: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]


def trace(
    forward: Callable[[Any, jax.Array], Any], variables: Any, shape: tuple[int, int, int]
) -> list[Node]:
    """The operations of a network on one tile, without executing them.

    Args:
        forward: a function of variables and tiles (n, h, w, c) uint8.
        variables: collections of arrays, or of their shapes and dtypes.
        shape: (h, w, c).

    Returns:
        Nodes in the order of execution: variables, tiles, operations.
    """
    with plain_ops():
        traced = jax.make_jaxpr(forward)(variables, jax.ShapeDtypeStruct((1, *shape), np.uint8))
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    names = ["/".join(param_groups.path_of(keys)[1:]) for keys, _ in leaves]
    nodes = [
        Node(name, "Variable", (), leaf.shape)
        for name, (_, leaf) in zip(names, leaves, strict=True)
    ]
    nodes.append(Node("tiles", "Placeholder", (), (1, *shape)))
    known: dict[Any, str] = dict(zip(traced.jaxpr.invars, [*names, "tiles"], strict=True))
    for i, equation in enumerate(traced.jaxpr.eqns):
        operation = _operation(equation)
        # The stack also has method names ("encoder.feature_map") and the outermost module.
        stack = str(equation.source_info.name_stack).split("/")
        outermost = stack[0].split(".")[0]
        modules = [module for module in stack if "." not in module and module != outermost]
        name = "/".join([*modules, f"{operation}_{i}"])
        inputs = [known[x] for x in equation.invars if not isinstance(x, Literal) and x in known]
        nodes.append(Node(name, operation, tuple(inputs), equation.outvars[0].aval.shape))
        known |= dict.fromkeys(equation.outvars, name)
    return nodes


def _operation(equation: JaxprEqn) -> str:
    """The name of an operation, or of the function it calls."""
    inner = equation.params.get("call_jaxpr")
    if inner is not None:
        return _operation(inner.eqns[0])
    return str(equation.params.get("name", equation.primitive.name))

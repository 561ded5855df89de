"""Tiles to descriptors, for train, embed and query alike."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from geomatch.nn.encoder import Siamese


class Model(Hashable, Protocol):
    """What is applied to tiles: all of a network, or a part of it."""

    def apply(self, variables: Any, tiles: Any, /) -> Any:
        """(n, h, w, c) uint8 to (n, d)."""


class Engine(Protocol):
    """What computes descriptors.

    Attributes:
        name: for people: "jax bfloat16".
        size: tiles in each batch that it takes.
    """

    name: str
    size: int

    def start(self, tiles: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
        """Begin with (size, h, w, c) tiles; a function that waits for (size, d) descriptors."""


def describe(
    model: Model, variables: Any, batches: Iterable[NDArray[np.uint8]], size: int
) -> Iterator[NDArray[np.float32]]:
    """Descriptors of batches of tiles, in inference mode, over all of JAX's devices.

    Args:
        variables: parameters and BatchNorm statistics.
        batches: (n, h, w, c) uint8, n at most `size`.
        size: tiles a step; shorter batches are padded, so that one program serves all.

    Yields:
        (n, d) float32 for each batch.
    """
    return describe_with(Jax(model, variables, size), batches)


def describe_with(
    engine: Engine, batches: Iterable[NDArray[np.uint8]]
) -> Iterator[NDArray[np.float32]]:
    """`describe`, by any engine; batches have at most `engine.size` tiles."""
    pending: Callable[[], NDArray[np.float32]] | None = None
    for batch in batches:
        # The engine works on this batch while the caller has the one before.
        started = _start(engine, batch)
        if pending is not None:
            yield pending()
        pending = started
    if pending is not None:
        yield pending()


def _start(engine: Engine, batch: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
    count = len(batch)
    padded = np.zeros((engine.size, *batch.shape[1:]), np.uint8)
    padded[:count] = batch
    finish = engine.start(padded)
    return lambda: finish()[:count]


class Jax:
    """The network itself, over all devices.

    Args:
        fixed: make the weights constants of the program, which oneDNN then folds and lays out once
            instead of with every batch: for many batches, and a program that is not kept.
    """

    def __init__(
        self, model: Model, variables: Any, size: int, name: str = "jax", fixed: bool = False
    ) -> None:
        self.name = name
        self.devices = jax.local_device_count()
        self.size = -(-size // self.devices) * self.devices
        if fixed:
            self.forward = jax.pmap(partial(model.apply, variables))
            return
        # Once, rather than with every batch.
        mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("devices",))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self.forward = partial(_forward(model), jax.device_put(variables, everywhere))

    def start(self, tiles: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
        result = self.forward(tiles.reshape(self.devices, -1, *tiles.shape[1:]))
        return lambda: np.asarray(result).reshape(self.size, -1)


@functools.cache
def _forward(model: Model) -> Any:
    return jax.pmap(lambda variables, tiles: model.apply(variables, tiles), in_axes=(None, 0))


def in_dtype(model: Siamese, dtype: Any) -> Siamese:
    """The same network, computing in another dtype."""
    shared = dataclasses.replace(model.encoder.shared, dtype=jnp.dtype(dtype))
    return model.clone(encoder=model.encoder.clone(shared=shared))

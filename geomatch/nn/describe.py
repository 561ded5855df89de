"""Tiles to descriptors, for train, embed and query."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from numpy.typing import NDArray


class Model(Hashable, Protocol):
    """A network, or part of one, that maps tiles to vectors."""

    def apply(self, variables: Any, tiles: Any, /) -> Any:
        """(n, h, w, c) uint8 to (n, d)."""


class Engine(Protocol):
    """Computes descriptors of batches of a fixed size.

    Attributes:
        name: for display, such as "jax bfloat16".
        batch_size: tiles per batch.
    """

    name: str
    batch_size: int

    def start(self, tiles: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
        """Start on (batch_size, h, w, c) tiles.

        Returns:
            A function that waits for the (batch_size, d) descriptors.
        """


def describe(
    model: Model, variables: Any, batches: Iterable[NDArray[np.uint8]], size: int
) -> Iterator[NDArray[np.float32]]:
    """Descriptors of batches of tiles, in inference mode, on all devices of this process.

    Args:
        variables: parameters and BatchNorm statistics.
        batches: (n, h, w, c) uint8, n at most `size`.
        size: tiles per step; shorter batches are padded, so that one compiled program suffices.

    Yields:
        (n, d) float32 for each batch.
    """
    return describe_with(JaxEngine(model, variables, size), batches)


def describe_with(
    engine: Engine, batches: Iterable[NDArray[np.uint8]]
) -> Iterator[NDArray[np.float32]]:
    """`describe` with any engine; batches have at most `engine.batch_size` tiles."""
    pending: Callable[[], NDArray[np.float32]] | None = None
    for batch in batches:
        # The engine works on this batch while the caller uses the previous one.
        started = _start(engine, batch)
        if pending is not None:
            yield pending()
        pending = started
    if pending is not None:
        yield pending()


def _start(engine: Engine, batch: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
    count = len(batch)
    padded = np.zeros((engine.batch_size, *batch.shape[1:]), np.uint8)
    padded[:count] = batch
    finish = engine.start(padded)
    return lambda: finish()[:count]


class JaxEngine:
    """The network in JAX, on all devices.

    Args:
        constant_weights: compile the weights into the program as constants, which oneDNN folds and
            lays out once instead of in every batch. For many batches, and a program that is not
            cached.
    """

    def __init__(
        self,
        model: Model,
        variables: Any,
        size: int,
        name: str = "jax",
        constant_weights: bool = False,
    ) -> None:
        self.name = name
        self.devices = jax.local_device_count()
        self.batch_size = -(-size // self.devices) * self.devices
        if constant_weights:
            self.forward = jax.pmap(partial(model.apply, variables), devices=jax.local_devices())
            return
        # Transferred once instead of with every batch.
        mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("devices",))
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self.forward = partial(_forward(model), jax.device_put(variables, replicated))

    def start(self, tiles: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
        result = self.forward(tiles.reshape(self.devices, -1, *tiles.shape[1:]))
        return lambda: np.asarray(result).reshape(self.batch_size, -1)


@functools.cache
def _forward(model: Model) -> Any:
    return jax.pmap(
        lambda variables, tiles: model.apply(variables, tiles),
        in_axes=(None, 0),
        devices=jax.local_devices(),
    )

"""Tiles to descriptors, for train, embed and query alike."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from geomatch.nn.encoder import Siamese


def describe(
    model: Siamese, variables: Any, batches: Iterable[NDArray[np.uint8]], size: int
) -> Iterator[NDArray[np.float32]]:
    """Descriptors of batches of tiles, in inference mode, over all devices.

    Args:
        variables: parameters and BatchNorm statistics.
        batches: (n, h, w, c) uint8, n at most `size`.
        size: tiles a step; shorter batches are padded, so that one program serves all.

    Yields:
        (n, d) float32 for each batch.
    """
    devices = jax.local_device_count()
    size = -(-size // devices) * devices
    forward = _forward(model)
    # Once, rather than with every batch.
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("devices",))
    variables = jax.device_put(
        variables, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    pending: tuple[Any, int] | None = None
    for batch in batches:
        padded = np.zeros((size, *batch.shape[1:]), np.uint8)
        padded[: len(batch)] = batch
        shaped = padded.reshape(devices, size // devices, *batch.shape[1:])
        # The device works on this batch while the caller has the one before.
        result = forward(variables, shaped), len(batch)
        if pending is not None:
            yield _gather(*pending)
        pending = result
    if pending is not None:
        yield _gather(*pending)


@functools.cache
def _forward(model: Siamese) -> Any:
    return jax.pmap(lambda variables, tiles: model.apply(variables, tiles), in_axes=(None, 0))


def _gather(result: jax.Array, n: int) -> NDArray[np.float32]:
    gathered: NDArray[np.float32] = np.asarray(result).reshape(-1, result.shape[-1])[:n]
    return gathered

"""Pooling of a feature map to one vector, or with R-MAC to one per region."""

from __future__ import annotations

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from geomatch.nn.layers import instance_norm, mean_pool_to, unit

RMAC_LEVELS = 3
"""Number of scales of R-MAC's regions."""


class Pool(nn.Module):
    """Pools (b, h, w, c) to (b, r, d).

    Attributes:
        kind: "max" (MAC), "mean" or "sum" (SPoC: Babenko and Lempitsky 2015, arXiv 1510.07493),
            "gem" (generalised mean with a learned power: Radenovic et al. 2017, arXiv 1711.02512),
            "rmac" (maxima over regions at several scales, each at unit norm: Tolias et al. 2015,
            arXiv 1511.05879), "flatten", or "grid" (means over `bins` x `bins` cells, each at unit
            norm, flattened, which keeps the spatial layout).
        bins: of "grid", per side.
        instance_norm: normalise the map of "grid" first.
    """

    kind: str
    bins: int
    instance_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kind == "rmac":
            side = min(x.shape[1:3])
            maxima = [
                spatial_max(x[:, i : i + size, j : j + size]) for i, j, size in rmac_regions(side)
            ]
            return unit(jnp.stack(maxima, axis=1))
        return self._pooled(x).reshape(len(x), 1, -1)

    def _pooled(self, x: jax.Array) -> jax.Array:
        if self.kind == "max":
            return spatial_max(x)
        if self.kind == "mean":
            return x.mean(axis=(1, 2))
        if self.kind == "sum":
            return x.sum(axis=(1, 2))
        if self.kind == "gem":
            power = self.param("power", nn.initializers.constant(3.0), ())
            # Positive, so that the power has a finite gradient, and relative to the maximum, so
            # that it does not overflow.
            x = jnp.maximum(x, 1e-6)
            largest = lax.stop_gradient(x.max(axis=(1, 2)))
            relative = x / largest[:, None, None]
            return largest * (relative**power).mean(axis=(1, 2)) ** (1 / power)
        if self.kind == "grid":
            if self.instance_norm:
                x = instance_norm(x)
            return unit(mean_pool_to(x, self.bins))
        return x


@jax.custom_vjp
def spatial_max(x: jax.Array) -> jax.Array:
    """Maxima (b, c) of (b, h, w, c); the gradient of each goes to a single position.

    JAX divides it among all positions equal to the maximum. XLA may recompute the map to find them,
    with different rounding; if none is equal then, the gradient is 0 / 0.
    """
    return x.max(axis=(1, 2))


def _spatial_max_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    flat = x.reshape(len(x), -1, x.shape[-1])
    positions = jax.nn.one_hot(flat.argmax(axis=1), flat.shape[1], dtype=bool, axis=1)
    return spatial_max(x), positions.reshape(x.shape)


def _spatial_max_backward(positions: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(positions, dy[:, None, None], 0),)


spatial_max.defvjp(_spatial_max_forward, _spatial_max_backward)


def rmac_regions(side: int) -> Iterator[tuple[int, int, int]]:
    """Top, left and size of R-MAC's regions of a square map; level n has n x n regions."""
    for level in range(1, RMAC_LEVELS + 1):
        size = max(2 * side // (level + 1), 1)
        starts = [i * (side - size) // max(level - 1, 1) for i in range(level)]
        yield from ((i, j, size) for i in starts for j in starts)

"""Pooling: a feature map to one vector, or to several for R-MAC."""

from __future__ import annotations

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from geomatch.nn.layers import mean_pool_to, unit

LEVELS = 3
"""Scales of R-MAC's regions."""


class Pool(nn.Module):
    """Pools (b, h, w, c) to (b, r, d).

    Attributes:
        kind: "max" (MAC), "mean" and "sum" (SPoC: Babenko and Lempitsky 2015, arXiv 1510.07493),
            "gem" (generalised mean with a learned power: Radenovic et al. 2017, arXiv 1711.02512),
            "rmac" (maxima over regions at several scales, each of unit norm: Tolias et al. 2015,
            arXiv 1511.05879), "flatten", or "grid" (means over `bins` x `bins`, each of unit norm,
            flattened: it keeps the layout).
    """

    kind: str
    bins: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kind == "rmac":
            side = min(x.shape[1:3])
            found = [maximum(x[:, i : i + size, j : j + size]) for i, j, size in regions(side)]
            return unit(jnp.stack(found, axis=1))
        return self._pooled(x).reshape(len(x), 1, -1)

    def _pooled(self, x: jax.Array) -> jax.Array:
        if self.kind == "max":
            return maximum(x)
        if self.kind == "mean":
            return x.mean(axis=(1, 2))
        if self.kind == "sum":
            return x.sum(axis=(1, 2))
        if self.kind == "gem":
            power = self.param("power", nn.initializers.constant(3.0), ())
            # Bounded below, where a power has no finite gradient, and relative to the maximum,
            # so that no power leaves the range of a float.
            x = jnp.maximum(x, 1e-6)
            most = lax.stop_gradient(x.max(axis=(1, 2)))
            share = x / most[:, None, None]
            return most * (share**power).mean(axis=(1, 2)) ** (1 / power)
        if self.kind == "grid":
            return unit(mean_pool_to(x, self.bins))
        return x


@jax.custom_vjp
def maximum(x: jax.Array) -> jax.Array:
    """Maxima (b, c) of (b, h, w, c); the gradient of each goes to one place.

    JAX shares it among all places equal to the maximum. XLA may compute the map anew to find them,
    rounded otherwise: then there are none, and the share is 0 / 0.
    """
    return x.max(axis=(1, 2))


def _maximum_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    flat = x.reshape(len(x), -1, x.shape[-1])
    places = jax.nn.one_hot(flat.argmax(axis=1), flat.shape[1], dtype=bool, axis=1)
    return maximum(x), places.reshape(x.shape)


def _maximum_backward(places: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(places, dy[:, None, None], 0),)


maximum.defvjp(_maximum_forward, _maximum_backward)


def regions(side: int) -> Iterator[tuple[int, int, int]]:
    """Top, left and size of R-MAC's regions of a square map; level n has n x n, evenly spaced."""
    for level in range(1, LEVELS + 1):
        size = max(2 * side // (level + 1), 1)
        starts = [i * (side - size) // max(level - 1, 1) for i in range(level)]
        yield from ((i, j, size) for i in starts for j in starts)

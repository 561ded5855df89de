"""Losses: pure functions of descriptors or logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def binary_cross_entropy(logits: jax.Array, matching: jax.Array) -> jax.Array:
    """Mean binary cross-entropy.

    Args:
        logits: (n,) of the pair head.
        matching: (n,) 1 for pairs of one place, 0 for others.
    """
    # log(1 + e^x) - x y, in the form that does not overflow.
    return jnp.mean(jnp.logaddexp(0.0, logits) - logits * matching)


def info_nce(
    queries: jax.Array,
    candidates: jax.Array,
    match: jax.Array,
    neutral: jax.Array,
    temperature: jax.Array,
) -> jax.Array:
    """Cross-entropy of picking each query's match by cosine among candidates.

    van den Oord et al. 2018 (arXiv 1807.03748).

    Args:
        queries: (n, d) unit vectors.
        candidates: (m, d) unit vectors.
        match: (n,) column of each query's match.
        neutral: (n, m) whether query and candidate lie on common ground; such candidates do not
            count, the match itself apart.
        temperature: scalar that divides the cosines.
    """
    logits = queries @ candidates.T / temperature
    own = jnp.arange(candidates.shape[0])[None] == match[:, None]
    logits = jnp.where(neutral & ~own, -jnp.inf, logits)
    chosen = jnp.take_along_axis(logits, match[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)


def head_penalty(params: Mapping[str, Any], tile_size: int) -> jax.Array:
    """S1's L2 penalties on its 512 px head: 2e-4 on convolutions, 1e-3 on the Dense layer."""
    head = params.get("encoder", {}).get("head", {})
    total = jnp.zeros(())
    if tile_size == 512:
        for name, layer in head.items():
            weight = 1e-3 if name.startswith("Dense") else 2e-4
            total += weight * (layer["kernel"] ** 2).sum()
    return total

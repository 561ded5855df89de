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


def head_penalty(params: Mapping[str, Any], tile_size: int) -> jax.Array:
    """S1's L2 penalties on its 512 px head: 2e-4 on convolutions, 1e-3 on the Dense layer."""
    head = params.get("encoder", {}).get("head", {})
    total = jnp.zeros(())
    if tile_size == 512:
        for name, layer in head.items():
            weight = 1e-3 if name.startswith("Dense") else 2e-4
            total += weight * (layer["kernel"] ** 2).sum()
    return total

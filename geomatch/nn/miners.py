"""Triplets chosen within a batch, from the distances of its descriptors."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Triplets(NamedTuple):
    """Indices of triplets, of a shape that does not depend on what is found.

    Attributes:
        anchor: (t,) rows of the distances.
        positive: (t,) columns.
        negative: (t,) columns.
        valid: (t,) bool, whether it is a triplet; the indices of others mean nothing.
        hardness: (t,) distance to the positive less that to the negative; 0 where not valid.
    """

    anchor: jax.Array
    positive: jax.Array
    negative: jax.Array
    valid: jax.Array
    hardness: jax.Array


def semi_hard(
    distances: jax.Array,
    positive: jax.Array,
    negative: jax.Array,
    margin: float,
    allowed: jax.Array | None = None,
) -> Triplets:
    """For each anchor and positive, the nearest negative beyond the positive, within the margin.

    Schroff et al. 2015 (FaceNet, arXiv 1503.03832). Where there is none, the farthest negative, as
    in TensorFlow Addons' triplet_semihard_loss: it is then easy, or the least hard.

    Args:
        distances: (q, m) from anchors to candidates, squared or not.
        positive: (q, m) bool, candidates of the anchor's place, without itself.
        negative: (q, m) bool, candidates of another; those in neither mask are in no triplet.
        margin: in the unit of the distances.
        allowed: (m, m) bool, whether the positive of the row may go with the negative of the
            column; unset: any may.

    Returns:
        q * m triplets, of which those of a positive with a negative are valid.
    """
    distances = lax.stop_gradient(distances)
    anchors, columns = distances.shape
    allowed = _any(columns) if allowed is None else allowed

    # Anchor by anchor, since (q, m, m) may not fit in memory.
    def of_anchor(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        own, others = row
        candidates = allowed & others
        beyond = own - own[:, None]
        within = candidates & (beyond > 0) & (beyond < margin)
        nearest = jnp.where(within, own, jnp.inf).argmin(axis=1)
        farthest = jnp.where(candidates, own, -jnp.inf).argmax(axis=1)
        return jnp.where(within.any(axis=1), nearest, farthest), candidates.any(axis=1)

    chosen, found = lax.map(of_anchor, (distances, negative))
    anchor, column = jnp.indices((anchors, columns))
    return _triplets(
        distances, anchor.ravel(), column.ravel(), chosen.ravel(), (positive & found).ravel()
    )


def batch_hard(
    distances: jax.Array,
    positive: jax.Array,
    negative: jax.Array,
    allowed: jax.Array | None = None,
) -> Triplets:
    """For each anchor, its farthest positive and the nearest negative that may go with it.

    Hermans et al. 2017 (arXiv 1703.07737).

    Args:
        distances, positive, negative, allowed: as in `semi_hard`.

    Returns:
        q triplets, of which those of anchors with both are valid.
    """
    distances = lax.stop_gradient(distances)
    anchors, columns = distances.shape
    allowed = _any(columns) if allowed is None else allowed
    farthest = jnp.where(positive, distances, -jnp.inf).argmax(axis=1)
    candidates = negative & allowed[farthest]
    nearest = jnp.where(candidates, distances, jnp.inf).argmin(axis=1)
    valid = positive.any(axis=1) & candidates.any(axis=1)
    return _triplets(distances, jnp.arange(anchors), farthest, nearest, valid)


def _any(columns: int) -> jax.Array:
    """That any positive may go with any negative."""
    return jnp.ones((columns, 1), bool)


def _triplets(
    distances: jax.Array,
    anchor: jax.Array,
    positive: jax.Array,
    negative: jax.Array,
    valid: jax.Array,
) -> Triplets:
    hardness = distances[anchor, positive] - distances[anchor, negative]
    return Triplets(anchor, positive, negative, valid, jnp.where(valid, hardness, 0))

"""In-batch triplet mining, from the distances between a batch's descriptors."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Triplets(NamedTuple):
    """Indices of triplets, in arrays whose shapes do not depend on the data.

    Attributes:
        anchor: (t,) rows of the distance matrix.
        positive: (t,) columns of it.
        negative: (t,) columns of it.
        valid: (t,) bool; the indices of invalid triplets are meaningless.
        hardness: (t,) distance to the positive minus distance to the negative; 0 if invalid.
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
    """For each anchor and positive, the nearest negative farther than the positive by < `margin`.

    Schroff et al. 2015 (FaceNet, arXiv 1503.03832). Without such a negative, the farthest one, as
    in TensorFlow Addons' triplet_semihard_loss: it is either easy or the least hard.

    Args:
        distances: (q, m) from anchors to candidates, squared or not.
        positive: (q, m) bool, candidates of the anchor's place, except the anchor itself.
        negative: (q, m) bool, candidates of other places; candidates in neither mask are ignored.
        margin: in the unit of the distances.
        allowed: (m, m) bool, whether the positive of the row may be combined with the negative of
            the column; by default all may.

    Returns:
        q * m triplets, valid where a positive has an allowed negative.
    """
    distances = lax.stop_gradient(distances)
    anchors, columns = distances.shape
    allowed = _all_allowed(columns) if allowed is None else allowed

    # One anchor at a time, since (q, m, m) may not fit in memory.
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
    """For each anchor, the farthest positive and the nearest negative allowed with it.

    Hermans et al. 2017 (arXiv 1703.07737).

    Args:
        distances, positive, negative, allowed: as in `semi_hard`.

    Returns:
        q triplets, valid for anchors that have both.
    """
    distances = lax.stop_gradient(distances)
    anchors, columns = distances.shape
    allowed = _all_allowed(columns) if allowed is None else allowed
    farthest = jnp.where(positive, distances, -jnp.inf).argmax(axis=1)
    candidates = negative & allowed[farthest]
    nearest = jnp.where(candidates, distances, jnp.inf).argmin(axis=1)
    valid = positive.any(axis=1) & candidates.any(axis=1)
    return _triplets(distances, jnp.arange(anchors), farthest, nearest, valid)


def _all_allowed(columns: int) -> jax.Array:
    """A mask that allows any positive with any negative."""
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

"""Losses: pure functions of descriptors or logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

EPSILON, ALPHA, BETA, BASE = 0.1, 2.0, 50.0, 0.5
"""Of `multi_similarity`: mining margin, scales of positive and negative pairs, and threshold."""


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


def focal(logits: jax.Array, matching: jax.Array, gamma: float, alpha: float) -> jax.Array:
    """Mean focal loss: cross-entropy that plays down the pairs already told apart.

    Lin et al. 2017 (arXiv 1708.02002).

    Args:
        logits: (n,) of the pair head.
        matching: (n,) 1 for pairs of one place, 0 for others.
        gamma: power of the probability of the wrong answer; 0 is weighted cross-entropy.
        alpha: weight of matching pairs; others have 1 - alpha.
    """
    signed = jnp.where(matching == 1, logits, -logits)
    weight = jnp.where(matching == 1, alpha, 1 - alpha)
    # The probability of the wrong answer through its logarithm, which does not overflow.
    wrong = jnp.exp(gamma * jax.nn.log_sigmoid(-signed))
    return jnp.mean(-weight * wrong * jax.nn.log_sigmoid(signed))


def distance(a: jax.Array, b: jax.Array, squared: bool = False) -> jax.Array:
    """Euclidean distances (...) of (..., d), or their squares; the gradient at 0 is 0."""
    squares = ((a - b) ** 2).sum(axis=-1)
    if squared:
        return squares
    # The root has no finite gradient at 0, not even where it is then left out.
    apart = squares > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1)), 0)


def contrastive(distances: jax.Array, matching: jax.Array, margin: float) -> jax.Array:
    """Mean of half the squares of matching distances and of what others lack to the margin.

    Hadsell, Chopra and LeCun 2006 (Dimensionality reduction by learning an invariant mapping).

    Args:
        distances: (n,) Euclidean, of the two descriptors of a pair.
        matching: (n,) 1 for pairs of one place, 0 for others.
        margin: distance from which on other pairs do not count.
    """
    lacking = jax.nn.relu(margin - distances)
    return jnp.mean(matching * distances**2 + (1 - matching) * lacking**2) / 2


def cosine_embedding(cosines: jax.Array, matching: jax.Array, margin: float) -> jax.Array:
    """Mean of 1 - cosine of matching pairs and of the cosine above the margin of others.

    As torch.nn.CosineEmbeddingLoss.

    Args:
        cosines: (n,) of the two descriptors of a pair.
        matching: (n,) 1 for pairs of one place, 0 for others.
        margin: cosine up to which other pairs do not count.
    """
    return jnp.mean(matching * (1 - cosines) + (1 - matching) * jax.nn.relu(cosines - margin))


def triplet(
    positive_distance: jax.Array,
    negative_distance: jax.Array,
    margin: float,
    weight: jax.Array | None = None,
) -> jax.Array:
    """Mean of what negatives lack to being farther from the anchor by `margin` than positives.

    Schroff et al. 2015 (arXiv 1503.03832), whose distances are squared.

    Args:
        positive_distance: (n,) from anchor to positive.
        negative_distance: (n,) from anchor to negative.
        margin: in the unit of the distances.
        weight: (n,) 1 for triplets that count, 0 for others; unset: all do. Where none does, 0.
    """
    lacking = jax.nn.relu(positive_distance - negative_distance + margin)
    if weight is None:
        return jnp.mean(lacking)
    return jnp.sum(weight * lacking) / jnp.maximum(jnp.sum(weight), 1)


def multi_similarity(similarity: jax.Array, positive: jax.Array, negative: jax.Array) -> jax.Array:
    """Mean over queries of the soft maxima of their hard pairs, far positives and near negatives.

    Wang et al. 2019 (arXiv 1904.06627). A positive is hard when it is less similar than the most
    similar negative plus `EPSILON`; a negative when it is more similar than the least similar
    positive less `EPSILON`. A query without a positive or without a negative gives 0.

    Args:
        similarity: (q, m) cosines of queries and candidates.
        positive: (q, m) bool, candidates of the query's place.
        negative: (q, m) bool, candidates of another; those in neither mask do not count.
    """
    nearest = jnp.where(negative, similarity, -jnp.inf).max(axis=1, keepdims=True)
    farthest = jnp.where(positive, similarity, jnp.inf).min(axis=1, keepdims=True)
    hard_positive = positive & (similarity - EPSILON < nearest)
    hard_negative = negative & (similarity + EPSILON > farthest)

    def soft_maximum(excess: jax.Array, hard: jax.Array) -> jax.Array:
        # log(1 + sum of e^x): the 1 is a column of zeros, which keeps empty rows finite.
        columns = jnp.pad(jnp.where(hard, excess, -jnp.inf), ((0, 0), (1, 0)))
        return jax.nn.logsumexp(columns, axis=1)

    pull = soft_maximum(ALPHA * (BASE - similarity), hard_positive) / ALPHA
    push = soft_maximum(BETA * (similarity - BASE), hard_negative) / BETA
    return jnp.mean(pull + push)


def head_penalty(params: Mapping[str, Any], tile_size: int) -> jax.Array:
    """S1's L2 penalties on its 512 px head: 2e-4 on convolutions, 1e-3 on the Dense layer."""
    head = params.get("encoder", {}).get("head", {})
    total = jnp.zeros(())
    if tile_size == 512:
        for name, layer in head.items():
            weight = 1e-3 if name.startswith("Dense") else 2e-4
            total += weight * (layer["kernel"] ** 2).sum()
    return total

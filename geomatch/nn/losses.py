"""Losses as pure functions of descriptors, distances or logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

EPSILON, ALPHA, BETA, BASE = 0.1, 2.0, 50.0, 0.5
"""Of `multi_similarity`: mining margin, positive and negative scales, and similarity threshold."""

TEMPERATURE = 0.05
"""Of `distillation`."""


def binary_cross_entropy(logits: jax.Array, matching: jax.Array) -> jax.Array:
    """Mean binary cross-entropy.

    Args:
        logits: (n,) of the pair head.
        matching: (n,) 1 for pairs of the same place, 0 for others.
    """
    # log(1 + e^x) - x y, without overflow.
    return jnp.mean(jnp.logaddexp(0.0, logits) - logits * matching)


def info_nce(
    queries: jax.Array,
    candidates: jax.Array,
    match: jax.Array,
    neutral: jax.Array,
    temperature: jax.Array,
) -> jax.Array:
    """Mean cross-entropy of choosing each query's match among the candidates by cosine (InfoNCE).

    van den Oord et al. 2018 (arXiv 1807.03748).

    Args:
        queries: (n, d) unit vectors.
        candidates: (m, d) unit vectors.
        match: (n,) index of each query's match.
        neutral: (n, m) bool, query and candidate are at the same or overlapping places; such
            candidates are excluded, except for the match itself.
        temperature: scalar that divides the cosines.
    """
    logits = queries @ candidates.T / temperature
    own = jnp.arange(candidates.shape[0])[None] == match[:, None]
    logits = jnp.where(neutral & ~own, -jnp.inf, logits)
    chosen = jnp.take_along_axis(logits, match[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)


def distillation(
    similarity: jax.Array, teacher: jax.Array, match: jax.Array, neutral: jax.Array
) -> jax.Array:
    """Mean divergence (Kullback-Leibler) of a teacher's choice of candidates from the student's.

    Choices are softmaxes of cosines over `TEMPERATURE`. After Hinton et al. 2015
    (arXiv 1503.02531), on similarities as in Park et al. 2019 (arXiv 1904.05068).

    Args:
        similarity: (n, m) cosines of queries and candidates.
        teacher: (n, m) the teacher's cosines of the same.
        match, neutral: as for `info_nce`.
    """
    kept = ~neutral | (jnp.arange(similarity.shape[1])[None] == match[:, None])
    # A finite value, so that an excluded candidate gives 0 * 0 and not 0 * inf.
    ours, theirs = (
        jax.nn.log_softmax(jnp.where(kept, cosines / TEMPERATURE, -1e4), axis=1)
        for cosines in (similarity, teacher)
    )
    return jnp.mean((jnp.exp(theirs) * (theirs - ours)).sum(axis=1))


def focal(logits: jax.Array, matching: jax.Array, gamma: float, alpha: float) -> jax.Array:
    """Mean focal loss: cross-entropy with less weight on pairs that are already classified well.

    Lin et al. 2017 (arXiv 1708.02002).

    Args:
        logits: (n,) of the pair head.
        matching: (n,) 1 for pairs of the same place, 0 for others.
        gamma: exponent of the probability of the wrong class; 0 gives weighted cross-entropy.
        alpha: weight of matching pairs; other pairs have 1 - alpha.
    """
    signed = jnp.where(matching == 1, logits, -logits)
    weight = jnp.where(matching == 1, alpha, 1 - alpha)
    # The probability of the wrong class, computed from its logarithm to avoid overflow.
    wrong = jnp.exp(gamma * jax.nn.log_sigmoid(-signed))
    return jnp.mean(-weight * wrong * jax.nn.log_sigmoid(signed))


def distance(a: jax.Array, b: jax.Array, squared: bool = False) -> jax.Array:
    """Euclidean distances (...) of vectors (..., d), optionally squared; the gradient at 0 is 0."""
    squares = ((a - b) ** 2).sum(axis=-1)
    if squared:
        return squares
    # The root's gradient at 0 is infinite, and NaN after an outer `where` alone.
    distinct = squares > 0
    return jnp.where(distinct, jnp.sqrt(jnp.where(distinct, squares, 1)), 0)


def contrastive(distances: jax.Array, matching: jax.Array, margin: float) -> jax.Array:
    """Contrastive loss: mean of d^2 / 2 of matching pairs and max(0, margin - d)^2 / 2 of others.

    Hadsell, Chopra and LeCun 2006 (Dimensionality reduction by learning an invariant mapping).

    Args:
        distances: (n,) Euclidean, between the two descriptors of each pair.
        matching: (n,) 1 for pairs of the same place, 0 for others.
        margin: distance beyond which other pairs have no loss.
    """
    hinge = jax.nn.relu(margin - distances)
    return jnp.mean(matching * distances**2 + (1 - matching) * hinge**2) / 2


def cosine_embedding(cosines: jax.Array, matching: jax.Array, margin: float) -> jax.Array:
    """Mean of 1 - cosine of matching pairs and max(0, cosine - margin) of others.

    Equals torch.nn.CosineEmbeddingLoss.

    Args:
        cosines: (n,) between the two descriptors of each pair.
        matching: (n,) 1 for pairs of the same place, 0 for others.
        margin: cosine below which other pairs have no loss.
    """
    return jnp.mean(matching * (1 - cosines) + (1 - matching) * jax.nn.relu(cosines - margin))


def triplet(
    positive_distance: jax.Array,
    negative_distance: jax.Array,
    margin: float,
    weight: jax.Array | None = None,
) -> jax.Array:
    """Triplet loss: mean of max(0, positive distance - negative distance + margin).

    Schroff et al. 2015 (FaceNet, arXiv 1503.03832), where distances are squared.

    Args:
        positive_distance: (n,) from anchor to positive.
        negative_distance: (n,) from anchor to negative.
        margin: in the unit of the distances.
        weight: (n,) 1 for triplets that count, 0 for others; by default all count. The loss is 0
            if none does.
    """
    hinge = jax.nn.relu(positive_distance - negative_distance + margin)
    if weight is None:
        return jnp.mean(hinge)
    weight = weight.astype(hinge.dtype)
    return jnp.sum(weight * hinge) / jnp.maximum(jnp.sum(weight), 1)


def multi_similarity(similarity: jax.Array, positive: jax.Array, negative: jax.Array) -> jax.Array:
    """Multi-similarity loss: mean over queries of soft maxima of hard positives and negatives.

    Wang et al. 2019 (arXiv 1904.06627). A positive is hard if it is less similar than the most
    similar negative plus `EPSILON`, a negative if it is more similar than the least similar
    positive minus `EPSILON`. A query without positives or without negatives has loss 0.

    Args:
        similarity: (q, m) cosines of queries and candidates.
        positive: (q, m) bool, candidates of the query's place.
        negative: (q, m) bool, candidates of other places; candidates in neither mask are ignored.
    """
    nearest = jnp.where(negative, similarity, -jnp.inf).max(axis=1, keepdims=True)
    farthest = jnp.where(positive, similarity, jnp.inf).min(axis=1, keepdims=True)
    hard_positive = positive & (similarity - EPSILON < nearest)
    hard_negative = negative & (similarity + EPSILON > farthest)

    def soft_maximum(excess: jax.Array, hard: jax.Array) -> jax.Array:
        # log(1 + sum of e^x): the column of zeros is the 1 and keeps empty rows finite.
        columns = jnp.pad(jnp.where(hard, excess, -jnp.inf), ((0, 0), (1, 0)))
        return jax.nn.logsumexp(columns, axis=1)

    pull = soft_maximum(ALPHA * (BASE - similarity), hard_positive) / ALPHA
    push = soft_maximum(BETA * (similarity - BASE), hard_negative) / BETA
    return jnp.mean(pull + push)


def head_penalty(params: Mapping[str, Any], tile_size: int) -> jax.Array:
    """L2 penalties on the "conv" head at 512 px, after Khokhlova et al. 2020; else 0.

    The weights are 2e-4 for convolutions and 1e-3 for the Dense layer.
    """
    head = params.get("encoder", {}).get("head", {})
    total = jnp.zeros(())
    if tile_size == 512:
        for name, layer in head.items():
            weight = 1e-3 if name.startswith("Dense") else 2e-4
            total += weight * (layer["kernel"] ** 2).sum()
    return total

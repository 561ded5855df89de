"""The loss of a batch: which rows are compared, depending on the loss of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from geomatch.config import Config
from geomatch.nn import losses, miners
from geomatch.nn.encoder import Siamese
from geomatch.nn.layers import unit

MARGINS = {"contrastive": 1.0, "cosine": 0.0, "triplet": 0.1}
"""By `train.loss`, where `train.margin` is unset."""


@dataclass(frozen=True)
class MatchRule:
    """Which rows of a batch match.

    Attributes:
        dated: tiles have years, so that a negative must have its positive's year.
        reach: maximum difference in columns and rows of cells that overlap.
    """

    dated: bool
    reach: int

    def relations(self, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Which pairs of rows are positives, and which are negatives; the others are neutral.

        Args:
            a, b: (n, 4) and (m, 4) int32: zone, column, row, year. For class folders the column is
                the class, and the year is the tile's number.

        Returns:
            Positives and negatives, (n, m) bool each.
        """
        difference = jnp.abs(a[:, None] - b[None])
        same = (difference[..., :3] == 0).all(-1)
        near = (difference[..., 0] == 0) & (difference[..., 1:3] <= self.reach).all(-1)
        return same & (difference[..., 3] > 0), ~near


class Batch(NamedTuple):
    """The input of a loss.

    Attributes:
        model, params: the network, for its pair head and temperature.
        rows: (roles, b, d) descriptors.
        places: (roles, b, 4) see `MatchRule.relations`.
        features: (roles, b, f) of the initial network before its head, for `train.distil`.
    """

    model: Siamese
    params: Any
    rows: jax.Array
    places: jax.Array
    features: jax.Array | None = None

    def take(self, roles: Iterable[int]) -> tuple[jax.Array, jax.Array]:
        """Descriptors (n, d) and places (n, 4) of the given roles, concatenated."""
        indices = jnp.array(tuple(roles))
        rows, places = self.rows[indices], self.places[indices]
        return rows.reshape(-1, rows.shape[-1]), places.reshape(-1, places.shape[-1])

    def triplets(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Descriptors of anchors, positives and negatives, for roles in this repeated order."""
        anchor, positive, negative = (
            self.take(range(first, len(self.rows), 3))[0] for first in range(3)
        )
        return anchor, positive, negative


Objective = Callable[[Batch], tuple[jax.Array, jax.Array]]
"""A batch to its loss and the share of its triplets that are hard (NaN without in-batch mining)."""


def margin(settings: Config) -> float:
    """The margin of a run's loss."""
    given = settings.train.margin
    return MARGINS.get(settings.train.loss, 0.0) if given is None else given


def objective(settings: Config, match_rule: MatchRule, axis: str, views: int) -> Objective:
    """The loss of a run, as a function of one device's batch.

    Args:
        axis: pmap axis over which whole-batch losses gather the rows of all devices.
        views: rows per place in a batch that is compared as a whole; 0 for batches of anchors,
            positives and negatives.
    """
    train, train_margin = settings.train, margin(settings)

    def of_pairs(batch: Batch) -> jax.Array:
        """Pairs of each anchor with its positive and with its negative."""
        anchor, positive, negative = batch.triplets()
        first = jnp.concatenate([anchor, anchor])
        second = jnp.concatenate([positive, negative])
        matching = jnp.repeat(jnp.array([1.0, 0.0]), len(first) // 2)
        if train.loss == "contrastive":
            return losses.contrastive(losses.distance(first, second), matching, train_margin)
        if train.loss == "cosine":
            cosine = (unit(first) * unit(second)).sum(-1)
            return losses.cosine_embedding(cosine, matching, train_margin)
        variables = {"params": batch.params}
        logits: Any = batch.model.apply(variables, first, second, method=Siamese.pair)
        if train.loss == "focal":
            return losses.focal(logits, matching, train.gamma, train.alpha)
        return losses.binary_cross_entropy(logits, matching)

    def of_triplets(batch: Batch) -> jax.Array:
        anchor, positive, negative = batch.triplets()
        near, far = (
            losses.distance(anchor, other, train.squared) for other in (positive, negative)
        )
        return losses.triplet(near, far, train_margin)

    def gather(values: jax.Array) -> jax.Array:
        return jax.lax.all_gather(values, axis, tiled=True)

    def all_rows(batch: Batch) -> tuple[jax.Array, jax.Array]:
        return batch.take(range(len(batch.rows)))

    def in_batch(batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Triplets mined with this device's rows as anchors, among the rows of all devices."""
        rows, places = all_rows(batch)
        others, their_places = gather(rows), gather(places)
        positive, negative = match_rule.relations(places, their_places)
        distances = losses.distance(rows[:, None], others[None], train.squared)
        years = their_places[:, 3]
        allowed = years[:, None] == years[None] if match_rule.dated else None
        if settings.mining.pick == "semi-hard":
            found = miners.semi_hard(distances, positive, negative, train_margin, allowed)
        else:
            found = miners.batch_hard(distances, positive, negative, allowed)
        near, far = (distances[found.anchor, column] for column in (found.positive, found.negative))
        valid = found.valid.astype(jnp.float32)
        hard = jnp.where(found.hardness + train_margin > 0, valid, 0).sum()
        # Scaled so that the average over devices is the mean over all devices' triplets.
        count = jax.lax.pmean(valid.sum(), axis)
        loss = losses.triplet(near, far, train_margin, valid) * valid.sum() / jnp.maximum(count, 1)
        return loss, hard / jnp.maximum(count, 1)

    def multi_similarity(batch: Batch) -> jax.Array:
        rows, places = all_rows(batch)
        rows = unit(rows)
        positive, negative = match_rule.relations(places, gather(places))
        return losses.multi_similarity(rows @ gather(rows).T, positive, negative)

    def info_nce(batch: Batch) -> jax.Array:
        """Searches each view in the next one, cyclically, among the rows of all devices."""
        temperature: Any = batch.model.apply({"params": batch.params}, method=Siamese.temperature)
        unit_rows = batch._replace(rows=unit(batch.rows))
        teacher = None
        if batch.features is not None:
            mean = jax.lax.pmean(batch.features.mean(axis=(0, 1)), axis)
            teacher = batch._replace(rows=unit(batch.features - mean))

        def one_way(query_roles: list[int], candidate_roles: list[int]) -> jax.Array:
            # A device's candidates start with the matches, in the order of the queries.
            queries, places = unit_rows.take(query_roles)
            candidates, their_places = unit_rows.take(candidate_roles)
            match = jax.lax.axis_index(axis) * len(candidates) + jnp.arange(len(queries))
            candidates, their_places = gather(candidates), gather(their_places)
            _, negative = match_rule.relations(places, their_places)
            loss = losses.info_nce(queries, candidates, match, ~negative, temperature)
            if teacher is None:
                return loss
            known = teacher.take(query_roles)[0] @ gather(teacher.take(candidate_roles)[0]).T
            kept = losses.distillation(queries @ candidates.T, known, match, ~negative)
            return loss + train.distil * kept

        ways = [([view], [(view + 1) % views]) for view in range(views)]
        if len(batch.rows) > views:
            query, match, negative = range(views, views + 3)
            ways[0] = [0, query], [1, match, negative]
            ways[1] = [1, match], [ways[1][1][0], query]
        return jnp.stack([one_way(*way) for way in ways]).mean()

    def without_mining(loss: Callable[[Batch], jax.Array]) -> Objective:
        return lambda batch: (loss(batch), jnp.array(jnp.nan))

    if settings.mining.rule == "in-batch":
        return in_batch
    by_loss = {
        "triplet": of_triplets,
        "infonce": info_nce,
        "multi-similarity": multi_similarity,
    }
    return without_mining(by_loss.get(train.loss, of_pairs))

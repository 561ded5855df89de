"""The loss of a batch: which rows are compared with which, by the loss that a run asks for."""

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
"""S1's and S2's, where `train.margin` is unset."""


@dataclass(frozen=True)
class MatchRule:
    """How rows of a batch relate.

    Attributes:
        dated: tiles have years, so that a negative must be of its positive's year.
        reach: cells on common ground differ by at most so many columns and rows.
    """

    dated: bool
    reach: int

    def relations(self, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(n, m) which rows are matches, and which are of other places; the rest is neutral.

        Args:
            a, b: (n, 4) and (m, 4) int32: zone, column, row, and the year; of class folders the
                class is the column, and the tile's own number stands for the year.
        """
        apart = jnp.abs(a[:, None] - b[None])
        same = (apart[..., :3] == 0).all(-1)
        near = (apart[..., 0] == 0) & (apart[..., 1:3] <= self.reach).all(-1)
        return same & (apart[..., 3] > 0), ~near


class Batch(NamedTuple):
    """What a loss is a function of.

    Attributes:
        model, params: of the network, for the pair head and the temperature.
        rows: (roles, b, d) descriptors.
        places: (roles, b, 4) see `MatchRule.relations`.
    """

    model: Siamese
    params: Any
    rows: jax.Array
    places: jax.Array

    def take(self, roles: Iterable[int]) -> tuple[jax.Array, jax.Array]:
        """Descriptors and places of some roles, stacked."""
        which = jnp.array(tuple(roles))
        rows, places = self.rows[which], self.places[which]
        return rows.reshape(-1, rows.shape[-1]), places.reshape(-1, places.shape[-1])

    def triplets(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Descriptors of anchors, positives and negatives, where roles come in threes."""
        anchor, positive, negative = (
            self.take(range(first, len(self.rows), 3))[0] for first in range(3)
        )
        return anchor, positive, negative


Objective = Callable[[Batch], tuple[jax.Array, jax.Array]]
"""A batch to its loss, and to the share of its triplets that are hard (NaN where none is mined)."""


def margin(settings: Config) -> float:
    """The margin of a run's loss."""
    asked = settings.train.margin
    return MARGINS.get(settings.train.loss, 0.0) if asked is None else asked


def objective(settings: Config, match_rule: MatchRule, axis: str, views: int) -> Objective:
    """The loss that `settings` ask for, of the batches of one device among those of `axis`.

    Args:
        views: rows of one place in a batch that is compared as a whole, else 0.
    """
    train, apart = settings.train, margin(settings)

    def of_pairs(batch: Batch) -> jax.Array:
        """Each anchor with its match, and with what is none."""
        anchor, positive, negative = batch.triplets()
        first = jnp.concatenate([anchor, anchor])
        second = jnp.concatenate([positive, negative])
        matching = jnp.repeat(jnp.array([1.0, 0.0]), len(first) // 2)
        if train.loss == "contrastive":
            return losses.contrastive(losses.distance(first, second), matching, apart)
        if train.loss == "cosine":
            cosine = (unit(first) * unit(second)).sum(-1)
            return losses.cosine_embedding(cosine, matching, apart)
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
        return losses.triplet(near, far, apart)

    def everywhere(values: jax.Array) -> jax.Array:
        return jax.lax.all_gather(values, axis, tiled=True)

    def all_rows(batch: Batch) -> tuple[jax.Array, jax.Array]:
        return batch.take(range(len(batch.rows)))

    def in_batch(batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Triplets of this device's rows with those of all devices."""
        rows, places = all_rows(batch)
        others, their_places = everywhere(rows), everywhere(places)
        positive, negative = match_rule.relations(places, their_places)
        distances = losses.distance(rows[:, None], others[None], train.squared)
        years = their_places[:, 3]
        allowed = years[:, None] == years[None] if match_rule.dated else None
        if settings.mining.pick == "semi-hard":
            found = miners.semi_hard(distances, positive, negative, apart, allowed)
        else:
            found = miners.batch_hard(distances, positive, negative, allowed)
        near, far = (distances[found.anchor, column] for column in (found.positive, found.negative))
        valid = found.valid.astype(jnp.float32)
        hard = (valid * (found.hardness + apart > 0)).sum()
        # The mean over the triplets of all devices, once the devices' are averaged.
        count = jax.lax.pmean(valid.sum(), axis)
        loss = losses.triplet(near, far, apart, valid) * valid.sum() / jnp.maximum(count, 1)
        return loss, hard / jnp.maximum(count, 1)

    def multi_similarity(batch: Batch) -> jax.Array:
        rows, places = all_rows(batch)
        rows = unit(rows)
        positive, negative = match_rule.relations(places, everywhere(places))
        return losses.multi_similarity(rows @ everywhere(rows).T, positive, negative)

    def info_nce(batch: Batch) -> jax.Array:
        """Each view in the next, and around; all devices' rows are candidates."""
        temperature: Any = batch.model.apply({"params": batch.params}, method=Siamese.temperature)
        unit_rows = batch._replace(rows=unit(batch.rows))

        def one_way(asking: list[int], answers: list[int]) -> jax.Array:
            # Matches come first among a device's candidates, in the order of the queries.
            queries, places = unit_rows.take(asking)
            candidates, their_places = unit_rows.take(answers)
            match = jax.lax.axis_index(axis) * len(candidates) + jnp.arange(len(queries))
            candidates, their_places = everywhere(candidates), everywhere(their_places)
            _, elsewhere = match_rule.relations(places, their_places)
            return losses.info_nce(queries, candidates, match, ~elsewhere, temperature)

        ways = [([view], [(view + 1) % views]) for view in range(views)]
        if len(batch.rows) > views:
            query, match, negative = range(views, views + 3)
            ways[0] = [0, query], [1, match, negative]
            ways[1] = [1, match], [ways[1][1][0], query]
        return jnp.stack([one_way(*way) for way in ways]).mean()

    def unmined(loss: Callable[[Batch], jax.Array]) -> Objective:
        return lambda batch: (loss(batch), jnp.array(jnp.nan))

    if settings.mining.rule == "in-batch":
        return in_batch
    by_loss = {
        "triplet": of_triplets,
        "infonce": info_nce,
        "multi-similarity": multi_similarity,
    }
    return unmined(by_loss.get(train.loss, of_pairs))

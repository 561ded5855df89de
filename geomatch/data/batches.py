"""Which tiles make a batch: a pure function of the seed, the step and the mined pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomatch.data.mining import HardPairs
from geomatch.data.pairs import are_neutral, by_place
from geomatch.data.tiles import TileTable
from geomatch.errors import GeomatchError

Ints = NDArray[np.int64]

EPOCH_ORDER, BATCH = 0, 1
"""Streams of randomness under one seed."""


@dataclass(frozen=True)
class Sampler:
    """Draws batches of training tiles.

    Attributes:
        tiles: training tiles alone.
        batch: anchors of a batch, over all devices.
        negatives: draw a random negative for each anchor; a loss over the whole batch needs none.
    """

    tiles: TileTable
    batch: int
    seed: int
    negatives: bool = True

    def __post_init__(self) -> None:
        table = by_place(self.tiles)
        object.__setattr__(self, "_places", table[(table >= 0).sum(axis=1) >= 2])
        by_year = [np.flatnonzero(self.tiles.year == y) for y in range(len(self.tiles.years))]
        object.__setattr__(self, "_by_year", by_year)

    @property
    def places(self) -> Ints:
        """(places, years) tile of each place seen in two years or more, -1 where none."""
        places: Ints = self._places  # type: ignore[attr-defined]
        return places

    @property
    def steps_per_epoch(self) -> int:
        """Every place is an anchor once an epoch; the last batch is filled up."""
        return -(-len(self.places) // self.batch)

    def roles(self, hard: bool) -> int:
        """How many tiles an anchor brings, with hard pairs or without."""
        return 2 + self.negatives + 3 * hard

    def draw(self, step: int, hard: HardPairs | None) -> Ints:
        """Tiles of step `step` as (roles, batch) indices.

        Roles are anchor, positive and, if asked for, random negative; and, once pairs were mined,
        a hard query, its match and one of its hard negatives. A negative is of its positive's
        year, never of the anchor's own, or the year itself would become the answer.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, EPOCH_ORDER, epoch]).permutation(len(self.places))
        rng = np.random.default_rng([self.seed, BATCH, step])
        chosen = np.take(
            order, np.arange(position * self.batch, (position + 1) * self.batch), mode="wrap"
        )
        anchors, positives = self._two_years(rng, self.places[chosen])
        roles = [anchors, positives]
        if self.negatives:
            roles.append(self._negatives(rng, anchors, positives))
        if hard is not None and len(hard.query):
            row = rng.integers(len(hard.query), size=self.batch)
            column = rng.integers((hard.negatives[row] >= 0).sum(axis=1))
            roles += [hard.query[row], hard.match[row], hard.negatives[row, column]]
        return np.stack(roles)

    @staticmethod
    def _two_years(rng: np.random.Generator, places: Ints) -> tuple[Ints, Ints]:
        """Two tiles of different years of each place (n, years)."""
        draw = np.where(places >= 0, rng.random(places.shape), 2.0)
        years = np.argsort(draw, axis=1)[:, :2]
        picked = np.take_along_axis(places, years, axis=1)
        return picked[:, 0], picked[:, 1]

    def _negatives(self, rng: np.random.Generator, anchors: Ints, positives: Ints) -> Ints:
        """A tile of each positive's year that is not on the anchor's ground."""
        by_year: list[Ints] = self._by_year  # type: ignore[attr-defined]
        negatives = np.empty_like(anchors)
        for i, (anchor, positive) in enumerate(zip(anchors, positives, strict=True)):
            pool = by_year[self.tiles.year[positive]]
            # Few of a territory's tiles are neutral: look through all only where draws fail.
            apart = self._apart(anchor, pool[rng.integers(len(pool), size=8)])
            if not len(apart):
                apart = self._apart(anchor, rng.permutation(pool))
            if not len(apart):
                raise GeomatchError(
                    "a training place has no negative: all tiles of the other year overlap it",
                    "Train on more ground, or with a larger grid.stride.",
                )
            negatives[i] = apart[0]
        return negatives

    def _apart(self, anchor: int, others: Ints) -> Ints:
        """Those of `others` that share no ground with the anchor."""
        return others[~are_neutral(self.tiles, np.asarray(anchor), others)]

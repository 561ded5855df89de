"""The tiles of each batch: a pure function of the seed, the step and the mined samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from geomatch import config
from geomatch.data.ground_truth import are_neutral, by_place
from geomatch.data.tiles import TileTable
from geomatch.errors import GeomatchError
from geomatch.training.mining import Mined

Ints = NDArray[np.int64]

EPOCH_ORDER, BATCH = 0, 1
"""Random streams of one seed."""


def compares_whole_batch(train: config.TrainConfig, mining: config.MiningConfig) -> bool:
    """Whether the loss compares all tiles of a batch, not given pairs or triplets."""
    return train.loss in ("infonce", "multi-similarity") or mining.rule == "in-batch"


@dataclass(frozen=True)
class Sampler:
    """Draws batches of training tiles.

    Anchors of tiles with years are places seen in at least two years; anchors of class folders are
    tiles, with the classes in turn.

    Attributes:
        tiles: training tiles only.
    """

    tiles: TileTable
    train: config.TrainConfig
    mining: config.MiningConfig

    @cached_property
    def places(self) -> Ints:
        """(places, years) the tile of each place in each year, -1 for none; two years at least."""
        table = by_place(self.tiles)
        return table[(table >= 0).sum(axis=1) >= 2]

    @cached_property
    def classes(self) -> list[Ints]:
        """Tiles of each class that has at least two."""
        place = self.tiles.places()
        classes = [np.flatnonzero(place == code) for code in np.unique(place)]
        return [tiles for tiles in classes if len(tiles) > 1]

    @cached_property
    def _by_year(self) -> list[Ints]:
        return [np.flatnonzero(self.tiles.year == y) for y in range(len(self.tiles.years))]

    @cached_property
    def anchors(self) -> int:
        """Number of places, or classes, to train on; at least two are needed."""
        return len(self.places) if self.tiles.dated else len(self.classes)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every anchor (with ranked mining, every mined triplet) comes once."""
        if self.mining.rule == "ranked":
            count = self.mining.hardest
        else:
            count = self.anchors if self.tiles.dated else sum(map(len, self.classes))
        return -(-count // self.train.batch)

    def roles(self, hard: bool) -> int:
        """Tiles per anchor, with mined samples (`hard`) or without."""
        plain = self.train.views if compares_whole_batch(self.train, self.mining) else 3
        return plain + 3 * (hard and self.mining.rule == "knn")

    def draw(self, step: int, mined: Mined | None) -> Ints:
        """Tile indices (roles, batch) of step `step`.

        Roles are the views of a place, or anchor, positive and negative; and with mined hard pairs
        also a hard query, its match and one of its negatives. A negative is of the positive's
        year, never of the anchor's: otherwise the year would give the answer away.
        """
        rng = np.random.default_rng([self.train.seed, BATCH, step])
        epoch, position = divmod(step, self.steps_per_epoch)
        positions = np.arange(position * self.train.batch, (position + 1) * self.train.batch)
        rule, has_samples = self.mining.rule, mined is not None and len(mined.query) > 0
        if rule == "ranked" and mined is not None and has_samples:
            order = self._rng(epoch).permutation(len(mined.query))
            rows = np.take(order, positions, mode="wrap")
            return np.stack([mined.query[rows], mined.match[rows], mined.negatives[rows, 0]])
        if self.tiles.dated:
            anchors = np.take(self._order(epoch, mined), positions, mode="wrap")
        else:
            anchors = self._class_tiles(epoch * self.steps_per_epoch * self.train.batch + positions)
        roles = list(self._views(rng, anchors))
        if rule == "knn" and mined is not None and has_samples:
            roles += self._hard(rng, mined, self._hard_share(step))
        return np.stack(roles)

    def _order(self, epoch: int, mined: Mined | None) -> Ints:
        """Places in the order of an epoch, cached for its further steps."""
        cached = self._orders.get(epoch)
        # Threads read batches ahead: an order that another thread dropped is computed again.
        if cached is None or cached[0] is not mined:
            order = self._rng(epoch).permutation(len(self.places))
            if self.mining.rule == "neighbours" and mined is not None:
                share = self._hard_share(epoch * self.steps_per_epoch)
                order = self._with_neighbours(order, mined, share)
            self._orders.clear()
            cached = self._orders[epoch] = mined, order
        return cached[1]

    @cached_property
    def _orders(self) -> dict[int, tuple[Mined | None, Ints]]:
        return {}

    def _rng(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.train.seed, EPOCH_ORDER, epoch])

    def _hard_share(self, step: int) -> float:
        """Share of hard samples at `step`."""
        first = self.mining.every if self.mining.rule == "knn" else 0
        return ramp(self.mining, step / self.steps_per_epoch - first)

    # Anchors, positives and negatives

    def _class_tiles(self, positions: Ints) -> Ints:
        """Tiles at positions of an endless sequence in which the classes take turns.

        Each turn has one tile of every class, in a shuffled order; the tiles of a class are
        shuffled again each time all were seen.
        """
        chosen = np.empty(len(positions), np.int64)
        turns, places = np.divmod(positions, len(self.classes))
        for i, (turn, place) in enumerate(zip(turns.tolist(), places.tolist(), strict=True)):
            code = int(self._rng(turn).permutation(len(self.classes))[place])
            tiles = self.classes[code]
            shuffle, index = divmod(turn, len(tiles))
            rng = np.random.default_rng([self.train.seed, EPOCH_ORDER, code, shuffle])
            chosen[i] = tiles[rng.permutation(len(tiles))[index]]
        return chosen

    def _views(self, rng: np.random.Generator, anchors: Ints) -> Ints:
        """(roles, n) views of places; or anchors, positives and negatives."""
        whole_batch = compares_whole_batch(self.train, self.mining)
        count = self.train.views if whole_batch else 2
        if self.tiles.dated:
            views = self._views_of_places(rng, self.places[anchors], count)
        else:
            views = self._views_of_classes(rng, anchors, count)
        return views if whole_batch else np.stack([*views, self._negatives(rng, *views)])

    @staticmethod
    def _views_of_places(rng: np.random.Generator, places: Ints, count: int) -> Ints:
        """(count, n) tiles of different years of each place (n, years), repeated if too few."""
        draw = np.where(places >= 0, rng.random(places.shape), 2.0)
        years = np.argsort(draw, axis=1)
        seen = (places >= 0).sum(axis=1, keepdims=True)
        return np.take_along_axis(
            places, np.take_along_axis(years, np.arange(count) % seen, 1), 1
        ).T

    def _views_of_classes(self, rng: np.random.Generator, anchors: Ints, count: int) -> Ints:
        """(count, n) each anchor and other tiles of its class, repeated if too few."""
        place = self.tiles.places()
        of_class = {int(place[tiles[0]]): tiles for tiles in self.classes}
        views = np.empty((count, len(anchors)), np.int64)
        for i, anchor in enumerate(anchors):
            tiles = of_class[int(place[anchor])]
            others = rng.permutation(tiles[tiles != anchor])
            views[:, i] = [anchor, *np.resize(others, count - 1)]
        return views

    def _negatives(self, rng: np.random.Generator, anchors: Ints, positives: Ints) -> Ints:
        """(n,) tiles of each positive's year that are not neutral to the anchor."""
        negatives = np.empty_like(anchors)
        for i, (anchor, positive) in enumerate(zip(anchors, positives, strict=True)):
            pool = self._by_year[self.tiles.year[positive]]
            # Few tiles of a territory are neutral: search all only if draws fail.
            found = self._negatives_among(anchor, pool[rng.integers(len(pool), size=8)])
            if not len(found):
                found = self._negatives_among(anchor, rng.permutation(pool))
            if not len(found):
                raise GeomatchError(
                    "a training place has no negative: all tiles of the other year overlap it",
                    "Train on a larger area, or with a larger grid.stride.",
                )
            negatives[i] = found[0]
        return negatives

    def _negatives_among(self, anchor: int, others: Ints) -> Ints:
        """Those of `others` that are not neutral to the anchor."""
        return others[~are_neutral(self.tiles, np.asarray(anchor), others)]

    # Mined samples

    def _hard(self, rng: np.random.Generator, mined: Mined, share: float) -> list[Ints]:
        """Hard queries, matches and negatives; random ones for all but `share` of them."""
        row = rng.integers(len(mined.query), size=self.train.batch)
        column = rng.integers((mined.negatives[row] >= 0).sum(axis=1))
        hard = np.stack([mined.query[row], mined.match[row], mined.negatives[row, column]])
        if share < 1:
            if self.tiles.dated:
                places = self.places[rng.integers(len(self.places), size=self.train.batch)]
                anchors, positives = self._views_of_places(rng, places, 2)
            else:
                tiles = np.concatenate(self.classes)
                drawn = tiles[rng.integers(len(tiles), size=self.train.batch)]
                anchors, positives = self._views_of_classes(rng, drawn, 2)
            drawn = np.stack([anchors, positives, self._negatives(rng, anchors, positives)])
            hard = np.where(rng.random(self.train.batch) < share, hard, drawn)
        return list(hard)

    def _with_neighbours(self, order: Ints, mined: Mined, share: float) -> Ints:
        """`order` with each place followed by its neighbours that are still waiting.

        As in Sample4Geo (Deuser et al. 2023, arXiv 2303.11851).
        """
        row_of = np.full(len(self.tiles), -1)
        table = self.places
        for column in range(table.shape[1]):
            seen = table[:, column] >= 0
            row_of[table[seen, column]] = np.flatnonzero(seen)
        near: dict[int, list[int]] = {}
        for query, negatives in zip(mined.query, mined.negatives, strict=True):
            found = row_of[negatives[negatives >= 0]].tolist()
            near.setdefault(int(row_of[query]), []).extend(found)
        waiting = dict.fromkeys(order.tolist())
        result = []
        limit = round(share * self.mining.k)
        while waiting:
            place = next(iter(waiting))
            group = [place, *[other for other in near.get(place, ()) if other in waiting]]
            for other in dict.fromkeys(group[: 1 + limit]):
                del waiting[other]
                result.append(other)
        return np.array(result, np.int64)


def ramp(mining: config.MiningConfig, epochs: float) -> float:
    """Share of hard samples, `epochs` epochs after the first mining."""
    return float(np.clip(epochs / mining.ramp, 0, 1)) if mining.ramp else 1.0

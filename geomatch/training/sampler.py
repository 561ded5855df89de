"""Which tiles make a batch: a pure function of the seed, the step and what was mined."""

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
"""Streams of randomness under one seed."""


def whole(train: config.TrainConfig, mining: config.MiningConfig) -> bool:
    """Whether the loss compares all tiles of a batch, rather than pairs or triplets of them."""
    return train.loss in ("infonce", "multi-similarity") or mining.rule == "in-batch"


@dataclass(frozen=True)
class Sampler:
    """Draws batches of training tiles.

    Of tiles with years, anchors are places seen in two years or more; of class folders they are
    tiles, each class in its turn.

    Attributes:
        tiles: training tiles alone.
    """

    tiles: TileTable
    train: config.TrainConfig
    mining: config.MiningConfig

    @cached_property
    def places(self) -> Ints:
        """(places, years) tile of each place seen in two years or more, -1 where none."""
        table = by_place(self.tiles)
        return table[(table >= 0).sum(axis=1) >= 2]

    @cached_property
    def _classes(self) -> list[Ints]:
        """Tiles of each class of at least two."""
        place = self.tiles.places()
        groups = [np.flatnonzero(place == code) for code in np.unique(place)]
        return [group for group in groups if len(group) > 1]

    @cached_property
    def _by_year(self) -> list[Ints]:
        return [np.flatnonzero(self.tiles.year == y) for y in range(len(self.tiles.years))]

    @cached_property
    def anchors(self) -> int:
        """Places, or classes, that can be learnt from; at least two are needed."""
        return len(self.places) if self.tiles.dated else len(self._classes)

    @property
    def steps_per_epoch(self) -> int:
        """Every anchor comes once an epoch (every mined triplet, where they are ranked)."""
        if self.mining.rule == "ranked":
            count = self.mining.hardest
        else:
            count = self.anchors if self.tiles.dated else sum(map(len, self._classes))
        return -(-count // self.train.batch)

    def roles(self, hard: bool) -> int:
        """How many tiles an anchor brings, with mined samples or without."""
        plain = self.train.views if whole(self.train, self.mining) else 3
        return plain + 3 * (hard and self.mining.rule == "knn")

    def draw(self, step: int, mined: Mined | None) -> Ints:
        """Tiles of step `step` as (roles, batch) indices.

        Roles are the views of a place, or anchor, positive and negative; and, once hard pairs
        were mined by neighbours, a hard query, its match and one of its negatives. A negative is
        of its positive's year, never of the anchor's own, or the year itself would become the
        answer.
        """
        rng = np.random.default_rng([self.train.seed, BATCH, step])
        epoch, position = divmod(step, self.steps_per_epoch)
        turn = np.arange(position * self.train.batch, (position + 1) * self.train.batch)
        rule, some = self.mining.rule, mined is not None and len(mined.query) > 0
        if rule == "ranked" and mined is not None and some:
            order = self._rng(epoch).permutation(len(mined.query))
            rows = np.take(order, turn, mode="wrap")
            return np.stack([mined.query[rows], mined.match[rows], mined.negatives[rows, 0]])
        if self.tiles.dated:
            anchors = np.take(self._order(epoch, mined), turn, mode="wrap")
        else:
            anchors = self._class_tiles(epoch * self.steps_per_epoch * self.train.batch + turn)
        roles = list(self._views(rng, anchors))
        if rule == "knn" and mined is not None and some:
            roles += self._hard(rng, mined, self._share(step))
        return np.stack(roles)

    def _order(self, epoch: int, mined: Mined | None) -> Ints:
        """Places in the order of an epoch, kept for its further steps."""
        kept = self._orders.get(epoch)
        # Batches are read ahead in threads: what another one drops is made again.
        if kept is None or kept[0] is not mined:
            order = self._rng(epoch).permutation(len(self.places))
            if self.mining.rule == "neighbours" and mined is not None:
                order = self._side_by_side(order, mined, self._share(epoch * self.steps_per_epoch))
            self._orders.clear()
            kept = self._orders[epoch] = mined, order
        return kept[1]

    @cached_property
    def _orders(self) -> dict[int, tuple[Mined | None, Ints]]:
        return {}

    def _rng(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.train.seed, EPOCH_ORDER, epoch])

    def _share(self, step: int) -> float:
        """Of samples that are hard, as of `step`."""
        first = self.mining.every if self.mining.rule == "knn" else 0
        return ramp(self.mining, step / self.steps_per_epoch - first)

    # Anchors and what they bring

    def _class_tiles(self, turn: Ints) -> Ints:
        """Tiles at positions of an endless sequence in which every class comes in its turn.

        Each run of as many tiles as there are classes has one of each; a class's own tiles come
        in a shuffled order, anew each time all were seen.
        """
        chosen = np.empty(len(turn), np.int64)
        for i, (visit, place) in enumerate(zip(*np.divmod(turn, len(self._classes)), strict=True)):
            code = int(self._rng(int(visit)).permutation(len(self._classes))[place])
            group = self._classes[code]
            seen, which = divmod(int(visit), len(group))
            rng = np.random.default_rng([self.train.seed, EPOCH_ORDER, code, seen])
            chosen[i] = group[rng.permutation(len(group))[which]]
        return chosen

    def _views(self, rng: np.random.Generator, anchors: Ints) -> Ints:
        """(roles, n) views of places, or anchors, positives and negatives."""
        together = whole(self.train, self.mining)
        count = self.train.views if together else 2
        if self.tiles.dated:
            views = self._of_years(rng, self.places[anchors], count)
        else:
            views = self._of_class(rng, anchors, count)
        return views if together else np.stack([*views, self._negatives(rng, *views)])

    @staticmethod
    def _of_years(rng: np.random.Generator, places: Ints, count: int) -> Ints:
        """(count, n) tiles of different years of each place (n, years), again where too few."""
        draw = np.where(places >= 0, rng.random(places.shape), 2.0)
        years = np.argsort(draw, axis=1)
        seen = (places >= 0).sum(axis=1, keepdims=True)
        return np.take_along_axis(
            places, np.take_along_axis(years, np.arange(count) % seen, 1), 1
        ).T

    def _of_class(self, rng: np.random.Generator, anchors: Ints, count: int) -> Ints:
        """(count, n) each anchor and others of its class, again where too few."""
        place = self.tiles.places()
        member = {int(place[group[0]]): group for group in self._classes}
        views = np.empty((count, len(anchors)), np.int64)
        for i, anchor in enumerate(anchors):
            group = member[int(place[anchor])]
            others = rng.permutation(group[group != anchor])
            views[:, i] = [anchor, *np.resize(others, count - 1)]
        return views

    def _negatives(self, rng: np.random.Generator, anchors: Ints, positives: Ints) -> Ints:
        """A tile of each positive's year that is not of the anchor's place or ground."""
        negatives = np.empty_like(anchors)
        for i, (anchor, positive) in enumerate(zip(anchors, positives, strict=True)):
            pool = self._by_year[self.tiles.year[positive]]
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

    # What was mined

    def _hard(self, rng: np.random.Generator, mined: Mined, share: float) -> list[Ints]:
        """A hard query, its match and one of its negatives; random ones in place of some."""
        row = rng.integers(len(mined.query), size=self.train.batch)
        column = rng.integers((mined.negatives[row] >= 0).sum(axis=1))
        hard = np.stack([mined.query[row], mined.match[row], mined.negatives[row, column]])
        if share < 1:
            if self.tiles.dated:
                places = self.places[rng.integers(len(self.places), size=self.train.batch)]
                anchors, positives = self._of_years(rng, places, 2)
            else:
                tiles = np.concatenate(self._classes)
                drawn = tiles[rng.integers(len(tiles), size=self.train.batch)]
                anchors, positives = self._of_class(rng, drawn, 2)
            drawn = np.stack([anchors, positives, self._negatives(rng, anchors, positives)])
            hard = np.where(rng.random(self.train.batch) < share, hard, drawn)
        return list(hard)

    def _side_by_side(self, order: Ints, mined: Mined, share: float) -> Ints:
        """`order` of places, each followed by those of its neighbours that did not come yet.

        As Sample4Geo shuffles (Deuser et al. 2023, arXiv 2303.11851).
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
        most = round(share * self.mining.k)
        while waiting:
            place = next(iter(waiting))
            group = [place, *[other for other in near.get(place, ()) if other in waiting]]
            for other in dict.fromkeys(group[: 1 + most]):
                del waiting[other]
                result.append(other)
        return np.array(result, np.int64)


def ramp(mining: config.MiningConfig, epochs: float) -> float:
    """Share of samples that are hard, so many epochs after the first round."""
    return float(np.clip(epochs / mining.ramp, 0, 1)) if mining.ramp else 1.0

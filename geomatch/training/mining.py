"""Mined samples: what the current descriptors still get wrong, as tile indices and hardness."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.spatial import KDTree

from geomatch.data.ground_truth import Task, are_neutral, by_place
from geomatch.data.tiles import TileTable

Ints = NDArray[np.int64]
Float32Array = NDArray[np.float32]


@dataclass(frozen=True)
class Mined:
    """Samples of one round as parallel arrays of tile indices.

    Attributes:
        query: (n,) tile that is asked for.
        match: (n,) a tile of the same place.
        negatives: (n, k) tiles of other places, nearest first, then -1.
        hardness: (n,) by how much the nearest of them is nearer than the match.
        asked: how many queries (or triplets) were looked at; `hard` of them are still hard.
    """

    query: Ints
    match: Ints
    negatives: Ints
    hardness: Float32Array
    asked: int
    hard: int

    @property
    def share(self) -> float | None:
        """Share of what was looked at that is still hard."""
        return self.hard / self.asked if self.asked else None

    def save(self, path: Path) -> None:
        """Write Parquet, a row a sample."""
        counts = {"asked": self.asked, "hard": self.hard, "k": self.negatives.shape[1]}
        columns = {
            "query": self.query,
            "match": self.match,
            "negatives": pa.array(self.negatives.tolist(), pa.list_(pa.int64())),
            "hardness": self.hardness.astype(np.float32),
        }
        table = pa.table(columns)
        metadata = {key: str(value) for key, value in counts.items()}
        pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")

    @classmethod
    def load(cls, path: Path) -> Mined:
        """Read what `save` wrote."""
        table = pq.read_table(path)
        counts = {key.decode(): int(value) for key, value in table.schema.metadata.items()}
        negatives = np.asarray(table["negatives"].to_pylist(), np.int64)
        return cls(
            table["query"].to_numpy(),
            table["match"].to_numpy(),
            negatives.reshape(len(table), counts["k"]),
            table["hardness"].to_numpy(),
            counts["asked"],
            counts["hard"],
        )


# By nearest neighbours


def matches(task: Task, seed: Sequence[int]) -> Ints:
    """(q,) position in the database of a match of each query: drawn, where there are several."""
    if task.truth is not None:
        return task.truth
    rng = np.random.default_rng(list(seed))
    order = np.argsort(task.database_place, kind="stable")
    places = task.database_place[order]
    start = np.searchsorted(places, task.query_place, "left")
    count = np.searchsorted(places, task.query_place, "right") - start
    # A query is searched itself: its own place in the order, from which others are counted.
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    own = np.empty(len(task.queries), np.int64)
    own[task.neutral[0]] = rank[task.neutral[1]]
    return order[start + (own - start + rng.integers(1, count)) % count]


def hard_queries(
    task: Task,
    match: Ints,
    near: Ints,
    scores: Float32Array,
    match_scores: Float32Array,
    within: int,
) -> Mined:
    """S1's rule: hard is a query with no tile of its place among its first `within` neighbours.

    Its negatives are its neighbours less those of its place and less neutral tiles.

    Args:
        match: (q,) position in the database of a match of each query.
        near: (q, k) positions in the database, nearest first; -1 where there is none.
        scores: (q, k) of the neighbours, higher is nearer.
        match_scores: (q,) of the matches.
    """
    right, wrong = _right_and_wrong(task, near)
    # Neutral tiles do not push the match down.
    place = np.cumsum(right | wrong, axis=1)
    found = (right & (place <= within)).any(axis=1)
    kept = ~np.asarray(found) & np.asarray(wrong.any(axis=1))
    return _mined(task, match, near, scores, match_scores, wrong, kept)


def wrong_neighbours(
    task: Task, match: Ints, near: Ints, scores: Float32Array, match_scores: Float32Array
) -> Mined:
    """The wrong neighbours of every query that has any; hard are those with one before the match.

    Args: as `hard_queries`.
    """
    _, wrong = _right_and_wrong(task, near)
    any_wrong = np.asarray(wrong.any(axis=1))
    kept = _mined(task, match, near, scores, match_scores, wrong, any_wrong)
    return replace(kept, hard=int((kept.hardness >= 0).sum()))


def _right_and_wrong(task: Task, near: Ints) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(q, k) which neighbours are matches, and which are of other places."""
    size = max(len(task.database), 1)
    keys = np.arange(len(task.queries))[:, None] * size + near
    counts = (near >= 0) & ~np.isin(keys, task.neutral[0] * size + task.neutral[1])
    same = task.database_place[near] == task.query_place[:, None]
    return same & counts, ~same & counts


def _mined(
    task: Task,
    match: Ints,
    near: Ints,
    scores: Float32Array,
    match_scores: Float32Array,
    wrong: NDArray[np.bool_],
    kept: NDArray[np.bool_],
) -> Mined:
    rows = np.flatnonzero(kept)
    # Wrong answers first, in their order.
    order = np.argsort(~wrong[rows], axis=1, kind="stable")
    negatives = np.take_along_axis(task.database[near[rows]], order, axis=1)
    counts = wrong[rows].sum(axis=1, keepdims=True)
    negatives = np.where(np.arange(near.shape[1]) < counts, negatives, -1)
    nearest = np.take_along_axis(scores[rows], order[:, :1], axis=1)[:, 0]
    hardness = (nearest - match_scores[rows]).astype(np.float32)
    return Mined(
        task.queries[rows],
        task.database[match[rows]],
        negatives,
        hardness,
        len(task.queries),
        len(rows),
    )


def join(parts: Sequence[Mined], k: int) -> Mined:
    """The samples of several parts, each with its first `k` negatives, or padded to as many."""
    none = np.empty(0, np.int64)
    empty = Mined(none, none, np.empty((0, k), np.int64), np.empty(0, np.float32), 0, 0)
    arrays = [
        (part.query, part.match, _padded(part.negatives, k), part.hardness)
        for part in (empty, *parts)
    ]
    query, match, negatives, hardness = (np.concatenate(a) for a in zip(*arrays, strict=True))
    return Mined(
        query,
        match,
        negatives,
        hardness.astype(np.float32),
        sum(part.asked for part in parts),
        sum(part.hard for part in parts),
    )


def _padded(negatives: Ints, k: int) -> Ints:
    negatives = negatives[:, :k]
    return np.pad(negatives, ((0, 0), (0, k - negatives.shape[1])), constant_values=-1)


# By the ground


def on_the_ground(tiles: TileTable, k: int) -> Mined:
    """The k places nearest to each place that share no ground with it, before anything is learnt.

    Places of different zones are far from each other. What is hard is not known.
    """
    table = by_place(tiles)
    places = table[(table >= 0).sum(axis=1) >= 2]
    first = places.max(axis=1)
    parts = []
    for zone in np.unique(tiles.epsg[first]):
        mine = first[tiles.epsg[first] == zone]
        cells = np.stack([tiles.col[mine], tiles.row[mine]], axis=1)
        # Those that overlap a place, and itself, are at most so many.
        reach = tiles.grid.reach if tiles.grid else 0
        wanted = min(len(mine), k + (2 * reach + 1) ** 2)
        near = KDTree(cells).query(cells, wanted)[1].reshape(len(mine), -1)
        apart = ~are_neutral(tiles, mine[:, None], mine[near])
        order = np.argsort(~apart, axis=1, kind="stable")[:, :k]
        chosen = np.take_along_axis(mine[near], order, axis=1)
        negatives = np.where(np.take_along_axis(apart, order, axis=1), chosen, -1)
        none = np.zeros(len(mine), np.float32)
        parts.append(Mined(mine, mine, negatives, none, 0, 0))
    return join(parts, k)


# By loss


def candidate_triplets(tiles: TileTable, each: int, seed: Sequence[int]) -> Iterator[Ints]:
    """(3, n) anchors, positives and negatives, `each` of every place, other places in turn.

    As S2 draws them: for each ordered pair of classes a number of triplets. Of dated tiles the
    negative is of the positive's year.
    """
    rng = np.random.default_rng(list(seed))
    place = tiles.places()
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    sizes = np.diff(starts, append=len(order))
    table = by_place(tiles) if tiles.dated else None
    others = len(starts) - 1
    if others < 1:
        return
    for i in np.flatnonzero(sizes > 1):
        first = rng.integers(sizes[i], size=each)
        second = (first + rng.integers(1, sizes[i], size=each)) % sizes[i]
        anchor, positive = order[starts[i] + first], order[starts[i] + second]
        turns, rest = divmod(each, others)
        # The last turn is drawn alone: a territory has far more places than are asked for.
        drawn = [rng.permutation(others) for _ in range(turns)]
        other = np.concatenate([*drawn, rng.choice(others, rest, replace=False)])
        other += other >= i
        if table is None:
            negative = order[starts[other] + rng.integers(sizes[other])]
        else:
            negative = table[place[order[starts[other]]], tiles.year[positive]]
        fits = (negative >= 0) & ~are_neutral(tiles, anchor, negative)
        yield np.stack([anchor, positive, negative])[:, fits]


class Hardest:
    """S2's rule: the triplets of the largest loss, and beside them some drawn from all.

    Args:
        count: how many are taken.
        share: of them that are the hardest.
        margin: of the loss; a triplet is hard where its loss is above 0.
    """

    def __init__(self, count: int, share: float, margin: float, seed: Sequence[int]) -> None:
        self._top, self._drawn = round(share * count), count - round(share * count)
        self._margin = margin
        self._rng = np.random.default_rng(list(seed))
        # Rows of anchor, positive, negative; of hardness and of a random number.
        self._triplets = np.empty((3, 0), np.int64)
        self._values = np.empty((2, 0), np.float32)
        self._asked = self._hard = 0

    def add(self, triplets: Ints, hardness: Float32Array) -> None:
        """Look at further triplets (3, n).

        Args:
            hardness: (n,) distance to the positive less that to the negative.
        """
        values = np.stack([hardness, self._rng.random(len(hardness), np.float32)])
        self._triplets = np.concatenate([self._triplets, triplets], axis=1)
        self._values = np.concatenate([self._values, values], axis=1)
        self._asked += len(hardness)
        self._hard += int((hardness + self._margin > 0).sum())
        # Only so many can be taken in the end: a territory has far more candidates.
        if self._triplets.shape[1] > 8 * (self._top + self._drawn):
            kept = self._chosen()
            self._triplets, self._values = self._triplets[:, kept], self._values[:, kept]

    def _chosen(self) -> Ints:
        hardness, drawn = self._values
        order = np.argsort(-hardness, kind="stable")
        rest = order[self._top :]
        return np.concatenate(
            [order[: self._top], rest[np.argsort(drawn[rest], kind="stable")][: self._drawn]]
        )

    def result(self) -> Mined:
        """What was taken, the hardest first."""
        chosen = self._chosen()
        anchor, positive, negative = self._triplets[:, chosen]
        hardness = self._values[0, chosen]
        return Mined(anchor, positive, negative[:, None], hardness, self._asked, self._hard)

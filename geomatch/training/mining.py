"""Hard mining: the samples that the current descriptors still get wrong, as tile indices."""

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
    """Mined samples of one round, as parallel arrays of tile indices.

    Attributes:
        query: (n,) query or anchor.
        match: (n,) a tile of the same place.
        negatives: (n, k) tiles of other places, nearest first, padded with -1.
        hardness: (n,) by how much the nearest negative is nearer than the match.
        examined: number of queries (or triplets) examined.
        hard: number of those that are hard.
    """

    query: Ints
    match: Ints
    negatives: Ints
    hardness: Float32Array
    examined: int
    hard: int

    @property
    def share(self) -> float | None:
        """Share of the examined samples that are hard; None if none were examined."""
        return self.hard / self.examined if self.examined else None

    def save(self, path: Path) -> None:
        """Write Parquet, one row per sample."""
        counts = {"asked": self.examined, "hard": self.hard, "k": self.negatives.shape[1]}
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


# Nearest neighbours


def matches(task: Task, seed: Sequence[int]) -> Ints:
    """(q,) database position of a match of each query, drawn at random where there are several."""
    if task.truth is not None:
        return task.truth
    rng = np.random.default_rng(list(seed))
    order = np.argsort(task.database_place, kind="stable")
    places = task.database_place[order]
    start = np.searchsorted(places, task.query_place, "left")
    count = np.searchsorted(places, task.query_place, "right") - start
    # The query is in the database, too: count on from its own position among its class.
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
    """Queries with no tile of their place among their first `within` neighbours.

    Their negatives are their neighbours without tiles of their place and neutral tiles. After
    Khokhlova et al. 2020 (ICIP).

    Args:
        match: (q,) database position of a match of each query.
        near: (q, k) database positions of the neighbours, nearest first, padded with -1.
        scores: (q, k) of the neighbours; higher is nearer.
        match_scores: (q,) of the matches.
    """
    right, wrong = _right_and_wrong(task, near)
    # Neutral tiles do not count in the rank.
    rank = np.cumsum(right | wrong, axis=1)
    found = (right & (rank <= within)).any(axis=1)
    kept = ~np.asarray(found) & np.asarray(wrong.any(axis=1))
    return _mined(task, match, near, scores, match_scores, wrong, kept)


def wrong_neighbours(
    task: Task, match: Ints, near: Ints, scores: Float32Array, match_scores: Float32Array
) -> Mined:
    """The wrong neighbours of every query; hard queries have one that is nearer than the match.

    Args: as for `hard_queries`.
    """
    _, wrong = _right_and_wrong(task, near)
    any_wrong = np.asarray(wrong.any(axis=1))
    kept = _mined(task, match, near, scores, match_scores, wrong, any_wrong)
    return replace(kept, hard=int((kept.hardness >= 0).sum()))


def _right_and_wrong(task: Task, near: Ints) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(q, k) which neighbours are matches, and which are negatives."""
    size = max(len(task.database), 1)
    keys = np.arange(len(task.queries))[:, None] * size + near
    counts = (near >= 0) & ~np.isin(keys, task.neutral[0] * size + task.neutral[1])
    same_place = task.database_place[near] == task.query_place[:, None]
    return same_place & counts, ~same_place & counts


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
    # Negatives first, in their order.
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
    """The samples of all parts, each with its first `k` negatives, padded with -1."""
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
        sum(part.examined for part in parts),
        sum(part.hard for part in parts),
    )


def _padded(negatives: Ints, k: int) -> Ints:
    negatives = negatives[:, :k]
    return np.pad(negatives, ((0, 0), (0, k - negatives.shape[1])), constant_values=-1)


# Distance on the ground


def nearest_on_ground(tiles: TileTable, k: int) -> Mined:
    """The k places nearest to each place that share no ground with it: samples before training.

    Places of different zones count as far apart. Hardness is unknown: 0.
    """
    table = by_place(tiles)
    places = table[(table >= 0).sum(axis=1) >= 2]
    first = places.max(axis=1)
    parts = []
    for zone in np.unique(tiles.epsg[first]):
        anchors = first[tiles.epsg[first] == zone]
        cells = np.stack([tiles.col[anchors], tiles.row[anchors]], axis=1)
        # At most (2 reach + 1)^2 cells overlap a place, itself included.
        reach = tiles.grid.reach if tiles.grid else 0
        count = min(len(anchors), k + (2 * reach + 1) ** 2)
        near = KDTree(cells).query(cells, count)[1].reshape(len(anchors), -1)
        apart = ~are_neutral(tiles, anchors[:, None], anchors[near])
        order = np.argsort(~apart, axis=1, kind="stable")[:, :k]
        chosen = np.take_along_axis(anchors[near], order, axis=1)
        negatives = np.where(np.take_along_axis(apart, order, axis=1), chosen, -1)
        unknown = np.zeros(len(anchors), np.float32)
        parts.append(Mined(anchors, anchors, negatives, unknown, 0, 0))
    return join(parts, k)


# Ranking by loss


def candidate_triplets(tiles: TileTable, per_place: int, seed: Sequence[int]) -> Iterator[Ints]:
    """Triplets of each place: (3, n) anchors, positives and negatives, n at most `per_place`.

    Negatives come from all other places in turn: for each ordered pair of classes, a number of
    triplets. Negatives of dated tiles are of the positive's year.
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
        first = rng.integers(sizes[i], size=per_place)
        second = (first + rng.integers(1, sizes[i], size=per_place)) % sizes[i]
        anchor, positive = order[starts[i] + first], order[starts[i] + second]
        turns, rest = divmod(per_place, others)
        # The last, incomplete turn is drawn alone: a territory has far more places than triplets.
        drawn = [rng.permutation(others) for _ in range(turns)]
        other = np.concatenate([*drawn, rng.choice(others, rest, replace=False)])
        other += other >= i
        if table is None:
            negative = order[starts[other] + rng.integers(sizes[other])]
        else:
            negative = table[place[order[starts[other]]], tiles.year[positive]]
        is_negative = (negative >= 0) & ~are_neutral(tiles, anchor, negative)
        yield np.stack([anchor, positive, negative])[:, is_negative]


class HardestTriplets:
    """Selects triplets by rank of their loss: the hardest, and others drawn from the rest.

    Args:
        count: number of triplets to select.
        share: of these, the share that are the hardest.
        margin: of the triplet loss; a triplet is hard where its loss is above 0.
    """

    def __init__(self, count: int, share: float, margin: float, seed: Sequence[int]) -> None:
        self._top, self._drawn = round(share * count), count - round(share * count)
        self._margin = margin
        self._rng = np.random.default_rng(list(seed))
        # Rows: anchor, positive, negative; and hardness, a random number.
        self._triplets = np.empty((3, 0), np.int64)
        self._values = np.empty((2, 0), np.float32)
        self._examined = self._hard = 0

    def add(self, triplets: Ints, hardness: Float32Array) -> None:
        """Examine further triplets (3, n).

        Args:
            hardness: (n,) distance to the positive minus distance to the negative.
        """
        values = np.stack([hardness, self._rng.random(len(hardness), np.float32)])
        self._triplets = np.concatenate([self._triplets, triplets], axis=1)
        self._values = np.concatenate([self._values, values], axis=1)
        self._examined += len(hardness)
        self._hard += int((hardness + self._margin > 0).sum())
        # Drop what cannot be selected any more: a territory has far more candidates.
        if self._triplets.shape[1] > 8 * (self._top + self._drawn):
            kept = self._selected()
            self._triplets, self._values = self._triplets[:, kept], self._values[:, kept]

    def _selected(self) -> Ints:
        hardness, drawn = self._values
        order = np.argsort(-hardness, kind="stable")
        rest = order[self._top :]
        return np.concatenate(
            [order[: self._top], rest[np.argsort(drawn[rest], kind="stable")][: self._drawn]]
        )

    def result(self) -> Mined:
        """The selected triplets, hardest first."""
        selected = self._selected()
        anchor, positive, negative = self._triplets[:, selected]
        hardness = self._values[0, selected]
        return Mined(anchor, positive, negative[:, None], hardness, self._examined, self._hard)

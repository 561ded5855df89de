"""The windows of a scan are searched, and vote for one place.

Each answer to a window says where the scan's centre would be, as in a generalised Hough transform
(Ballard 1981). A vote weighs as much as the score of the answer stands out from that of the last
one: what is seen everywhere, such as bare ground, does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomatch.data.filters import Filter
from geomatch.querying.opened import OpenIndex
from geomatch.querying.scan import Pose, Windows

Float64Array = NDArray[np.float64]
Ints = NDArray[np.int64]

ANSWERS = 20
"""Answers of each window that vote."""
TOGETHER = 512
"""Windows that are described at a time, at least."""


@dataclass(frozen=True)
class Place:
    """Where a scan may lie.

    Attributes:
        epsg, x, y: its centre.
        weight: of the votes for it.
        tile: position in the index of the tile nearest to it, of those that vote for it.
        score: mean of the scores of the votes.
        agreeing: number of windows that vote for it.
        windows: number of windows in this pose.
    """

    pose: Pose
    epsg: int
    x: float
    y: float
    weight: float
    tile: int
    score: float
    agreeing: int
    windows: int

    def to_ground(self, points: Float64Array, shape: tuple[int, ...]) -> Float64Array:
        """Coordinates (n, 2) in the CRS of pixels (n, 2) of the scan, as column and row.

        Args:
            points: counted from the upper left corner of the scan.
            shape: height and width of the scan.
        """
        angle = np.radians(self.pose.turn)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        right_and_up = (points - np.array(shape)[::-1] / 2) * [1, -1] * self.pose.gsd
        ground: Float64Array = right_and_up @ turn.T + [self.x, self.y]
        return ground

    def ring(self, shape: tuple[int, ...]) -> Float64Array:
        """The outline of the scan (5, 2), counter-clockwise, in the CRS."""
        height, width = shape
        corners = [(0, height), (width, height), (width, 0), (0, 0), (0, height)]
        return self.to_ground(np.array(corners, np.float64), shape)


def locate(
    index: OpenIndex,
    cut: Iterable[Windows],
    describe: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    passing: Filter,
    most: int,
) -> list[Place]:
    """The places that a scan may lie in, the best first.

    Args:
        describe: descriptors (n, d) of tiles (n, size, size, c).
        passing: the tiles to search.
        most: number of places.
    """
    side = index.tiles.size * (index.tiles.gsd or 0.0)
    candidates: list[Place] = []
    for some in _together(cut):
        vectors = describe(np.concatenate([each.pixels for each in some]))
        scores, positions = index.vectors.search(vectors, ANSWERS, passing)
        known, code = np.unique(positions, return_inverse=True)
        rows = index.rows.take(known.tolist())
        epsg = np.array([row["epsg"] for row in rows])[code].reshape(positions.shape)
        centres = np.array([(row["x"], row["y"]) for row in rows])[code]
        centres = centres.reshape(*positions.shape, 2)
        start = 0
        for each in some:
            part = slice(start, start := start + len(each.pixels))
            candidates += places(
                each, scores[part], positions[part], epsg[part], centres[part], side, most + 1
            )
    return best_places(candidates, side, most + 1)


def _together(cut: Iterable[Windows]) -> Iterator[list[Windows]]:
    """Poses in groups of many windows."""
    group: list[Windows] = []
    for each in cut:
        group.append(each)
        if sum(len(one.pixels) for one in group) >= TOGETHER:
            yield group
            group = []
    if group:
        yield group


def places(
    cut: Windows,
    scores: NDArray[np.float32],
    positions: Ints,
    epsg: Ints,
    centres: Float64Array,
    side: float,
    most: int,
) -> list[Place]:
    """The places that the answers to the windows of a pose vote for, best first.

    Args:
        cut: n windows.
        scores: (n, k) of the answers, best first.
        positions: (n, k) of the answers in the index.
        epsg, centres: (n, k) and (n, k, 2) of their tiles.
        side: metres along a tile's side.
        most: number of places.
    """
    weights = (scores - scores[:, -1:]).astype(np.float64) ** 2
    votes = centres - cut.offsets[:, None]
    n, k = weights.shape
    points, zones = votes.reshape(-1, 2), epsg.reshape(-1)
    # A tile of the database lies up to half a tile beside a window: near votes agree.
    near = np.maximum(1 - np.abs(points[:, None] - points) / side, 0).prod(axis=-1)
    near *= zones[:, None] == zones
    support = (near * weights.reshape(-1)).reshape(n * k, n, k)
    ranks, totals = support.argmax(axis=2), support.max(axis=2).sum(axis=1)
    found: list[Place] = []
    while len(found) < most and totals.max(initial=0) > 0:
        best = int(totals.argmax())
        shares = support[best].max(axis=1)
        agreeing = np.flatnonzero(shares > 0)
        at = agreeing, ranks[best, agreeing]
        centre = np.average(votes[at], axis=0, weights=shares[agreeing])
        nearest = int(np.abs(centres[at] - centre).max(axis=1).argmin())
        found.append(
            Place(
                pose=cut.pose,
                epsg=int(zones[best]),
                x=float(centre[0]),
                y=float(centre[1]),
                # Poses with more windows have more votes that agree by chance.
                weight=float(totals[best]) / n**0.5,
                tile=int(positions[at][nearest]),
                score=float(scores[at].mean()),
                agreeing=len(agreeing),
                windows=n,
            )
        )
        totals[_is_near(zones, points, found[-1], side)] = 0
    return found


def best_places(candidates: Iterable[Place], side: float, most: int) -> list[Place]:
    """The places with the most weight, each but once, in whatever pose it has most."""
    kept: list[Place] = []
    for place in sorted(candidates, key=lambda place: -place.weight):
        zones = np.array([each.epsg for each in kept], np.int64)
        points = np.array([(each.x, each.y) for each in kept]).reshape(-1, 2)
        if len(kept) < most and not _is_near(zones, points, place, side).any():
            kept.append(place)
    return kept


def _is_near(epsg: Ints, points: Float64Array, place: Place, side: float) -> NDArray[np.bool_]:
    """Which points (n, 2) are less than two tiles from a place."""
    away = np.abs(points - [place.x, place.y]).max(axis=1, initial=0)
    return (epsg == place.epsg) & (away < 2 * side)

"""Answers to a query."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from geomatch.errors import GeomatchError
from geomatch.querying.targets import Query
from geomatch.querying.votes import Place
from geomatch.records import OPTIONAL, Record

if TYPE_CHECKING:
    from geomatch.querying.placed import Placed


@dataclass(frozen=True)
class Match(Record):
    """One answer. `year`, `lon` and `lat` are None for tiles without.

    Attributes:
        query: id of the query's tile, or path of its image.
        score: cosine similarity, or negative distance; higher is better.
        distance_m: metres between tile centres; None if the query or the tiles have no real place.
        probability: that it shows the query's place, if half of all queries have a match; None
            where that is unknown.
        match: False for an answer to a query that has no match; None where that is unknown.
        turn: degrees by which the query is turned counter-clockwise for this answer, if it was to
            be turned.
        gsd: of a scan, metres per pixel.
        confidence: of a scan, 1 less the votes for the best other place as a share of those for
            this one, at least 0.
        agreeing, windows: of a scan, how many of its windows vote for this place, and of how many.
        confirmed: whether the query lies there by its local features; None where that was not
            looked at.
        inliers: local features that agree with one transform, in which the query lies there.
        query_lon, query_lat: where the query's centre lies by it, if that is confirmed; `turn`
            and `gsd` are then those of the transform.
    """

    query: str
    rank: int
    tile: str
    year: str | None
    score: float
    lon: float | None
    lat: float | None
    distance_m: float | None
    probability: float | None = None
    match: bool | None = None
    turn: float | None = field(default=None, metadata=OPTIONAL)
    gsd: float | None = field(default=None, metadata=OPTIONAL)
    confidence: float | None = field(default=None, metadata=OPTIONAL)
    agreeing: int | None = field(default=None, metadata=OPTIONAL)
    windows: int | None = field(default=None, metadata=OPTIONAL)
    confirmed: bool | None = field(default=None, metadata=OPTIONAL)
    inliers: int | None = field(default=None, metadata=OPTIONAL)
    query_lon: float | None = field(default=None, metadata=OPTIONAL)
    query_lat: float | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class Looked:
    """What was seen of an answer that was looked at: pixels (h, w, c), and points (n, 2) in them.

    Attributes:
        query, around: pixels of the query, and of the ground around the answer.
        at, to: the inliers in these, none where the answer is not confirmed.
    """

    query: NDArray[np.uint8]
    around: NDArray[np.uint8]
    at: NDArray[np.float64]
    to: NDArray[np.float64]


@dataclass(frozen=True)
class Matches:
    """Answers in order of rank.

    Attributes:
        query: what was asked for.
        rows: rows of the answers in the pixel store.
        centres: EPSG code, x and y of the centre of each answer; all None without
            georeference.
        places: of a scan, the place of each answer, whose tile is the one nearest to it.
        looked: of the first answers, if these were looked at.
        placed: of an image that was georeferenced.
    """

    query: Query
    matches: tuple[Match, ...]
    rows: tuple[int, ...]
    centres: tuple[tuple[int | None, float | None, float | None], ...]
    places: tuple[Place, ...] = ()
    looked: tuple[Looked, ...] = field(default=(), compare=False)
    placed: Placed | None = field(default=None, compare=False)

    def as_json(self) -> list[dict[str, Any]]:
        """A list of plain dictionaries."""
        return [match.as_json() for match in self.matches]

    def pairs(self) -> Iterator[tuple[Looked, str, bool]]:
        """The answers that were looked at, each with a caption and whether it is confirmed."""
        for match, looked in zip(self.matches, self.looked, strict=False):
            verdict = "confirmed" if match.confirmed else "not confirmed"
            turn = f", turned by {match.turn:g} degrees" if match.turn and match.confirmed else ""
            text = f"{match.rank}: {match.tile}, {verdict}, {match.inliers} inliers{turn}"
            yield looked, text, bool(match.confirmed)

    def as_line(self) -> dict[str, Any]:
        """A plain dictionary, to stand among those of other queries."""
        return {"query": self.query.name, "matches": self.as_json()}


@dataclass(frozen=True)
class Unanswered:
    """A target without answers, and why."""

    target: str
    error: GeomatchError

    def as_line(self) -> dict[str, Any]:
        """A plain dictionary, to stand among answers."""
        return {"query": self.target, "error": self.error.message, "hint": self.error.hint}

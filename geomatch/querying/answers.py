"""Answers to a query."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from geomatch.errors import GeomatchError
from geomatch.querying.targets import Query
from geomatch.querying.votes import Place
from geomatch.records import OPTIONAL, Record


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


@dataclass(frozen=True)
class Matches:
    """Answers in order of rank.

    Attributes:
        query: what was asked for.
        rows: rows of the answers in the pixel store.
        centres: EPSG code, x and y of the centre of each answer; all None without
            georeference.
        places: of a scan, the place of each answer, whose tile is the one nearest to it.
    """

    query: Query
    matches: tuple[Match, ...]
    rows: tuple[int, ...]
    centres: tuple[tuple[int | None, float | None, float | None], ...]
    places: tuple[Place, ...] = ()

    def as_json(self) -> list[dict[str, Any]]:
        """A list of plain dictionaries."""
        return [match.as_json() for match in self.matches]

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

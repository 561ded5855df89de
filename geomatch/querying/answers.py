"""Answers to a query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from geomatch.errors import GeomatchError
from geomatch.querying.targets import Query
from geomatch.records import Record


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


@dataclass(frozen=True)
class Matches:
    """Answers in order of rank.

    Attributes:
        query: what was asked for.
        rows: rows of the answers in the pixel store.
        centres: EPSG code, x and y of the centre of each answer; all None without
            georeference.
    """

    query: Query
    matches: tuple[Match, ...]
    rows: tuple[int, ...]
    centres: tuple[tuple[int | None, float | None, float | None], ...]

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

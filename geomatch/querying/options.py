"""How a query is to be answered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from geomatch.errors import UsageError


@dataclass(frozen=True)
class Options:
    """The options of `query`.

    Attributes:
        top: number of answers.
        years: the years to search; by default all but the query's own.
        same_year: also search the query's own year (its tile is never an answer).
        from_year: year of the tile to take at a point, and of an image; by default the newest.
        index: name of the index; by default that of the latest embeddings, or the latest index
            where that is newer.
        fpr: share of queries without a match whose first answer may pass as one.
        build: make an index that is missing or stale.
        csv, geojson, gpkg: files to write the answers in; see `outputs`.
        sheet: PNG to draw the queries and their answers in.

    Raises:
        UsageError: a value makes no sense.
    """

    top: int = 5
    years: tuple[str, ...] = ()
    same_year: bool = False
    from_year: str | None = None
    index: str | None = None
    fpr: float = 0.01
    build: bool = True
    csv: Path | None = None
    geojson: Path | None = None
    gpkg: Path | None = None
    sheet: Path | None = None

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UsageError(f"--top {self.top}: must be at least 1")
        if not 0 <= self.fpr <= 1:
            raise UsageError(f"--fpr {self.fpr}: a share between 0 and 1 is expected")

    @property
    def files(self) -> tuple[Path, ...]:
        """The files to write."""
        named = (self.csv, self.geojson, self.gpkg, self.sheet)
        return tuple(path for path in named if path is not None)

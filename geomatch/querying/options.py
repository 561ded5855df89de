"""How a query is to be answered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from geomatch.config import LocalFeatures, Split
from geomatch.errors import UsageError

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Options:
    """The options of `query`.

    Attributes:
        top: number of answers.
        years: the years to search; by default all but the query's own.
        same_year: also search the query's own year (its tile is never an answer).
        split: of the answers; by default any.
        box: west, south, east and north in degrees that hold the centres of the answers; west is
            more than east where it crosses 180.
        within: a vector file whose polygons hold the centres of the answers.
        exclude_radius: metres from the query's centre that an answer is away at least.
        from_year: year of the tile to take at a point, and of an image; by default the newest.
        rotate: degrees between turns in which the query is searched; 90 for quarter turns. The best
            turn counts for each answer.
        scales: metres per pixel of images that are scans of a larger area, of which every one is
            tried; none if images are tiles.
        expand: number of first answers that a query is averaged with and searched again; see
            `feedback.expand`.
        like, unlike: ids of answers that are confirmed and rejected, for one query; see
            `feedback.rocchio`. Rejected ones are no answers any more.
        verify: number of first answers to look at by local features; see `confirming`.
        features: local features by which `verify` and `georeference` look at answers.
        georeference: GeoTIFF to write the image in, for one query that is an image; see `placing`.
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
    split: Split | None = None
    box: Box | None = None
    within: Path | None = None
    exclude_radius: float | None = None
    from_year: str | None = None
    rotate: float | None = None
    scales: tuple[float, ...] = ()
    expand: int = 0
    like: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()
    verify: int = 0
    features: LocalFeatures = "sift"
    georeference: Path | None = None
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
        if self.box:
            west, south, east, north = self.box
            in_range = -180 <= west <= 180 and -180 <= east <= 180
            if not (in_range and -90 <= south <= north <= 90):
                raise UsageError(
                    f"{west:g},{south:g},{east:g},{north:g} is no box in degrees",
                    "Give W,S,E,N: the least longitude and latitude first.",
                )
        if self.exclude_radius is not None and not 0 <= self.exclude_radius < math.inf:
            raise UsageError(f"--exclude-radius {self.exclude_radius:g}: must not be negative")
        if self.scales and self.exclude_radius:
            raise UsageError("--exclude-radius is for tiles, not for scans")
        if self.expand < 0:
            raise UsageError(f"--expand {self.expand}: must not be negative")
        if self.verify < 0:
            raise UsageError(f"--verify {self.verify}: must not be negative")
        if self.features != "sift" and not (self.verify or self.georeference):
            raise UsageError(
                f"--features {self.features} is for --verify N and --georeference OUT.tif"
            )
        if self.georeference and self.georeference.suffix.lower() not in (".tif", ".tiff"):
            raise UsageError(
                f"--georeference {self.georeference}: a GeoTIFF is written", "For example: OUT.tif"
            )
        if self.scales and (self.expand or self.like or self.unlike):
            raise UsageError("--expand, --like and --unlike are for tiles, not for scans")
        for scale in self.scales:
            if not 0 < scale < math.inf:
                raise UsageError(f"{scale:g} m per pixel is no scale", "For example: --gsd 0.5")
        if not 0 <= self.fpr <= 1:
            raise UsageError(f"--fpr {self.fpr}: a share between 0 and 1 is expected")

    @property
    def files(self) -> tuple[Path, ...]:
        """The files to write."""
        named = (self.csv, self.geojson, self.gpkg, self.sheet)
        return tuple(path for path in named if path is not None)

"""Query: find the place of a tile, a point or an image in other years, by an index.

Only an image needs the encoder, which is imported for it alone.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch.data import embeddings
from geomatch.data.index_rows import IndexRows
from geomatch.errors import GeomatchError, UsageError
from geomatch.manifests import IndexManifest, TileManifest
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, latest
from geomatch.search.flat import FlatIndex

POINT = re.compile(r"\s*(-?\d+(?:\.\d*)?)\s*,\s*(-?\d+(?:\.\d*)?)\s*")


@dataclass(frozen=True)
class Match:
    """One answer. `year`, `lon` and `lat` are None for tiles without.

    Attributes:
        query: id of the query's tile, or path of its image.
        score: cosine similarity, or negative distance; higher is better.
        distance_m: metres between tile centres; None if the query or the tiles have no real place.
    """

    query: str
    rank: int
    tile: str
    year: str | None
    score: float
    lon: float | None
    lat: float | None
    distance_m: float | None


@dataclass(frozen=True)
class Matches:
    """Answers in order of rank.

    Attributes:
        query_row: row of the query's tile in the pixel store; None for an image.
        rows: rows of the answers in the pixel store.
        query_pixels: (h, w, c) uint8, the part of an image that was described; None for a tile.
    """

    matches: tuple[Match, ...]
    query_row: int | None
    rows: tuple[int, ...]
    query_pixels: NDArray[np.uint8] | None = field(default=None, compare=False)

    def as_json(self) -> list[dict[str, Any]]:
        """A list of plain dictionaries."""
        return [asdict(match) for match in self.matches]


@dataclass(frozen=True)
class _Index:
    """An open index: its vectors, a row for each vector, and the manifests."""

    vectors: FlatIndex
    rows: IndexRows
    manifest: IndexManifest
    tiles: TileManifest

    @classmethod
    def open(cls, project: Project, name: str | None) -> _Index:
        name = latest(project.index_names(), name, "index", "geomatch index")
        folder = project.indexes / name
        manifest = project.index_manifest(name)
        project.check_fresh(manifest)
        embeddings.check_index(manifest, project.embeddings / f"{name}.parquet")
        vectors = FlatIndex(folder, manifest.counts, manifest.metric)
        return cls(vectors, IndexRows(folder), manifest, project.tile_manifest())

    def year_code(self, year: str) -> int:
        if year not in self.manifest.years:
            available = ", ".join(filter(None, self.manifest.years))
            raise UsageError(
                f"the index has no year {year}",
                f"Available: {available}." if available else "Its images have no years.",
            )
        return self.manifest.years.index(year)


@dataclass(frozen=True)
class _Query:
    """A descriptor (d,), and what is known of its tile or image.

    Attributes:
        name: id of the tile, or path of the image.
        position, store_row: of the tile in the index, and in the pixel store.
        epsg: code of the CRS of its centre (x, y).
        year: code of its year.
        pixels: see `Matches.query_pixels`.
    """

    name: str
    vector: NDArray[np.float32]
    position: int | None = None
    store_row: int | None = None
    epsg: int | None = None
    x: float = 0.0
    y: float = 0.0
    year: int | None = None
    pixels: NDArray[np.uint8] | None = None


def query(
    project: Project,
    target: str,
    *,
    top: int = 5,
    years: tuple[str, ...] = (),
    same_year: bool = False,
    from_year: str | None = None,
    index: str | None = None,
    sheet: Path | None = None,
    progress: ProgressCallback = silent,
) -> Matches:
    """Find the `top` nearest tiles to a tile, a point or an image.

    Args:
        target: a tile id, "LON,LAT", or the path of an image.
        years: the years to search; by default all but the query's own.
        same_year: also search the query's own year (its tile is never an answer).
        from_year: year of the tile to take at a point, and of an image; by default the newest.
        index: name of the index; by default the latest.
        sheet: PNG to draw the query and its answers in.

    Raises:
        GeomatchError: there is no index, it is stale, or the target is not found.
    """
    if top < 1:
        raise UsageError(f"--top {top}: must be at least 1")
    opened = _Index.open(project, index)
    searched = [opened.year_code(year) for year in years]
    from_code = opened.year_code(from_year) if from_year else None
    found = _find(project, opened, target, from_code, progress)
    if not years:
        every_year = same_year or opened.manifest.years == ("",)
        searched = [y for y in range(len(opened.manifest.years)) if every_year or y != found.year]
    scores, positions = opened.vectors.search(found.vector, searched, top + 1)
    keep = positions != found.position if found.position is not None else slice(None)
    result = _matches(opened, found, scores[keep][:top], positions[keep][:top])
    if sheet:
        from geomatch.report.matches import match_sheet

        query_tile = result.query_pixels if result.query_row is None else result.query_row
        assert query_tile is not None
        match_sheet(project, result.as_json(), result.rows, query_tile, target, sheet)
    return result


def _find(
    project: Project, index: _Index, target: str, year: int | None, progress: ProgressCallback
) -> _Query:
    if (position := index.rows.find(target)) is not None:
        return _tile_query(index, position)
    example = index.rows.take([0])[0]["id"]
    if point := POINT.fullmatch(target):
        if not index.tiles.on_ground:
            raise UsageError(
                f"{target} is a point, but the images have no georeference",
                f"Give a tile id, such as {example}, or an image file.",
            )
        return _tile_query(index, _tile_at(index, float(point[1]), float(point[2]), year))
    if Path(target).is_file():
        return _image_query(project, index, target, year, progress)
    raise GeomatchError(
        f"{target} is neither a tile of the index, nor LON,LAT, nor an image file",
        f"Tile ids look like {example}.",
    )


def _tile_query(index: _Index, position: int) -> _Query:
    (row,) = index.rows.take([position])
    return _Query(
        name=row["id"],
        vector=index.vectors.vector(position),
        position=position,
        store_row=row["store_row"],
        epsg=row["epsg"],
        x=row["x"],
        y=row["y"],
        year=index.year_code(row["year"] or ""),
    )


def _tile_at(index: _Index, lon: float, lat: float, year: int | None) -> int:
    """Position of the tile at a point, of the given or else the newest year."""
    from geomatch.geo.coordinates import project_points

    if abs(lon) > 180 or abs(lat) > 90:
        raise UsageError(
            f"{lon},{lat} is not a longitude and latitude",
            "Give LON,LAT in degrees, longitude first.",
        )
    half = index.tiles.size * (index.tiles.gsd or 0.0) / 2

    @cache
    def point(epsg: int) -> tuple[float, float]:
        px, py = project_points("OGC:CRS84", np.array([lon]), np.array([lat]), f"EPSG:{epsg}")
        return float(px[0]), float(py[0])

    best: tuple[int, float, int] | None = None
    covering = index.rows.within(point, half)
    for i, row in zip(covering, index.rows.take(covering), strict=True):
        of_year = index.year_code(row["year"] or "")
        if year in (None, of_year):
            px, py = point(row["epsg"])
            away = max(abs(row["x"] - px), abs(row["y"] - py))
            # The newest year first, then the nearest centre.
            candidate = (of_year, -away, i)
            best = max(best, candidate) if best else candidate
    if best is None:
        of = "" if year is None else f" of {index.manifest.years[year]}"
        raise GeomatchError(
            f"no tile{of} covers {lon},{lat}", "Give LON,LAT in degrees, longitude first."
        )
    return best[2]


def _image_query(
    project: Project, index: _Index, path: str, year: int | None, progress: ProgressCallback
) -> _Query:
    from geomatch import image_input

    encoding = image_input.encoder_of(project, index.manifest, index.tiles, "index")
    label = None if year is None else index.manifest.years[year]
    cut = image_input.cut(path, encoding, index.tiles, label)
    progress(cut.remark)
    if encoding.form.label_channels:
        progress("the query has no labels: its label channels are set to unknown")
    (vector,) = image_input.describe_cuts(encoding, [cut], index.manifest, year)
    return _Query(path, vector, epsg=cut.epsg, x=cut.x, y=cut.y, pixels=cut.pixels)


def _matches(
    index: _Index, query: _Query, scores: NDArray[np.float32], positions: NDArray[np.int64]
) -> Matches:
    answers = index.rows.take(positions.tolist())
    distances: list[float | None] = [None] * len(answers)
    if query.epsg is not None and index.tiles.in_metres:
        from geomatch.geo.footprints import distance

        from_xy = np.broadcast_to([[query.x, query.y]], (len(answers), 2))
        to_xy = np.array([(row["x"], row["y"]) for row in answers]).reshape(-1, 2)
        from_epsg = np.full(len(answers), query.epsg)
        to_epsg = np.array([row["epsg"] for row in answers], np.int64)
        distances = distance(from_epsg, from_xy, to_epsg, to_xy).tolist()
    found = [
        Match(query.name, rank, row["id"], row["year"], score, row["lon"], row["lat"], metres)
        for rank, (score, row, metres) in enumerate(
            zip(scores.tolist(), answers, distances, strict=True), 1
        )
    ]
    return Matches(
        matches=tuple(found),
        query_row=query.store_row,
        rows=tuple(row["store_row"] for row in answers),
        query_pixels=query.pixels,
    )

"""Query: where is this, in another year? The nearest tiles of an index.

A query by tile id or by a point needs the index alone; only an image needs the encoder, which
is imported when one comes.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from geomatch.data import embeddings
from geomatch.errors import GeomatchError, UsageError
from geomatch.manifests import IndexManifest, TileManifest
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, latest
from geomatch.search.flat import FlatIndex

POINT = re.compile(r"\s*(-?\d+(?:\.\d*)?)\s*,\s*(-?\d+(?:\.\d*)?)\s*")


@dataclass(frozen=True)
class Match:
    """One answer.

    Attributes:
        query: id of the tile asked for, or the image's path.
        score: cosine similarity, or the negative distance; higher is better.
        distance_m: between tile centres; None without a place of one's own. `year`, `lon` and
            `lat` are None where tiles have none.
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
    """Answers in order of rank, and the rows of the pixel store of the query and of each.

    Of an image as a query, `cut` is what of it was asked for, (h, w, c) uint8.
    """

    matches: tuple[Match, ...]
    query_row: int | None
    rows: tuple[int, ...]
    cut: NDArray[np.uint8] | None = field(default=None, compare=False)

    def as_json(self) -> list[dict[str, Any]]:
        """A list of plain dictionaries."""
        return [asdict(match) for match in self.matches]


@dataclass(frozen=True)
class _Asked:
    """A query: what it is called, its descriptor, place and year, where they are known."""

    name: str
    vector: NDArray[np.float32]
    position: int | None = None
    epsg: int | None = None
    x: float = 0.0
    y: float = 0.0
    year: int | None = None
    cut: NDArray[np.uint8] | None = None


def query(
    project: Project,
    target: str,
    *,
    top: int = 5,
    years: tuple[str, ...] = (),
    same_year: bool = False,
    from_year: str | None = None,
    index: str | None = None,
    progress: ProgressCallback = silent,
) -> Matches:
    """The `top` nearest tiles to a tile, a point or an image.

    Args:
        target: a tile's id, "LON,LAT", or an image file.
        years: search these only.
        same_year: search the query's own year too (the tile itself is never an answer).
        from_year: whose tile to take at a point; by default the newest.
        index: its name; by default the latest.

    Raises:
        GeomatchError: there is no index, it is stale, or the target is not to be found.
    """
    if top < 1:
        raise UsageError(f"--top {top}: at least 1 is expected")
    name = latest(project.index_names(), index, "index", "geomatch index")
    folder = project.indexes / name
    made = project.index_manifest(name)
    project.check_fresh(made)
    embeddings.check_index(made, project.embeddings / f"{name}.parquet")
    tiles = project.tile_manifest()
    known = _year_codes((*years, *([from_year] if from_year else [])), made.years)
    found = FlatIndex(folder, made.counts, made.metric)
    rows = pq.read_table(folder / "tiles.parquet", memory_map=True)
    asked = _resolve(project, target, made, tiles, rows, found, from_year, progress)
    if years:
        searched = known[: len(years)]
    else:
        everything = same_year or made.years == ("",)
        searched = [y for y in range(len(made.years)) if everything or y != asked.year]
    scores, positions = found.search(asked.vector, searched, top + 1)
    keep = positions != asked.position if asked.position is not None else slice(None)
    return _matches(asked, scores[keep][:top], positions[keep][:top], rows, tiles.in_metres)


def _year_codes(wanted: tuple[str, ...], years: tuple[str, ...]) -> list[int]:
    if unknown := [year for year in wanted if year not in years]:
        has = ", ".join(year for year in years if year) or "images without years"
        raise UsageError(f"the index has no year {', '.join(unknown)}", f"It has: {has}.")
    return [years.index(year) for year in wanted]


def _resolve(
    project: Project,
    target: str,
    made: IndexManifest,
    tiles: TileManifest,
    rows: Any,
    found: FlatIndex,
    from_year: str | None,
    progress: ProgressCallback,
) -> _Asked:
    hits = np.flatnonzero(_column(rows, "id") == target)
    if len(hits):
        position = int(hits[0])
    elif point := POINT.fullmatch(target):
        if not tiles.on_ground:
            raise UsageError(
                f"{target} is a point, and the images have no place on the ground",
                f"Give a tile id, such as {rows['id'][0].as_py()}, or an image file.",
            )
        position = _over(rows, float(point[1]), float(point[2]), made.years, tiles, from_year)
    elif Path(target).is_file():
        year = None if from_year is None else made.years.index(from_year)
        return _image(project, target, made, tiles, year, progress)
    else:
        raise GeomatchError(
            f"{target} is neither a tile of the index, nor LON,LAT, nor an image file",
            f"Tile ids look like {rows['id'][0].as_py()}.",
        )
    row = {key: rows[key][position].as_py() for key in ("id", "year", "epsg", "x", "y")}
    return _Asked(
        row["id"],
        found.vector(position),
        position,
        row["epsg"],
        row["x"],
        row["y"],
        made.years.index(row["year"] or ""),
    )


def _column(rows: Any, name: str) -> NDArray[Any]:
    values: NDArray[Any] = rows[name].to_numpy()
    return values


def _over(
    rows: Any,
    lon: float,
    lat: float,
    order: tuple[str, ...],
    tiles: TileManifest,
    from_year: str | None,
) -> int:
    """Position of the tile over a point, of the year asked for or the newest there."""
    from geomatch.geo.rasters import project_points

    if abs(lon) > 180 or abs(lat) > 90:
        raise UsageError(f"{lon},{lat} is no point", "Give LON,LAT in degrees, longitude first.")
    half = tiles.size * (tiles.gsd or 0.0) / 2
    epsg, x, y = (_column(rows, name) for name in ("epsg", "x", "y"))
    years = _column(rows, "year")
    best: tuple[int, float, int] | None = None
    for code in np.unique(epsg):
        px, py = project_points("OGC:CRS84", np.array([lon]), np.array([lat]), f"EPSG:{code}")
        away = np.maximum(np.abs(x - px[0]), np.abs(y - py[0]))
        for i in np.flatnonzero((epsg == code) & (away <= half)):
            if from_year in (None, years[i]):
                # The newest year first, then the tile whose centre is nearest.
                ranked = (order.index(years[i]), -float(away[i]), int(i))
                best = max(best, ranked) if best else ranked
    if best is None:
        of = f" of {from_year}" if from_year else ""
        raise GeomatchError(
            f"no tile{of} lies over {lon},{lat}",
            "The point is LON,LAT in degrees; geomatch info shows what is covered.",
        )
    return best[2]


def _image(
    project: Project,
    path: str,
    made: IndexManifest,
    tiles: TileManifest,
    year: int | None,
    progress: ProgressCallback,
) -> _Asked:
    from geomatch import image_input

    encoding = image_input.encoder_of(project, made, tiles, "the index is", "index")
    cut = image_input.cut(path, encoding, tiles)
    progress(cut.remark)
    if encoding.form.label_channels:
        progress("the query has no labels: they are left unknown")
    (vector,) = image_input.describe_cuts(encoding, [cut], made, year)
    return _Asked(path, vector, None, cut.epsg, cut.x, cut.y, cut=cut.pixels)


def _matches(
    asked: _Asked,
    scores: NDArray[np.float32],
    positions: NDArray[np.int64],
    rows: Any,
    placed: bool,
) -> Matches:
    taken = rows.take(positions)
    metres: list[float | None] = [None] * len(taken)
    if asked.epsg is not None and placed:
        from geomatch.geo.footprints import distance

        here = np.broadcast_to([[asked.x, asked.y]], (len(taken), 2))
        there = np.stack([_column(taken, "x"), _column(taken, "y")], axis=1)
        zones = np.full(len(taken), asked.epsg)
        metres = distance(zones, here, _column(taken, "epsg"), there).tolist()
    found = [
        Match(asked.name, rank, row["id"], row["year"], score, row["lon"], row["lat"], away)
        for rank, (score, row, away) in enumerate(
            zip(scores.tolist(), taken.to_pylist(), metres, strict=True), 1
        )
    ]
    own = rows["store_row"][asked.position].as_py() if asked.position is not None else None
    return Matches(tuple(found), own, tuple(taken["store_row"].to_pylist()), asked.cut)

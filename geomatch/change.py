"""Change: rank places by how far their descriptors moved between two years."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomatch.data.embeddings import DescriptorFile
from geomatch.data.ground_truth import by_place
from geomatch.data.tiles import TileTable
from geomatch.errors import GeomatchError, UsageError
from geomatch.geo import footprints
from geomatch.geo.grid import CRS84
from geomatch.geo.layers import Layer, write
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, write_csv
from geomatch.records import Record

SAMPLE = 20_000
"""Places at most, drawn at random, that tell how places usually move."""
STEPS = 3
"""Rounds in which the half of them that moved least is found; it settles after two on levir."""
BLOCK = 16_384
"""Places in memory at a time."""
METRES_PER_DEGREE = 111_320.0
"""Along a meridian."""

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ChangedPlace(Record):
    """One place. `lon` and `lat`, of its centre, are None without georeference.

    Attributes:
        score: see `Changes.score`.
        before, after: ids of its tiles.
    """

    rank: int
    score: float
    before: str
    after: str
    lon: float | None
    lat: float | None


@dataclass(frozen=True)
class Changes:
    """The places that both years show, as parallel arrays of length n, the most changed first.

    Attributes:
        tiles: all tiles.
        before, after: (n,) rows of `tiles`, of either year.
        score: (n,) how far the descriptor moved beyond what is usual, relative to the place in the
            middle of the ranking.
    """

    tiles: TileTable
    before: Ints
    after: Ints
    score: Float64Array

    def __len__(self) -> int:
        return len(self.score)

    def places(self, start: int = 0, stop: int | None = None) -> list[ChangedPlace]:
        """The places from one position in the ranking to another."""
        part = slice(start, stop)
        before, after = (self.tiles.select(rows[part]) for rows in (self.before, self.after))
        degrees: list[list[float | None]] = [[None, None]] * len(before)
        if before.grid is not None:
            degrees = footprints.lonlat(before.epsg, before.centres()).tolist()
        columns = self.score[part].tolist(), before.ids(), after.ids(), degrees
        return [
            ChangedPlace(rank, score, a, b, lon, lat)
            for rank, (score, a, b, (lon, lat)) in enumerate(zip(*columns, strict=True), start + 1)
        ]


def change(
    project: Project,
    before: str,
    after: str,
    *,
    run: str | None = None,
    top: int = 10,
    gpkg: Path | None = None,
    csv: Path | None = None,
    picture: Path | None = None,
    progress: ProgressCallback = silent,
) -> Changes:
    """Rank places by how far their descriptors moved beyond what light and season move.

    The difference of a place's descriptors is standardised by the mean and the spread of the
    differences of places that did not change, and its length is the score: change vector analysis
    (Malila 1980) of descriptors, with the reference of multivariate alteration detection (Nielsen
    2007): places that did not change, found from the differences themselves.

    Args:
        before, after: labels of two years.
        run: name of the embeddings ("RUN@STEP"); by default the latest.
        top: how many places the picture shows.
        gpkg, csv: files for all places in order of rank; GeoPackage with their footprints.
        picture: PNG for a map of the scores and the two years of the first places.

    Raises:
        UsageError: there is no such year, or GeoPackage is asked for tiles without georeference.
        GeomatchError: there are no embeddings, they are stale, or no place is seen in both years.
    """
    if top < 1:
        raise UsageError(f"--top {top}: must be at least 1")
    manifest = project.tile_manifest()
    if gpkg and not manifest.on_ground:
        raise UsageError(
            "--gpkg needs footprints, but the images have no georeference",
            "Write --csv FILE instead.",
        )
    descriptors = DescriptorFile(project.embeddings / f"{project.embeddings_of(run)}.parquet")
    project.check_fresh(descriptors.manifest)
    tiles = TileTable.load(project.catalogue)
    pairs = _pairs(tiles, before, after)
    mean, spread = _usual(_moved(descriptors, *_sample(pairs)))
    scores, count = [np.empty(0)], len(pairs[0])
    for start in range(0, count, BLOCK):
        progress("comparing places", start, count)
        part = slice(start, start + BLOCK)
        scores.append(_distance(_moved(descriptors, *(rows[part] for rows in pairs)), mean, spread))
    progress("comparing places", count, count)
    score = np.concatenate(scores)
    score /= np.median(score) or 1.0
    order = np.argsort(-score, kind="stable")
    found = Changes(tiles, pairs[0][order], pairs[1][order], score[order])
    if gpkg:
        _write_gpkg(gpkg, found)
    if csv:
        _write_csv(csv, found)
    if picture:
        from geomatch.report.change_map import draw

        shown = found.places(0, top)
        captions = [
            (f"{place.rank}: {place.score:.2f}", place.before.partition("@")[0]) for place in shown
        ]
        rows = np.stack([found.before, found.after], axis=1)
        draw(project, rows, found.score, _centres(found), captions, (before, after), picture)
    return found


def _pairs(tiles: TileTable, before: str, after: str) -> tuple[Ints, Ints]:
    """Rows of the tiles of both years of each place that has both, in the order of the catalogue.

    Raises:
        UsageError: there are no two such years.
        GeomatchError: no place has both.
    """
    if not tiles.dated:
        raise UsageError("the images have no years", "Tile pairs: geomatch tile --pairs A B")
    tiles.check_years((before, after))
    if before == after:
        raise UsageError(f"{before} and {after} are one year", "Name two.")
    rows = by_place(tiles)[:, [tiles.years.index(before), tiles.years.index(after)]]
    rows = rows[(rows >= 0).all(axis=1)]
    if not len(rows):
        raise GeomatchError(
            f"no place has tiles of both {before} and {after}", "See the years: geomatch info"
        )
    rows = rows[np.argsort(rows[:, 0])]
    return rows[:, 0], rows[:, 1]


def _sample(pairs: tuple[Ints, Ints]) -> tuple[Ints, Ints]:
    """At most `SAMPLE` pairs, drawn with a fixed seed."""
    count = len(pairs[0])
    drawn = np.sort(np.random.default_rng(0).permutation(count)[:SAMPLE])
    return pairs[0][drawn], pairs[1][drawn]


def _moved(descriptors: DescriptorFile, before: Ints, after: Ints) -> Float32Array:
    """(n, d) differences of the descriptors of some places."""
    return descriptors[after] - descriptors[before]


def _usual(moved: Float32Array) -> tuple[Float64Array, Float64Array]:
    """Mean and spread (d,) of the differences (n, d) of places that did not change.

    They are taken to be the half that moved least, which is found by the concentration steps of
    Rousseeuw and Van Driessen 1999, "A Fast Algorithm for the Minimum Covariance Determinant
    Estimator", for a diagonal covariance: a full one gains nothing (`tests/benchmarks/change.py`)
    and needs more places than a descriptor has values.
    """
    mean, spread = np.median(moved, axis=0).astype(np.float64), np.ones(moved.shape[1])
    for _ in range(STEPS):
        distance = _distance(moved, mean, spread)
        calm = moved[distance <= np.median(distance)].astype(np.float64)
        mean, spread = calm.mean(axis=0), calm.std(axis=0)
        # A value that never moves must not outweigh all others once it does.
        spread = np.maximum(spread, 1e-3 * spread.max()) if spread.any() else np.ones_like(spread)
    return mean, spread


def _distance(moved: Float32Array, mean: Float64Array, spread: Float64Array) -> Float64Array:
    """Lengths (n,) of standardised differences."""
    lengths: Float64Array = np.linalg.norm((moved - mean) / spread, axis=1)
    return lengths


def _centres(found: Changes) -> tuple[Float64Array, float] | None:
    """Centres (n, 2) of places in the CRS of the grid, and a tile's step there.

    In longitude and latitude for a "utm" grid; None without georeference.
    """
    grid = found.tiles.grid
    if grid is None:
        return None
    tiles, crs = found.tiles.select(found.before), footprints.file_crs(grid)
    unit = METRES_PER_DEGREE if crs == CRS84 else 1.0
    return footprints.in_crs(tiles.epsg, tiles.centres(), crs), grid.step / unit


def _blocks(found: Changes) -> Iterator[tuple[slice, list[ChangedPlace]]]:
    for start in range(0, len(found), BLOCK):
        yield slice(start, start + BLOCK), found.places(start, start + BLOCK)


def _write_gpkg(path: Path, found: Changes) -> None:
    """Write footprints in the CRS of the grid; of a "utm" grid, in longitude and latitude."""
    grid = found.tiles.grid
    assert grid is not None
    crs = footprints.file_crs(grid)

    def layers() -> Iterator[Layer]:
        for part, places in _blocks(found):
            tiles = found.tiles.select(found.before[part])
            rows = [place.as_json() for place in places]
            columns = {name: [row[name] for row in rows] for name in rows[0]}
            yield Layer("places", footprints.rings(tiles.epsg, tiles.bounds(), crs), columns)

    write(path, layers(), "GPKG", crs)


def _write_csv(path: Path, found: Changes) -> None:
    rows = (place.as_json() for _, places in _blocks(found) for place in places)
    write_csv(path, list(ChangedPlace.__dataclass_fields__), rows)

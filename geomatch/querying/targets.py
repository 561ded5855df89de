"""What is asked for: a tile, a point or an image.

Only an image needs the encoder, which is loaded for the first of them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from geomatch.data.filters import Filter
from geomatch.errors import GeomatchError, UsageError
from geomatch.progress import ProgressCallback
from geomatch.querying.opened import OpenIndex

if TYPE_CHECKING:
    from geomatch.image_input import Cut

NUMBER = r"\s*(-?\d+(?:\.\d*)?)\s*"
POINT = re.compile(f"{NUMBER},{NUMBER}")
BOX = re.compile(f"{NUMBER},{NUMBER},{NUMBER},{NUMBER}")


def is_several(target: str) -> bool:
    """Whether a target stands for any number of others: a box, a folder or a glob."""
    is_glob = bool(re.search(r"[*?[]", target)) and not os.path.isfile(target)
    return bool(BOX.fullmatch(target)) or os.path.isdir(target) or is_glob


@dataclass(frozen=True)
class Query:
    """A tile or an image that is searched for.

    Attributes:
        name: id of the tile, or path of the image.
        position, store_row: of the tile in the index, and in the pixel store; None for an image.
        epsg: code of the CRS of its centre (x, y); None without a place.
        year: label of its year; None for an image, or without years.
        pixels: (size, size, c) uint8, the part of an image that is described; None for a tile.
        around: (h, w, c) uint8, the same with more of the image on all sides.
        is_scan: whether `pixels` are all of a scan (h, w, c), which is not described as a whole.
    """

    name: str
    position: int | None = None
    store_row: int | None = None
    epsg: int | None = None
    x: float = 0.0
    y: float = 0.0
    year: str | None = None
    pixels: NDArray[np.uint8] | None = field(default=None, compare=False)
    around: NDArray[np.uint8] | None = field(default=None, compare=False)
    is_scan: bool = False

    @classmethod
    def of_tile(cls, index: OpenIndex, position: int) -> Self:
        """A tile of an index."""
        (row,) = index.rows.take([position])
        return cls(
            name=row["id"],
            position=position,
            store_row=row["store_row"],
            epsg=row["epsg"],
            x=row["x"],
            y=row["y"],
            year=row["year"],
        )

    @classmethod
    def of_image(cls, name: str, cut: Cut) -> Self:
        """A tile that was cut from an image."""
        return cls(name, epsg=cut.epsg, x=cut.x, y=cut.y, pixels=cut.pixels, around=cut.around)

    @property
    def picture(self) -> int | NDArray[np.uint8]:
        """Its row in the pixel store, or its pixels."""
        shown = self.store_row if self.pixels is None else self.pixels
        assert shown is not None
        return shown


class Targets:
    """Finds what is asked for in an index, or reads it from a file.

    Args:
        year: code of the year of the tile at a point, and of an image; None for the newest.
        angles: degrees by which queries are turned, 0 first.
        scans: whether images are scans.
    """

    def __init__(
        self,
        index: OpenIndex,
        year: int | None,
        angles: Sequence[float],
        scans: bool,
        progress: ProgressCallback,
    ) -> None:
        self._index, self._year, self._angles, self._scans = index, year, angles, scans
        self._progress = progress

    def each(self, target: str) -> Iterable[str]:
        """The targets that a target stands for: itself, or those of a box, a folder or a glob.

        Raises:
            GeomatchError: there are none.
        """
        if not is_several(target) or self._index.rows.find(target) is not None:
            return [target]
        if box := BOX.fullmatch(target):
            self._index.check_ground(f"{target} is a box", "Give tile ids or image files.")
            return self._tiles_in(*map(float, box.groups()))
        if os.path.isdir(target):
            from geomatch.tiling.image_files import list_images

            paths = [str(path) for path in list_images(Path(target))]
        else:
            paths = sorted(glob(target, recursive=True))
        if not paths:
            raise GeomatchError(f"{target} has no image files", "Give another folder or glob.")
        return paths

    def _tiles_in(self, west: float, south: float, east: float, north: float) -> list[str]:
        """Ids of the tiles in a box, of the given or else the newest year of each place."""
        index, box = self._index, f"{west:g},{south:g},{east:g},{north:g}"
        _check_degrees(west, south)
        _check_degrees(east, north)
        newest: dict[tuple[int, float, float], tuple[int, str]] = {}
        for row in index.rows.take(index.rows.passing(Filter(box=(west, south, east, north)))):
            code, place = index.year_code(row["year"] or ""), (row["epsg"], row["x"], row["y"])
            if self._year in (None, code):
                newest[place] = max(newest.get(place, (code, row["id"])), (code, row["id"]))
        if not newest:
            raise GeomatchError(
                f"no tile{_of_year(index, self._year)} has its centre in {box}",
                "Give W,S,E,N in degrees; for the tile over a point, LON,LAT.",
            )
        return [name for _, name in newest.values()]

    def find(self, target: str) -> Query:
        """What a target names.

        Args:
            target: a tile id, "LON,LAT" or the path of an image.

        Raises:
            GeomatchError: it names nothing, or the image cannot be read.
        """
        index = self._index
        if (position := index.rows.find(target)) is not None:
            return Query.of_tile(index, position)
        example = index.rows.take([0])[0]["id"]
        if point := POINT.fullmatch(target):
            index.check_ground(
                f"{target} is a point", f"Give a tile id, such as {example}, or an image file."
            )
            at = position_at(index, float(point[1]), float(point[2]), self._year)
            return Query.of_tile(index, at)
        if os.path.isfile(target):
            return self._image(target)
        raise GeomatchError(
            f"{target} is neither a tile of the index, nor LON,LAT, nor an image file",
            f"Tile ids look like {example}.",
        )

    def _image(self, path: str) -> Query:
        from geomatch import image_input

        label = None if self._year is None else self._index.manifest.years[self._year]
        if self._scans:
            pixels, remark = image_input.read_scan(path, self._index.tiles, label)
            self._progress(remark)
            return Query(path, pixels=pixels, is_scan=True)
        cut = image_input.cut(path, self._index.tiles, label, reach_of(self._angles))
        for remark in remarks(self._index, cut):
            self._progress(remark)
        return Query.of_image(path, cut)

    def vectors(self, queries: Sequence[Query]) -> Iterator[NDArray[np.float32]]:
        """Descriptors (turns, d) of each query that is no scan; all turns of all are one batch.

        A tile that is not turned has the descriptor that it has in the index.
        """
        queries = [query for query in queries if not query.is_scan]
        tiles, years = [], []
        for query in queries:
            views = self._views(query)
            tiles += views
            years += [self._year_of(query)] * len(views)
        described = self.describe(np.stack(tiles), years) if tiles else None
        start = 0
        for query in queries:
            stored = [] if query.position is None else [self._index.vectors.vector(query.position)]
            stop = start + len(self._angles) - len(stored)
            fresh = [] if described is None else [*described[start:stop]]
            yield np.stack([*stored, *fresh])
            start = stop

    def describe(
        self, tiles: NDArray[np.uint8], years: Sequence[int | None] | None = None
    ) -> NDArray[np.float32]:
        """Descriptors (n, d) of tiles (n, size, size, c), to be searched in the index.

        Args:
            years: codes of their years; by default that of images.
        """
        from geomatch import image_input

        years = [self._year] * len(tiles) if years is None else years
        index = self._index
        vectors = image_input.describe_pixels(index.encoding, tiles, index.manifest, years)
        return vectors if index.whitening is None else index.whitening(vectors)

    def _views(self, query: Query) -> list[NDArray[np.uint8]]:
        """What of a query is to be described: its turns; a tile needs no first one."""
        if query.position is not None and len(self._angles) == 1:
            return []
        from geomatch.querying.turns import turned

        tiles = self._index.tiles
        if query.pixels is not None and query.around is not None:
            upright, around = [query.pixels], query.around
        else:
            upright, around = [], self._index.pixels.read(np.array([query.store_row]))[0]
        size, channels = tiles.size, tiles.channels.image
        return upright + [turned(around, angle, size, channels) for angle in self._angles[1:]]

    def _year_of(self, query: Query) -> int | None:
        return self._year if query.position is None else self._index.year_code(query.year or "")


def position_at(index: OpenIndex, lon: float, lat: float, year: int | None) -> int:
    """Position of the tile at a point.

    Args:
        year: code of its year; None for the newest.

    Raises:
        UsageError: the point is not on the Earth.
        GeomatchError: no tile covers it.
    """
    from geomatch.geo.coordinates import project_points

    _check_degrees(lon, lat)
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
        raise GeomatchError(
            f"no tile{_of_year(index, year)} covers {lon},{lat}",
            "Give LON,LAT in degrees, longitude first.",
        )
    return best[2]


def remarks(index: OpenIndex, cut: Cut) -> Iterator[str]:
    """How a query was made of an image."""
    yield cut.remark
    if index.tiles.channels.label:
        yield "the query has no labels: its label channels are set to unknown"


def reach_of(angles: Sequence[float]) -> float:
    """How much larger than a tile an image is to be cut, to be turned by these angles."""
    return 1.0 if len(angles) == 1 else math.sqrt(2)


def _of_year(index: OpenIndex, year: int | None) -> str:
    return "" if year is None else f" of {index.manifest.years[year]}"


def _check_degrees(lon: float, lat: float) -> None:
    if abs(lon) > 180 or abs(lat) > 90:
        raise UsageError(
            f"{lon},{lat} is not a longitude and latitude",
            "Give LON,LAT in degrees, longitude first.",
        )

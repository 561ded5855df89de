"""What is answered: queries, tiles and their pictures, from an open index.

All of it runs on the queue's thread.
"""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch import __version__
from geomatch.data.filters import Filter
from geomatch.data.tiles import find_ids
from geomatch.errors import GeomatchError, UsageError
from geomatch.geo import footprints
from geomatch.geo.grid import CRS84
from geomatch.image_input import Cut
from geomatch.query import answers
from geomatch.querying import outputs, turns
from geomatch.querying.answers import Matches, Unanswered
from geomatch.querying.opened import OpenIndex
from geomatch.querying.options import Options
from geomatch.querying.targets import Query, position_at, remarks
from geomatch.report.contact_sheet import picture
from geomatch.serving.parameters import box_of

LISTED = 500
"""Tiles that are listed, by default."""
SIDE = 256
"""Pixels along the picture of an image that was asked for."""
QUALITY = 88
"""Of JPEG thumbnails, in percent."""
POSES = 64
"""Turns and scales of a scan that are tried, at most: others wait meanwhile."""
NEAR = 0.01
"""Tiles whose centres are so near, as a share of their side, are of one place."""


class UnknownTileError(GeomatchError):
    """There is no such tile."""


class Service:
    """Answers about the tiles of an index."""

    def __init__(self, index: OpenIndex) -> None:
        self._index = index

    def about(self) -> dict[str, Any]:
        """What the project has."""
        index, tiles = self._index, self._index.tiles
        return {
            "name": index.project.root.resolve().name,
            "version": __version__,
            "index": index.manifest.name,
            "tiles": sum(index.manifest.counts),
            "years": [year for year in index.manifest.years if year],
            "splits": tiles.splits,
            "size": tiles.size,
            "gsd": tiles.gsd,
            "placement": tiles.placement,
            "bbox": index.rows.extent() if tiles.in_metres else None,
        }

    def remarks(self, cut: Cut) -> list[str]:
        """How a query was made of an image; any thread may ask."""
        return [*remarks(self._index, cut)]

    def ask(
        self,
        values: Mapping[str, Any],
        options: Options,
        image: tuple[Query, Sequence[str]] | None,
    ) -> tuple[Matches, list[str]]:
        """Answers, and remarks on how they were found.

        Args:
            values: of `parameters.TARGET`, unless there is an image.
            image: what was made of it, and remarks on how.

        Raises:
            GeomatchError: there are none.
        """
        poses = len(options.scales) * len(turns.angles(options.rotate))
        if poses > POSES:
            raise UsageError(f"{poses} turns and scales are too many", f"At most {POSES}.")
        if options.scales and options.verify:
            raise UsageError("verify is not for scans", "Run: geomatch query IMAGE --gsd --verify")
        if image is None:
            position = self._position(values, options.from_year)
            image = Query.of_tile(self._index, position), ()
        query, said = image[0], [*image[1]]

        def note(task: str, done: int = 0, total: int = 0, *_: Any, **__: Any) -> None:
            if not total:
                said.append(task)

        (found,) = answers(self._index, [query], options, note)
        if isinstance(found, Unanswered):
            raise found.error
        return found, said

    def _position(self, values: Mapping[str, Any], year: str | None) -> int:
        """The position of the tile that is asked for."""
        index = self._index
        if ("tile" in values) == ("lon" in values) or ("lon" in values) != ("lat" in values):
            raise UsageError("what is asked for?", "Give tile, or lon and lat, or post an image.")
        if "tile" in values:
            return self._find(values["tile"])
        index.check_ground("a point needs tiles with a place", "Give a tile.")
        code = index.year_code(year) if year else None
        return position_at(index, values["lon"], values["lat"], code)

    def _find(self, name: str) -> int:
        position = self._index.rows.find(name)
        if position is None:
            raise UnknownTileError(f"there is no tile {name}", "GET /tiles lists tiles.")
        return position

    def as_json(self, found: Matches, said: Sequence[str]) -> dict[str, Any]:
        """Answers as they are sent: those of `query --json`, with footprints."""
        query = found.query
        matches = found.as_json()
        if self._index.tiles.in_metres:
            rings = _rounded(outputs.outlines([found], self._half, CRS84))
            matches = [m | {"footprint": r} for m, r in zip(matches, rings, strict=True)]
        placed = query.epsg is not None and self._index.tiles.in_metres
        seen = {}
        if query.pixels is not None:
            data = base64.b64encode(self._jpeg(_middle(query.pixels), SIDE)).decode()
            seen = {"picture": f"data:image/jpeg;base64,{data}"}
        return seen | {
            "query": query.name,
            "tile": None if query.position is None else query.name,
            "year": query.year,
            "footprint": self._rings([(query.epsg, query.x, query.y)])[0] if placed else None,
            "matches": matches,
            "remarks": list(said),
        }

    def as_file(self, found: Matches, form: str) -> bytes:
        """Answers as a file: gpkg, geojson or csv."""
        if form != "csv":
            self._index.check_ground(f"{form} needs footprints", "Ask for format=csv.")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"answers.{form}")
            if form == "csv":
                outputs.write_csv(path, [found])
            else:
                write = {"gpkg": outputs.write_gpkg, "geojson": outputs.write_geojson}[form]
                write(path, [found], self._index.tiles)
            return path.read_bytes()

    def tiles(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Some tiles of a box, or with a text in their id, and how many there are.

        Of too many, every so many is taken.
        """
        index, most = self._index, values.get("limit", LISTED)
        year = values.get("year") or index.manifest.years[-1]
        code = index.year_code(year)
        if "search" in values:
            if "bbox" in values:
                raise UsageError("search and bbox cannot be combined")
            names = find_ids(index.project.catalogue, values["search"], year or None, most + 1)
            positions = [p for name in names if (p := index.rows.find(name)) is not None]
            return {"total": None, "tiles": self._listed(positions[:most])}
        box = box_of(values["bbox"]) if "bbox" in values else None
        if box:
            index.check_ground("bbox needs tiles with a place", "Ask without bbox.")
        positions = index.rows.passing(Filter(years=(code,), box=Options(box=box).box))
        step = max(1, -(-len(positions) // most))
        return {"total": len(positions), "tiles": self._listed(positions[::step])}

    def _listed(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        rows = self._index.rows.take(positions)
        listed = [{key: row[key] for key in ("id", "year", "lon", "lat")} for row in rows]
        if not self._index.tiles.in_metres:
            return listed
        rings = self._rings([(row["epsg"], row["x"], row["y"]) for row in rows])
        return [each | {"footprint": ring} for each, ring in zip(listed, rings, strict=True)]

    def tile(self, name: str) -> dict[str, Any]:
        """A tile, and the ids of those of the same place in other years."""
        index = self._index
        position = self._find(name)
        (row,) = index.rows.take([position])
        (listed,) = self._listed([position])
        others: list[str] = []
        if index.tiles.on_ground:
            reach = NEAR * index.tiles.size * (index.tiles.gsd or 0.0)

            def at(epsg: int) -> tuple[float, float]:
                return (row["x"], row["y"]) if epsg == row["epsg"] else (np.inf, np.inf)

            near = [each for each in index.rows.within(at, reach) if each != position]
            others = [each["id"] for each in index.rows.take(near)]
        split = ("train", "validation", "test")[row["split"]]
        return listed | {"split": split, "others": others}

    def thumbnail(self, name: str, side: int) -> bytes:
        """A JPEG of a tile."""
        (row,) = self._index.rows.take([self._find(name)])
        pixels = self._index.pixels.read(np.array([row["store_row"]]))[0]
        return self._jpeg(pixels, side)

    def _jpeg(self, pixels: NDArray[np.uint8], side: int) -> bytes:
        target = io.BytesIO()
        shown = picture(pixels[..., : self._index.tiles.channels.image], side)
        shown.save(target, format="JPEG", quality=QUALITY)
        return target.getvalue()

    def _rings(self, centres: Sequence[tuple[Any, Any, Any]]) -> list[Any]:
        """Footprints as closed rings of longitude and latitude."""
        half = self._half
        epsg = np.array([code for code, _, _ in centres], np.int64)
        at = np.array([(x, y) for _, x, y in centres], np.float64).reshape(-1, 2)
        rings = footprints.rings(epsg, np.concatenate([at - half, at + half], axis=1), CRS84)
        return _rounded(rings)

    @property
    def _half(self) -> float:
        """Metres along half of a tile's side."""
        return self._index.tiles.size * (self._index.tiles.gsd or 0.0) / 2


def _rounded(rings: NDArray[np.float64]) -> list[Any]:
    """Rings (n, 5, 2) of degrees, to a centimetre."""
    found: list[Any] = np.round(footprints.unbroken(rings), 7).tolist()
    return found


def _middle(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The centre square of an image (h, w, c)."""
    side = min(pixels.shape[:2])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]

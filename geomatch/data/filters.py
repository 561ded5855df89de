"""Which tiles of an index may answer a query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from geomatch.geo.grid import great_circle

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Place:
    """A point (x, y) in the CRS of an EPSG code, and its degrees."""

    epsg: int
    x: float
    y: float
    lon: float
    lat: float


@dataclass(frozen=True)
class Filter:
    """What an answer has to be; None leaves it open. A tile is where its centre is.

    Attributes:
        years: their codes.
        split: its code.
        box: west, south, east and north in degrees; west is greater where it crosses 180.
        area: polygons in degrees (OGC:CRS84).
        away: a place, and how many metres from it an answer is at least.
        without: positions of tiles that are no answers, such as the query's own.
    """

    years: tuple[int, ...] | None = None
    split: int | None = None
    box: Box | None = None
    area: shapely.Geometry | None = None
    away: tuple[Place, float] | None = None
    without: tuple[int, ...] = ()

    @property
    def columns(self) -> list[str]:
        """The columns of the tiles' rows that `passing` needs."""
        names = ["split"] if self.split is not None else []
        if self.box or self.area is not None or self.away:
            names += ["lon", "lat"]
        return names + (["epsg", "x", "y"] if self.away else [])

    def passing(self, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
        """Which rows (n,) pass by their `columns`; years and `without` are not looked at."""
        passed = np.ones(len(next(iter(columns.values()))), np.bool_)
        if self.split is not None:
            passed &= columns["split"] == self.split
        if self.box:
            passed &= in_box(self.box, columns["lon"], columns["lat"])
        if self.area is not None:
            shapely.prepare(self.area)
            passed[passed] = shapely.contains_xy(
                self.area, columns["lon"][passed], columns["lat"][passed]
            )
        if self.away:
            place, metres = self.away
            far = np.hypot(columns["x"] - place.x, columns["y"] - place.y) >= metres
            other = columns["epsg"] != place.epsg
            if other.any():
                here = np.array([[place.lon, place.lat]])
                there = np.stack([columns["lon"][other], columns["lat"][other]], axis=1)
                far[other] = great_circle(here, there) >= metres
            passed &= far
        return passed

    def may_pass(self, bounds: Mapping[str, tuple[Any, Any]]) -> bool:
        """Whether a row may pass, of which only the least and largest values are known.

        Args:
            bounds: of the columns; None where unknown.
        """
        west, east = bounds.get("lon", (None, None))
        south, north = bounds.get("lat", (None, None))
        boxes = [self.box] if self.box else []
        boxes += [tuple(shapely.bounds(self.area))] if self.area is not None else []
        if None in (west, east, south, north):
            return True
        return all(
            box[1] <= north
            and south <= box[3]
            and (box[0] > box[2] or (box[0] <= east and west <= box[2]))
            for box in boxes
        )

    def is_far(self, bounds: Mapping[str, tuple[Any, Any]]) -> bool:
        """Whether nothing but a distance is asked for, and all rows have it; see `may_pass`."""
        if not self.away or self.split is not None or self.box or self.area is not None:
            return False
        place, metres = self.away
        (left, right), (bottom, top) = bounds["x"], bounds["y"]
        if bounds["epsg"] != (place.epsg, place.epsg) or None in (left, right, bottom, top):
            return False
        dx = max(left - place.x, place.x - right, 0.0)
        dy = max(bottom - place.y, place.y - top, 0.0)
        return bool(np.hypot(dx, dy) >= metres)


def in_box(box: Box, lon: NDArray[np.float64], lat: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether points (n,) lie in a box; see `Filter.box`."""
    west, south, east, north = box
    after, before = lon >= west, lon <= east
    inside: NDArray[np.bool_] = (after | before) if west > east else (after & before)
    return inside & (lat >= south) & (lat <= north)

"""Which tiles a query searches, from what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from geomatch.data.filters import Filter, Place
from geomatch.data.tiles import SPLITS
from geomatch.errors import GeomatchError, UsageError
from geomatch.geo.grid import CRS84
from geomatch.querying.opened import OpenIndex
from geomatch.querying.options import Options

if TYPE_CHECKING:
    import shapely

    from geomatch.querying.targets import Query


def passing(index: OpenIndex, options: Options) -> Filter:
    """The filter that holds for every query.

    Raises:
        UsageError: tiles lack what a filter asks for.
        GeomatchError: the file of `options.within` cannot be read.
    """
    for option, value in (("--bbox", options.box), ("--within", options.within)):
        if value:
            index.check_ground(f"{option} needs a place", f"Ask without {option}.")
    if options.exclude_radius and not index.tiles.in_metres:
        raise UsageError(
            "--exclude-radius needs metres, but the tiles have no real place",
            "Ask without --exclude-radius.",
        )
    return Filter(
        years=tuple(index.year_code(year) for year in options.years) or None,
        split=SPLITS.index(options.split) if options.split else None,
        box=options.box,
        area=_area(options) if options.within else None,
    )


def _area(options: Options) -> shapely.Geometry:
    from geomatch.geo.labels import read_areas

    area = read_areas([str(options.within)], CRS84, (-180.0, -90.0, 180.0, 90.0))
    if area.is_empty:
        raise GeomatchError(f"{options.within} has no polygons", "Draw the area as polygons.")
    return area


def for_query(
    index: OpenIndex, query: Query, options: Options, every: Filter, rejected: Sequence[int]
) -> Filter:
    """The filter for one query, which finds neither itself nor what was rejected.

    Without years that are named, its own is left out.

    Args:
        every: see `passing`.

    Raises:
        UsageError: the query has no place to stay away from.
    """
    own = [] if query.position is None else [query.position]
    every = replace(every, without=(*own, *rejected))
    if every.years is None and not options.same_year:
        years = enumerate(index.manifest.years)
        every = replace(every, years=tuple(code for code, year in years if year != query.year))
    if not options.exclude_radius:
        return every
    if query.epsg is None:
        raise UsageError(
            f"--exclude-radius: {query.name} has no place", "Ask for a tile, or without it."
        )
    from geomatch.geo.footprints import lonlat

    centre = np.array([[query.x, query.y]])
    ((lon, lat),) = lonlat(np.array([query.epsg]), centre).tolist()
    place = Place(query.epsg, query.x, query.y, lon, lat)
    return replace(every, away=(place, options.exclude_radius))

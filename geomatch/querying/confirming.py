"""Answers looked at again: does the query lie there by its local features, and where exactly?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from geomatch.data.mosaic import Ground
from geomatch.data.store import TileStore
from geomatch.geo import footprints
from geomatch.geo.grid import Float64Array, Grid
from geomatch.querying.answers import Match, Matches
from geomatch.querying.opened import OpenIndex
from geomatch.search import local_features
from geomatch.search.local_features import Alignment, Sought

KNOWN = 0.6, 1 / 0.6
"""Scales that are possible where the pixels of the query have the size of those of tiles."""
UNKNOWN = 1 / 4, 4.0


@dataclass(frozen=True)
class Looked:
    """An answer with its picture: the query's pixels, those around the answer, and inliers."""

    match: Match
    query: NDArray[np.uint8]
    around: NDArray[np.uint8]
    alignment: Alignment | None


def ground_of(index: OpenIndex) -> Ground:
    """The ground that the tiles of an index cover."""
    tiles = index.tiles
    assert tiles.crs is not None
    assert tiles.gsd is not None
    assert tiles.stride is not None
    grid = Grid(tiles.crs, tiles.size, tiles.gsd, tiles.stride)
    return Ground(index.rows, TileStore.open(index.project.pixels), grid, tiles.channels.image)


def confirm(index: OpenIndex, found: Matches, first: int) -> tuple[Matches, list[Looked]]:
    """Look for a query in its first answers by local features; those that are confirmed come first.

    Args:
        first: number of answers to look at.

    Returns:
        The answers, ranked anew, and those looked at, confirmed ones first.
    """
    store, channels = TileStore.open(index.project.pixels), index.tiles.channels.image
    query = found.query
    pixels = query.pixels
    if pixels is None:
        pixels = store.read(np.array([query.store_row]))[0][..., :channels]
    sought = Sought.of(pixels)
    is_known = query.position is not None or query.epsg is not None
    looked = []
    for match, row, (epsg, x, y) in zip(found.matches, found.rows, found.centres, strict=True):
        if len(looked) == first:
            break
        if epsg is None or x is None or y is None:
            around = store.read(np.array([row]))[0][..., :channels]
            features = local_features.features(around)
        else:
            ground = ground_of(index)
            mosaic = ground.mosaic(epsg, (x, y), ground.grid.side, match.year or "")
            around = mosaic.pixels
            features = local_features.features(around, mosaic.valid)
        guess = centred(pixels.shape[:2], around.shape[:2], match.turn or 0.0)
        finding = local_features.find(sought, features, [guess], KNOWN if is_known else UNKNOWN)
        alignment = finding.alignment if finding.is_confirmed else None
        answer = replace(match, confirmed=alignment is not None, inliers=finding.inliers)
        if alignment is not None:
            answer = replace(answer, turn=round(alignment.turn, 1))
            if epsg is not None:
                answer = _placed(answer, epsg, mosaic.to_ground(), alignment, pixels.shape[:2])
        looked.append(Looked(answer, pixels, around, alignment))
    order = sorted(range(len(looked)), key=lambda i: not looked[i].match.confirmed)
    order += range(len(looked), len(found.matches))
    matches = [*(each.match for each in looked), *found.matches[len(looked) :]]
    ranked = replace(
        found,
        matches=tuple(replace(matches[i], rank=rank) for rank, i in enumerate(order, 1)),
        rows=tuple(found.rows[i] for i in order),
        centres=tuple(found.centres[i] for i in order),
    )
    shown = [replace(looked[i], match=ranked.matches[at]) for at, i in enumerate(order[: len(looked)])]
    return ranked, shown


def centred(query: Sequence[int], reference: Sequence[int], turn: float) -> Float64Array:
    """The transform (2, 3) of a query that is turned counter-clockwise around its centre, which
    lies at that of a reference; their shapes are (h, w)."""
    angle = np.radians(turn)
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    middles = [np.array(shape[::-1]) / 2 for shape in (query, reference)]
    return np.column_stack([matrix, middles[1] - matrix @ middles[0]])


def _placed(
    match: Match, epsg: int, to_ground: Float64Array, alignment: Alignment, shape: Sequence[int]
) -> Match:
    """An answer with the place that the query's centre has by an alignment."""
    middle = np.array([shape[::-1]]) / 2
    at = local_features.transformed(middle, alignment.matrix)
    place = local_features.transformed(at, to_ground)
    ((lon, lat),) = footprints.lonlat(np.array([epsg]), place).tolist()
    return replace(match, query_lon=lon, query_lat=lat)

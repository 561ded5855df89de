"""Answers looked at again: does the query lie there by its local features, and where exactly?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from geomatch.config import LocalFeatures
from geomatch.data.mosaic import Mosaic
from geomatch.data.store import TileStore
from geomatch.geo import footprints
from geomatch.geo.georeferencing import Scan
from geomatch.geo.grid import Float64Array
from geomatch.querying import placing
from geomatch.querying.answers import Looked, Match, Matches
from geomatch.querying.detectors import detector_of
from geomatch.querying.opened import OpenIndex
from geomatch.search import local_features
from geomatch.search.local_features import Detector, Sought, transformed

KNOWN = 0.6, 1 / 0.6
"""Scales that are possible where the pixels of the query are as large as those of tiles."""
UNKNOWN = 1 / 4, 4.0
NOTHING = np.zeros((0, 2))


def confirm(
    index: OpenIndex, found: Matches, first: int, features: LocalFeatures = "sift"
) -> Matches:
    """Look for a query in its first answers by local features; confirmed ones first.

    Args:
        first: number of answers to look at.
        features: the kind of local features.
    """
    look = _look_for_scan if found.query.is_scan else _look_for_tile
    seen = look(index, found, first, detector_of(features))
    # Of neighbouring tiles, the one that has most of the query comes first.
    order = sorted(
        range(len(seen)),
        key=lambda i: -(seen[i][0].inliers or 0) if seen[i][0].confirmed else 1,
    )
    matches = [match for match, _ in seen]
    ranked = [matches[i] for i in order] + list(found.matches[len(seen) :])
    order += range(len(seen), len(ranked))
    return replace(
        found,
        matches=tuple(replace(match, rank=rank) for rank, match in enumerate(ranked, 1)),
        rows=tuple(found.rows[i] for i in order),
        centres=tuple(found.centres[i] for i in order),
        places=tuple(found.places[i] for i in order) if found.places else (),
        looked=tuple(seen[i][1] for i in order[: len(seen)]),
    )


def _look_for_tile(
    index: OpenIndex, found: Matches, first: int, detector: Detector
) -> list[tuple[Match, Looked]]:
    query, channels = found.query, index.tiles.channels.image
    store = TileStore.open(index.project.pixels)

    def tile(row: int | None) -> NDArray[np.uint8]:
        return store.read(np.array([row]))[0][..., :channels]

    pixels = tile(query.store_row) if query.pixels is None else query.pixels[..., :channels]
    sought = Sought.of(pixels, detect=detector.any_turn)
    is_known = query.position is not None or query.epsg is not None
    seen = []
    answers = list(zip(found.matches, found.rows, found.centres, strict=True))
    for match, row, (epsg, x, y) in answers[:first]:
        mosaic = None
        if epsg is not None and x is not None and y is not None:
            ground = placing.ground_of(index)
            mosaic = ground.mosaic(epsg, (x, y), ground.grid.side, match.year or "")
        around = tile(row) if mosaic is None else mosaic.pixels
        features = detector.upright(around, None if mosaic is None else mosaic.valid)
        guess = _centred(pixels.shape, around.shape, match.turn or 0.0)
        finding = local_features.find(sought, features, [guess], KNOWN if is_known else UNKNOWN)
        match = replace(match, confirmed=finding.is_confirmed, inliers=finding.inliers)
        at, to = NOTHING, NOTHING
        if finding.alignment is not None and finding.is_confirmed:
            at, to = finding.alignment.query, finding.alignment.reference
            match = replace(match, turn=round(finding.alignment.turn, 1))
            if mosaic is not None and epsg is not None:
                middle = np.array([pixels.shape[1::-1]]) / 2
                match = _lying(match, epsg, mosaic, transformed(middle, finding.alignment.matrix))
        seen.append((match, Looked(pixels, around, at, to)))
    return seen


def _look_for_scan(
    index: OpenIndex, found: Matches, first: int, detector: Detector
) -> list[tuple[Match, Looked]]:
    ground, scan = placing.ground_of(index), Scan.open(found.query.name)
    seen = []
    for i, match in enumerate(found.matches[:first]):
        epsg, start = placing.start_of(index, found, scan, i)
        looked = placing.look(scan, ground, epsg, start, match.year or "", detector)
        placed = looked.placed
        match = replace(match, confirmed=placed is not None, inliers=looked.inliers)
        if placed is not None:
            match = replace(match, turn=round(placed.turn, 1), gsd=placed.gsd)
            ((lon, lat),) = footprints.lonlat(np.array([epsg]), placed.centre).tolist()
            match = replace(match, query_lon=lon, query_lat=lat)
        at, to = (looked.at, looked.to) if placed else (NOTHING, NOTHING)
        seen.append((match, Looked(looked.image, looked.mosaic.pixels, at, to)))
    return seen


def _centred(query: Sequence[int], reference: Sequence[int], turn: float) -> Float64Array:
    """The transform (2, 3) of a query that is turned counter-clockwise about its centre.

    Its centre lies at that of the reference.

    Args:
        query, reference: shapes (h, w, c).
    """
    angle = np.radians(turn)
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    middle, target = (np.array(shape[1::-1]) / 2 for shape in (query, reference))
    return np.column_stack([matrix, target - matrix @ middle])


def _lying(match: Match, epsg: int, mosaic: Mosaic, centre: Float64Array) -> Match:
    """An answer with the place that the query's centre has, given in pixels (1, 2) of a mosaic."""
    place = transformed(centre, mosaic.to_ground())
    ((lon, lat),) = footprints.lonlat(np.array([epsg]), place).tolist()
    return replace(match, query_lon=lon, query_lat=lat)

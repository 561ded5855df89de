"""The place of a whole image on the ground, from coarse to fine around a place that is near.

As in EarthMatch (Berton et al., "EarthMatch: Iterative coregistration for fine-grained
localization of astronaut photography", 2024), each match says where the image lies, for the ground
there to be matched again with the image warped onto it. The first matches are of few pixels, since
what is large changes least.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomatch.config import LocalFeatures
from geomatch.data.mosaic import Ground, Mosaic
from geomatch.data.store import TileStore
from geomatch.errors import GeomatchError, UsageError
from geomatch.geo import georeferencing
from geomatch.geo.georeferencing import Scan
from geomatch.geo.grid import Float64Array, Grid
from geomatch.project import replacing
from geomatch.querying.answers import Matches
from geomatch.querying.detectors import detector_of
from geomatch.querying.opened import OpenIndex
from geomatch.querying.placed import Placed
from geomatch.search import local_features
from geomatch.search.local_features import SIFT, Detector, Sought, scale_of, transformed

LEVELS = 384, 768, 1536, 2048
"""Pixels along a side of the ground, in each match."""
ROOM = 1.15, 1.6
"""Sides of the ground in those of the image, where its place is known and where it is not."""
SURE = 4.0
"""Least score of a match: an image has more ways to lie by chance than a tile has."""


@dataclass(frozen=True)
class Look:
    """What one match of an image with the ground gave.

    Attributes:
        placed: None if the image is not confirmed there.
        image: (h, w, c) uint8, the image as it was matched.
        mosaic: the ground.
        at, to: (n, 2) points of the inliers in both.
    """

    placed: Placed | None
    image: NDArray[np.uint8]
    mosaic: Mosaic
    at: Float64Array
    to: Float64Array

    @property
    def inliers(self) -> int:
        return len(self.at)


def ground_of(index: OpenIndex) -> Ground:
    """The ground that the tiles of an index cover, which have a place."""
    tiles = index.tiles
    assert tiles.crs is not None
    assert tiles.gsd is not None
    assert tiles.stride is not None
    grid = Grid(tiles.crs, tiles.size, tiles.gsd, tiles.stride)
    return Ground(index.rows, TileStore.open(index.project.pixels), grid, tiles.channels.image)


def start_of(index: OpenIndex, found: Matches, scan: Scan, i: int) -> tuple[int, Float64Array]:
    """Where the i-th answer puts an image: EPSG code, and a transform (2, 3) from its points.

    Raises:
        UsageError: the answers have no place in metres.
    """
    epsg, x, y = found.centres[i]
    if epsg is None or x is None or y is None or not index.tiles.in_metres:
        raise UsageError(
            "an image cannot be georeferenced where tiles have no real place",
            "Tile imagery that is georeferenced.",
        )
    match = found.matches[i]
    # Without a scale of its own, the centre square of an image was taken for a tile.
    tile = index.tiles.size * (index.tiles.gsd or 0.0)
    gsd = match.gsd or tile / min(scan.width, scan.height)
    angle = np.radians(match.turn or 0.0)
    matrix = gsd * np.array([[np.cos(angle), np.sin(angle)], [np.sin(angle), -np.cos(angle)]])
    middle = np.array([scan.width, scan.height]) / 2
    return epsg, np.column_stack([matrix, np.array([x, y]) - matrix @ middle])


def georeference(
    index: OpenIndex, found: Matches, path: Path, features: LocalFeatures = "sift"
) -> Placed:
    """Write the image that was searched for as a GeoTIFF, as it lies at the first answer it can.

    See `write`.

    Raises:
        UsageError: no image was searched for, it has a place, or the answers have none.
        GeomatchError: it lies at none of the answers, or a file cannot be written.
    """
    query = found.query
    if query.position is not None:
        raise UsageError(f"{query.name} is a tile, which has a place", "Give an image file.")
    if query.epsg is not None:
        raise UsageError(f"{query.name} is georeferenced", "Warp it: gdalwarp -t_srs EPSG:n IN OUT")
    if path.resolve() == Path(query.name).resolve():
        raise UsageError(f"--georeference {path} is the image itself", "Give another file.")
    scan = Scan.open(query.name)
    ground = ground_of(index)
    for i, match in enumerate(found.matches):
        epsg, start = start_of(index, found, scan, i)
        placed = place(scan, ground, epsg, start, match.year or "", detector_of(features))
        if placed is not None:
            write(placed, path)
            return placed
    raise GeomatchError(
        f"{query.name} is not confirmed at any of {len(found.matches)} answers: not georeferenced",
        "Give its --gsd or --scales, --rotate, more answers (--top), or the --year most like it.",
    )


def place(
    scan: Scan,
    ground: Ground,
    epsg: int,
    start: Float64Array,
    year: str,
    detector: Detector = SIFT,
) -> Placed | None:
    """Find where an image lies; arguments as for `look`.

    Returns:
        None if it is not confirmed there.
    """
    best = look(scan, ground, epsg, start, year, detector).placed
    if best is None:
        return None
    for level in LEVELS[2:]:
        refined = _match(
            scan, ground, epsg, best.matrix, year, level, detector, is_first=False
        ).placed
        if refined is None:
            break
        best = refined
    return best


def look(
    scan: Scan,
    ground: Ground,
    epsg: int,
    start: Float64Array,
    year: str,
    detector: Detector = SIFT,
) -> Look:
    """Look for an image on coarse ground.

    Args:
        epsg: code of the CRS of x and y.
        start: (2, 3) from points of the image to x, y, if only roughly: its centre within half
            of the image's side, its scale within a factor of 4, any turn.
        year: of the tiles that it is compared with.
    """
    first = _match(scan, ground, epsg, start, year, LEVELS[0], detector, is_first=True)
    matrix = start if first.placed is None else first.placed.matrix
    second = _match(
        scan, ground, epsg, matrix, year, LEVELS[1], detector, is_first=first.placed is None
    )
    return second if second.placed or not first.placed else first


def _match(
    scan: Scan,
    ground: Ground,
    epsg: int,
    start: Float64Array,
    year: str,
    level: int,
    detector: Detector,
    *,
    is_first: bool,
) -> Look:
    corners = transformed(scan.corners, start)
    low, high = corners.min(axis=0), corners.max(axis=0)
    centre, half = (low + high) / 2, ROOM[is_first] * float((high - low).max()) / 2
    mosaic = ground.mosaic(epsg, (centre[0], centre[1]), half, year)
    coarsest = max(mosaic.valid.shape[0] / level, scale_of(start) / ground.grid.gsd)
    mosaic = mosaic.reduced(max(round(coarsest), 1))
    image, valid = scan.read(max(mosaic.gsd / scale_of(start), 1.0))
    to_scan = np.diag(np.array([scan.width, scan.height]) / image.shape[1::-1])
    to_scan = np.column_stack([to_scan, np.zeros(2)])
    guess = _after(_inverse(mosaic.to_ground()), _after(start, to_scan))
    if not is_first:
        image, valid = local_features.warped(image, valid, guess, mosaic.valid.shape)
        to_scan, guess = _after(to_scan, _inverse(guess)), np.eye(2, 3)
    # The image was warped to lie as the ground does, unless this is the first match.
    detect = detector.any_turn if is_first else detector.upright
    finding = local_features.find(
        Sought.of(image, valid, detect),
        detector.upright(mosaic.pixels, mosaic.valid),
        [guess],
        (1 / 4, 4.0) if is_first else (0.8, 1.25),
    )
    if finding.alignment is None:
        return Look(None, image, mosaic, np.zeros((0, 2)), np.zeros((0, 2)))
    found = local_features.affine(finding.alignment)
    placed = None
    if finding.score >= SURE:
        at = transformed(found.query, to_scan)
        to = transformed(found.reference, mosaic.to_ground())
        matrix = _after(mosaic.to_ground(), _after(found.matrix, _inverse(to_scan)))
        placed = Placed(scan, epsg, matrix, at, to, finding.score)
    return Look(placed, image, mosaic, found.query, found.reference)


def write(placed: Placed, path: Path) -> float:
    """Write an image as a GeoTIFF, and beside it `.points` for QGIS, and `.vrt` with the points.

    Returns:
        Metres per pixel of the GeoTIFF.

    Raises:
        GeomatchError: the image is damaged, or a file cannot be written.
    """
    scan, epsg, at, to = placed.scan, placed.epsg, placed.at, placed.to
    # In pixels of the image, from the point to where the transform has it.
    off = transformed(to, _inverse(placed.matrix)) - at
    with replacing(path.with_suffix(".points")) as temporary:
        georeferencing.write_points(temporary, at, to, -off, epsg)
    with replacing(path.with_suffix(".vrt")) as temporary:
        georeferencing.write_vrt(scan, temporary, at, to, epsg)
    with replacing(path) as temporary:
        return georeferencing.write_geotiff(scan, placed.matrix, epsg, temporary)


def _after(second: Float64Array, first: Float64Array) -> Float64Array:
    """The transform (2, 3) that is `first`, then `second`."""
    return np.column_stack(
        [second[:, :2] @ first[:, :2], second[:, :2] @ first[:, 2] + second[:, 2]]
    )


def _inverse(matrix: Float64Array) -> Float64Array:
    back = np.linalg.inv(matrix[:, :2])
    return np.column_stack([back, -back @ matrix[:, 2]])

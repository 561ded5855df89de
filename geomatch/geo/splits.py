"""Spatial splits: which split each place belongs to.

Places that would leak are dropped: no two places of different splits share ground or lie nearer
to each other than the buffer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatch

import numpy as np
import shapely
from numpy.typing import NDArray

from geomatch.errors import UsageError
from geomatch.geo.grid import Grid, Ints

TRAIN, VALIDATION, TEST, DROPPED = 0, 1, 2, -1
SHARE = 0.15
"""Share of places in validation, and again in test, where blocks are drawn."""
BLOCKS = 24
"""About how many blocks there are by default."""


def block_side(grid: Grid, places: int) -> float:
    """Side in metres of blocks of which `places` fill about `BLOCKS`."""
    return max(3.0, math.sqrt(places / BLOCKS)) * grid.step


def blocks_of(grid: Grid, epsg: Ints, col: Ints, row: Ints, side: float) -> Ints:
    """The block of `side` metres that holds each cell's centre: (n, 3) EPSG code, column, row."""
    index = np.floor(grid.centres(col, row) / side).astype(np.int64)
    return np.column_stack([epsg, index])


def by_blocks(grid: Grid, epsg: Ints, col: Ints, row: Ints, block: float | None, seed: int) -> Ints:
    """Split of each place by square blocks of ground, drawn at random with `seed`.

    Args:
        block: side in metres; None for about `BLOCKS` blocks.

    Raises:
        UsageError: a block is smaller than a tile.
    """
    if block is None:
        block = block_side(grid, len(col))
    if block < grid.side:
        raise UsageError(
            f"split.block = {block:g} m is smaller than a tile ({grid.side:g} m)",
            "Give a block of several tiles.",
        )
    keys = blocks_of(grid, epsg, col, row, block)
    blocks, member, count = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(blocks))
    split = np.full(len(blocks), TRAIN)
    for target in (TEST, VALIDATION):
        free = [b for b in order if split[b] == TRAIN]
        taken = 0
        for b in free[: len(free) - 1]:  # leave a block to train on
            if taken >= SHARE * len(col):
                break
            split[b] = target
            taken += int(count[b])
    return split[member.reshape(-1)]


def by_source(
    names: Sequence[Sequence[str]], validation: Sequence[str], test: Sequence[str]
) -> Ints:
    """Split of each place by the files that cover it, dropped where these disagree.

    Args:
        names: paths of the files of all years that cover each place.
        validation, test: globs of file names or whole paths.

    Raises:
        UsageError: a glob matches no file.
    """
    paths = {path for covering in names for path in covering}
    split_of = dict.fromkeys(paths, TRAIN)
    for globs, target in ((validation, VALIDATION), (test, TEST)):
        for pattern in globs:
            hits = [p for p in paths if fnmatch(p, pattern) or fnmatch(p.split("/")[-1], pattern)]
            if not hits:
                raise UsageError(
                    f"split: no source file matches {pattern!r}",
                    "Give globs of file names, such as 'scene_03[5-9]*'.",
                )
            split_of.update(dict.fromkeys(hits, target))
    splits = [{split_of[path] for path in covering} for covering in names]
    return np.asarray([s.pop() if len(s) == 1 else DROPPED for s in splits], np.int64)


def by_areas(
    footprints: NDArray[np.float64], validation: shapely.Geometry, test: shapely.Geometry
) -> Ints:
    """Split of each place by polygons, dropped where it is only partly inside one.

    Args:
        footprints: (n, 5, 2) closed rings, in the CRS of the polygons.
    """
    shapes = shapely.polygons(footprints)
    split = np.full(len(footprints), TRAIN)
    for area, target in ((validation, VALIDATION), (test, TEST)):
        shapely.prepare(area)
        split[shapely.intersects(area, shapes) & ~shapely.touches(area, shapes)] = DROPPED
        split[shapely.covers(area, shapes)] = target
    return split


def keep_apart(grid: Grid, epsg: Ints, col: Ints, row: Ints, split: Ints, buffer: float) -> Ints:
    """`split` with places dropped that lie within `buffer` metres of another split.

    Training places are dropped in favour of validation and test, validation in favour of test.
    """
    reach = math.ceil((buffer + grid.side) / grid.step - 1e-9) - 1
    result = split.copy()
    if reach <= 0:
        return result
    places = dict(
        zip(
            zip(epsg.tolist(), col.tolist(), row.tolist(), strict=True), split.tolist(), strict=True
        )
    )
    for i, ((zone, c, r), here) in enumerate(places.items()):
        if here in (DROPPED, TEST):
            continue
        near = (
            places.get((zone, c + dc, r + dr), DROPPED)
            for dc in range(-reach, reach + 1)
            for dr in range(-reach, reach + 1)
        )
        if any(other > here for other in near):
            result[i] = DROPPED
    return result

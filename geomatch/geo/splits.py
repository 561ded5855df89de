"""Setting regions apart: which split each place of the ground belongs to.

A place that would leak is dropped: no two places of different splits share ground, nor lie
nearer to each other than the buffer.
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
"""Of all places, in validation and again in test, where blocks are drawn."""
BLOCKS = 24


def block_side(grid: Grid, places: int) -> float:
    """Metres of a side of blocks of which `places` fill about `BLOCKS`."""
    return max(3.0, math.sqrt(places / BLOCKS)) * grid.step


def blocks_of(grid: Grid, epsg: Ints, col: Ints, row: Ints, side: float) -> Ints:
    """(n, 3) the block of `side` metres that each cell's centre is in: zone, column and row."""
    index = np.floor(grid.centres(col, row) / side).astype(np.int64)
    return np.column_stack([epsg, index])


def by_blocks(grid: Grid, epsg: Ints, col: Ints, row: Ints, block: float | None, seed: int) -> Ints:
    """Split of each place by square blocks of the ground, drawn by `seed`.

    Args:
        block: side in metres; None makes about `BLOCKS` blocks.
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
        for b in free[: len(free) - 1]:  # something is left to train on
            if taken >= SHARE * len(col):
                break
            split[b] = target
            taken += int(count[b])
    return split[member.reshape(-1)]


def by_source(
    names: Sequence[Sequence[str]], validation: Sequence[str], test: Sequence[str]
) -> Ints:
    """Split of each place by the files over it, dropped where they disagree.

    Args:
        names: paths of the files over each place, of all years.
        validation, test: globs of file names or whole paths.

    Raises:
        UsageError: a glob matches no file.
    """
    paths = {path for over in names for path in over}
    of = dict.fromkeys(paths, TRAIN)
    for globs, target in ((validation, VALIDATION), (test, TEST)):
        for pattern in globs:
            hits = [p for p in paths if fnmatch(p, pattern) or fnmatch(p.split("/")[-1], pattern)]
            if not hits:
                raise UsageError(
                    f"split: no source file matches {pattern!r}",
                    "Give globs of file names, such as 'scene_03[5-9]*'.",
                )
            of.update(dict.fromkeys(hits, target))
    splits = [{of[path] for path in over} for over in names]
    return np.asarray([s.pop() if len(s) == 1 else DROPPED for s in splits], np.int64)


def by_areas(
    outlines: NDArray[np.float64], validation: shapely.Geometry, test: shapely.Geometry
) -> Ints:
    """Split of each place by polygons, dropped where it is only partly inside one.

    Args:
        outlines: (n, 5, 2), in the CRS of the polygons.
    """
    shapes = shapely.polygons(outlines)
    split = np.full(len(outlines), TRAIN)
    for area, target in ((validation, VALIDATION), (test, TEST)):
        shapely.prepare(area)
        split[shapely.intersects(area, shapes) & ~shapely.touches(area, shapes)] = DROPPED
        split[shapely.covers(area, shapes)] = target
    return split


def keep_apart(grid: Grid, epsg: Ints, col: Ints, row: Ints, split: Ints, buffer: float) -> Ints:
    """`split` with places dropped that lie within `buffer` metres of another split.

    Training places give way to validation and test, validation to test.
    """
    apart = math.ceil((buffer + grid.side) / grid.step - 1e-9) - 1
    result = split.copy()
    if apart <= 0:
        return result
    places = dict(
        zip(
            zip(epsg.tolist(), col.tolist(), row.tolist(), strict=True), split.tolist(), strict=True
        )
    )
    for i, ((zone, c, r), own) in enumerate(places.items()):
        if own in (DROPPED, TEST):
            continue
        near = (
            places.get((zone, c + dc, r + dr), DROPPED)
            for dc in range(-apart, apart + 1)
            for dr in range(-apart, apart + 1)
        )
        if any(other > own for other in near):
            result[i] = DROPPED
    return result

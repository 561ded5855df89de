"""Spatial splits: which split each place belongs to.

Places that would leak are dropped: no two places of different splits share ground or lie nearer
to each other than the buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch

import numpy as np
import shapely
from numpy.typing import NDArray

from geomatch.errors import UsageError
from geomatch.geo.grid import ROW_BITS, Grid, Ints, cell_keys

TRAIN, VALIDATION, TEST, DROPPED = 0, 1, 2, -1
ALL = (TRAIN, VALIDATION, TEST)
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


def by_blocks(
    grid: Grid, epsg: Ints, col: Ints, row: Ints, block: float, seed: int, known: Ints | None = None
) -> Ints:
    """Split of each place by square blocks of ground, drawn at random with `seed`.

    Args:
        block: side in metres.
        known: the split (n,) of places that have one already, which their block has, else -1.

    Raises:
        UsageError: a block is smaller than a tile.
    """
    if block < grid.side:
        raise UsageError(
            f"split.block = {block:g} m is smaller than a tile ({grid.side:g} m)",
            "Give a block of several tiles.",
        )
    keys = cell_keys(*blocks_of(grid, epsg, col, row, block).T)
    blocks, member, count = np.unique(keys, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(blocks))
    member = member.reshape(-1)
    split = np.full(len(blocks), TRAIN)
    drawn = np.ones(len(blocks), bool)
    if known is not None:
        has_split = known >= 0
        split[member[has_split]] = known[has_split]
        drawn[member[has_split]] = False
    for target in (TEST, VALIDATION):
        free = [b for b in order if drawn[b] and split[b] == TRAIN]
        taken = int(count[split == target].sum())
        # Leave a block to train on.
        most = len(free) - bool(drawn[split == TRAIN].all())
        for b in free[:most]:
            if taken >= SHARE * len(col):
                break
            split[b] = target
            taken += int(count[b])
    return split[member]


def of_files(paths: Sequence[str], validation: Sequence[str], test: Sequence[str]) -> list[int]:
    """Split of each file.

    Args:
        validation, test: globs of file names or whole paths.

    Raises:
        UsageError: a glob matches no file.
    """
    split_of = dict.fromkeys(paths, TRAIN)
    for globs, target in ((validation, VALIDATION), (test, TEST)):
        for pattern in globs:
            hits = [
                path
                for path in split_of
                if fnmatch(path, pattern) or fnmatch(path.split("/")[-1], pattern)
            ]
            if not hits:
                raise UsageError(
                    f"split: no source file matches {pattern!r}",
                    "Give globs of file names, such as 'scene_03[5-9]*'.",
                )
            split_of.update(dict.fromkeys(hits, target))
    return [split_of[path] for path in paths]


def by_source(places: Ints, covered: Sequence[Ints]) -> Ints:
    """Split of each place by the files that cover it, dropped where these disagree.

    Args:
        places: keys (n,) of all places, in ascending order.
        covered: of each split, the keys of all places that its files cover.
    """
    within = np.zeros((len(covered), len(places)), bool)
    for inside, keys in zip(within, covered, strict=True):
        inside[np.searchsorted(places, keys)] = True
    return np.where(within.sum(axis=0) == 1, within.argmax(axis=0), DROPPED)


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


def keep_apart(
    grid: Grid, places: Ints, split: Ints, buffer: float, fixed: NDArray[np.bool_] | None = None
) -> Ints:
    """`split` with places dropped that lie within `buffer` metres of another split.

    Training places are dropped in favour of validation and test, validation in favour of test.

    Args:
        places: keys (n,) in ascending order.
        fixed: which places (n,) are not dropped; they are apart from each other.
    """
    reach = math.ceil((buffer + grid.side) / grid.step - 1e-9) - 1
    if reach <= 0:
        return split
    if fixed is not None:
        split = split.copy()
        for kept in ALL:
            near = _near(places, places[fixed & (split == kept)], reach)
            split[near & ~fixed & (split != kept)] = DROPPED
    result = split.copy()
    for favoured in (VALIDATION, TEST):
        near = _near(places, places[split >= favoured], reach)
        result[near & (split < favoured)] = DROPPED
    return result


def _near(places: Ints, some: Ints, reach: int) -> NDArray[np.bool_]:
    """Which places (n,) are up to `reach` columns and rows away from one of `some`."""
    near = np.zeros(len(places), bool)
    # Whatever is near to a place with all its neighbours is as near to another one.
    has_all = np.ones(len(some), bool)
    for offset in _offsets(1):
        has_all &= _find(some, some + offset)[1]
    for offset in _offsets(reach):
        at, found = _find(places, some[~has_all] + offset)
        near[at[found]] = True
    return near


def _offsets(reach: int) -> Iterator[int]:
    """Differences of keys of the cells up to so many columns and rows away."""
    for columns in range(-reach, reach + 1):
        for rows in range(-reach, reach + 1):
            yield (columns << ROW_BITS) + rows


def _find(keys: Ints, wanted: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Where each of some keys is among ascending ones, and whether it is."""
    at = np.minimum(np.searchsorted(keys, wanted), max(0, len(keys) - 1))
    return at, keys[at] == wanted if len(keys) else np.zeros(len(wanted), bool)

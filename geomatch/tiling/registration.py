"""The registration check: how far the imagery of each pair of years is shifted.

Windows of the source imagery are compared rather than tiles, whose size is the user's: small ones
hold too little ground for a shift to be sure.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from geomatch.data.registration import YearPair
from geomatch.data.tiles import TileTable
from geomatch.geo import footprints
from geomatch.geo.grid import Grid, Ints
from geomatch.geo.phase_correlation import shift, spectrum
from geomatch.geo.rasters import GridReader, Pixels
from geomatch.progress import ProgressCallback
from geomatch.tiling.sources import YearSource

SIDE = 256
"""Side of a window in pixels."""
PLACES = 100
"""Largest number of windows of a pair of years."""
COMPLETE = 0.99
"""Least share of valid pixels of a window."""
FLAT = 4.0
"""Standard deviation in grey levels up to which a window counts as flat if it gave no answer."""


def measure(
    year_sources: Sequence[YearSource],
    table: TileTable,
    in_metres: bool,
    progress: ProgressCallback,
) -> list[YearPair]:
    """Measure the shift between each two years, at up to `PLACES` places drawn with a fixed seed.

    Args:
        table: the tiles cut from `year_sources`; places are drawn where both years have some.
        in_metres: metres mean something.

    Raises:
        GeomatchError: a raster is damaged.
    """
    assert table.grid is not None
    grid = Grid(table.grid.crs, SIDE, table.grid.gsd, SIDE // 2)
    cells, present = _places(table, grid)
    pairs = list(itertools.combinations(range(len(year_sources)), 2))
    found = []
    with contextlib.ExitStack() as stack:
        windows = _Windows(year_sources, grid, cells, stack)
        for done, (a, b) in enumerate(pairs, 1):
            common = np.flatnonzero(present[:, [a, b]].all(axis=1)).tolist()
            compared = list(itertools.islice(_compared(windows, common, a, b), PLACES))
            epsg, col, row = cells[[place for place, _, _ in compared]].T
            centres = grid.centres(col, row)
            lonlat = footprints.lonlat(epsg, centres)
            found.append(
                YearPair(
                    years=(year_sources[a].year, year_sources[b].year),
                    lonlat=lonlat,
                    xy=lonlat if grid.crs == "utm" else centres,
                    east_north=np.array([moved for _, moved, _ in compared]).reshape(-1, 2),
                    flat=np.array([flat for _, _, flat in compared], bool),
                    gsd=grid.gsd if in_metres else None,
                )
            )
            progress("comparing years", done, len(pairs))
    return found


def _places(table: TileTable, grid: Grid) -> tuple[Ints, NDArray[np.bool_]]:
    """Windows with tiles in them, shuffled: EPSG code, column and row (n, 3); years (n, years)."""
    half = (grid.side - grid.step) / 2
    nearest = np.floor((table.centres() - half) / grid.step).astype(np.int64)
    keys = np.column_stack([table.epsg, nearest])
    cells, place = np.unique(keys, axis=0, return_inverse=True)
    present = np.zeros((len(cells), len(table.years)), bool)
    present[place.reshape(-1), table.year] = True
    order = np.random.default_rng(0).permutation(len(cells))
    return cells[order], present[order]


class _Windows:
    """Reads windows of a year in grey, each once."""

    def __init__(
        self,
        year_sources: Sequence[YearSource],
        grid: Grid,
        cells: Ints,
        stack: contextlib.ExitStack,
    ) -> None:
        self._sources, self._grid, self._cells, self._stack = year_sources, grid, cells, stack
        self._readers: dict[tuple[int, int], GridReader] = {}
        self._read: dict[tuple[int, int], Pixels | None] = {}

    def read(self, place: int, year: int) -> Pixels | None:
        """The window (side, side), or None where data are missing."""
        if (place, year) not in self._read:
            epsg, col, row = self._cells[place].tolist()
            if (year, epsg) not in self._readers:
                source = self._sources[year]
                reader = GridReader(
                    source.images,
                    self._grid,
                    f"EPSG:{epsg}",
                    stretch=source.stretch,
                    by_centre=source.by_centre,
                )
                self._readers[year, epsg] = self._stack.enter_context(reader)
            pixels, valid, _ = self._readers[year, epsg].read(col, row)
            grey = pixels.mean(axis=-1).astype(np.uint8) if valid.mean() >= COMPLETE else None
            self._read[place, year] = grey
        return self._read[place, year]


def _compared(
    windows: _Windows, places: Sequence[int], a: int, b: int
) -> Iterator[tuple[int, tuple[float, float], bool]]:
    """Compare two years at the places where both have all data.

    Yields:
        The place, how far east and north `b` lies from `a` in pixels (NaN without an answer), and
        whether there is no answer because a window is flat.
    """
    for place in places:
        first, second = windows.read(place, a), windows.read(place, b)
        if first is None or second is None:
            continue
        moved = shift(spectrum(first), spectrum(second))
        if moved is None:
            yield place, (np.nan, np.nan), bool(min(first.std(), second.std()) <= FLAT)
        else:
            down, right = moved
            yield place, (right, -down), False

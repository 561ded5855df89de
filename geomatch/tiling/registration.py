"""The registration check: how far the imagery of each pair of years is shifted.

Windows of the source imagery are compared rather than tiles, whose size is the user's: small ones
hold too little ground for a shift to be sure.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from geomatch.data.registration import YearPair
from geomatch.data.tiles import TileTable
from geomatch.geo import footprints
from geomatch.geo.grid import Grid, Ints
from geomatch.geo.phase_correlation import shift, spectrum
from geomatch.geo.rasters import Pixels
from geomatch.geo.windows import GridReader
from geomatch.progress import ProgressCallback
from geomatch.tiling.sources import YearSource
from geomatch.tiling.usable import Unreadable

SIDES = (256, 128, 64)
"""Sides of windows in pixels: the largest of which there are `FEWEST`, since it tells most."""
FEWEST, PLACES = 9, 100
"""Number of windows of a pair of years that are enough, and the largest number compared."""
DRAWN = 5_000
"""Largest number of cells that windows are drawn from."""
COMPLETE = 0.99
"""Least share of valid pixels of a window."""
FLAT = 4.0
"""Standard deviation in grey levels up to which a window counts as flat if it gave no answer."""

Compared = tuple[Ints, tuple[float, float], bool]
"""A window: its EPSG code, column and row; how far east and north the later year lies in pixels
(NaN without an answer); whether there is no answer because a year is flat."""


def measure(
    year_sources: Sequence[YearSource],
    table: TileTable,
    in_metres: bool,
    unreadable: Unreadable,
    progress: ProgressCallback,
) -> list[YearPair]:
    """Measure the shift between each two years, at up to `PLACES` places drawn with a fixed seed.

    Args:
        table: the tiles cut from `year_sources`; places are drawn where both years have some.
        in_metres: metres mean something.
        unreadable: see `GridReader`.

    Raises:
        GeomatchError: a raster is damaged.
    """
    pairs = list(itertools.combinations(range(len(year_sources)), 2))
    sizes = [_Windows(year_sources, table, side, unreadable) for side in SIDES]
    found = []
    for done, (a, b) in enumerate(pairs, 1):
        for windows in sizes:
            with contextlib.closing(windows):
                compared = list(itertools.islice(windows.compare(a, b), PLACES))
            if len(compared) >= FEWEST:
                break
        years = (year_sources[a].year, year_sources[b].year)
        found.append(_pair(years, windows.grid, compared, in_metres))
        progress("comparing years", done, len(pairs))
    return found


def _pair(
    years: tuple[str, str], grid: Grid, compared: Sequence[Compared], in_metres: bool
) -> YearPair:
    epsg, col, row = np.array([cell for cell, _, _ in compared], np.int64).reshape(-1, 3).T
    centres = grid.centres(col, row)
    lonlat = footprints.lonlat(epsg, centres)
    return YearPair(
        years=years,
        side=grid.size,
        lonlat=lonlat,
        xy=lonlat if grid.crs == "utm" else centres,
        east_north=np.array([moved for _, moved, _ in compared]).reshape(-1, 2),
        flat=np.array([flat for _, _, flat in compared], bool),
        gsd=grid.gsd if in_metres else None,
    )


class _Windows:
    """Windows of one size over the ground of tiles, each read once, in grey."""

    def __init__(
        self,
        year_sources: Sequence[YearSource],
        table: TileTable,
        side: int,
        unreadable: Unreadable,
    ) -> None:
        assert table.grid is not None
        self.grid = Grid(table.grid.crs, side, table.grid.gsd, side // 2)
        self._sources, self._table, self._unreadable = year_sources, table, unreadable
        self._readers: dict[tuple[int, int], GridReader] = {}
        self._read: dict[tuple[int, int], Pixels | None] = {}

    def close(self) -> None:
        """Close all rasters, since many years would have too many open at once."""
        for reader in self._readers.values():
            reader.close()

    def compare(self, a: int, b: int) -> Iterator[Compared]:
        """Compare two years where both have all data."""
        cells, present = self._drawn
        for place in np.flatnonzero(present[:, [a, b]].all(axis=1)).tolist():
            first, second = self._grey(place, a), self._grey(place, b)
            if first is None or second is None:
                continue
            moved = shift(spectrum(first), spectrum(second))
            if moved is None:
                flat = bool(min(first.std(), second.std()) <= FLAT)
                yield cells[place], (np.nan, np.nan), flat
            else:
                down, right = moved
                yield cells[place], (right, -down), False

    def _grey(self, place: int, year: int) -> Pixels | None:
        """A window (side, side), or None where data are missing."""
        if (place, year) not in self._read:
            epsg, col, row = self._drawn[0][place].tolist()
            if (year, epsg) not in self._readers:
                source = self._sources[year]
                self._readers[year, epsg] = GridReader(
                    source.images,
                    self.grid,
                    f"EPSG:{epsg}",
                    stretch=source.stretch,
                    unreadable=self._unreadable,
                    by_centre=source.by_centre,
                )
            pixels, valid, _ = self._readers[year, epsg].read(col, row)
            grey = pixels.mean(axis=-1).astype(np.uint8) if valid.mean() >= COMPLETE else None
            self._read[place, year] = grey
        return self._read[place, year]

    @functools.cached_property
    def _drawn(self) -> tuple[Ints, NDArray[np.bool_]]:
        """The windows that are the nearest ones of some ground of tiles, shuffled.

        EPSG code, column and row (n, 3), and whether a year has such tiles (n, years).
        """
        grid, rng = self.grid, np.random.default_rng(0)
        places = self._table.places()
        tiles = self._table.select(np.isin(places, rng.permutation(places.max() + 1)[:DRAWN]))
        bounds = tiles.bounds() - (grid.side - grid.step) / 2
        low = np.floor(bounds[:, :2] / grid.step).astype(np.int64)
        high = np.ceil(bounds[:, 2:] / grid.step).astype(np.int64)
        found = []
        for offset in itertools.product(range((high - low).max()), repeat=2):
            within = (low + offset < high).all(axis=1)
            columns = (tiles.epsg, *(low + offset).T, tiles.year)
            found.append(np.column_stack(columns)[within])
        keys = np.concatenate(found)
        cells, which = np.unique(keys[:, :3], axis=0, return_inverse=True)
        present = np.zeros((len(cells), len(tiles.years)), bool)
        present[which.reshape(-1), keys[:, 3]] = True
        order = rng.permutation(len(cells))
        return cells[order], present[order]

"""Shards of a plan, and the batches of them that worker processes cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from geomatch.data.store import shard_rows
from geomatch.data.store_rows import StoreRows
from geomatch.geo import placement
from geomatch.geo.grid import Float64Array, Ints
from geomatch.geo.labels import Layer, VectorLayer
from geomatch.geo.rasters import Raster
from geomatch.project import fingerprint
from geomatch.tiling import sources
from geomatch.tiling.cells import RECORD, Batch, CellShard, Kept
from geomatch.tiling.plan import TilePlan
from geomatch.tiling.sources import YearSource

Keys = NDArray[np.uint64]

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
MOST = 8
"""Shards of a batch at most, since Ctrl-C waits for its end."""


class Sheets:
    """Which rasters of each year, images and others, are near some cells."""

    def __init__(self, year_sources: Sequence[YearSource]) -> None:
        self._sources = year_sources
        self._trees: dict[tuple[int, str, int], tuple[shapely.STRtree, Float64Array]] = {}
        self._numbers: dict[tuple[int, str], Keys] = {}

    def label(self, code: int) -> str:
        """The label of a year."""
        return self._sources[code].year

    def near(self, epsg: Ints, bounds: Float64Array, year: Ints) -> dict[int, YearSource]:
        """The sources of the years of some cells, with those rasters alone.

        A raster is one of them if its box intersects that of the cells of its year in a zone.

        Args:
            epsg, bounds, year: CRS (n,), left, bottom, right, top in it (n, 4), and year (n,).
        """
        found = {}
        for code in np.unique(year).tolist():
            mine = year == code
            boxes = {}
            for zone in np.unique(epsg[mine]).tolist():
                cells = bounds[mine & (epsg == zone)]
                boxes[zone] = np.append(cells[:, :2].min(axis=0), cells[:, 2:].max(axis=0))

            def chosen(
                what: str,
                files: tuple[Raster, ...],
                code: int = code,
                boxes: dict[int, Float64Array] = boxes,
            ) -> tuple[Raster, ...]:
                numbers = {
                    i for zone in boxes for i in self._within(code, what, files, zone, boxes[zone])
                }
                return tuple(files[i] for i in sorted(numbers))

            found[code] = _reduced(self._sources[code], chosen)
        return found

    def keys(self, epsg: Ints, bounds: Float64Array, year: Ints, how: str) -> Keys:
        """The key (n,) of each cell: what rasters it touches in which order, and how it is cut.

        Args:
            epsg, bounds, year: as for `near`.
            how: what all tiles depend on.
        """
        keys = np.zeros(len(year), np.uint64)
        for code, zone in sorted({*zip(year.tolist(), epsg.tolist(), strict=True)}):
            mine = (year == code) & (epsg == zone)
            cells = bounds[mine]
            box = np.append(cells[:, :2].min(axis=0), cells[:, 2:].max(axis=0))
            source = self._sources[code]
            found = np.full(len(cells), _number([how, sources.manner(source)]))
            for what, files in sources.lists(source).items():
                numbers = self._numbers_of(code, what, files)
                near = self._within(code, what, files, zone, box)
                known = self._trees[code, what, zone][1][near] if near else np.empty((0, 4))
                touch = (known[:, :2] < cells[:, None, 2:]) & (known[:, 2:] > cells[:, None, :2])
                # A polynomial of the rasters in their order, modulo 2**64.
                for raster, touches in zip(near, touch.all(axis=2).T, strict=True):
                    found[touches] = found[touches] * MULTIPLIER + numbers[raster]
                found = found * MULTIPLIER + _number(what)
            keys[mine] = found
        return keys

    def _numbers_of(self, code: int, what: str, files: tuple[Raster, ...]) -> Keys:
        if (code, what) not in self._numbers:
            known = [_number(sources.raster_identity(raster)) for raster in files]
            self._numbers[code, what] = np.asarray(known, np.uint64)
        return self._numbers[code, what]

    def _within(
        self, code: int, what: str, files: tuple[Raster, ...], zone: int, box: Float64Array
    ) -> list[int]:
        """Numbers of the rasters of a list that share area with a box, in their order."""
        if not files:
            return []
        if (code, what, zone) not in self._trees:
            around = [placement.bounds_in(each, f"EPSG:{zone}") for each in files]
            known = np.asarray(around, np.float64)
            shapes = shapely.box(*known.T)
            shapes[~np.isfinite(known).all(axis=1)] = None
            self._trees[code, what, zone] = shapely.STRtree(shapes), known
        tree, known = self._trees[code, what, zone]
        near = tree.query(shapely.box(*box))
        inside = ((known[near, :2] < box[2:]) & (known[near, 2:] > box[:2])).all(axis=1)
        numbers: list[int] = np.sort(near[inside]).tolist()
        return numbers


def _number(value: Any) -> np.uint64:
    """A digest of a JSON-ready value as a number."""
    return np.uint64(int(fingerprint(value)[:16], 16))


def _reduced(
    source: YearSource, near: Callable[[str, tuple[Raster, ...]], tuple[Raster, ...]]
) -> YearSource:
    """A source with those of its rasters that are near some cells.

    Args:
        near: chooses them; its first argument tells lists of rasters apart.
    """
    layers: list[Layer] = []
    for i, layer in enumerate(source.labels.layers):
        if isinstance(layer, VectorLayer):
            layers.append(layer)
        elif files := near(f"layer {i}", layer.rasters):
            layers.append(replace(layer, rasters=files))
    known = replace(
        source.labels, rasters=near("labels", source.labels.rasters), layers=tuple(layers)
    )
    images, changed = near("images", source.images), near("changed", source.changed)
    return replace(source, images=images, labels=known, changed=changed)


@dataclass(frozen=True)
class Shards:
    """The shards of a plan, made when they are asked for.

    Attributes:
        folder: in which they are made.
        channels: of image and labels.
        skip_bad: see `CellShard`.
        before: the tiles that are there, whose rows are kept where they hold what would be cut.
        store: the pixels of these.
    """

    plan: TilePlan
    folder: Path
    channels: tuple[int, int]
    sheets: Sheets
    skip_bad: bool
    before: StoreRows | None = None
    store: Path = Path()

    def __len__(self) -> int:
        return -(-len(self.plan.col) // self.rows)

    @property
    def rows(self) -> int:
        """Rows of the store that a shard has; the last one may have fewer."""
        return shard_rows(self.plan.grid.size, sum(self.channels))

    def made(self, numbers: range) -> list[CellShard]:
        """Some shards, each with the rasters that it needs."""
        plan, sheets = self.plan, self.sheets
        leaving = ["skip bad"] if self.skip_bad else []
        how = fingerprint([asdict(plan.grid), self.channels, RECORD, *leaving])
        found = []
        for number in numbers:
            start = number * self.rows
            part = slice(start, start + self.rows)
            epsg, col, row, year = cells = (
                plan.epsg[part],
                plan.col[part],
                plan.row[part],
                plan.year[part],
            )
            bounds = plan.grid.bounds(col, row)
            needed = sheets.near(epsg, bounds, year)
            keys = sheets.keys(epsg, bounds, year, how)
            kept = self._kept(cells, keys)
            found.append(
                CellShard(
                    number,
                    start,
                    self.folder,
                    plan.grid,
                    self.channels,
                    *cells,
                    keys,
                    needed,
                    self.skip_bad,
                    kept,
                )
            )
        return found

    def _kept(self, cells: tuple[Ints, Ints, Ints, Ints], keys: Keys) -> Kept | None:
        """What can be kept of the tiles that are there."""
        before = self.before
        # Another geomatch may have made shards of another length.
        if before is None or len(before.shards) != -(-len(before) // self.rows):
            return None
        epsg, col, row, year = cells
        rows = np.full(len(keys), -1)
        for code in np.unique(year).tolist():
            mine = np.flatnonzero(year == code)
            label = self.sheets.label(code)
            rows[mine] = before.find(label, epsg[mine], col[mine], row[mine])
        rows[before.key[rows] != keys] = -1
        # What could not be read is tried again.
        for number in np.unique(rows[rows >= 0] // self.rows).tolist():
            if before.shards[number].get("unreadable"):
                rows[rows // self.rows == number] = -1
        if (rows < 0).all():
            return None
        return Kept.of(before, self.store, rows, self.rows)


def batches(missing: Sequence[CellShard], sheets: Sheets, workers: int) -> list[Batch]:
    """Shards in batches of those that begin in one row of cells, from west to east.

    So a file that is stored in strips is decoded once for all of them.
    """
    most = min(MOST, max(1, len(missing) // workers))
    rows: dict[tuple[int, int, int], list[CellShard]] = {}
    for shard in missing:
        first = int(shard.year[0]), int(shard.epsg[0]), int(shard.row[0])
        rows.setdefault(first, []).append(shard)
    return [
        _batch(part[start : start + most], sheets)
        for part in rows.values()
        for start in range(0, len(part), most)
    ]


def _batch(part: Sequence[CellShard], sheets: Sheets) -> Batch:
    if len(part) == 1:
        return Batch((part[0],), part[0].year_sources)
    epsg, col, row, year = (
        np.concatenate([getattr(shard, name) for shard in part])
        for name in ("epsg", "col", "row", "year")
    )
    return Batch(tuple(part), sheets.near(epsg, part[0].grid.bounds(col, row), year))

"""Shards of a plan, and the batches of them that worker processes cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import shapely

from geomatch.data.store import shard_rows
from geomatch.geo import placement
from geomatch.geo.grid import Float64Array, Ints
from geomatch.geo.labels import Layer, VectorLayer
from geomatch.geo.rasters import Raster
from geomatch.tiling.cells import Batch, CellShard
from geomatch.tiling.plan import TilePlan
from geomatch.tiling.sources import YearSource

MOST = 8
"""Shards of a batch at most, since Ctrl-C waits for its end."""


class Sheets:
    """Which rasters of each year, images and others, are near some cells."""

    def __init__(self, year_sources: Sequence[YearSource]) -> None:
        self._sources = year_sources
        self._trees: dict[tuple[int, int | str, int], tuple[shapely.STRtree, Float64Array]] = {}

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
                what: int | str,
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

    def _within(
        self, code: int, what: int | str, files: tuple[Raster, ...], zone: int, box: Float64Array
    ) -> list[int]:
        """Numbers of the rasters of a list that share area with a box."""
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
        numbers: list[int] = near[inside].tolist()
        return numbers


def _reduced(
    source: YearSource, near: Callable[[int | str, tuple[Raster, ...]], tuple[Raster, ...]]
) -> YearSource:
    """A source with those of its rasters that are near some cells.

    Args:
        near: chooses them; its first argument tells lists of rasters apart.
    """
    layers: list[Layer] = []
    for i, layer in enumerate(source.labels.layers):
        if isinstance(layer, VectorLayer):
            layers.append(layer)
        elif files := near(i, layer.rasters):
            layers.append(replace(layer, rasters=files))
    known = replace(
        source.labels, rasters=near("labels", source.labels.rasters), layers=tuple(layers)
    )
    images, changed = near("images", source.images), near("changed", source.changed)
    return replace(source, images=images, labels=known, changed=changed)


def shards_of(
    plan: TilePlan, folder: Path, channels: tuple[int, int], sheets: Sheets, skip_bad: bool
) -> list[CellShard]:
    """The shards of a plan, each with the rasters that it needs.

    Args:
        folder: in which they are made.
        channels: of image and labels.
        skip_bad: see `CellShard`.
    """
    rows = shard_rows(plan.grid.size, sum(channels))
    found = []
    for number, start in enumerate(range(0, len(plan.col), rows)):
        part = slice(start, start + rows)
        epsg, col, row, year = plan.epsg[part], plan.col[part], plan.row[part], plan.year[part]
        needed = sheets.near(epsg, plan.grid.bounds(col, row), year)
        cells = epsg, col, row, year
        found.append(
            CellShard(number, start, folder, plan.grid, channels, *cells, needed, skip_bad)
        )
    return found


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

"""The plan: which cell of which year is which row of the store, made from headers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geomatch import config
from geomatch.errors import GeomatchError, UsageError
from geomatch.geo import footprints, labels, rasters, splits
from geomatch.geo.grid import Grid, Ints, utm_epsg
from geomatch.geo.rasters import Raster
from geomatch.progress import ProgressCallback
from geomatch.tiling import sources
from geomatch.tiling.sources import Collection

MOST_CELLS = 1e8
"""Of one raster: beyond, a unit was mistaken."""


@dataclass(frozen=True)
class TilePlan:
    """Every tile that may be cut, as parallel arrays in the order of the store's rows."""

    grid: Grid
    epsg: Ints
    col: Ints
    row: Ints
    year: Ints
    split: Ints


def choose_grid(wanted: config.GridConfig, collections: Sequence[Collection]) -> Grid:
    """The ground grid asked for, what is left open taken from the first source.

    Raises:
        GeomatchError: a source lies far outside the grid's CRS.
        UsageError: the CRS or the sizes make no sense.
    """
    first = collections[0].images[0]
    metric = rasters.metric_crs(first)
    if wanted.crs == "auto":
        crs = metric
    elif wanted.crs == "utm":
        crs = "utm"
    else:
        crs = rasters.check_grid_crs(wanted.crs)
    if crs != "utm":
        for collection in collections:
            for image in collection.images:
                rasters.check_zone(image, crs)
    stride = wanted.size if wanted.stride is None else wanted.stride
    gsd = rasters.ground_sample_distance(first, metric) if wanted.gsd is None else wanted.gsd
    if wanted.size < 8 or not 0 < gsd < math.inf or not 0 < stride <= wanted.size:
        raise UsageError(
            f"grid: size {wanted.size}, gsd {gsd}, stride {stride}",
            "size is at least 8 px, gsd above 0, stride between 1 and size.",
        )
    return Grid(crs, wanted.size, gsd, stride)


def make_plan(
    settings: config.Config,
    grid: Grid,
    collections: Sequence[Collection],
    progress: ProgressCallback,
) -> TilePlan:
    """Every cell that a raster of a year touches, less those dropped between splits.

    Raises:
        GeomatchError: no ground is covered in two years.
        UsageError: the split makes no sense.
    """
    buffer = _buffer(settings.split, grid)
    cells: list[Ints] = []
    over: dict[tuple[int, int, int], set[str]] = {}
    for collection in collections:
        found = []
        for raster in collection.images:
            touched = _cells_of(raster, grid, buffer)
            found.append(touched)
            if settings.split.by == "source":
                for cell in map(tuple, touched.tolist()):
                    over.setdefault(cell, set()).add(raster.path)
        cells.append(np.unique(np.concatenate(found), axis=0))
    table = np.concatenate(cells)
    year = np.repeat(np.arange(len(cells)), [len(mine) for mine in cells])
    places, place, counts = np.unique(table, axis=0, return_inverse=True, return_counts=True)
    if len(collections) > 1 and counts.max() < 2:
        raise GeomatchError(
            "no ground is covered in more than one year: "
            + "; ".join(f"{c.year} {_extent(c)}" for c in collections),
            "Check the files' CRS and the years' paths.",
        )
    split = _split(settings.split, grid, places, over)
    epsg, col, row = places.T
    split = splits.keep_apart(grid, epsg, col, row, split, buffer)
    progress(f"grid {grid.id}: {len(places)} places, {np.sum(split < 0)} dropped between splits")
    own = split[place.reshape(-1)]
    # Tiles of one shard are of one year where they can be, and lie together on the ground, so
    # that they share open files.
    epsg, col, row = table.T
    order = np.lexsort((col, row, col // 16, row // 16, epsg, year))
    order = order[own[order] >= 0]
    return TilePlan(grid, epsg[order], col[order], row[order], year[order], own[order])


def _cells_of(raster: Raster, grid: Grid, buffer: float) -> Ints:
    """(n, 3) EPSG code, column and row of the cells a raster's box touches.

    Where each place has its own zone, cells nearer than `buffer` metres to the zone's border are
    left out, so that no ground is in cells of two zones.

    Raises:
        UsageError: they are beyond number.
    """
    found = []
    for code in _zones(raster) if grid.crs == "utm" else [int(grid.crs.removeprefix("EPSG:"))]:
        crs = f"EPSG:{code}"
        box = rasters.project_bounds(raster.crs, raster.bounds, crs)
        count = (box[2] - box[0]) * (box[3] - box[1]) / grid.step**2
        if count > MOST_CELLS:
            raise UsageError(
                f"{raster.name} would make {count:.3g} tiles of {grid.side:g} m",
                "Check grid.gsd (metres a pixel) and grid.stride.",
            )
        col, row = grid.touching(box)
        epsg = np.full(len(col), code, np.int64)
        if grid.crs == "utm":
            grown = grid.bounds(col, row) + buffer * np.array([-1, -1, 1, 1])
            corners = footprints.rings(epsg, grown, footprints.CRS84)
            mine = (utm_epsg(corners[..., 0], corners[..., 1]) == code).all(axis=1)
            epsg, col, row = epsg[mine], col[mine], row[mine]
        found.append(np.stack([epsg, col, row], axis=1))
    return np.concatenate(found)


def _zones(raster: Raster) -> list[int]:
    left, bottom, right, top = rasters.project_bounds(raster.crs, raster.bounds, "OGC:CRS84")
    lon = np.append(np.arange(left, right, 6.0), right)
    zones = [utm_epsg(lon, np.full(len(lon), lat)) for lat in (bottom, top)]
    return [int(z) for z in np.unique(zones)]


def _extent(collection: Collection) -> str:
    boxes = np.asarray(
        [rasters.project_bounds(r.crs, r.bounds, "OGC:CRS84") for r in collection.images]
    )
    left, bottom = boxes[:, :2].min(axis=0)
    right, top = boxes[:, 2:].max(axis=0)
    return f"lies within {left:.4f},{bottom:.4f} to {right:.4f},{top:.4f}"


def _split(
    wanted: config.SplitConfig, grid: Grid, places: Ints, over: dict[tuple[int, int, int], set[str]]
) -> Ints:
    epsg, col, row = places.T
    if wanted.by == "blocks":
        return splits.by_blocks(grid, epsg, col, row, wanted.block, wanted.seed)
    if wanted.by == "source":
        names = [sorted(over[tuple(cell)]) for cell in places.tolist()]
        return splits.by_source(names, wanted.validation, wanted.test)
    crs = footprints.file_crs(grid)
    validation, test = (
        labels.read_areas(sources.area_files(names), crs)
        for names in (wanted.validation, wanted.test)
    )
    return splits.by_areas(footprints.rings(epsg, grid.bounds(col, row), crs), validation, test)


def _buffer(wanted: config.SplitConfig, grid: Grid) -> float:
    if wanted.buffer is None:
        return grid.side if wanted.by == "blocks" else 0.0
    if not 0 <= wanted.buffer < math.inf:
        raise UsageError(f"split.buffer = {wanted.buffer}", "Metres, 0 or more, are expected.")
    return wanted.buffer

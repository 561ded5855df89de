"""The plan: which cell of which year goes into which row of the store, from headers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geomatch import config
from geomatch.errors import GeomatchError, UsageError
from geomatch.geo import coordinates, footprints, labels, placement, splits
from geomatch.geo.grid import Grid, Ints, utm_epsg
from geomatch.geo.rasters import Raster
from geomatch.progress import ProgressCallback
from geomatch.tiling import sources
from geomatch.tiling.sources import YearSource

BAND = 16
"""Columns and rows of cells that follow each other in the store."""
MAX_CELLS = 1e8
"""Cells of one raster; more mean that a unit is wrong."""


@dataclass(frozen=True)
class TilePlan:
    """Every tile to be cut, as parallel arrays in the order of the store's rows."""

    grid: Grid
    epsg: Ints
    col: Ints
    row: Ints
    year: Ints
    split: Ints


def choose_grid(settings: config.GridConfig, year_sources: Sequence[YearSource]) -> Grid:
    """The grid of the settings; what these leave open comes from the first raster.

    Raises:
        GeomatchError: a raster is far outside the area of the grid's CRS.
        UsageError: the CRS, size, gsd or stride is invalid.
    """
    first = year_sources[0].images[0]
    metric = placement.metric_crs(first)
    if settings.crs == "auto":
        crs = metric
    elif settings.crs == "utm":
        crs = "utm"
    else:
        crs = coordinates.check_grid_crs(settings.crs)
    if crs != "utm":
        for source in year_sources:
            for image in source.images:
                placement.check_zone(image, crs)
    size = config.TILE_SIZE if settings.size is None else settings.size
    stride = size if settings.stride is None else settings.stride
    gsd = placement.ground_sample_distance(first, metric) if settings.gsd is None else settings.gsd
    if size < 8 or not 0 < gsd < math.inf or not 0 < stride <= size:
        raise UsageError(
            f"grid: size {size}, gsd {gsd}, stride {stride}",
            "size must be at least 8 px, gsd above 0, and stride between 1 and size.",
        )
    return Grid(crs, size, gsd, stride)


def make_plan(
    settings: config.Config,
    grid: Grid,
    year_sources: Sequence[YearSource],
    progress: ProgressCallback,
) -> TilePlan:
    """Every cell that a raster of a year touches, but for those dropped between splits.

    Raises:
        GeomatchError: no ground is covered in two years.
        UsageError: the split is invalid.
    """
    buffer = _buffer(settings.split, grid)
    cells: list[Ints] = []
    covering: dict[tuple[int, int, int], set[str]] = {}  # paths of the rasters over each place
    for source in year_sources:
        found = []
        for raster in source.images:
            touched = _cells_of(raster, grid, buffer)
            found.append(touched)
            if settings.split.by == "source":
                for cell in map(tuple, touched.tolist()):
                    covering.setdefault(cell, set()).add(raster.path)
        cells.append(np.unique(np.concatenate(found), axis=0))
    table = np.concatenate(cells)
    if not len(table):
        raise GeomatchError(
            f"no tile of {grid.side:g} m lies within one UTM zone",
            "Give smaller tiles with --size, or one grid for all with --crs EPSG:n.",
        )
    year = np.repeat(np.arange(len(cells)), [len(of_year) for of_year in cells])
    places, place, counts = np.unique(table, axis=0, return_inverse=True, return_counts=True)
    if len(year_sources) > 1 and counts.max() < 2:
        raise GeomatchError(
            "no ground is covered in more than one year: "
            + "; ".join(f"{c.year} {_extent(c)}" for c in year_sources),
            "Check the CRS of the files and the paths of the years.",
        )
    split = _split(settings.split, grid, places, covering)
    epsg, col, row = places.T
    split = splits.keep_apart(grid, epsg, col, row, split, buffer)
    progress(f"grid {grid.id}: {len(places)} places, {np.sum(split < 0)} dropped between splits")
    tile_split = split[place.reshape(-1)]
    if (tile_split < 0).all():
        raise GeomatchError(
            f"no tile is left: all {len(places)} places lie between splits",
            "Choose other splits, or a smaller split.buffer or split.block.",
        )
    # Tiles of a shard are close together and, where possible, of one year, so that they share open
    # files.
    epsg, col, row = table.T
    order = np.lexsort((col, row, col // BAND, row // BAND, epsg, year))
    order = order[tile_split[order] >= 0]
    return TilePlan(grid, epsg[order], col[order], row[order], year[order], tile_split[order])


def _cells_of(raster: Raster, grid: Grid, buffer: float) -> Ints:
    """(n, 3) EPSG code, column and row of the cells that a raster's bounding box touches.

    In a "utm" grid, cells nearer than `buffer` metres to the border of their zone are left out, so
    that no ground is in cells of two zones.

    Raises:
        UsageError: there are more than `MAX_CELLS`.
    """
    found = []
    for code in _zones(raster) if grid.crs == "utm" else [int(grid.crs.removeprefix("EPSG:"))]:
        crs = f"EPSG:{code}"
        box = placement.bounds_in(raster, crs)
        count = (box[2] - box[0]) * (box[3] - box[1]) / grid.step**2
        if count > MAX_CELLS:
            raise UsageError(
                f"{raster.name} would make {count:.3g} tiles of {grid.side:g} m",
                "Check grid.gsd (metres per pixel) and grid.stride.",
            )
        col, row = grid.touching(box)
        epsg = np.full(len(col), code, np.int64)
        if grid.crs == "utm":
            grown = grid.bounds(col, row) + buffer * np.array([-1, -1, 1, 1])
            corners = footprints.rings(epsg, grown, coordinates.CRS84)
            inside = (utm_epsg(corners[..., 0], corners[..., 1]) == code).all(axis=1)
            epsg, col, row = epsg[inside], col[inside], row[inside]
        found.append(np.stack([epsg, col, row], axis=1))
    return np.concatenate(found)


def _zones(raster: Raster) -> list[int]:
    """EPSG codes of the UTM zones that a raster's bounding box touches."""
    west, south, east, north = raster.lonlat
    lon = np.append(np.arange(west, east, 3.0), east)  # within each zone, not on borders alone
    zones = [utm_epsg(lon, np.full(len(lon), lat)) for lat in (south, north)]
    return [int(z) for z in np.unique(zones)]


def _extent(source: YearSource) -> str:
    boxes = np.asarray([image.lonlat for image in source.images])
    left, bottom = boxes[:, :2].min(axis=0)
    right, top = boxes[:, 2:].max(axis=0)
    return f"lies within {left:.4f},{bottom:.4f} to {right:.4f},{top:.4f}"


def _split(
    settings: config.SplitConfig,
    grid: Grid,
    places: Ints,
    covering: dict[tuple[int, int, int], set[str]],
) -> Ints:
    epsg, col, row = places.T
    if settings.by == "blocks":
        return splits.by_blocks(grid, epsg, col, row, settings.block, settings.seed)
    if settings.by == "source":
        names = [sorted(covering[tuple(cell)]) for cell in places.tolist()]
        return splits.by_source(names, settings.validation, settings.test)
    crs = footprints.file_crs(grid)
    rings = footprints.rings(epsg, grid.bounds(col, row), crs)
    low, high = rings.min(axis=(0, 1)).tolist(), rings.max(axis=(0, 1)).tolist()
    validation, test = (
        labels.read_areas(sources.area_files(names), crs, (*low, *high))
        for names in (settings.validation, settings.test)
    )
    return splits.by_areas(rings, validation, test)


def _buffer(settings: config.SplitConfig, grid: Grid) -> float:
    if settings.buffer is None:
        return grid.side if settings.by == "blocks" else 0.0
    if not 0 <= settings.buffer < math.inf:
        raise UsageError(f"split.buffer = {settings.buffer}", "It must be 0 or more metres.")
    return settings.buffer

"""The plan: which cell of which year goes into which row of the store, from headers alone."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from geomatch import config
from geomatch.data.store_rows import StoreRows
from geomatch.errors import GeomatchError, UsageError
from geomatch.geo import coordinates, footprints, labels, placement, splits
from geomatch.geo.grid import (
    CRS84,
    HALF,
    ROW_BITS,
    Grid,
    Ints,
    cell_keys,
    cells_of,
    utm_epsg,
)
from geomatch.geo.rasters import Raster
from geomatch.progress import ProgressCallback
from geomatch.project import fingerprint, replacing
from geomatch.tiling import sources
from geomatch.tiling.sources import YearSource

BAND = 16
"""Columns and rows of cells that follow each other in the store."""
MAX_CELLS = 1e8
"""Cells of one raster; more mean that a unit is wrong."""


@dataclass(frozen=True)
class TilePlan:
    """Every tile to be cut, as parallel arrays in the order of the store's rows.

    Attributes:
        rule, block: see `StoreRows`.
    """

    grid: Grid
    epsg: Ints
    col: Ints
    row: Ints
    year: Ints
    split: Ints
    rule: str
    block: float

    def save(self, path: Path) -> None:
        """Write the plan, atomically."""
        arrays = {name: getattr(self, name).astype(kind) for name, kind in ARRAYS.items()}
        rest = json.dumps({"grid": asdict(self.grid), "rule": self.rule, "block": self.block})
        with replacing(path) as temporary, temporary.open("wb") as handle:
            np.savez_compressed(handle, rest=np.asarray(rest), **arrays)

    @classmethod
    def load(cls, path: Path) -> TilePlan:
        """Read what `save` wrote."""
        with np.load(path) as file:
            rest = json.loads(str(file["rest"]))
            arrays = {name: file[name].astype(np.int64) for name in ARRAYS}
        return cls(grid=Grid(**rest.pop("grid")), **rest, **arrays)


ARRAYS = {"epsg": np.int32, "col": np.int32, "row": np.int32, "year": np.int16, "split": np.int8}


def first_raster(year_sources: Sequence[YearSource], before: StoreRows | None) -> Raster:
    """The raster that decides what the settings of the grid leave open.

    It is that of the tiles that are there while it is among the sources, so that an earlier year
    or another sheet does not move the grid.
    """
    images = [image for source in year_sources for image in source.images]
    known = [image for image in images if before is not None and image.path == before.first]
    return known[0] if known else images[0]


def choose_grid(
    settings: config.GridConfig, year_sources: Sequence[YearSource], first: Raster
) -> Grid:
    """The grid of the settings; what these leave open comes from the first raster.

    Raises:
        GeomatchError: a raster is far outside the area of the grid's CRS.
        UsageError: the CRS, size, gsd or stride is invalid.
    """
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
    before: StoreRows | None = None,
) -> TilePlan:
    """Every cell that a raster of a year touches, but for those dropped between splits.

    Args:
        before: the tiles that are there. If their splits were drawn by the same rule, each of
            their places keeps its split, and only others are drawn or dropped.

    Raises:
        GeomatchError: no ground is covered in two years.
        UsageError: the split is invalid.
    """
    buffer = _buffer(settings.split, grid)
    drawn = _rule(settings.split, grid)
    images = [image for source in year_sources for image in source.images]
    zones = {image: _zones(image, grid) for image in images}
    codes = np.unique([code for each in zones.values() for code in each])
    by_source = settings.split.by == "source"
    rule = settings.split.validation, settings.split.test
    file_split = splits.of_files([i.path for i in images], *rule) if by_source else []
    number = itertools.count()
    covered: list[list[Ints]] = [[] for _ in splits.ALL]  # keys of places, by split of the file
    keys: list[Ints] = []  # of the cells of each year
    for source in year_sources:
        found = []
        for raster in source.images:
            touched = _cells_of(raster, grid, zones[raster], codes, buffer)
            found.append(touched)
            if by_source:
                covered[file_split[next(number)]].append(touched)
        keys.append(np.unique(np.concatenate(found)))
    if not sum(map(len, keys)):
        raise GeomatchError(
            f"no tile of {grid.side:g} m lies within one UTM zone",
            "Give smaller tiles with --size, or one grid for all with --crs EPSG:n.",
        )
    places, counts = np.unique(np.concatenate(keys), return_counts=True)
    if len(year_sources) > 1 and counts.max() < 2:
        raise GeomatchError(
            "no ground is covered in more than one year: "
            + "; ".join(f"{c.year} {_extent(c)}" for c in year_sources),
            "Check the CRS of the files and the paths of the years.",
        )
    known = block = None
    if before is not None and before.rule == drawn:
        zone, col, row = cells_of(places)
        known = before.splits_of(codes[zone], col, row)
        if (known < 0).all():
            known = None
        else:
            block = before.block
    if settings.split.block is not None:
        block = settings.split.block
    elif block is None:
        block = splits.block_side(grid, len(places))
    if by_source:
        none = np.empty(0, np.int64)
        split = splits.by_source(places, [np.concatenate([none, *each]) for each in covered])
    else:
        split = _split(settings.split, grid, codes, places, block, known)
    covered.clear()
    fixed = None
    if known is not None:
        fixed = known >= 0
        split = np.where(fixed, known, split)
    split = splits.keep_apart(grid, places, split, buffer, fixed)
    progress(f"grid {grid.id}: {len(places)} places, {np.sum(split < 0)} dropped between splits")
    parts = []
    for code, of_year in enumerate(keys):
        tile_split = split[np.searchsorted(places, of_year)]
        zone, col, row = cells_of(of_year)
        # Tiles of a shard are close together and, where possible, of one year, so that they share
        # open files.
        order = np.argsort(_in_bands(zone, col, row))
        order = order[tile_split[order] >= 0]
        year = np.full(len(order), code, np.int64)
        parts.append((codes[zone[order]], col[order], row[order], year, tile_split[order]))
    epsg, col, row, year, tile_split = map(np.concatenate, zip(*parts, strict=True))
    plan = TilePlan(grid, epsg, col, row, year, tile_split, drawn, block)
    if not len(plan.col):
        raise GeomatchError(
            f"no tile is left: all {len(places)} places lie between splits",
            "Choose other splits, or a smaller split.buffer or split.block.",
        )
    return plan


def _in_bands(zone: Ints, col: Ints, row: Ints) -> Ints:
    """Keys that order cells by zone, band of rows, band of columns, row and column."""
    keys = zone
    for part, values in (
        (row // BAND + HALF // BAND, 2 * HALF // BAND),
        (col // BAND + HALF // BAND, 2 * HALF // BAND),
        (row % BAND, BAND),
        (col % BAND, BAND),
    ):
        keys = keys * values + part
    return keys


def _cells_of(raster: Raster, grid: Grid, zones: list[int], codes: Ints, buffer: float) -> Ints:
    """Keys of the cells that a raster's bounding box touches, with the rank of zones in `codes`.

    In a "utm" grid, cells nearer than `buffer` metres to the border of their zone are left out, so
    that no ground is in cells of two zones.

    Raises:
        UsageError: there are more than `MAX_CELLS`, or they are too small.
    """
    found = []
    for code in zones:
        crs = f"EPSG:{code}"
        box = placement.bounds_in(raster, crs)
        count = (box[2] - box[0]) * (box[3] - box[1]) / grid.step**2
        if count > MAX_CELLS:
            raise UsageError(
                f"{raster.name} would make {count:.3g} tiles of {grid.side:g} m",
                "Check grid.gsd (metres per pixel) and grid.stride.",
            )
        if count > 0 and max(map(abs, box)) > (HALF - BAND) * grid.step:
            raise UsageError(
                f"{raster.name} would make tiles of {grid.side:g} m, too small to be numbered",
                "Check grid.gsd (metres per pixel) and grid.stride.",
            )
        col, row = grid.touching(box)
        if grid.crs == "utm":
            epsg = np.full(len(col), code, np.int64)
            grown = grid.bounds(col, row) + buffer * np.array([-1, -1, 1, 1])
            corners = footprints.rings(epsg, grown, CRS84)
            inside = (utm_epsg(corners[..., 0], corners[..., 1]) == code).all(axis=1)
            col, row = col[inside], row[inside]
        rank = int(np.searchsorted(codes, code))
        found.append(cell_keys(np.zeros(len(col), np.int64), col, row) + (rank << 2 * ROW_BITS))
    return np.concatenate(found)


def _zones(raster: Raster, grid: Grid) -> list[int]:
    """EPSG codes of the CRSs that a raster is cut in; in a "utm" grid, all its zones."""
    if grid.crs != "utm":
        return [int(grid.crs.removeprefix("EPSG:"))]
    west, south, east, north = raster.lonlat
    lon = np.append(np.arange(west, east, 3.0), east)  # within each zone, not on borders alone
    zones = [utm_epsg(lon, np.full(len(lon), lat)) for lat in (south, north)]
    return [int(z) for z in np.unique(zones)]


def _extent(source: YearSource) -> str:
    boxes = np.asarray([image.lonlat for image in source.images])
    left, bottom = boxes[:, :2].min(axis=0)
    right, top = boxes[:, 2:].max(axis=0)
    return f"lies within {left:.4f},{bottom:.4f} to {right:.4f},{top:.4f}"


def _rule(settings: config.SplitConfig, grid: Grid) -> str:
    """Fingerprint of the rule by which splits are drawn."""
    chosen = asdict(replace(settings, years=()))
    return fingerprint([chosen, sources.area_stamps(settings), asdict(grid)])


def _split(
    settings: config.SplitConfig,
    grid: Grid,
    codes: Ints,
    places: Ints,
    block: float,
    known: Ints | None,
) -> Ints:
    """Split of each place by blocks or by polygons."""
    zone, col, row = cells_of(places)
    epsg = codes[zone]
    if settings.by == "blocks":
        return splits.by_blocks(grid, epsg, col, row, block, settings.seed, known)
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

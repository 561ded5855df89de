"""Tile: rasters and label layers of several years, cut on one ground grid.

The plan (which cell of which year is which row of the store) is made from headers alone. Worker
processes cut shards into `tiles.partial/`, each with a record of what it was cut from, so that a
killed command can continue. When all shards are there, they replace `tiles/`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from geomatch import config
from geomatch.data.registration import YearPair
from geomatch.data.store import shard_rows
from geomatch.data.tiles import TileTable
from geomatch.errors import GeomatchError, UsageError
from geomatch.geo import labels, placement
from geomatch.geo.grid import Grid, Ints
from geomatch.geo.labels import Layer, VectorLayer
from geomatch.geo.rasters import Pixels, Raster
from geomatch.geo.views import Reading
from geomatch.geo.windows import GridReader
from geomatch.manifests import Channels, TileRequest, YearOfTiles
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, fingerprint, replace_folder, replacing
from geomatch.report.preview import preview as draw_preview
from geomatch.tiling import image_folders, registration, shards, sources
from geomatch.tiling.plan import TilePlan, choose_grid, make_plan
from geomatch.tiling.sources import YearSource
from geomatch.tiling.usable import Unreadable

RECORD = 2
"""Version of the records of shards; shards with records of another one are cut again."""


@dataclass(frozen=True)
class Tiled:
    """The result of `tile`.

    Attributes:
        grid: id of the ground grid; of images without georeference their size.
        skipped: cells or images that are not in the catalogue, having too few valid pixels or none
            that can be read.
        splits: number of tiles by split.
        unreadable: files or images that were left out, with the reason.
        registration: the shift between each two years, if `check` was asked for.
    """

    table: TileTable
    grid: str
    skipped: int
    splits: dict[str, int]
    unreadable: dict[str, str]
    registration: tuple[YearPair, ...] = ()


@dataclass(frozen=True)
class CellShard(shards.Shard):
    """A shard of cells, which one worker process cuts in one go."""

    grid: Grid
    channels: tuple[int, int]
    epsg: Ints
    col: Ints
    row: Ints
    year: Ints
    year_sources: dict[int, YearSource]
    skip_bad: bool

    def __len__(self) -> int:
        return len(self.col)

    @property
    def key(self) -> str:
        cells = [a.tolist() for a in (self.epsg, self.col, self.row, self.year)]
        used = {year: sources.identity(source) for year, source in self.year_sources.items()}
        leaving = ["skip bad"] if self.skip_bad else []
        return fingerprint([cells, used, asdict(self.grid), self.channels, RECORD, *leaving])


def tile(
    project: Project,
    settings: config.Config,
    *,
    overrides: Sequence[str] = (),
    workers: int | None = None,
    force: bool = False,
    preview: int = 0,
    check: bool = False,
    progress: ProgressCallback = silent,
) -> Tiled:
    """Cut the tiles of `settings.source` or `settings.images`.

    Relative paths in `settings` are relative to the project folder.
    `geomatch.tiling.request.tile_arguments` combines settings as the command line does.

    Args:
        overrides: the "table.key=value" strings within `settings` that `geomatch.toml` does not
            hold; they are recorded with the sources, so that the request can be repeated.
        workers: processes (threads for images without georeference); by default one per core.
        force: cut tiles again even if they are up to date.
        preview: number of places to draw as `Project.preview`.
        check: measure how far the years are shifted against each other, and draw it as
            `reports/registration.png`.

    Raises:
        GeomatchError: a source is missing or damaged, or does not fit the others.
        UsageError: a setting makes no sense.
    """
    images = settings.images.folders or settings.images.pairs
    if not (images or settings.source):
        raise UsageError(
            "no imagery is named",
            "Run: geomatch tile 2010=PATH 2020=PATH, or --folders DIR, or add [[source]].",
        )
    if check and images:
        raise UsageError(
            "--check compares years of georeferenced imagery",
            "Leave out --check, or name the imagery as YEAR=PATH.",
        )
    pairs: Sequence[YearPair] = ()
    if images:
        table = image_folders.tile(project, settings, overrides, workers, force, progress)
    else:
        table, pairs = _tile_ground(project, settings, overrides, workers, force, check, progress)
    manifest = project.tile_manifest()
    if preview:
        draw_preview(project, preview, project.preview)
    return Tiled(
        table,
        manifest.grid,
        manifest.planned - len(table),
        manifest.splits,
        manifest.unreadable or {},
        tuple(pairs),
    )


def _check(
    project: Project,
    table: TileTable,
    year_sources: Sequence[YearSource],
    unreadable: Unreadable,
    progress: ProgressCallback,
) -> Sequence[YearPair]:
    """Measure how far the years are shifted, and draw a map.

    Raises:
        UsageError: there is only one year.
    """
    from geomatch.report.registration_map import draw

    in_metres = project.tile_manifest().in_metres
    pairs = registration.measure(year_sources, table, in_metres, unreadable, progress)
    if not pairs:
        raise UsageError(
            f"--check compares years, but there is only {year_sources[0].year}",
            "Leave out --check, or name imagery of another year too.",
        )
    with replacing(project.registration_map) as temporary:
        draw(pairs, temporary)
    return pairs


def _tile_ground(
    project: Project,
    settings: config.Config,
    overrides: Sequence[str],
    workers: int | None,
    force: bool,
    check: bool,
    progress: ProgressCallback,
) -> tuple[TileTable, Sequence[YearPair]]:
    """Cut the tiles of `settings.source`, as `image_folders.tile` does those of folders."""
    settings = config.located(settings, project.root)
    partial = project.root / "tiles.partial"
    with project.lock("tiles"):
        year_sources = sources.collect(settings, partial / "collars", progress)
        channels = sources.channels(year_sources)
        grid = choose_grid(settings.grid, year_sources)
        request_fingerprint = fingerprint(
            [
                asdict(grid),
                config.as_dict(settings)["split"],
                sources.area_stamps(settings.split),
                settings.grid.min_valid,
                [sources.identity(c) for c in year_sources],
                *(["skip bad"] if settings.grid.skip_bad else []),
            ]
        )
        if not force and shards.are_made(project, request_fingerprint):
            progress("tiles are up to date")
        else:
            plan = make_plan(settings, grid, year_sources, progress)
            named = tuple(config.as_dict(settings)["source"])
            request = TileRequest(source=named, set=tuple(overrides))
            shards.prepare(partial, [len(plan.col), grid.size, sum(channels)], request, force)
            work = _shards(plan, partial, channels, year_sources, settings.grid.skip_bad)
            cut = functools.partial(_cut, workers or os.cpu_count() or 1)
            records = shards.cut(work, cut, "cutting tiles", progress)
            table = _catalogue(plan, year_sources, records, settings.grid.min_valid)
            described = _description(grid, year_sources, channels, settings.grid, table, records)
            for layer, count in (described["broken"] or {}).items():
                progress(f"labels: {count} broken shapes left out of {layer}")
            for name, share in (described["label_classes"] or {}).items():
                if not share:
                    progress(f"labels: no pixel of any tile is {name}")
            if settings.grid.skip_bad:
                found = [c.unreadable for c in year_sources] + [r["unreadable"] for r in records]
                described["unreadable"] = {
                    path: why for part in found for path, why in part.items()
                }
            shards.finish(
                partial / "tiles",
                table,
                records,
                request=request,
                request_fingerprint=request_fingerprint,
                **described,
            )
            replace_folder(partial / "tiles", project.tiles)
        try:
            table = TileTable.load(project.catalogue)
            unreadable: Unreadable = {} if settings.grid.skip_bad else None
            pairs = _check(project, table, year_sources, unreadable, progress) if check else ()
        finally:  # masks of collars are in it, which the check reads as well
            shutil.rmtree(partial, ignore_errors=True)
        return table, pairs


def _shards(
    plan: TilePlan,
    folder: Path,
    channels: tuple[int, int],
    year_sources: Sequence[YearSource],
    skip_bad: bool,
) -> list[CellShard]:
    rows = shard_rows(plan.grid.size, sum(channels))
    boxes: list[Boxes] = [defaultdict(dict) for _ in year_sources]
    found = []
    for number, start in enumerate(range(0, len(plan.col), rows)):
        part = slice(start, start + rows)
        epsg, col, row, year = plan.epsg[part], plan.col[part], plan.row[part], plan.year[part]
        bounds = plan.grid.bounds(col, row)
        needed = {}
        for code in np.unique(year).tolist():
            mine = year == code

            near = functools.partial(_near, boxes[code], epsg[mine], bounds[mine])
            needed[code] = _reduced(year_sources[code], near)
        cells = epsg, col, row, year
        found.append(
            CellShard(number, start, folder, plan.grid, channels, *cells, needed, skip_bad)
        )
    return found


Near = Callable[[int | str, tuple[Raster, ...]], tuple[Raster, ...]]


def _reduced(source: YearSource, near: Near) -> YearSource:
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


Boxes = defaultdict[int | str, dict[int, np.ndarray]]
"""(n, 4) left, bottom, right, top of the n rasters of each list, by EPSG code."""


def _near(
    boxes: Boxes, epsg: Ints, bounds: np.ndarray, what: int | str, files: tuple[Raster, ...]
) -> tuple[Raster, ...]:
    """The rasters of the list `what` whose box intersects that of some cells, in any zone."""
    wanted, known = np.zeros(len(files), bool), boxes[what]
    for zone in np.unique(epsg).tolist():
        if zone not in known:
            projected = [placement.bounds_in(f, f"EPSG:{zone}") for f in files]
            known[zone] = np.asarray(projected, np.float64).reshape(-1, 4)
        cells = bounds[epsg == zone]
        low, high = cells[:, :2].min(axis=0), cells[:, 2:].max(axis=0)
        wanted |= ((known[zone][:, :2] < high) & (known[zone][:, 2:] > low)).all(axis=1)
    return tuple(itertools.compress(files, wanted))


# Cutting


def _cut(workers: int, missing: list[CellShard]) -> Iterator[tuple[CellShard, shards.ShardRecord]]:
    workers = min(workers, len(missing))
    if workers <= 1:
        yield from ((shard, _cut_shard(shard)) for shard in missing)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_watch, initargs=(os.getpid(),))
    try:
        # A large area has many thousands of shards: keep only a few queued.
        waiting = iter(missing)
        running: dict[Future[shards.ShardRecord], CellShard] = {}
        with _interrupts_ignored():  # for the workers to inherit while they start
            for shard in itertools.islice(waiting, 4 * workers):
                running[pool.submit(_cut_shard, shard)] = shard
        while running:
            future = next(as_completed(running))
            yield running.pop(future), future.result()
            for shard in itertools.islice(waiting, 1):
                running[pool.submit(_cut_shard, shard)] = shard
    except BrokenProcessPool as error:
        raise GeomatchError(
            "a worker process died, most likely because memory ran out",
            "Run the same command again with --workers 1; finished shards are kept.",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Let this process alone handle Ctrl-C: children started within ignore it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _watch(parent: int) -> None:
    """Make a worker exit with its parent, even if that is killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _cut_shard(shard: CellShard) -> shards.ShardRecord:
    """Read the cells of a shard, write its pixels, then its record."""
    size, (bands, drawn) = shard.grid.size, shard.channels
    pixels = np.zeros((len(shard.col), size, size, bands + drawn), np.uint8)
    valid = np.zeros(len(shard.col), np.float32)
    names = [""] * len(shard.col)
    sheets = [0] * len(shard.col)
    changed: list[float | None] = [None] * len(shard.col)
    broken: Broken = {}
    unreadable: Unreadable = {} if shard.skip_bad else None
    for (code, epsg), rows in _groups(shard):
        source, crs = shard.year_sources[code], f"EPSG:{epsg}"
        with contextlib.ExitStack() as stack:
            images = stack.enter_context(
                GridReader(
                    source.images,
                    shard.grid,
                    crs,
                    stretch=source.stretch,
                    unreadable=unreadable,
                    by_centre=source.by_centre,
                )
            )
            read_labels = _label_reader(stack, source, shard, rows, crs, broken, unreadable)
            read_share = _share_reader(stack, source, shard, crs, unreadable)
            for i in rows:
                col, row = int(shard.col[i]), int(shard.row[i])
                values, mask, seen = images.read(col, row)
                names[i] = seen[0].name if seen else ""
                sheets[i] = len({raster.path for raster in seen})
                pixels[i, ..., :bands] = values
                valid[i] = mask.mean()
                if read_labels is not None:
                    pixels[i, ..., bands:] = read_labels(col, row)
                changed[i] = read_share(col, row)
    left_out = {} if unreadable is None else {"unreadable": unreadable}
    # How many pixels have each class.
    classes = np.bincount(pixels[..., -1].reshape(-1), minlength=256).tolist() if drawn else []
    return shard.write(
        pixels,
        valid=valid.tolist(),
        source=names,
        sheets=sheets,
        changed=changed,
        broken=broken,
        classes=classes,
        **left_out,
    )


def _groups(shard: CellShard) -> Iterator[tuple[tuple[int, int], Ints]]:
    keys = np.stack([shard.year, shard.epsg], axis=1)
    for year, epsg in np.unique(keys, axis=0).tolist():
        yield (year, epsg), np.flatnonzero((shard.year == year) & (shard.epsg == epsg))


def _label_reader(
    stack: contextlib.ExitStack,
    source: YearSource,
    shard: CellShard,
    rows: Ints,
    crs: str,
    broken: Broken,
    unreadable: Unreadable,
) -> Callable[[int, int], Pixels] | None:
    """A function of column and row that reads the labels of a cell, 0 where there are none.

    Args:
        broken: takes up features that could not be drawn; see `labels.LayerReader`.
    """
    known = source.labels
    if known.layers:
        bounds = shard.grid.bounds(shard.col[rows], shard.row[rows])
        low, high = bounds[:, :2].min(axis=0), bounds[:, 2:].max(axis=0)
        box = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
        drawn = stack.enter_context(
            labels.LayerReader(known.layers, shard.grid, crs, box, unreadable)
        )
        _take_up(broken, drawn.broken)
        return drawn.read
    if known.rasters:
        reader = stack.enter_context(
            GridReader(known.rasters, shard.grid, crs, nearest=True, unreadable=unreadable)
        )
        return lambda col, row: reader.read(col, row)[0]
    return None


Broken = dict[str, list[int]]
"""Ids of features that could not be drawn, by layer."""


def _take_up(broken: Broken, found: Broken) -> None:
    for layer, ids in found.items():
        broken[layer] = sorted({*broken.get(layer, ()), *ids})


def _share_reader(
    stack: contextlib.ExitStack,
    source: YearSource,
    shard: CellShard,
    crs: str,
    unreadable: Unreadable,
) -> Callable[[int, int], float | None]:
    """A function of column and row: the share of changed ground in a cell, None if unknown."""
    if not source.changed:
        return lambda col, row: None
    reader = stack.enter_context(
        GridReader(source.changed, shard.grid, crs, nearest=True, unreadable=unreadable)
    )
    boxes = np.asarray([placement.bounds_in(mask, crs) for mask in source.changed])

    def share(col: int, row: int) -> float | None:
        cell = shard.grid.bounds(np.asarray(col), np.asarray(row))
        covered = ((boxes[:, :2] < cell[2:]) & (boxes[:, 2:] > cell[:2])).all(axis=1)
        if not covered.any():
            return None
        # If the nodata value of a mask is 0, unchanged ground is not valid.
        found = float((reader.read(col, row)[0] > 0).mean())
        readable = np.asarray([mask.path not in (unreadable or {}) for mask in source.changed])
        return found if (covered & readable).any() else None

    return share


# What was cut


def _catalogue(
    plan: TilePlan,
    year_sources: Sequence[YearSource],
    records: Sequence[shards.ShardRecord],
    min_valid: float,
) -> TileTable:
    valid = np.concatenate([np.asarray(r["valid"], np.float32) for r in records])
    names = [name for record in records for name in record["source"]]
    changed = np.concatenate([np.asarray(r["changed"], np.float32) for r in records])
    sources, source = np.unique(names, return_inverse=True)
    kept = np.flatnonzero(valid >= np.float32(min_valid))
    if not len(kept):
        raise GeomatchError(
            f"no tile has {min_valid:.0%} valid pixels (the best has {valid.max(initial=0):.0%})",
            "Lower grid.min_valid, or check the nodata value of the sources with gdalinfo.",
        )
    return TileTable(
        grid=plan.grid,
        years=tuple(c.year for c in year_sources),
        sources=tuple(str(name) for name in sources),
        classes=(),
        label=np.full(len(plan.col), -1, np.int64),
        epsg=plan.epsg,
        col=plan.col,
        row=plan.row,
        year=plan.year,
        split=plan.split,
        source=source.reshape(-1).astype(np.int64),
        valid=valid,
        store_row=np.arange(len(plan.col), dtype=np.int64),
        changed=changed if any(c.changed for c in year_sources) else None,
    ).select(kept)


def _description(
    grid: Grid,
    year_sources: Sequence[YearSource],
    channels: tuple[int, int],
    settings: config.GridConfig,
    table: TileTable,
    records: Sequence[shards.ShardRecord],
) -> dict[str, Any]:
    reading = sources.reading(settings)
    sheets = np.concatenate([record["sheets"] for record in records])[table.store_row]
    fictitious = any(c.placement == "fictitious" for c in year_sources)
    broken: Broken = {}
    for record in records:
        _take_up(broken, record["broken"])
    shares: dict[str, float] = {}
    if classes := year_sources[0].labels.classes:
        pixels = np.sum([record["classes"] for record in records], axis=0)
        counted = zip(classes, pixels[1 : len(classes) + 1], strict=True)
        shares = {name: float(f"{count / pixels.sum():.3g}") for name, count in counted}
    return {
        "grid": grid.id,
        "crs": grid.crs,
        "size": grid.size,
        "gsd": grid.gsd,
        "stride": grid.stride,
        "channels": Channels(*channels),
        "placement": "fictitious" if fictitious else "real",
        "reading": asdict(reading) if reading != Reading() else None,
        "years": {
            c.year: YearOfTiles(
                files=len(c.images),
                labels=len(c.labels.rasters) + len(c.labels.layers),
                stretch=asdict(c.stretch) if c.stretch else None,
                overlap=c.overlap,
                seams=int(((sheets > 1) & (table.year == i)).sum()),
            )
            for i, c in enumerate(year_sources)
        },
        "label_classes": shares or None,
        "broken": {layer: len(ids) for layer, ids in broken.items()} or None,
    }

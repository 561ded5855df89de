"""Tile: rasters and label layers of several years, cut on one ground grid.

The plan (which cell of which year is which row of the store) is made from headers alone. Shards
are cut by worker processes into `tiles.partial/`, each with a record of what it was cut from, so
that a killed command goes on; when all are there, what was made takes the place of `tiles/`.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from geomatch import __version__, config
from geomatch.data import geoparquet
from geomatch.data.store import TileStore, shard_rows
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import GeomatchError, UsageError
from geomatch.geo import footprints, labels, rasters, sources
from geomatch.geo.grid import Grid, Ints
from geomatch.geo.plan import Plan, choose_grid, make_plan
from geomatch.geo.rasters import GridReader, Raster
from geomatch.geo.sources import Collection
from geomatch.progress import Reporter, silent
from geomatch.project import (
    FORMAT,
    Project,
    fingerprint,
    read_manifest,
    replace_folder,
    write_json,
)


@dataclass(frozen=True)
class Shard:
    """The work of one process at one time: rows `start` onwards of the store."""

    number: int
    start: int
    folder: Path
    grid: Grid
    channels: tuple[int, int]
    epsg: Ints
    col: Ints
    row: Ints
    year: Ints
    collections: dict[int, Collection]

    @property
    def record(self) -> Path:
        return self.folder / "shards" / f"{self.number:06d}.json"

    @property
    def pixels(self) -> Path:
        return self.folder / "tiles" / "pixels.zarr"

    @property
    def key(self) -> str:
        """What the shard's pixels depend on: a record with another key is of no use."""
        cells = [a.tolist() for a in (self.epsg, self.col, self.row, self.year)]
        used = {year: sources.facts(collection) for year, collection in self.collections.items()}
        return fingerprint([cells, used, asdict(self.grid), self.channels])


def tile(
    project: Project,
    settings: config.Config,
    *,
    overrides: Sequence[str] = (),
    workers: int | None = None,
    force: bool = False,
    report: Reporter = silent,
) -> TileTable:
    """Cut the tiles of `settings.source` and return their catalogue.

    Relative paths in `settings` are taken from the project's folder.

    Args:
        overrides: the "table.key=value" strings within `settings` that `geomatch.toml` does not
            hold; kept, with the sources, so that the same tiles can be asked for again.
        workers: processes; one a core by default.
        force: cut anew what is up to date.

    Raises:
        GeomatchError: a source is missing, damaged or does not fit the others.
        UsageError: a setting makes no sense.
    """
    if not settings.source:
        raise UsageError(
            "no imagery is named", "Run: geomatch tile 2010=PATH 2020=PATH, or add [[source]]."
        )
    settings = config.located(settings, project.root)
    partial = project.root / "tiles.partial"
    with project.lock("tiles"):
        collections = sources.collect(settings, report)
        channels = sources.channels(collections)
        grid = choose_grid(settings.grid, collections)
        request = fingerprint(
            [
                asdict(grid),
                config.as_dict(settings)["split"],
                sources.area_stamps(settings.split),
                settings.grid.min_valid,
                [sources.facts(c) for c in collections],
            ]
        )
        if not force and _up_to_date(project, request):
            report("tiles are up to date")
        else:
            plan = make_plan(settings, grid, collections, report)
            asked = {"source": config.as_dict(settings)["source"], "set": list(overrides)}
            _prepare(partial, plan, channels, asked, force)
            shards = _shards(plan, partial, channels, collections)
            records = _cut(shards, workers or os.cpu_count() or 1, report)
            table = _catalogue(plan, collections, records, settings.grid.min_valid)
            facts = {"request": request, "asked": asked}
            _finish(partial / "tiles", collections, channels, table, records, facts)
            replace_folder(partial / "tiles", project.tiles)
        shutil.rmtree(partial, ignore_errors=True)
        return TileTable.load(project.catalogue)


def asked_before(project: Project) -> dict[str, Any]:
    """Sources and overrides of the last `tile`, finished or not: "source" and "set" lists."""
    for path in (project.root / "tiles.partial" / "plan.json", project.tiles_manifest):
        if path.exists():
            asked: dict[str, Any] = read_manifest(path, "geomatch tile YEAR=PATH")["asked"]
            return asked
    return {"source": [], "set": []}


def _shards(
    plan: Plan, folder: Path, channels: tuple[int, int], collections: Sequence[Collection]
) -> list[Shard]:
    rows = shard_rows(plan.grid.size, sum(channels))
    # Boxes of images and of labels of each year, by zone.
    boxes: list[tuple[Boxes, Boxes]] = [({}, {}) for _ in collections]
    shards = []
    for number, start in enumerate(range(0, len(plan.col), rows)):
        part = slice(start, start + rows)
        epsg, col, row, year = plan.epsg[part], plan.col[part], plan.row[part], plan.year[part]
        bounds = plan.grid.bounds(col, row)
        needed = {}
        for code in np.unique(year).tolist():
            collection, mine = collections[code], year == code
            needed[code] = replace(
                collection,
                images=_near(collection.images, boxes[code][0], epsg[mine], bounds[mine]),
                labels=_near(collection.labels, boxes[code][1], epsg[mine], bounds[mine]),
            )
        shards.append(
            Shard(number, start, folder, plan.grid, channels, epsg, col, row, year, needed)
        )
    return shards


Boxes = dict[int, np.ndarray]
"""(n, 4) left, bottom, right, top of n rasters, by EPSG code."""


def _near(
    files: tuple[Raster, ...], boxes: Boxes, epsg: Ints, bounds: np.ndarray
) -> tuple[Raster, ...]:
    """The rasters whose box meets that of some cells, in any of their zones."""
    wanted = np.zeros(len(files), bool)
    for zone in np.unique(epsg).tolist():
        if zone not in boxes:
            projected = [rasters.project_bounds(f.crs, f.bounds, f"EPSG:{zone}") for f in files]
            boxes[zone] = np.asarray(projected, np.float64).reshape(-1, 4)
        cells = bounds[epsg == zone]
        low, high = cells[:, :2].min(axis=0), cells[:, 2:].max(axis=0)
        wanted |= ((boxes[zone][:, :2] < high) & (boxes[zone][:, 2:] > low)).all(axis=1)
    return tuple(itertools.compress(files, wanted))


# Cutting


def _prepare(
    partial: Path, plan: Plan, channels: tuple[int, int], asked: dict[str, Any], force: bool
) -> None:
    """Make the unfinished folder, or keep the one whose store has the same shape."""
    shape = [len(plan.col), plan.grid.size, sum(channels)]
    path, pixels = partial / "plan.json", partial / "tiles" / "pixels.zarr"
    # Killed while the folder took its place, what is left are records of pixels that moved.
    if force or not pixels.exists() or _asked_shape(path) != shape:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "shards").mkdir(parents=True)
    write_json(path, {"format": FORMAT, "shape": shape, "asked": asked})
    TileStore.create(pixels, *shape)


def _asked_shape(path: Path) -> Any:
    return read_manifest(path, "geomatch tile --force")["shape"] if path.exists() else None


def _cut(shards: list[Shard], workers: int, report: Reporter) -> list[dict[str, Any]]:
    """Cut what is not there yet; the records of all shards, in order."""
    records: dict[int, dict[str, Any]] = {}
    for shard in shards:
        if shard.record.exists():
            record = read_manifest(shard.record, "geomatch tile --force")
            if record["key"] == shard.key:
                records[shard.number] = record
    missing = [shard for shard in shards if shard.number not in records]
    total = sum(len(shard.col) for shard in shards)
    kept = done = total - sum(len(shard.col) for shard in missing)
    if records and missing:
        report(f"going on: {done} of {total} tiles were cut before")
    started = time.monotonic()
    for shard, record in _results(missing, min(workers, len(missing))):
        records[shard.number] = record
        done += len(shard.col)
        rate = (done - kept) / (time.monotonic() - started)
        report("cutting tiles", done, total, f"{rate:.0f} tiles/s")
    return [records[shard.number] for shard in shards]


def _results(shards: list[Shard], workers: int) -> Iterator[tuple[Shard, dict[str, Any]]]:
    if workers <= 1:
        yield from ((shard, _cut_shard(shard)) for shard in shards)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_watch, initargs=(os.getpid(),))
    try:
        # A territory has many thousands of shards: keep only a few queued.
        waiting = iter(shards)
        running: dict[Future[dict[str, Any]], Shard] = {}
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
            "a worker process died, most often for want of memory",
            "Run the same command again with --workers 1; what was cut is kept.",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Leave Ctrl-C to this process: children started within never see it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _watch(parent: int) -> None:
    """End a worker with its parent, even when that is killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _cut_shard(shard: Shard) -> dict[str, Any]:
    """Read a shard's cells, write its pixels, then its record."""
    size, (bands, drawn) = shard.grid.size, shard.channels
    pixels = np.zeros((len(shard.col), size, size, bands + drawn), np.uint8)
    valid = np.zeros(len(shard.col), np.float32)
    names = [""] * len(shard.col)
    for (code, epsg), rows in _groups(shard):
        collection, crs = shard.collections[code], f"EPSG:{epsg}"
        with contextlib.ExitStack() as stack:
            images = stack.enter_context(
                GridReader(collection.images, shard.grid, crs, stretch=collection.stretch)
            )
            read_labels = _label_reader(stack, collection, shard, rows, crs)
            for i in rows:
                col, row = int(shard.col[i]), int(shard.row[i])
                values, mask, names[i] = images.read(col, row)
                pixels[i, ..., :bands] = values
                valid[i] = mask.mean()
                if read_labels is not None:
                    pixels[i, ..., bands:] = read_labels(col, row)
    TileStore.open(shard.pixels).write(shard.start, pixels)
    record = {
        "format": FORMAT,
        "key": shard.key,
        "digest": fingerprint(pixels.tobytes()),
        "valid": valid.tolist(),
        "source": names,
    }
    write_json(shard.record, record)
    return record


def _groups(shard: Shard) -> Iterator[tuple[tuple[int, int], Ints]]:
    keys = np.stack([shard.year, shard.epsg], axis=1)
    for year, epsg in np.unique(keys, axis=0).tolist():
        yield (year, epsg), np.flatnonzero((shard.year == year) & (shard.epsg == epsg))


def _label_reader(
    stack: contextlib.ExitStack, collection: Collection, shard: Shard, rows: Ints, crs: str
) -> Callable[[int, int], rasters.Pixels] | None:
    """A function of column and row that gives a cell's labels, 0 where there are none."""
    if collection.vector is not None:
        bounds = shard.grid.bounds(shard.col[rows], shard.row[rows])
        low, high = bounds[:, :2].min(axis=0), bounds[:, 2:].max(axis=0)
        box = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
        return labels.VectorReader(collection.vector, shard.grid, crs, box).read
    if collection.labels:
        reader = stack.enter_context(GridReader(collection.labels, shard.grid, crs, nearest=True))
        return lambda col, row: reader.read(col, row)[0]
    return None


# What was cut


def _catalogue(
    plan: Plan,
    collections: Sequence[Collection],
    records: Sequence[dict[str, Any]],
    min_valid: float,
) -> TileTable:
    valid = np.concatenate([np.asarray(r["valid"], np.float32) for r in records])
    names = [name for record in records for name in record["source"]]
    sources, source = np.unique(names, return_inverse=True)
    kept = np.flatnonzero(valid >= np.float32(min_valid))
    if not len(kept):
        raise GeomatchError(
            f"no tile has {min_valid:.0%} valid pixels (the best has {valid.max(initial=0):.0%})",
            "Lower grid.min_valid, or check the sources' nodata value with gdalinfo.",
        )
    return TileTable(
        grid=plan.grid,
        years=tuple(c.year for c in collections),
        sources=tuple(str(name) for name in sources),
        epsg=plan.epsg,
        col=plan.col,
        row=plan.row,
        year=plan.year,
        split=plan.split,
        source=source.reshape(-1).astype(np.int64),
        valid=valid,
        store_row=np.arange(len(plan.col), dtype=np.int64),
    ).select(kept)


def _finish(
    folder: Path,
    collections: Sequence[Collection],
    channels: tuple[int, int],
    table: TileTable,
    records: Sequence[dict[str, Any]],
    facts: dict[str, Any],
) -> None:
    """Write the catalogue and, last, the manifest."""
    table.save(folder / "tiles.parquet", *footprints.drawing(table.grid))
    fictitious = any(c.placement == "fictitious" for c in collections)
    contents = [
        asdict(table.grid),
        [record["digest"] for record in records],
        table.store_row.tolist(),
        table.split.tolist(),
        table.years,
    ]
    years = {
        c.year: {
            "files": len(c.images),
            "labels": c.vector or len(c.labels),
            "stretch": c.stretch and asdict(c.stretch),
        }
        for c in collections
    }
    write_json(
        folder / "manifest.json",
        {
            "format": FORMAT,
            "geomatch": __version__,
            "fingerprint": fingerprint(contents),
            "grid": table.grid.id,
            "crs": table.grid.crs,
            "size": table.grid.size,
            "gsd": table.grid.gsd,
            "stride": table.grid.stride,
            "channels": {"image": channels[0], "label": channels[1]},
            "placement": "fictitious" if fictitious else "real",
            "years": years,
            "tiles": len(table),
            "planned": sum(len(record["valid"]) for record in records),
            "splits": {name: int((table.split == i).sum()) for i, name in enumerate(SPLITS)},
            **facts,
        },
    )


def _up_to_date(project: Project, request: str) -> bool:
    try:
        facts = project.tile_facts()
        geoparquet.read_footer(project.catalogue, "geomatch", "geomatch tile")
    except GeomatchError:
        return False
    return facts["request"] == request

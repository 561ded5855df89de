"""Tile: rasters and label layers of several years, cut on one ground grid.

The plan (which cell of which year is which row of the store) is made from headers alone. Worker
processes cut shards into `tiles.partial/`, each with a record of what it was cut from, so that a
killed command can continue. When all shards are there, they replace `tiles/`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from geomatch import config
from geomatch.data.registration import YearPair
from geomatch.data.tiles import TileTable
from geomatch.errors import GeomatchError, UsageError
from geomatch.geo.grid import Grid
from geomatch.geo.headers import Headers
from geomatch.geo.views import Reading
from geomatch.manifests import Channels, TileRequest, YearOfTiles
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, fingerprint, replace_folder, replacing
from geomatch.tiling import image_folders, shards, sources
from geomatch.tiling.batches import Sheets, shards_of
from geomatch.tiling.cells import Broken, CellShard, take_up
from geomatch.tiling.plan import TilePlan, choose_grid, make_plan
from geomatch.tiling.sources import YearSource
from geomatch.tiling.usable import Unreadable
from geomatch.tiling.workers import cut_all

HEADERS = ".headers.json"
"""File of the project that remembers what the headers of rasters say; it may be deleted."""


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
        from geomatch.report.preview import preview as draw_preview

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
    from geomatch.tiling import registration

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
        headers = Headers(project.root / HEADERS)
        year_sources = sources.collect(settings, headers, partial / "collars", progress)
        headers.save()
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
            sheets = Sheets(year_sources)
            work = shards_of(plan, partial, channels, sheets, settings.grid.skip_bad)

            def cut(missing: list[CellShard]) -> Iterator[tuple[CellShard, shards.ShardRecord]]:
                return cut_all(missing, sheets, workers or os.cpu_count() or 1)

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
        take_up(broken, record["broken"])
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

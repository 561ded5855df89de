"""Tile: rasters and label layers of several years, cut on one ground grid.

The plan (which cell of which year is which row of the store) is made from headers alone. Worker
processes cut shards into `tiles.partial/`, each with a record of what it was cut from, so that a
killed command can continue. When all shards are there, they replace `tiles/`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from geomatch import config
from geomatch.data.registration import YearPair
from geomatch.data.tiles import TileTable
from geomatch.errors import GeomatchError, StaleError, UsageError
from geomatch.manifests import TileRequest
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, replace_folder, replacing, restore_folder
from geomatch.shares import Share, check_same, missing
from geomatch.tiling import catalogue, cells, image_folders, shards
from geomatch.tiling.batches import Sheets, batches
from geomatch.tiling.cells import Batch, CellShard
from geomatch.tiling.job import Job, inspect
from geomatch.tiling.sources import YearSource
from geomatch.tiling.usable import Unreadable
from geomatch.tiling.workers import cut_all


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
        kept: number of planned tiles that were kept from the tiles that were there; 0 if these
            are up to date.
        stale: embeddings and indexes of the tiles that were there, which `embed` and `index` make
            again.
    """

    table: TileTable
    grid: str
    skipped: int
    splits: dict[str, int]
    unreadable: dict[str, str]
    registration: tuple[YearPair, ...] = ()
    kept: int = 0
    stale: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cut:
    """The result of `cut_share`.

    Attributes:
        tiles: number of planned tiles in the share.
        kept: how many of them are kept from the tiles that are there.
    """

    tiles: int
    kept: int


Cutter = Callable[[list[CellShard], Sheets], Iterator[tuple[CellShard, shards.ShardRecord]]]
COMMAND = "geomatch tile"
TASK = "cutting tiles"


def tile(
    project: Project,
    settings: config.Config,
    *,
    overrides: Sequence[str] = (),
    workers: int | None = None,
    force: bool = False,
    preview: int = 0,
    check: bool = False,
    join: bool = False,
    scheduler: str | None = None,
    progress: ProgressCallback = silent,
) -> Tiled:
    """Cut the tiles of `settings.source` or `settings.images`.

    Tiles of georeferenced imagery that are there already, cut from the same files in the same way,
    are kept, and so are the splits of their places.

    Relative paths in `settings` are relative to the project folder.
    `geomatch.tiling.request.tile_arguments` combines settings as the command line does.

    Args:
        overrides: the "table.key=value" strings within `settings` that `geomatch.toml` does not
            hold; they are recorded with the sources, so that the request can be repeated.
        workers: processes (threads for images without georeference); by default one per core.
        force: cut all tiles again, and draw the splits again.
        preview: number of places to draw as `Project.preview`.
        check: measure how far the years are shifted against each other, and draw it as
            `reports/registration.png`.
        join: cut nothing, since `cut_share` did.
        scheduler: address of a dask.distributed scheduler whose workers cut the tiles; they see
            the project and the imagery at the same paths.

    Raises:
        GeomatchError: a share is missing; or a source is missing or damaged, or does not fit the
            others.
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
    kept: int | None = None
    if images:
        _check_alone(join or scheduler)
        table = image_folders.tile(project, settings, overrides, workers, force, progress)
    else:
        cutter = _on_cluster(scheduler, progress) if scheduler else _on_machine(workers)
        table, pairs, kept = _tile_ground(
            project, settings, overrides, force, join, check, cutter, progress
        )
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
        kept or 0,
        () if kept is None else _stale(project, manifest.fingerprint),
    )


def cut_share(
    project: Project,
    settings: config.Config,
    share: Share,
    *,
    overrides: Sequence[str] = (),
    workers: int | None = None,
    progress: ProgressCallback = silent,
) -> Cut:
    """Cut one share of the tiles that `tile` would cut, which `tile(join=True)` puts together.

    Several processes may do so at once, also on other machines over a shared folder. What is cut
    already is not cut again, and the tiles that are there stay in use.

    Args:
        settings, overrides, workers: as for `tile`; the same settings for each share.

    Raises:
        GeomatchError: as for `tile`; or another share is of other imagery or settings.
        UsageError: a setting makes no sense; or there is another number of shares.
    """
    _check_alone(bool(settings.images.folders or settings.images.pairs))
    with (
        project.lock("tiles", shared=True),
        project.lock(f"tiles.{share.lock}"),
        contextlib.ExitStack() as planning,
    ):
        planning.enter_context(project.lock("tiles.plan", wait=True))
        noted = shards.noted_in(project.unfinished_tiles)
        if noted.get("of") == share.of:  # it is planned, so others may begin meanwhile
            planning.close()
        job = inspect(project, settings, progress, is_first=not noted)
        if shards.are_made(project, job.fingerprint):
            progress("tiles are up to date")
            return Cut(0, 0)
        if noted.get("of"):
            if not job.is_planned:
                raise GeomatchError(
                    "tiles of other imagery or settings are being cut in this project",
                    f"Give every shard the same command; to begin anew, delete {job.folder}",
                )
            check_same(share, noted["of"], COMMAND)
        plan = job.plan(_request(settings, overrides), False, share.of, progress)
        planning.close()
        sheets = Sheets(job.year_sources)
        of_plan = job.shards(plan, sheets)
        work = of_plan.made(share.part(len(of_plan)))
        _say_kept(work, progress)
        cutter = _on_machine(workers)
        records = shards.cut(work, lambda missing: cutter(missing, sheets), TASK, progress)
        return Cut(sum(map(len, work)), sum(record["kept"] for record in records))


def _check_alone(shared: Any) -> None:
    """Check that tiles without georeference are not to be cut by several machines."""
    if shared:
        raise UsageError(
            "--shard, --join and --scheduler are for georeferenced imagery",
            "Images without georeference are read by one machine: leave them out.",
        )


def _on_machine(workers: int | None) -> Cutter:
    return lambda missing, sheets: cut_all(missing, sheets, workers or os.cpu_count() or 1)


def _on_cluster(address: str, progress: ProgressCallback) -> Cutter:
    from geomatch import cluster

    def cut(
        missing: list[CellShard], sheets: Sheets
    ) -> Iterator[tuple[CellShard, shards.ShardRecord]]:
        if not missing:
            return
        with cluster.connect(address, missing[0].folder, progress) as connected:
            work = batches(missing, sheets, connected.threads)
            for batch, records in connected.run(cells.cut, work, _named, progress):
                yield from zip(batch.shards, records, strict=True)

    return cut


def _named(batch: Batch) -> str:
    return f"shard {batch.shards[0].number}"


def _stale(project: Project, fingerprint: str) -> tuple[str, ...]:
    """Embeddings and indexes of other tiles."""
    from geomatch.data.embeddings import read_manifest

    found = []
    for name in project.embedding_names():
        with contextlib.suppress(StaleError):
            if read_manifest(project.embeddings / f"{name}.parquet").tiles != fingerprint:
                found.append(f"embeddings {name}")
    for name in project.index_names():
        with contextlib.suppress(StaleError):
            if project.index_manifest(name).tiles != fingerprint:
                found.append(f"index {name}")
    return tuple(found)


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
    force: bool,
    join: bool,
    check: bool,
    cutter: Cutter,
    progress: ProgressCallback,
) -> tuple[TileTable, Sequence[YearPair], int | None]:
    """Cut the tiles of `settings.source`, as `image_folders.tile` does those of folders.

    Returns:
        The catalogue, the shifts between years, and how many planned tiles were kept, None if all
        were up to date.
    """
    with project.lock("tiles"):
        restore_folder(project.tiles)
        job = inspect(project, settings, progress, force=force)
        kept = None
        if not force and shards.are_made(project, job.fingerprint):
            progress("tiles are up to date")
        else:
            kept = _make(job, _request(settings, overrides), force, join, cutter, progress)
        try:
            table = TileTable.load(project.catalogue)
            unreadable: Unreadable = {} if settings.grid.skip_bad else None
            pairs = _check(project, table, job.year_sources, unreadable, progress) if check else ()
        finally:  # masks of collars are in it, which the check reads as well
            shutil.rmtree(job.folder, ignore_errors=True)
        return table, pairs, kept


def _make(
    job: Job,
    request: TileRequest,
    force: bool,
    join: bool,
    cutter: Cutter,
    progress: ProgressCallback,
) -> int:
    """Cut what is missing, write the tables and replace the tiles; how many tiles were kept.

    Raises:
        GeomatchError: `join`, but a share is missing.
    """
    noted = shards.noted_in(job.folder)
    of = noted["of"] if job.is_planned else 0
    if join and not job.is_planned:
        raise GeomatchError(
            "there are no shards of these tiles to join",
            f"Run: {COMMAND} --shard 1/N and so on first, or {COMMAND} alone.",
        )
    plan = job.plan(request, force, of, progress)
    sheets = Sheets(job.year_sources)
    of_plan = job.shards(plan, sheets)
    work = of_plan.made(range(len(of_plan)))
    if join and (lacking := {shard.number for shard in work} - set(shards.done(work))):
        raise missing(lacking, len(work), of, COMMAND)
    _say_kept(work, progress)
    records = shards.cut(work, lambda missing: cutter(missing, sheets), TASK, progress)
    grid, years, settings = job.grid, job.year_sources, job.settings.grid
    table = catalogue.catalogue(plan, years, records, settings.min_valid)
    described = catalogue.description(grid, years, job.channels, settings, table, records)
    for layer, count in (described["broken"] or {}).items():
        progress(f"labels: {count} broken shapes left out of {layer}")
    for name, share in (described["label_classes"] or {}).items():
        if not share:
            progress(f"labels: no pixel of any tile is {name}")
    if settings.skip_bad:
        found = [c.unreadable for c in years] + [r["unreadable"] for r in records]
        described["unreadable"] = {path: why for part in found for path, why in part.items()}
    made = job.folder / "tiles"
    rows = catalogue.store_rows(plan, years, work, records, job.first)
    rows.save(made / job.project.store_rows.name)
    shards.finish(
        made,
        table,
        records,
        request=request,
        request_fingerprint=job.fingerprint,
        **described,
    )
    replace_folder(made, job.project.tiles)
    return sum(record["kept"] for record in records)


def _request(settings: config.Config, overrides: Sequence[str]) -> TileRequest:
    return TileRequest(source=tuple(config.as_dict(settings)["source"]), set=tuple(overrides))


def _say_kept(work: Sequence[CellShard], progress: ProgressCallback) -> None:
    kept = sum(int((shard.kept.rows >= 0).sum()) for shard in work if shard.kept)
    if kept:
        total = sum(map(len, work))
        progress(f"{kept} tiles are kept as they are, {total - kept} are cut")

"""Index: embeddings to a searchable index, with the columns of a result for each tile."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from geomatch.config import IndexConfig
from geomatch.data import index_rows
from geomatch.data.embeddings import DescriptorFile
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import GeomatchError, UsageError
from geomatch.geo import footprints
from geomatch.geo.grid import CRS84
from geomatch.manifests import EmbeddingManifest, IndexEngine, IndexManifest
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, replace_folder, write_record
from geomatch.search import engines
from geomatch.search.exact import Metric, Rows
from geomatch.search.flat import Dtype
from geomatch.search.whitening import WHITENING, Whitened, Whitening

if TYPE_CHECKING:
    from geomatch.search.pgvector import Part

SAMPLE = 100_000
"""Training descriptors that a whitening is fitted on at most."""


@dataclass(frozen=True)
class Indexed:
    """The result of `index`.

    Attributes:
        where: its folder, or the URL of its database without a password.
        tiles: number of tiles.
        engine: how they are searched.
    """

    name: str
    where: str
    tiles: int
    engine: IndexEngine


def index(
    project: Project,
    *,
    run: str | None = None,
    settings: IndexConfig | None = None,
    to: str | None = None,
    progress: ProgressCallback = silent,
) -> Indexed:
    """Build an index of embeddings for `query`.

    Args:
        run: name of the embeddings ("RUN@STEP"); by default the latest.
        settings: by default those of an empty `geomatch.toml`.
        to: URL of a PostgreSQL database with pgvector; by default a folder of the project.

    Raises:
        GeomatchError: there are no embeddings, or they are stale, or too few of them to whiten by;
            the database cannot be used.
    """
    settings = settings or IndexConfig()
    if to is not None and settings.whiten:
        raise UsageError("a database takes descriptors as they are", "Index without --whiten.")
    project.tile_manifest()
    name = project.embeddings_of(run)
    source = project.embeddings / f"{name}.parquet"
    with project.lock("tiles", shared=True), project.lock(f"index/{name}"):
        descriptors = DescriptorFile(source)
        origin = descriptors.manifest
        project.check_fresh(origin)
        tiles = TileTable.load(project.catalogue)
        if to is not None:
            from geomatch.search import pgvector

            manifest = _manifest(origin, tiles, settings, pgvector.ENGINE)
            with pgvector.connect(to) as connection:
                pgvector.write(connection, manifest, _parts(descriptors, tiles, progress))
            return Indexed(name, pgvector.shown(to), len(tiles), manifest.engine)
        partial = project.indexes / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        rows: Rows = descriptors
        if settings.whiten:
            rows = whitened(descriptors, tiles)
            rows.whitening.save(partial / WHITENING)
            progress(f"whitened to {rows.whitening.size} values")
        default: Dtype = "float32" if settings.engine == "exact" else "int8"
        wanted = engines.Wanted(
            kind=settings.engine,
            dtype=default if settings.dtype == "auto" else settings.dtype,
            metric=_metric(origin, settings),
            memory=settings.memory * 1e9,
            recall=settings.recall,
        )
        order = np.argsort(tiles.year, kind="stable")
        engine = engines.build(partial, rows, order, _counts(tiles), wanted, progress)
        index_rows.write(partial, tiles, footprints.lonlat)
        # Imported here, since a query that makes an index should start as quickly as others.
        from geomatch.evaluation import no_match

        if known := no_match.reference(rows, wanted.metric, tiles):
            known.confidence().save(partial)
        manifest = _manifest(origin, tiles, settings, engine)
        write_record(partial / "manifest.json", manifest)
        replace_folder(partial, project.indexes / name)
        return Indexed(name, str(project.indexes / name), len(tiles), engine)


def whitened(descriptors: DescriptorFile, tiles: TileTable) -> Whitened:
    """Descriptors seen through a whitening that is fitted on those of training tiles alone."""
    training = np.flatnonzero(tiles.split == SPLITS.index("train"))
    sample = training[:: -(-len(training) // SAMPLE) or 1]
    size = min(descriptors.manifest.dimension, len(sample) // 2)
    if size < 2:
        raise GeomatchError(
            f"whitening needs training tiles, of which there are {len(sample)}",
            "Index without --whiten.",
        )
    fitted = Whitening.fit(descriptors[sample], tiles.year[sample], size)
    return Whitened(descriptors, fitted)


def _metric(origin: EmbeddingManifest, settings: IndexConfig) -> Metric:
    return origin.metric if settings.metric == "auto" else settings.metric


def _counts(tiles: TileTable) -> tuple[int, ...]:
    """Number of tiles of each year."""
    return tuple(np.bincount(tiles.year, minlength=len(tiles.years)).tolist())


def _manifest(
    origin: EmbeddingManifest, tiles: TileTable, settings: IndexConfig, engine: IndexEngine
) -> IndexManifest:
    return IndexManifest(
        name=origin.name,
        tiles=origin.tiles,
        model=origin.model,
        run=origin.run,
        run_id=origin.run_id,
        step=origin.step,
        metric=_metric(origin, settings),
        centres=origin.centres,
        years=tiles.years,
        counts=_counts(tiles),
        embeddings=origin.fingerprint,
        engine=engine,
        whitened=settings.whiten or None,
    )


def _parts(
    descriptors: DescriptorFile, tiles: TileTable, progress: ProgressCallback
) -> Iterator[Part]:
    """The tiles in the order of an index, a few at a time."""
    order, done = np.argsort(tiles.year, kind="stable"), 0
    for part in index_rows.in_parts(tiles):
        rings = None if part.grid is None else footprints.rings(part.epsg, part.bounds(), CRS84)
        vectors = descriptors[order[done : done + len(part)]]
        yield index_rows.columns_of(part, footprints.lonlat), rings, vectors
        done += len(part)
        progress("index", done, len(tiles))

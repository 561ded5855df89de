"""Index: embeddings to a searchable exact index, with the columns of a result for each tile."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomatch.config import IndexConfig
from geomatch.data import index_rows
from geomatch.data.embeddings import DescriptorFile
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import GeomatchError
from geomatch.evaluation import no_match
from geomatch.geo import footprints
from geomatch.manifests import IndexManifest
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, replace_folder, write_record
from geomatch.search import flat
from geomatch.search.exact import Metric
from geomatch.search.whitening import WHITENING, FileRows, Whitened, Whitening

SAMPLE = 100_000
"""Training descriptors that a whitening is fitted on at most."""


@dataclass(frozen=True)
class Indexed:
    """The result of `index`: name and folder of the index, and its number of tiles."""

    name: str
    folder: Path
    tiles: int


def index(
    project: Project,
    *,
    run: str | None = None,
    settings: IndexConfig | None = None,
    progress: ProgressCallback = silent,
) -> Indexed:
    """Build an index of embeddings for `query`.

    Args:
        run: name of the embeddings ("RUN@STEP"); by default the latest.
        settings: by default those of an empty `geomatch.toml`.

    Raises:
        GeomatchError: there are no embeddings, or they are stale, or too few of them to whiten by.
    """
    settings = settings or IndexConfig()
    project.tile_manifest()
    name = project.embeddings_of(run)
    source = project.embeddings / f"{name}.parquet"
    with project.lock("tiles", shared=True), project.lock(f"index/{name}"):
        descriptors = DescriptorFile(source)
        origin = descriptors.manifest
        project.check_fresh(origin)
        tiles = TileTable.load(project.catalogue)
        partial = project.indexes / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        chosen: Metric = origin.metric if settings.metric == "auto" else settings.metric
        rows: FileRows = descriptors
        if settings.whiten:
            rows = whitened(descriptors, tiles)
            rows.whitening.save(partial / WHITENING)
            progress(f"whitened to {rows.whitening.size} values")
        counts = [int((tiles.year == year).sum()) for year in range(len(tiles.years))]
        for year, label in enumerate(tiles.years):
            flat.write(partial, year, _of_year(rows, tiles, year), chosen)
            progress(f"indexed {counts[year]} tiles" + (f" of {label}" if label else ""))
        index_rows.write(partial, tiles, footprints.lonlat)
        if known := no_match.reference(rows, chosen, tiles):
            known.confidence().save(partial)
        manifest = IndexManifest(
            name=name,
            tiles=origin.tiles,
            model=origin.model,
            run=origin.run,
            run_id=origin.run_id,
            step=origin.step,
            metric=chosen,
            centres=origin.centres,
            years=tiles.years,
            counts=tuple(counts),
            embeddings=origin.fingerprint,
            whitened=settings.whiten or None,
        )
        write_record(partial / "manifest.json", manifest)
        replace_folder(partial, project.indexes / name)
        return Indexed(name, project.indexes / name, len(tiles))


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


def _of_year(file: FileRows, tiles: TileTable, year: int) -> Iterator[NDArray[np.float32]]:
    """The descriptors of a year, one row group of the file at a time."""
    for start, stop in pairwise(file.starts.tolist()):
        rows = start + np.flatnonzero(tiles.year[start:stop] == year)
        if len(rows):
            yield file[rows]

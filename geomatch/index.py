"""Index: embeddings to a searchable exact index, with the columns of a result for each tile."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from geomatch.data import index_rows
from geomatch.data.embeddings import DescriptorFile
from geomatch.data.tiles import TileTable
from geomatch.evaluation import no_match
from geomatch.geo import footprints
from geomatch.manifests import IndexManifest
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, replace_folder, write_record
from geomatch.search import flat
from geomatch.search.exact import Metric


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
    metric: Literal["auto", "cosine", "euclidean"] = "auto",
    progress: ProgressCallback = silent,
) -> Indexed:
    """Build an index of embeddings for `query`.

    Args:
        run: name of the embeddings ("RUN@STEP"); by default the latest.
        metric: of queries; "auto" is that of the loss of the run.

    Raises:
        GeomatchError: there are no embeddings, or they are stale.
    """
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
        chosen: Metric = origin.metric if metric == "auto" else metric
        counts = [int((tiles.year == year).sum()) for year in range(len(tiles.years))]
        for year, label in enumerate(tiles.years):
            flat.write(partial, year, _of_year(descriptors, tiles, year), chosen)
            progress(f"indexed {counts[year]} tiles" + (f" of {label}" if label else ""))
        index_rows.write(partial, tiles, footprints.lonlat)
        if known := no_match.reference(descriptors, chosen, tiles):
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
        )
        write_record(partial / "manifest.json", manifest)
        replace_folder(partial, project.indexes / name)
        return Indexed(name, project.indexes / name, len(tiles))


def _of_year(file: DescriptorFile, tiles: TileTable, year: int) -> Iterator[NDArray[np.float32]]:
    """The descriptors of a year, one row group of the file at a time."""
    for start, stop in pairwise(file.starts.tolist()):
        rows = start + np.flatnonzero(tiles.year[start:stop] == year)
        if len(rows):
            yield file[rows]

"""Index: embeddings to a searchable exact index, with the columns of a result for each tile."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from geomatch.data import embeddings
from geomatch.data.tiles import TileTable
from geomatch.geo import footprints
from geomatch.manifests import IndexManifest
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, replace_folder, write_record
from geomatch.search import flat
from geomatch.search.exact import Metric

ROWS = 65_536
ROW = pa.schema(
    [
        ("id", pa.string()),
        ("year", pa.string()),
        ("lon", pa.float64()),
        ("lat", pa.float64()),
        ("epsg", pa.int64()),
        ("x", pa.float64()),
        ("y", pa.float64()),
        ("store_row", pa.int64()),
    ]
)


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
        origin = embeddings.read_manifest(source)
        project.check_fresh(origin)
        tiles = TileTable.load(project.catalogue)
        partial = project.indexes / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        chosen: Metric = origin.metric if metric == "auto" else metric
        counts = [int((tiles.year == year).sum()) for year in range(len(tiles.years))]
        for year, label in enumerate(tiles.years):
            flat.write(partial, year, _of_year(source, tiles, year), chosen)
            progress(f"indexed {counts[year]} tiles" + (f" of {label}" if label else ""))
        _write_rows(partial / "tiles.parquet", tiles)
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


def _of_year(source: Path, tiles: TileTable, year: int) -> Iterator[NDArray[np.float32]]:
    """The descriptors of a year, one row group of the file at a time."""
    file, start = pq.ParquetFile(source), 0
    for group in range(file.num_row_groups):
        column = file.read_row_group(group, columns=["embedding"])["embedding"].combine_chunks()
        vectors = column.flatten().to_numpy().reshape(len(column), -1)
        yield vectors[tiles.year[start : start + len(vectors)] == year]
        start += len(vectors)


def _write_rows(path: Path, tiles: TileTable) -> None:
    """Write id, year, centre and row in the pixel store of each tile, sorted by year.

    Values that a tile lacks are null.
    """
    order = np.argsort(tiles.year, kind="stable")
    writer: Any = None
    for start in range(0, len(order), ROWS):
        part = tiles.select(order[start : start + ROWS])
        columns = {
            "id": part.ids(),
            "year": [part.years[code] or None for code in part.year.tolist()],
            "store_row": part.store_row,
        }
        if part.grid is not None:
            centres = part.centres()
            lonlat = footprints.lonlat(part.epsg, centres)
            columns |= {"lon": lonlat[:, 0], "lat": lonlat[:, 1], "epsg": part.epsg}
            columns |= {"x": centres[:, 0], "y": centres[:, 1]}
        nulls = pa.nulls(len(part))
        table = pa.table([columns.get(name, nulls) for name in ROW.names], schema=ROW)
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    writer.close()

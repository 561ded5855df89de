"""Descriptors of tiles, saved as GeoParquet.

Two keys of the file's metadata are about them: "emb" tells any reader what the file holds, after
the geoembeddings convention, and "geomatch" is the manifest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from geomatch.data import geoparquet
from geomatch.data.tiles import SPLITS, Footprint, TileTable
from geomatch.errors import StaleError
from geomatch.geo.grid import Grid
from geomatch.manifests import EmbeddingManifest, IndexManifest
from geomatch.project import to_record

FOOTER = "geomatch"
"""Key of the manifest in the file's metadata."""


@dataclass(frozen=True)
class Embeddings:
    """Descriptors (n, d) float32, one row per tile, in the order of the catalogue."""

    vectors: NDArray[np.float32]
    manifest: EmbeddingManifest

    def save(
        self, path: Path, tiles: TileTable, footprint: Footprint | None, crs: dict[str, Any] | None
    ) -> None:
        """Write GeoParquet; see `write`."""
        write(path, [self.vectors], tiles, footprint, crs, self.manifest)

    @classmethod
    def load(cls, path: Path) -> Embeddings:
        """Read what `save` wrote.

        Raises:
            StaleError: the file is damaged.
        """
        file = DescriptorFile(path)
        return cls(file[:], file.manifest)


class DescriptorFile:
    """Descriptors (n, d) float32 that stay in their file; rows are read by a slice or indices.

    Attributes:
        starts: (groups + 1,) first row of each row group, and the number of rows.

    Raises:
        StaleError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.manifest = read_manifest(path)
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise StaleError(f"{path} cannot be read: {error}", "Run: geomatch embed") from error
        groups = map(self._file.metadata.row_group, range(self._file.num_row_groups))
        self.starts = np.cumsum([0, *(group.num_rows for group in groups)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, rows: slice | NDArray[np.int64], /) -> NDArray[np.float32]:
        """The descriptors at `rows`, of which a row group at a time is in memory beside them."""
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        order = np.argsort(rows, kind="stable")
        group_of = np.searchsorted(self.starts, rows[order], "right") - 1
        found = np.empty((len(rows), self.manifest.dimension), np.float32)
        for group in np.unique(group_of).tolist():
            at = order[slice(*np.searchsorted(group_of, [group, group + 1]))]
            column = self._file.read_row_group(group, columns=["embedding"])["embedding"]
            vectors = column.combine_chunks().flatten().to_numpy().reshape(len(column), -1)
            found[at] = vectors[rows[at] - self.starts[group]]
        return found


def read_manifest(path: Path) -> EmbeddingManifest:
    """Read the manifest from an embeddings file.

    Raises:
        StaleError: the file is damaged or of an older version.
    """
    command = "geomatch embed"
    values = geoparquet.read_footer(path, FOOTER, command)
    return to_record(values, EmbeddingManifest, path, command)


def convention(dimension: int, grid: Grid | None) -> dict[str, Any]:
    """The fields of the STAC Embedding Extension 0.0.1 (geoembeddings.org) that describe a file.

    Args:
        dimension: values of a descriptor.
        grid: None without georeference; then tiles have no layout, and pixels no size in metres.
    """
    fields: dict[str, Any] = {
        "emb:type": "chip",
        "emb:dimensions": dimension,
        "data_type": "float32",
    }
    if grid is not None:
        fields["gsd"] = grid.gsd
        fields["emb:chip_layout"] = {
            "layout_type": "regular_grid",
            "chip_size": [grid.size, grid.size],
            "stride": [grid.stride, grid.stride],
            "grid_id": grid.id,
        }
    return fields


def check_index(index: IndexManifest, path: Path) -> None:
    """Check that an index was made from the embeddings in `path`, if those still exist.

    Raises:
        StaleError: the embeddings were made again since.
    """
    if path.exists() and read_manifest(path).fingerprint != index.embeddings:
        raise StaleError(
            f"index {index.name} was made from other embeddings", "Run: geomatch index"
        )


def centres(parts: Iterable[NDArray[np.float32]], tiles: TileTable) -> NDArray[np.float32]:
    """Mean descriptor (years, d) of each year's training tiles, or of all its tiles if it has none.

    Args:
        parts: (n_i, d) descriptors, together those of all `tiles` in order.
    """
    sums: NDArray[np.floating] | float = 0.0
    counts, start = np.zeros((2, len(tiles.years))), 0
    training = tiles.split == SPLITS.index("train")
    for part in parts:
        rows = slice(start, start + len(part))
        start = rows.stop
        # (2, years, n): membership in each year, of training tiles and of all tiles.
        of_year = tiles.year[rows] == np.arange(len(tiles.years))[:, None]
        member = np.stack([of_year & training[rows], of_year]).astype(np.float32)
        sums, counts = sums + member @ part, counts + member.sum(axis=2)
    means = sums / np.maximum(counts, 1)[..., None]
    return np.where(counts[0, :, None] > 0, means[0], means[1]).astype(np.float32)


def write(
    path: Path,
    parts: Iterable[NDArray[np.float32]],
    tiles: TileTable,
    footprint: Footprint | None,
    crs: dict[str, Any] | None,
    manifest: EmbeddingManifest,
) -> None:
    """Write descriptors part by part in bounded memory.

    Args:
        parts: (n_i, d) float32 descriptors, together those of all `tiles` in order.
        footprint, crs: see `TileTable.save`.
    """
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("geometry", pa.binary()),
            ("bbox", geoparquet.BBOX),
            ("datetime", pa.timestamp("ms", tz="UTC")),
            ("year", pa.string()),
            ("embedding", pa.list_(pa.float32(), manifest.dimension)),
        ]
    )

    def tables() -> Iterable[pa.Table]:
        start = 0
        for part in parts:
            rows = tiles.arrow(footprint, slice(start, start + len(part)))
            start += len(part)
            column = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), part.shape[1])
            yield rows.append_column("embedding", column).select(schema.names)

    footer = {"emb": convention(manifest.dimension, tiles.grid), FOOTER: manifest.as_json()}
    geoparquet.write(path, schema, tables(), crs, footer)

"""An index, opened to be searched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from geomatch.data import embeddings
from geomatch.data.index_rows import IndexRows, Rows
from geomatch.errors import UsageError
from geomatch.manifests import IndexManifest, TileManifest
from geomatch.project import Project, latest
from geomatch.search import pgvector
from geomatch.search.engines import LocalVectors, Vectors


@dataclass(frozen=True)
class OpenIndex:
    """An open index of a project: its vectors, a row for each vector, and the manifests."""

    project: Project
    vectors: Vectors
    rows: Rows
    manifest: IndexManifest
    tiles: TileManifest

    @classmethod
    @contextmanager
    def open(cls, project: Project, name: str | None) -> Iterator[Self]:
        """Open an index, and close it when the block ends.

        Args:
            name: or the URL of a database; by default the latest of the project.

        Raises:
            GeomatchError: there is none.
            StaleError: it is stale or damaged.
        """
        tiles = project.tile_manifest()
        if name is not None and pgvector.is_url(name):
            with pgvector.connect(name) as connection:
                found = pgvector.PostgresIndex(connection, tiles.fingerprint, name)
                project.check_fresh(found.manifest)
                yield cls(project, found, found, found.manifest, tiles)
            return
        name = latest(project.index_names(), name, "index", "geomatch index")
        folder = project.indexes / name
        manifest = project.index_manifest(name)
        project.check_fresh(manifest)
        embeddings.check_index(manifest, project.embeddings / f"{name}.parquet")
        rows = IndexRows(folder, manifest.counts)
        yield cls(project, LocalVectors(folder, manifest, rows), rows, manifest, tiles)

    def year_code(self, year: str) -> int:
        """The code of a year.

        Raises:
            UsageError: the index has no such year.
        """
        if year not in self.manifest.years:
            available = ", ".join(filter(None, self.manifest.years))
            raise UsageError(
                f"the index has no year {year}",
                f"Available: {available}." if available else "Its images have no years.",
            )
        return self.manifest.years.index(year)

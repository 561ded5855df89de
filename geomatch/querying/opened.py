"""An index, opened to be searched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from geomatch.data import embeddings
from geomatch.data.index_rows import IndexRows
from geomatch.errors import UsageError
from geomatch.manifests import IndexManifest, TileManifest
from geomatch.project import Project, latest
from geomatch.search.flat import FlatIndex


@dataclass(frozen=True)
class OpenIndex:
    """An open index of a project: its vectors, a row for each vector, and the manifests."""

    project: Project
    vectors: FlatIndex
    rows: IndexRows
    manifest: IndexManifest
    tiles: TileManifest

    @classmethod
    def open(cls, project: Project, name: str | None) -> Self:
        """Open an index.

        Args:
            name: by default the latest.

        Raises:
            GeomatchError: there is none.
            StaleError: it is stale or damaged.
        """
        name = latest(project.index_names(), name, "index", "geomatch index")
        folder = project.indexes / name
        manifest = project.index_manifest(name)
        project.check_fresh(manifest)
        embeddings.check_index(manifest, project.embeddings / f"{name}.parquet")
        vectors = FlatIndex(folder, manifest.counts, manifest.metric)
        return cls(project, vectors, IndexRows(folder), manifest, project.tile_manifest())

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

    def check_ground(self, option: str) -> None:
        """Check that tiles have footprints, which an option needs.

        Raises:
            UsageError: they have no georeference.
        """
        if not self.tiles.on_ground:
            raise UsageError(
                f"{option} needs footprints, but the images have no georeference",
                "Write --csv FILE instead.",
            )

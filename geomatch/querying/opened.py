"""An index, opened to be searched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from geomatch.data import embeddings
from geomatch.data.confidence import Confidence
from geomatch.data.index_rows import IndexRows
from geomatch.errors import StaleError, UsageError
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
    confidence: Confidence | None

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
        manifest = _fresh_manifest(project, name)
        folder = project.indexes / name
        vectors = FlatIndex(folder, manifest.counts, manifest.metric)
        rows, confidence = IndexRows(folder), Confidence.load(folder)
        return cls(project, vectors, rows, manifest, project.tile_manifest(), confidence)

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


def wanted(project: Project, name: str | None) -> tuple[str, bool]:
    """The name of the index to search, and whether it is there and fresh.

    Args:
        name: see `OpenIndex.open`; by default that of the latest embeddings, or of the latest index
            where that is newer.

    Raises:
        GeomatchError: there are neither embeddings nor an index, or none of that name.
    """
    made = {each: project.indexes / each / "manifest.json" for each in project.index_names()}
    origins = {each: project.embeddings / f"{each}.parquet" for each in project.embedding_names()}
    paths = [*made.items(), *origins.items()]
    names = [each for each, path in sorted(paths, key=lambda pair: pair[1].stat().st_mtime_ns)]
    chosen = latest(names, name, "index" if names else "embeddings", "geomatch embed")
    try:
        _fresh_manifest(project, chosen)
    except StaleError:
        return chosen, False
    return chosen, True


def _fresh_manifest(project: Project, name: str) -> IndexManifest:
    manifest = project.index_manifest(name)
    project.check_fresh(manifest)
    embeddings.check_index(manifest, project.embeddings / f"{name}.parquet")
    return manifest

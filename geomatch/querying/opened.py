"""An index, opened to be searched."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from geomatch.data import embeddings
from geomatch.data.confidence import Confidence
from geomatch.data.index_rows import IndexRows, Rows
from geomatch.errors import GeomatchError, StaleError, UsageError
from geomatch.manifests import IndexManifest, TileManifest
from geomatch.project import Project, latest
from geomatch.search import pgvector
from geomatch.search.engines import LocalVectors, Vectors
from geomatch.search.exact import unit
from geomatch.search.whitening import WHITENING, Whitening

if TYPE_CHECKING:
    from geomatch.data.store import TileStore
    from geomatch.runs import Encoding

NONE = np.empty((0, 0), np.float32)


@dataclass(frozen=True)
class OpenIndex:
    """An open index of a project: its vectors, a row for each vector, and the manifests.

    As a context manager it closes the connection to its database, if it has one.
    """

    project: Project
    vectors: Vectors
    rows: Rows
    manifest: IndexManifest
    tiles: TileManifest
    confidence: Confidence | None = None
    whitening: Whitening | None = None
    _connected: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._connected.__exit__(*error)

    @classmethod
    def open(cls, project: Project, name: str | None) -> Self:
        """Open an index.

        Args:
            name: or the URL of a database; by default the latest of the project.

        Raises:
            GeomatchError: there is none.
            StaleError: it is stale or damaged.
        """
        tiles = project.tile_manifest()
        if name is not None and pgvector.is_url(name):
            with ExitStack() as connected:
                connection = connected.enter_context(pgvector.connect(name))
                found = pgvector.PostgresIndex(connection, tiles.fingerprint, name)
                project.check_fresh(found.manifest)
                return cls(
                    project,
                    found,
                    found,
                    found.manifest,
                    tiles,
                    _connected=connected.pop_all(),
                )
        name = latest(project.index_names(), name, "index", "geomatch index")
        manifest = _fresh_manifest(project, name)
        folder = project.indexes / name
        rows = IndexRows(folder, manifest.counts)
        vectors = LocalVectors(folder, manifest, rows)
        confidence = Confidence.load(folder)
        whitening = Whitening.load(folder / WHITENING) if manifest.whitened else None
        return cls(project, vectors, rows, manifest, tiles, confidence, whitening)

    @cached_property
    def encoding(self) -> Encoding:
        """The encoder that made it, loaded when it is first needed.

        Raises:
            GeomatchError: there is none, or it changed since.
        """
        from geomatch import image_input

        return image_input.encoder_of(self.project, self.manifest, self.tiles, "index")

    @cached_property
    def pixels(self) -> TileStore:
        """The pixels of the tiles."""
        from geomatch.data.store import TileStore

        return TileStore.open(self.project.pixels)

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

    def positions(self, ids: Sequence[str]) -> list[int]:
        """The positions of tiles.

        Raises:
            GeomatchError: an id is not in the index.
        """
        found = []
        for name in ids:
            if (position := self.rows.find(name)) is None:
                raise GeomatchError(f"{name} is no tile of the index", "Give the id of an answer.")
            found.append(position)
        return found

    def vectors_at(self, positions: Sequence[int]) -> NDArray[np.float32]:
        """The descriptors (n, d) at positions; their directions if the metric is cosine."""
        return np.stack([self.vectors.vector(each) for each in positions]) if positions else NONE

    def comparable(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Descriptors (n, d) in the form of those of the index."""
        return unit(vectors) if self.manifest.metric == "cosine" else vectors

    def check_ground(self, need: str, hint: str) -> None:
        """Check that tiles have a place on the ground.

        Args:
            need: what needs one, for the message.

        Raises:
            UsageError: they have no georeference.
        """
        if not self.tiles.on_ground:
            raise UsageError(f"{need}, but the images have no georeference", hint)


def wanted(project: Project, name: str | None) -> tuple[str, bool]:
    """The name of the index to search, and whether it is there and fresh.

    Args:
        name: see `OpenIndex.open`; by default that of the latest embeddings, or of the latest index
            where that is newer.

    Raises:
        GeomatchError: there are neither embeddings nor an index, or none of that name.
    """
    if name is not None and pgvector.is_url(name):
        return name, True
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

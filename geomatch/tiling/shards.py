"""Tiles are made shard by shard in `tiles.partial/`, so that a killed `tile` can resume.

Each shard has a record, written after its pixels, of what it was made from. The complete result
replaces `tiles/`.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from geomatch import __version__
from geomatch.data import geoparquet
from geomatch.data.store import Pixels, TileStore
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import GeomatchError
from geomatch.geo import footprints
from geomatch.manifests import TileManifest, TileRequest
from geomatch.progress import ProgressCallback
from geomatch.project import Project, fingerprint, read_json, write_json, write_record

ShardRecord = dict[str, Any]

PLAN = "plan.json"
"""File of the folder of unfinished tiles that says what they are to be."""
DIGEST = 12
"""Bytes of a shard's digest."""


@dataclass(frozen=True)
class Shard(ABC):
    """Consecutive rows of the store, from `start`, that are made together."""

    number: int
    start: int
    folder: Path

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def key(self) -> str:
        """Fingerprint of what the pixels depend on; a record with another key is stale."""

    @property
    def record(self) -> Path:
        return self.folder / "shards" / f"{self.number:06d}.json"

    @property
    def pixels(self) -> Path:
        return self.folder / "tiles" / "pixels.zarr"

    def write(self, pixels: Pixels, **columns: Any) -> ShardRecord:
        """Write the pixels, then the record, which also holds `columns` (a value for each tile)."""
        TileStore.open(self.pixels).write(self.start, pixels)
        digest = hashlib.blake2b(pixels.data, digest_size=DIGEST).hexdigest()
        return self.save_record(digest=digest, **columns)

    def save_record(self, **columns: Any) -> ShardRecord:
        """Write the record, which says that the shard is complete."""
        record = {"key": self.key, **columns}
        write_json(self.record, record, shared=True)
        return record


S = TypeVar("S", bound=Shard)


def prepare(
    partial: Path, shape: Sequence[int], request: TileRequest, force: bool, **noted: Any
) -> None:
    """Create the folder of unfinished tiles, or keep it if its store has the same shape.

    Args:
        shape: rows, size and channels of the store.
        request: recorded, so that `tile` can repeat it.
        force: start from scratch.
        noted: JSON values that are recorded beside.
    """
    path, pixels = partial / PLAN, partial / "tiles" / "pixels.zarr"
    # A kill while the result was moved into place leaves records without pixels.
    if force or not pixels.exists() or noted_in(partial).get("shape") != [*shape]:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "shards").mkdir(parents=True)
    TileStore.create(pixels, *shape)
    write_json(path, {"shape": [*shape], "asked": request.as_json(), **noted})


def noted_in(partial: Path) -> dict[str, Any]:
    """What `prepare` recorded; empty if there are no unfinished tiles."""
    path = partial / PLAN
    return read_json(path, "geomatch tile --force") if path.exists() else {}


def done(shards: Sequence[S]) -> dict[int, ShardRecord]:
    """The records of the shards that are made, by number."""
    records: dict[int, ShardRecord] = {}
    for shard in shards:
        if shard.record.exists():
            record = read_json(shard.record, "geomatch tile --force")
            if record["key"] == shard.key:
                records[shard.number] = record
    return records


def cut(
    shards: Sequence[S],
    make: Callable[[list[S]], Iterator[tuple[S, ShardRecord]]],
    task: str,
    progress: ProgressCallback,
) -> list[ShardRecord]:
    """Make the missing shards and return the records of all, in order."""
    records = done(shards)
    missing = [shard for shard in shards if shard.number not in records]
    total = sum(map(len, shards))
    kept = finished = total - sum(map(len, missing))
    if records and missing:
        progress(f"resuming: {finished} of {total} tiles are already cut")
    started = time.monotonic()
    for shard, record in make(missing):
        records[shard.number] = record
        finished += len(shard)
        rate = (finished - kept) / (time.monotonic() - started)
        progress(task, finished, total, f"{rate:.0f} tiles/s")
    return [records[shard.number] for shard in shards]


def finish(
    folder: Path, table: TileTable, records: Sequence[ShardRecord], **described: Any
) -> None:
    """Write the catalogue and, last, the manifest.

    Args:
        described: fields of `TileManifest` other than counts, fingerprint and version.
    """
    table.save(folder / "tiles.parquet", *footprints.file_geometry(table.grid))
    contents: list[Any] = [
        table.grid and asdict(table.grid),
        [record["digest"] for record in records],
        table.store_row.tolist(),
        table.split.tolist(),
        table.years,
    ]
    if table.grid is None:
        contents.append([table.ids(), table.cells()])
    manifest = TileManifest(
        geomatch=__version__,
        fingerprint=fingerprint(contents),
        tiles=len(table),
        planned=sum(len(record["valid"]) for record in records),
        classes=len(table.classes),
        splits={name: int((table.split == i).sum()) for i, name in enumerate(SPLITS)},
        **described,
    )
    write_record(folder / "manifest.json", manifest)


def are_made(project: Project, request_fingerprint: str) -> bool:
    """Whether the project's tiles are complete and made by this request."""
    try:
        manifest = project.tile_manifest()
        geoparquet.read_footer(project.catalogue, "geomatch", "geomatch tile")
    except GeomatchError:
        return False
    return manifest.request_fingerprint == request_fingerprint

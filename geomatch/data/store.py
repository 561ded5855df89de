"""The pixels of tiles: a sharded Zarr v3 array, one chunk per tile, through tensorstore."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from geomatch.errors import GeomatchError, StaleError
from geomatch.project import replacing
from geomatch.remote import PIXELS_URL, kvstore

Pixels = NDArray[np.uint8]

SHARD_BYTES = 32 * 2**20
REMOTE_CACHE = 64 * 2**20
"""Bytes of a store in object storage that are kept in memory."""


def shard_rows(size: int, channels: int) -> int:
    """Tiles per shard: a power of two from 16 to 512 whose pixels fit in `SHARD_BYTES`."""
    fitting = SHARD_BYTES // (size * size * channels)
    return int(np.clip(2 ** int(np.log2(max(fitting, 1))), 16, 512))


class TileStore:
    """A uint8 array (n, h, w, c) on disk, or in object storage, as the file `pixels.url` says.

    Rows that were never written read as zeros.
    """

    def __init__(self, array: Any) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, h, w, c = self._array.shape
        return n, h, w, c

    @classmethod
    def create(cls, path: Path, rows: int, size: int, channels: int) -> TileStore:
        """Create a store, or open an existing one of the same shape."""
        chunk = [1, size, size, channels]
        codecs = [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": chunk,
                    "codecs": [
                        {"name": "bytes"},
                        {"name": "zstd", "configuration": {"level": 1, "checksum": False}},
                    ],
                    "index_codecs": [
                        {"name": "bytes", "configuration": {"endian": "little"}},
                        {"name": "crc32c"},
                    ],
                },
            }
        ]
        shard = [shard_rows(size, channels), size, size, channels]
        spec = _spec(path) | {
            "metadata": {
                "shape": [rows, size, size, channels],
                "data_type": "uint8",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
                "codecs": codecs,
                "fill_value": 0,
                "dimension_names": ["tile", "y", "x", "channel"],
            }
        }
        return cls(ts.open(spec, create=True, open=True).result())

    @classmethod
    def open(cls, path: Path) -> TileStore:
        """Open an existing store.

        Raises:
            StaleError: the store is missing or damaged.
        """
        try:
            return cls(ts.open(_spec(path), open=True).result())
        except ValueError as error:
            raise StaleError(f"{path} cannot be read: {error}", "Run: geomatch tile") from error

    def write(self, start: int, pixels: Pixels) -> None:
        """Write whole shards from row `start` on; each shard has one writer.

        Raises:
            GeomatchError: the pixels cannot be written (disk full, no permission).
        """
        try:
            self._array[start : start + len(pixels)].write(pixels).result()
        except (ValueError, OSError) as error:
            raise GeomatchError(
                f"pixels cannot be written: {_short(error)}",
                "Free space or check permissions, then run the same command again.",
            ) from error

    def read(self, rows: NDArray[np.int64]) -> Pixels:
        """Read pixels (len(rows), h, w, c) in the order of `rows`.

        Raises:
            GeomatchError: a shard is damaged.
        """
        try:
            pixels: Pixels = self._array[np.asarray(rows)].read().result()
        except ValueError as error:
            raise GeomatchError(
                f"pixels cannot be read: {_short(error)}", "Run: geomatch tile --force"
            ) from error
        return pixels


def link_shard(store: Path, number: int, target: Path, target_number: int) -> None:
    """Make a shard of one store that of another one too, without a copy where that is possible.

    A shard is never written in place, so neither store can change the other.
    """
    source, shard = (
        path / "c" / str(each) / "0/0/0"
        for path, each in ((store, number), (target, target_number))
    )
    shard.unlink(missing_ok=True)
    if not source.exists():  # all zeros
        return
    shard.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, shard)
    except OSError:  # the file system has no links
        with replacing(shard) as temporary:
            shutil.copyfile(source, temporary)


def _spec(path: Path) -> dict[str, Any]:
    elsewhere = path.with_name(PIXELS_URL)
    # Shards are read one tile at a time: do not cache what was read, but for their indexes, which
    # cost a request each.
    if not path.exists() and elsewhere.exists():
        storage = kvstore(elsewhere.read_text(encoding="utf-8").strip())
        cached = {"cache_pool": {"total_bytes_limit": REMOTE_CACHE}}
        return {"driver": "zarr3", "kvstore": storage, "context": cached}
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path.resolve())},
        "context": {"cache_pool": {"total_bytes_limit": 0}},
    }


def _short(error: Exception) -> str:
    """tensorstore's message without the source locations it appends."""
    return str(error).split(" [", 1)[0]

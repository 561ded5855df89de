"""Image files that are nowhere but in memory, and what GDAL may do with those of strangers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Iterator
from pathlib import Path

import rasterio
from rasterio.io import MemoryFile

_held: dict[str, bytes] = {}


@contextlib.contextmanager
def held(data: bytes) -> Iterator[str]:
    """A path by which GDAL opens `data`, and `content` finds it."""
    with MemoryFile(data, filename="image") as file:
        _held[file.name] = data
        try:
            yield file.name
        finally:
            del _held[file.name]


def content(path: Path) -> io.BytesIO | None:
    """What is held under a path; None for a file on disk."""
    data = _held.get(str(path))
    return None if data is None else io.BytesIO(data)


def left_out(kept: Collection[str]) -> str:
    """The value of `GDAL_SKIP` in the environment of a process that has these drivers alone."""
    with rasterio.Env() as gdal:
        return ",".join(sorted(gdal.drivers().keys() - set(kept)))

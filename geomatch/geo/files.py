"""Files as GDAL opens them: their paths, and all that a raster is read from."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import tempfile
import threading
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import rasterio
from rasterio.errors import RasterioError

_LINKING = threading.Lock()


def gdal_path(path: str) -> str:
    """The path by which GDAL opens a file: its own, or of a link if a name is not UTF-8.

    Files beside it that begin with its stem, which may hold its header or mask, are linked as well.
    """
    try:
        path.encode()
        return path
    except UnicodeEncodeError:
        pass
    with _LINKING:
        folder, name = os.path.split(path)
        home = os.path.join(scratch().name, hashlib.sha256(os.fsencode(path)).hexdigest()[:16])
        os.makedirs(home, exist_ok=True)
        stem = name.partition(".")[0]
        for each in os.listdir(folder or "."):
            link = os.path.join(home, os.fsencode(each).decode(errors="replace"))
            if each.startswith(stem) and not os.path.lexists(link):
                os.symlink(os.path.abspath(os.path.join(folder, each)), link)
        return os.path.join(home, os.fsencode(name).decode(errors="replace"))


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for links and copies, which goes away with the process."""
    return tempfile.TemporaryDirectory(prefix="geomatch-")


def stamp(*paths: str) -> tuple[int, ...]:
    """Size in bytes and modification time in nanoseconds of each file, one after the other.

    Of a file in an archive (/vsizip/...), those of the archive; files that do not exist are left
    out.
    """
    found: list[int] = []
    for path in dict.fromkeys(map(_on_disk, paths)):
        with contextlib.suppress(OSError):
            stat = os.stat(path)
            found += (stat.st_size, stat.st_mtime_ns)
    return tuple(found)


def _on_disk(path: str) -> str:
    """The file itself, or the archive that it is in."""
    if not path.startswith("/vsi"):
        return path
    inside = re.sub(r"^(/vsi[a-z0-9]+/)+", "", path).replace("{", "").replace("}", "")
    parents = (inside, *map(str, Path(inside).parents))
    return next((parent for parent in parents if os.path.isfile(parent)), path)


def behind(source: Any, within: tuple[str, ...] = ()) -> list[str]:
    """Paths of the files that an open raster is read from, also through a VRT or a tile index.

    Args:
        within: VRTs that hold this one.
    """
    listed: list[str] = list(source.files)
    found = listed[:]
    named = _indexed(source.name) if source.driver == "GTI" else listed[1:]
    if source.driver in ("GTI", "VRT"):
        for path in named:
            found += [path, *(f"{path}{part}" for part in (".aux.xml", ".msk", ".ovr"))]
            if path.lower().endswith((".vrt", ".gti")) and path not in (*within, source.name):
                with contextlib.suppress(RasterioError), rasterio.open(path) as nested:
                    found += behind(nested, (*within, source.name))
    return found


def _indexed(path: str) -> list[str]:
    """Paths of a tile index (GTI) and of the rasters in it, which GDAL does not list."""
    path = path.removeprefix("GTI:")
    index, layer, field = path, None, "location"
    if path.lower().endswith(".gti"):
        try:
            described = ElementTree.parse(path).getroot()
        except ElementTree.ParseError:  # GDAL's own parser takes more
            return []
        index = _beside(path, described.findtext("IndexDataset") or "")
        layer = described.findtext("IndexLayer")
        field = described.findtext("LocationField") or field
    # Imported here, since queries read rasters too, and it imports pandas where that is installed.
    import pyogrio
    from pyogrio.errors import DataLayerError, DataSourceError, FieldError

    with contextlib.suppress(DataSourceError, DataLayerError, FieldError):
        _, _, _, columns = pyogrio.raw.read(
            index, layer=layer, columns=[field], read_geometry=False
        )
        return [index, *(_beside(index, str(name)) for name in columns[0])]
    return [index]


def _beside(path: str, name: str) -> str:
    """`name` relative to the folder of a file, if it exists there; else as it is."""
    beside = os.path.join(os.path.dirname(path), name)
    return beside if os.path.exists(beside) else name

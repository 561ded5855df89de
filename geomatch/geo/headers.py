"""Headers of rasters, remembered from one run to the next."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import rasterio

from geomatch import __version__
from geomatch.geo import files, rasters
from geomatch.geo.rasters import Raster
from geomatch.geo.views import Layout, Reading


class Headers:
    """What the headers of rasters say, kept in a file that may be deleted at any time.

    A file is read again when it has another size or modification time, or one of the files that
    it is read from, or when a file beside it that has its stem comes or goes.

    Args:
        path: of the file; what it holds is not trusted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Other versions may find other facts.
        self._made_by = [__version__, rasterio.__version__, rasterio.__gdal_version__]
        self._known: dict[str, Any] = {}
        self._crs: list[str] = []
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["by"] == self._made_by:
                self._known, self._crs = dict(found["files"]), list(found["crs"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self._numbers = {crs: number for number, crs in enumerate(self._crs)}
        self._folders: dict[str, dict[str, list[str]]] = {}
        self._asked: dict[str, Any] = {}
        self._is_new = False
        self._lock = threading.Lock()

    def read(self, path: str, reading: Reading | None = None) -> Raster:
        """As `rasters.read_header`, or what is known of the file."""
        return self._recall(path, reading) or rasters.read_header(path, reading)

    def save(self) -> None:
        """Write what was asked for, if any of it is new.

        Where that is impossible, the next run reads all headers again.
        """
        if not self._is_new:
            return
        beside = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
        values = {"by": self._made_by, "crs": self._crs, "files": self._asked}
        try:
            beside.write_text(json.dumps(values), encoding="utf-8")
            os.replace(beside, self._path)
        except OSError:
            beside.unlink(missing_ok=True)

    def _recall(self, path: str, reading: Reading | None) -> Raster | None:
        key = _key(path, reading)
        known = self._known.get(key)
        if known is None:
            return None
        try:
            names, behind, values = known
            if names != self._beside(path) or values["stamp"] != [*files.stamp(path, *behind)]:
                return None
            layout = values["layout"] | {"bands": tuple(values["layout"]["bands"])}
            fields: dict[str, Any] = {
                **{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()},
                "layout": Layout(**layout),
                "crs": self._crs[values["crs"]],
                "behind": tuple(behind),
            }
            raster = Raster(**fields)
        except (ValueError, KeyError, TypeError, IndexError):
            return None
        self._asked[key] = known
        return raster

    def remember(self, found: Iterable[Raster], reading: Reading | None = None) -> None:
        """Take up what was found, once it is known to have a place."""
        for raster in found:
            key = _key(raster.path, reading)
            if key in self._asked:
                continue
            values = asdict(replace(raster, collar=""))
            behind = values.pop("behind")
            if raster.crs not in self._numbers:
                self._numbers[raster.crs] = len(self._crs)
                self._crs.append(raster.crs)
            values["crs"] = self._numbers[raster.crs]
            self._asked[key] = [self._beside(raster.path), behind, values]
            self._is_new = True

    def _beside(self, path: str) -> list[str]:
        """Names in a file's folder that have its stem, in their order."""
        folder, name = os.path.split(path)
        with self._lock:
            if folder not in self._folders:
                by_stem = defaultdict[str, list[str]](list)
                with contextlib.suppress(OSError):  # in an archive
                    for each in sorted(os.listdir(folder)):
                        by_stem[_stem(each)].append(each)
                self._folders[folder] = by_stem
        return self._folders[folder].get(_stem(name), [])


def _stem(name: str) -> str:
    return name.partition(".")[0].lower()


def _key(path: str, reading: Reading | None) -> str:
    return json.dumps([path, reading and asdict(reading)])

"""Images that are sent, read by a process that may fail without harm."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch.errors import GeomatchError
from geomatch.geo import in_memory
from geomatch.image_input import Cut
from geomatch.manifests import TileManifest

MOST_BYTES = 64 << 20
"""Of an image as it is sent."""
SECONDS = 20.0
"""To read an image."""
STARTUP_SECONDS = 120.0
DRIVERS = ("BMP", "GIF", "GTiff", "JP2OpenJPEG", "JPEG", "MEM", "PNG", "PNM", "VRT", "WEBP")
"""Drivers of GDAL that may read what is sent; VRT is how bands are chosen, and no file is one."""
MOST_ANSWER = 1 << 30


class Decoder:
    """Reads one image after another in a process of its own, which is started again when it dies.

    Args:
        tiles: that images are cut like.
    """

    def __init__(self, tiles: TileManifest) -> None:
        self._tiles = tiles
        self._lock = threading.Lock()
        self._process = self._start()
        self._is_ready = False

    def cut(self, data: bytes, name: str, year: str | None, reach: float) -> Cut:
        """Cut a tile from an image; any thread may call it.

        Args:
            name: of the image, for messages.
            year, reach: as in `image_input.cut`.

        Raises:
            GeomatchError: it cannot be read, in time, or at all.
        """
        found, (pixels, around) = self._read(data, name, year, reach)
        return Cut(pixels, around, found["epsg"], found["x"], found["y"], found["remark"])

    def scan(self, data: bytes, name: str, year: str | None) -> tuple[NDArray[np.uint8], str]:
        """All pixels of an image, as by `image_input.read_scan`; otherwise as `cut`."""
        found, (pixels,) = self._read(data, name, year, None)
        return pixels, found["remark"]

    def _read(
        self, data: bytes, name: str, year: str | None, reach: float | None
    ) -> tuple[dict[str, Any], list[NDArray[np.uint8]]]:
        header = {"bytes": len(data), "name": name, "year": year, "reach": reach}
        with self._lock:
            if self._process.poll() is not None:  # it died while nothing was read
                self._restart()
            try:
                if not self._is_ready:
                    self._is_ready = bool(self._ask(b"", STARTUP_SECONDS)[0])
                found, pixels = self._ask(json.dumps(header).encode() + b"\n" + data, SECONDS)
            except (OSError, EOFError, ValueError) as error:
                self._restart()
                raise GeomatchError(
                    f"{name} cannot be read within {SECONDS:g} s and the memory that is allowed",
                    "Send a part of it, or save it anew.",
                ) from error
        if "error" in found:
            raise GeomatchError(found["error"], found["hint"])
        return found, pixels

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "GDAL_SKIP": in_memory.left_out(DRIVERS),
            "GDAL_PAM_ENABLED": "NO",
            # Each thread of a library takes address space, which is limited.
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "geomatch.serving.decoding"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the server
        )
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # if it died at once, the first request says so
            process.stdin.write(json.dumps(self._tiles.as_json()).encode() + b"\n")
            process.stdin.flush()
        return process

    def _restart(self) -> None:
        self._stop()
        self._process, self._is_ready = self._start(), False

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def _ask(self, request: bytes, seconds: float) -> tuple[dict[str, Any], list[NDArray[Any]]]:
        """Send a request and read the answer; without one after so many seconds, EOFError."""
        source, target = self._process.stdout, self._process.stdin
        assert source is not None
        assert target is not None
        # Once it is killed, its pipes end.
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        try:
            target.write(request)
            target.flush()
            if not (line := source.readline()):
                raise EOFError
            found = json.loads(line)
            shapes = [found[key] for key in ("pixels", "around") if key in found]
            if sum(map(math.prod, shapes)) > MOST_ANSWER:
                raise EOFError
            return found, [_pixels(source.read(math.prod(shape)), shape) for shape in shapes]
        finally:
            timer.cancel()


def _pixels(data: bytes, shape: list[int]) -> NDArray[np.uint8]:
    """Raises ValueError where data ends early."""
    return np.frombuffer(data, np.uint8).reshape(shape)

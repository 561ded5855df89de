"""A process that reads images of strangers: with bounds, without a disk, to be killed at any time.

`uploads.Decoder` runs it. A request on stdin is a line of JSON and the bytes of an image; an answer
on stdout is a line of JSON and pixels.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
from pathlib import Path
from typing import IO, Any

from geomatch import image_input
from geomatch.errors import GeomatchError
from geomatch.geo import in_memory
from geomatch.manifests import TileManifest
from geomatch.tiling import image_files

MOST_PIXELS = 100_000_000
MEMORY = 6 << 30
"""Bytes of address space: an image of so many pixels takes less than half, libraries the rest."""
MARKUP = b"<VRTDataset"
"""What makes a VRT of a file, which names other files to read."""
STARTS = {
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "JPEG": (b"\xff\xd8\xff",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
    "WebP": (b"RIFF",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
    "PNM": (b"P4", b"P5", b"P6"),
}
"""The first bytes of the files that are read, whatever their names."""


def main() -> None:
    """Answer requests until stdin ends. The first line is the manifest of the tiles."""
    # Libraries that print must not disturb the answers.
    source, target = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    tiles = TileManifest.from_json(json.loads(source.readline()))
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0)):
        _limit(kind, most)
    _answer(target, {"ready": True})
    while line := source.readline():
        asked = json.loads(line)
        data = source.read(asked["bytes"])
        try:
            found, pixels = read(data, asked, tiles)
        except GeomatchError as error:
            found, pixels = {"error": error.message, "hint": error.hint}, []
        except Exception as error:  # a damaged file may make a library raise anything
            reason = f"{asked['name']} cannot be read: {type(error).__name__}"
            found, pixels = {"error": reason, "hint": "Save it anew, or send a part of it."}, []
        _answer(target, found, *pixels)


def read(data: bytes, asked: dict[str, Any], tiles: TileManifest) -> tuple[dict[str, Any], Any]:
    """Cut a tile from an image, or read all of a scan.

    Args:
        asked: name of the image, and `year` and `reach` as in `image_input.cut`; a `reach` of None
            stands for a scan.

    Returns:
        What was read but its pixels, and these as arrays.

    Raises:
        GeomatchError: the image is of no format that is read, too large or damaged.
    """
    name = asked["name"]
    if not data.startswith(tuple(start for each in STARTS.values() for start in each)):
        raise GeomatchError(f"{name} is not an image", f"Give one of: {', '.join(STARTS)}.")
    if MARKUP in data[:4096]:
        raise GeomatchError(f"{name} is not only an image", "Save it anew.")
    with in_memory.held(data) as path:
        try:
            _check_size(name, path)
            if asked["reach"] is None:
                pixels, remark = image_input.read_scan(path, tiles, asked["year"])
                return {"pixels": pixels.shape, "remark": remark.replace(path, name)}, [pixels]
            cut = image_input.cut(path, tiles, asked["year"], asked["reach"])
        except GeomatchError as error:
            raise GeomatchError(error.message.replace(path, name), error.hint) from error
    place = {"epsg": cut.epsg, "x": cut.x, "y": cut.y, "remark": cut.remark.replace(path, name)}
    shapes = {"pixels": cut.pixels.shape, "around": cut.around.shape}
    return place | shapes, [cut.pixels, cut.around]


def _check_size(name: str, path: str) -> None:
    """Look at the header alone: a small file may have any number of pixels."""
    shape = image_files.inspect(Path(path))
    if shape.width * shape.height > MOST_PIXELS:
        raise GeomatchError(
            f"{name} has {shape.width} x {shape.height} pixels, more than the "
            f"{MOST_PIXELS // 10**6} million that are read",
            "Cut the part that is asked for.",
        )


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS knows no limit of address space
        resource.setrlimit(kind, (most, most))


def _answer(target: IO[bytes], values: dict[str, Any], *pixels: Any) -> None:
    target.write(json.dumps(values).encode() + b"\n")
    for each in pixels:
        target.write(each.tobytes())
    target.flush()


if __name__ == "__main__":
    main()

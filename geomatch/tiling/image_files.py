"""Images without a ground: listed in folders, read from image files and files of arrays."""

from __future__ import annotations

import gzip
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from geomatch.errors import GeomatchError

Pixels = NDArray[np.uint8]

SUFFIXES = (
    *(".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)

UNREADABLE = (
    UnidentifiedImageError,
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
)
"""What Pillow raises of a damaged file."""


class BrokenImageError(GeomatchError):
    """An image file that is missing or damaged; `reason` says how."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be read as an image: {reason}", "Look at it, or copy it.")
        self.reason = reason


@dataclass(frozen=True)
class Form:
    """Width and height in pixels, and whether the image has no colours."""

    width: int
    height: int
    grey: bool


@dataclass(frozen=True)
class Arrays:
    """Images (n, h, w) or (n, h, w, c) uint8, and the name of each one's class."""

    images: Pixels
    classes: tuple[str, ...]

    @property
    def form(self) -> Form:
        height, width = self.images.shape[1:3]
        return Form(width, height, self.images.ndim == 3 or self.images.shape[3] == 1)


def listed(folder: Path) -> list[Path]:
    """Image files within a folder at any depth, by their suffix, in order; hidden ones left out."""
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(where, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    return sorted(found)


def inspect(path: Path) -> Form:
    """What an image's header says.

    Raises:
        BrokenImageError: it cannot be read.
        GeomatchError: it has more than 8 bits a channel.
    """
    with _opened(path) as image:
        if image.mode in ("I", "F") or image.mode.startswith("I;") or ";16" in str(image.tile):
            raise GeomatchError(
                f"{path} has more than 8 bits a channel",
                "Convert it to 8 bits first: gdal_translate -ot Byte -scale IN OUT",
            )
        return Form(image.width, image.height, image.mode in ("1", "L", "LA", "La"))


def read(path: Path, size: int, channels: int) -> Pixels:
    """(size, size, channels): the centre square of an image, resized.

    Args:
        channels: 3, or 1 for grey; alpha is dropped.

    Raises:
        BrokenImageError: it cannot be read.
    """
    with _opened(path) as image:
        try:
            return _square(image.convert("RGB" if channels == 3 else "L"), size, channels)
        except UNREADABLE as error:
            raise _broken(path, error) from error


def square(pixels: Pixels, size: int, channels: int) -> Pixels:
    """`read` of an image that is an array (h, w) or (h, w, c)."""
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[2:] == (1,) else pixels)
    return _square(image.convert("RGB" if channels == 3 else "L"), size, channels)


def _square(image: Image.Image, size: int, channels: int) -> Pixels:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cut = image.crop((left, top, left + side, top + side))
    resized = cut.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(size, size, channels)


def _opened(path: Path) -> ImageFile.ImageFile:
    try:
        return Image.open(path)
    except UNREADABLE as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> BrokenImageError:
    if isinstance(error, UnidentifiedImageError):
        reason = "not an image"
    else:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return BrokenImageError(path, reason)


def arrays(path: Path) -> Arrays:
    """A file of many images: `.npz` with x and y, or images and labels; or MNIST's idx, packed or
    not, whose labels stand beside it.

    Raises:
        GeomatchError: it is damaged, of another form, or has labels of another length.
    """
    images, labels = _npz(path) if path.suffix == ".npz" else _idx_pair(path)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in (
        (), (1,), (3,), (4,)
    ):  # fmt: skip
        raise GeomatchError(
            f"{path} holds images {images.shape} of {images.dtype}",
            "uint8 of shape (n, height, width) or (n, height, width, 3) is expected.",
        )
    if labels.size != len(images):
        raise GeomatchError(
            f"{path} holds {len(images)} images, but {labels.size} labels",
            "One label for each image is expected.",
        )
    if labels.dtype.kind not in "iuU":
        raise GeomatchError(f"{path} has labels of {labels.dtype}", "Use integers or strings.")
    return Arrays(images, tuple(str(label) for label in labels.ravel().tolist()))


def _npz(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.generic]]:
    try:
        with np.load(path) as file:
            for keys in (("x", "y"), ("images", "labels")):
                if set(keys) <= set(file.files):
                    return file[keys[0]], file[keys[1]]
            held = ", ".join(file.files)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise GeomatchError(f"{path} cannot be read: {error}") from error
    raise GeomatchError(f"{path} holds {held}", "x and y, or images and labels, are expected.")


def _idx_pair(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    beside = [path.with_name(name), path.with_name(name.removesuffix(".gz"))]
    beside.append(path.with_name(f"{name}.gz"))
    labels = next((p for p in beside if p != path and p.is_file()), None)
    images = _idx(path)
    if labels is None:
        raise GeomatchError(
            f"{path} has no labels beside it",
            f"{name} is expected, as of MNIST: train-images-idx3-ubyte, train-labels-idx1-ubyte.",
        )
    return images, _idx(labels)


def _idx(path: Path) -> NDArray[np.uint8]:
    """An idx file of unsigned bytes: two zeros, type 8, dimensions; sizes, big-endian; values."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise GeomatchError(f"{path} cannot be read: {error}", "Copy it again.") from error
    if data[:3] != b"\0\0\x08" or len(data) < 4:
        raise GeomatchError(
            f"{path} is neither a folder, nor .npz, nor idx of unsigned bytes",
            "Give a folder whose subfolders are the classes, or a file of that form.",
        )
    start = 4 + 4 * data[3]
    shape = np.frombuffer(data[4:start], ">u4").astype(np.int64)
    values = np.frombuffer(data, np.uint8, offset=min(start, len(data)))
    if len(shape) != data[3] or len(values) != np.prod(shape):
        raise GeomatchError(f"{path} is cut short, or longer than it says", "Copy it again.")
    return values.reshape(shape)

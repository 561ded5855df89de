"""Images without georeference: listing folders, reading image files and array files."""

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
"""What Pillow raises for damaged files."""


class BrokenImageError(GeomatchError):
    """An image file is missing or damaged; `reason` says how."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path} cannot be read as an image: {reason}", "Check the file, or copy it again."
        )
        self.reason = reason


@dataclass(frozen=True)
class ImageShape:
    """Width and height in pixels, and whether the image is greyscale."""

    width: int
    height: int
    grey: bool


@dataclass(frozen=True)
class ArrayFile:
    """Images (n, h, w) or (n, h, w, c) uint8 of a file, and the class name of each."""

    images: Pixels
    classes: tuple[str, ...]

    @property
    def image_shape(self) -> ImageShape:
        height, width = self.images.shape[1:3]
        return ImageShape(width, height, self.images.ndim == 3 or self.images.shape[3] == 1)


def list_images(folder: Path) -> list[Path]:
    """Image files below a folder, by suffix and sorted, without hidden files and folders."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    return sorted(found)


def inspect(path: Path) -> ImageShape:
    """Read an image's header.

    Raises:
        BrokenImageError: it cannot be read.
        GeomatchError: it has more than 8 bits per channel.
    """
    with _open(path) as image:
        if image.mode in ("I", "F") or image.mode.startswith("I;") or ";16" in str(image.tile):
            raise GeomatchError(
                f"{path} has more than 8 bits per channel",
                "Convert it to 8 bits first: gdal_translate -ot Byte -scale IN OUT",
            )
        return ImageShape(image.width, image.height, image.mode in ("1", "L", "LA", "La"))


def read(path: Path, size: int, channels: int) -> Pixels:
    """The centre square of an image, resized to (size, size, channels).

    Args:
        channels: 3, or 1 for grey; alpha is dropped.

    Raises:
        BrokenImageError: it cannot be read.
    """
    with _open(path) as image:
        try:
            return _centre_square(image.convert("RGB" if channels == 3 else "L"), size, channels)
        except UNREADABLE as error:
            raise _broken_image(path, error) from error


def centre_square(pixels: Pixels, size: int, channels: int) -> Pixels:
    """Like `read`, for an image given as array (h, w) or (h, w, c)."""
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[2:] == (1,) else pixels)
    return _centre_square(image.convert("RGB" if channels == 3 else "L"), size, channels)


def _centre_square(image: Image.Image, size: int, channels: int) -> Pixels:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cut = image.crop((left, top, left + side, top + side))
    resized = cut.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(size, size, channels)


def _open(path: Path) -> ImageFile.ImageFile:
    try:
        return Image.open(path)
    except UNREADABLE as error:
        raise _broken_image(path, error) from error


def _broken_image(path: Path, error: Exception) -> BrokenImageError:
    if isinstance(error, UnidentifiedImageError):
        reason = "not an image"
    else:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return BrokenImageError(path, reason)


def read_array_file(path: Path) -> ArrayFile:
    """Read `.npz` with x and y, or images and labels; or MNIST's idx with its label file beside it.

    Idx files may be gzipped.

    Raises:
        GeomatchError: it is damaged, of another format, or has not one label per image.
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
            "One label per image is expected.",
        )
    if labels.dtype.kind not in "iuU":
        raise GeomatchError(
            f"{path} has labels of dtype {labels.dtype}", "Use integers or strings."
        )
    return ArrayFile(images, tuple(str(label) for label in labels.ravel().tolist()))


def _npz(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.generic]]:
    try:
        with np.load(path) as file:
            for keys in (("x", "y"), ("images", "labels")):
                if set(keys) <= set(file.files):
                    return file[keys[0]], file[keys[1]]
            contents = ", ".join(file.files)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise GeomatchError(f"{path} cannot be read: {error}") from error
    raise GeomatchError(f"{path} holds {contents}", "x and y, or images and labels, are expected.")


def _idx_pair(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    candidates = [path.with_name(name), path.with_name(name.removesuffix(".gz"))]
    candidates.append(path.with_name(f"{name}.gz"))
    labels = next((p for p in candidates if p != path and p.is_file()), None)
    images = _idx(path)
    if labels is None:
        raise GeomatchError(
            f"{path} has no label file beside it",
            f"{name} is expected, as in MNIST: train-images-idx3-ubyte, train-labels-idx1-ubyte.",
        )
    return images, _idx(labels)


def _idx(path: Path) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes.

    Two zeros, type 8, number of dimensions; big-endian sizes; values.
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise GeomatchError(f"{path} cannot be read: {error}", "Copy it again.") from error
    if data[:3] != b"\0\0\x08" or len(data) < 4:
        raise GeomatchError(
            f"{path} is neither a folder nor an .npz or idx file of unsigned bytes",
            "Give a folder with one subfolder per class, or a file of one of these formats.",
        )
    start = 4 + 4 * data[3]
    shape = np.frombuffer(data[4:start], ">u4").astype(np.int64)
    values = np.frombuffer(data, np.uint8, offset=min(start, len(data)))
    if len(shape) != data[3] or len(values) != np.prod(shape):
        raise GeomatchError(f"{path} is shorter or longer than its header says", "Copy it again.")
    return values.reshape(shape)

"""Images without georeference: listing folders, reading image files and array files."""

from __future__ import annotations

import contextlib
import gzip
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from geomatch.errors import GeomatchError
from geomatch.geo import in_memory, rasters
from geomatch.geo.rasters import Raster
from geomatch.geo.stretch import Stretch
from geomatch.geo.views import Reading

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

AS_IT_IS = Reading()
SAMPLES_PER_PIXEL = 277
"""Tag of a TIFF file."""
LUMA = np.array([0.299, 0.587, 0.114])
"""Shares of red, green and blue in grey (ITU-R BT.601), as in Pillow."""
TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of an EXIF orientation upright."""


class BrokenImageError(GeomatchError):
    """An image file is missing or damaged; `reason` says how."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path} cannot be read as an image: {reason}", "Check the file, or copy it again."
        )
        self.reason = reason


@dataclass(frozen=True)
class ImageShape:
    """Width and height in pixels, as stored, and whether the image is greyscale.

    Attributes:
        raster: of an image that GDAL is to read, not Pillow.
    """

    width: int
    height: int
    grey: bool
    raster: Raster | None = None

    @property
    def dtype(self) -> str:
        return "uint8" if self.raster is None else self.raster.dtype


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


def inspect(path: Path, reading: Reading = AS_IT_IS) -> ImageShape:
    """Read an image's header.

    Raises:
        BrokenImageError: it cannot be read, or lacks a band that is to be read.
    """
    with _open(path, reading) as (image, raster):
        if raster is not None:
            width, height = (int(side) for side in raster.bounds[2:])
            return ImageShape(width, height, raster.bands == 1, raster)
        return ImageShape(image.width, image.height, image.mode in ("1", "L", "LA", "La"))


def read(
    path: Path,
    size: int,
    channels: int,
    reading: Reading = AS_IT_IS,
    stretch: Stretch | None = None,
) -> Pixels:
    """The centre square of an image, upright and resized to (size, size, channels).

    Args:
        channels: 3, or 1 for grey, or as many as the image has; alpha is dropped.
        stretch: to uint8, needed for an image of another dtype.

    Raises:
        BrokenImageError: it cannot be read.
        GeomatchError: it has other bands.
    """
    planes = _planes(path, channels, reading, stretch)
    return np.concatenate(
        [_centre_square(plane, size, len(plane.getbands())) for plane in planes], axis=-1
    )


def read_whole(
    path: Path, channels: int, reading: Reading = AS_IT_IS, stretch: Stretch | None = None
) -> Pixels:
    """All of an image, upright: (h, w, channels). Arguments and errors as for `read`."""
    planes = [np.asarray(plane) for plane in _planes(path, channels, reading, stretch)]
    return np.concatenate([np.atleast_3d(plane) for plane in planes], axis=-1)


def _planes(
    path: Path, channels: int, reading: Reading, stretch: Stretch | None
) -> list[Image.Image]:
    """An image, upright, as one picture or as one for each band."""
    with _open(path, reading, channels) as (image, raster):
        try:
            if raster is None:
                image.load()  # which makes a TIFF file upright
                converted = image.convert("RGB" if channels == 3 else "L")
                return [_upright(converted, _orientation(image))]
            orientation = _orientation(image)
            values = rasters.read_plain(raster)
        except UNREADABLE as error:
            raise _broken_image(path, error) from error
        except GeomatchError as error:
            raise BrokenImageError(path, error.message) from error
    values = _with_channels(values, channels, path)
    if stretch is not None:
        values = stretch(values)
    return [_upright(Image.fromarray(plane), orientation) for plane in values]


def _with_channels(values: NDArray[Any], channels: int, path: Path) -> NDArray[Any]:
    """Bands (n, h, w) as (channels, h, w): grey as three, or three as grey."""
    if len(values) == channels:
        return values
    if (len(values), channels) == (1, 3):
        return values.repeat(3, axis=0)
    if (len(values), channels) == (3, 1):
        grey = np.tensordot(LUMA, values, 1)[None]
        return grey if values.dtype.kind == "f" else np.rint(grey).astype(values.dtype)
    raise GeomatchError(
        f"{path} has {len(values)} bands, the tiles have {channels}",
        "Give an image with those bands.",
    )


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


@contextlib.contextmanager
def _open(path: Path, reading: Reading, channels: int = 3) -> Iterator[tuple[Any, Raster | None]]:
    """An image as Pillow opens it, and as GDAL does if Pillow would not read it right."""
    image = None
    try:
        image = Image.open(in_memory.content(path) or path)
    except UNREADABLE as error:
        if not isinstance(error, UnidentifiedImageError):
            raise _broken_image(path, error) from error
        unidentified = error
    with image or contextlib.nullcontext():
        raster = None
        if image is None or reading.bands or channels not in (1, 3) or _is_beyond_pillow(image):
            try:
                raster = rasters.inspect_plain(str(path), reading, channels)
            except GeomatchError as error:
                if image is None and error.__cause__:  # GDAL cannot open it either
                    raise _broken_image(path, unidentified) from error
                raise BrokenImageError(path, error.message) from error
        yield image, raster


def _is_beyond_pillow(image: ImageFile.ImageFile) -> bool:
    """Whether an image has more than 8 bits, or bands of which Pillow cannot tell which is alpha.

    Pillow reads 16-bit colours as 8-bit ones, and garbles uncompressed TIFF files on their side.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;") or ";16" in str(image.tile):
        return True
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        is_odd = image.tag_v2.get(SAMPLES_PER_PIXEL, 1) not in (1, 3)
        return image.mode != "CMYK" and (is_odd or _orientation(image) > 4)
    return image.format == "JPEG2000"


def _orientation(image: ImageFile.ImageFile | None) -> int:
    """The EXIF orientation of an image, 1 (upright) to 8."""
    return 1 if image is None else image.getexif().get(ExifTags.Base.Orientation, 1)


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = TRANSPOSED.get(orientation)
    return image if turn is None else image.transpose(turn)


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

"""How the bands of a raster are read: which are image, which is the mask, and what is invalid.

Where this is not simply how they are stored, the raster is read through a GDAL VRT that has the
image bands first and the mask, as alpha band, last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
from rasterio.dtypes import dtype_rev, in_dtype_range, typename_fwd
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.windows import Window

from geomatch.errors import BadFileError

PROBES, PROBE_SIDE = 3, 64
"""An alpha band is probed in 3 x 3 windows of 64 pixels a side."""


@dataclass(frozen=True)
class Reading:
    """How imagery is to be read where its files leave it open.

    Attributes:
        bands: numbers of the image bands, from 1, in order; empty for all but an alpha band. Those
            of a colour table are its red, green and blue.
        nodata: value of invalid pixels in files that declare none.
        collar: whether black or white that is connected to the border is invalid.
    """

    bands: tuple[int, ...] = ()
    nodata: float | None = None
    collar: bool = False


@dataclass(frozen=True)
class Layout:
    """How the bands of one raster are read.

    Attributes:
        bands: numbers of the image bands; colours of the table if it is `expanded`.
        alpha: number of the alpha band; None if there is none, or if it is not a mask.
        dtype: of the image bands together.
        palette: whether values are indices of a colour table, which cannot be interpolated.
        expanded: whether the colour table is applied, in reading.
        nodata: value of invalid pixels, of a file that declares none; an index if it is expanded.
        collar: as in `Reading`.
        as_stored: whether the bands are stored in this way; others are read through a VRT.
    """

    bands: tuple[int, ...]
    alpha: int | None
    dtype: str
    palette: bool
    expanded: bool
    nodata: float | None
    collar: bool
    as_stored: bool


def layout(source: Any, path: str, reading: Reading | None) -> Layout:
    """How to read an open dataset.

    Args:
        path: names the file in errors.
        reading: None for labels and masks, whose colour tables stay unread.

    Raises:
        BadFileError: it lacks a band, an alpha band does not hold a mask, or numbers are complex.
    """
    kinds = source.colorinterp
    palette = bool(kinds[0] == ColorInterp.palette)
    expanded = palette and reading is not None
    wanted = reading or Reading()
    numbers = tuple(range(1, _colours(source) + 1)) if expanded else source.indexes
    alpha = kinds.index(ColorInterp.alpha) + 1 if ColorInterp.alpha in kinds else None
    bands = tuple(n for n in numbers if expanded or n != alpha)
    if wanted.bands:
        for number in wanted.bands:
            if number not in numbers:
                raise BadFileError(
                    path, f"has no band {number}: it has {len(numbers)}", "Correct --bands."
                )
        bands = wanted.bands
    if alpha is not None and reading is not None:
        if alpha in bands and not expanded:
            alpha = None
        elif not _is_mask(source, alpha):
            if not wanted.bands:
                every = ",".join(map(str, numbers))
                others = ",".join(map(str, bands))
                raise BadFileError(
                    path,
                    f"says that band {alpha} is alpha, but its values are not a mask's; it "
                    "is most likely near infrared",
                    f"Name the image bands: geomatch tile --bands {every}, or --bands {others} "
                    "without it; or correct the tag: gdal_edit.py "
                    f"-colorinterp_{alpha} undefined FILE",
                )
            alpha = None
    dtypes = source.dtypes[:1] if expanded else [source.dtypes[n - 1] for n in bands]
    if any("complex" in name for name in dtypes):
        raise BadFileError(
            path,
            f"contains complex numbers ({source.dtypes[0]})",
            "Take amplitudes: gdal_translate DERIVED_SUBDATASET:AMPLITUDE:IN OUT",
        )
    dtype = str(np.result_type(*dtypes))
    nodata = wanted.nodata
    if nodata is not None:
        # A value that a file cannot contain is nowhere in it.
        is_declared = all(value is not None for value in source.nodatavals)
        nodata = None if is_declared or not can_hold(dtype, nodata) else nodata
    count = source.count
    mask_is_plain = alpha is None and ColorInterp.alpha not in kinds
    mask_is_plain |= alpha == count and source.dtypes[count - 1] == "uint8"
    as_stored = (
        mask_is_plain
        and nodata is None
        and not expanded
        and not wanted.collar
        and bands == tuple(range(1, count + (alpha is None)))
        and len(set(dtypes)) == 1
    )
    dtype = "uint8" if expanded else dtype
    return Layout(bands, alpha, dtype, palette, expanded, nodata, wanted.collar, as_stored)


def _colours(source: Any) -> int:
    """Number of bands that the colour table of the first band stands for: 1 if all are grey."""
    return 1 if all(r == g == b for r, g, b, _ in source.colormap(1).values()) else 3


def can_hold(dtype: str, value: float) -> bool:
    """Whether pixels of a dtype can have a value."""
    if np.dtype(dtype).kind == "f":
        return True
    return value.is_integer() and bool(in_dtype_range(value, dtype))


def _is_mask(source: Any, alpha: int) -> bool:
    """Whether an alpha band holds a mask: most of its pixels are about opaque or transparent.

    Near infrared has values of all kinds. Only windows spread over the band are read, since files
    are large.
    """
    rows, cols = (
        np.linspace(0, max(0, side - PROBE_SIDE), PROBES).astype(int).tolist()
        for side in (source.height, source.width)
    )
    values = np.concatenate(
        [
            source.read(alpha, window=Window(col, row, PROBE_SIDE, PROBE_SIDE)).ravel()
            for row in np.unique(rows).tolist()
            for col in np.unique(cols).tolist()
        ]
    )
    highest = float(values.max())
    partial = (values > highest / 16) & (values < highest * 15 / 16)  # compression blurs the ends
    return bool(2 * partial.sum() <= (values > 0).sum())


def vrt(source: Any, chosen: Layout, collar: str = "", overview: int | None = None) -> str:
    """The text of a GDAL VRT that reads an open dataset in a layout.

    Its bands are those of the layout, then alpha if there is any.

    Args:
        collar: path of a raster that is 0 in the collar and where others are invalid, else 255.
        overview: number of the overview that the dataset is.
    """
    root = _empty(source)
    for number in chosen.bands:
        band = _band(root, chosen.dtype, "Undefined")
        if chosen.expanded:
            _read(band, source.name, "1", ColorTableComponent=str(number))
            continue
        nodata = source.nodatavals[number - 1]
        nodata = chosen.nodata if nodata is None else nodata
        if nodata is not None:
            ElementTree.SubElement(band, "NoDataValue").text = repr(nodata)
        _read(band, source.name, str(number))
    flags = source.mask_flag_enums[0]
    if collar:
        _read(_band(root, "uint8", "Alpha"), collar, "1")
    elif chosen.alpha is not None:
        # GDAL takes 1 of 65,535 or of 32,767 for transparent: every other width becomes 0 or 255.
        is_byte = source.dtypes[chosen.alpha - 1] == "uint8"
        lut = {} if is_byte else {"LUT": "0:0,1e-40:255"}
        _read(_band(root, "uint8", "Alpha"), source.name, str(chosen.alpha), **lut)
    elif chosen.expanded and chosen.nodata is not None:
        alpha = _band(root, "uint8", "Alpha")
        constant = {"ScaleOffset": "255", "ScaleRatio": "0"}
        _read(alpha, source.name, "1", **constant, NODATA=repr(chosen.nodata))
    elif chosen.expanded and any(a < 255 for *_, a in source.colormap(1).values()):
        _read(_band(root, "uint8", "Alpha"), source.name, "1", ColorTableComponent="4")
    elif chosen.expanded and MaskFlags.all_valid not in flags:
        _read(_band(root, "uint8", "Alpha"), source.name, "mask,1")
    elif MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags:
        mask = ElementTree.SubElement(root, "MaskBand")
        _read(ElementTree.SubElement(mask, "VRTRasterBand", dataType="Byte"), source.name, "mask,1")
    if overview is not None:
        for kind in ("SimpleSource", "ComplexSource"):
            for read in root.iter(kind):
                options = ElementTree.SubElement(read, "OpenOptions")
                ElementTree.SubElement(options, "OOI", key="OVERVIEW_LEVEL").text = str(overview)
    return ElementTree.tostring(root, encoding="unicode")


def mask_vrt(source: Any) -> str:
    """The text of a GDAL VRT whose band is the mask of an open dataset; it tells its overviews."""
    root = _empty(source)
    _read(_band(root, "uint8", "Undefined"), source.name, "mask,1")
    return ElementTree.tostring(root, encoding="unicode")


def _empty(source: Any) -> ElementTree.Element:
    """A VRT of the size and at the place of a dataset."""
    root = ElementTree.Element(
        "VRTDataset", rasterXSize=str(source.width), rasterYSize=str(source.height)
    )
    ElementTree.SubElement(root, "SRS").text = source.crs.to_wkt() if source.crs else ""
    numbers = ", ".join(repr(float(value)) for value in source.transform.to_gdal())
    ElementTree.SubElement(root, "GeoTransform").text = numbers
    return root


def _band(root: ElementTree.Element, dtype: str, kind: str) -> ElementTree.Element:
    band = ElementTree.SubElement(root, "VRTRasterBand", dataType=typename_fwd[dtype_rev[dtype]])
    ElementTree.SubElement(band, "ColorInterp").text = kind
    return band


def _read(band: ElementTree.Element, path: str, number: str, **how: str) -> None:
    """Add the source of a VRT band: a band of a dataset, through a colour table or LUT."""
    read = ElementTree.SubElement(band, "ComplexSource" if how else "SimpleSource")
    ElementTree.SubElement(read, "SourceFilename", relativeToVRT="0").text = path
    ElementTree.SubElement(read, "SourceBand").text = number
    for name, value in how.items():
        ElementTree.SubElement(read, name).text = value

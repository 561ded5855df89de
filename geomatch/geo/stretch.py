"""Stretches: the conversion of imagery of any dtype to uint8."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch.errors import GeomatchError, UsageError
from geomatch.geo.rasters import Pixels, Raster, guarded, has_alpha, open_view

STRETCH_FILES, STRETCH_SIDE = 256, 256
"""A percentile stretch samples at most 256 files, each reduced to at most 256 pixels a side."""


@dataclass(frozen=True)
class Stretch:
    """Linear scaling of each band from low..high to 0..255."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __call__(self, values: NDArray[Any]) -> Pixels:
        """Scale (bands, h, w) of any dtype to uint8."""
        low = np.asarray(self.low, np.float32)[:, None, None]
        span = np.maximum(np.asarray(self.high, np.float32)[:, None, None] - low, 1e-12)
        scaled = (values.astype(np.float32) - low) / span * 255
        return np.clip(np.rint(np.nan_to_num(scaled)), 0, 255).astype(np.uint8)


def measure_stretch(rasters: Sequence[Raster], text: str) -> Stretch:
    """The stretch given as "MIN,MAX", or as percentiles "2%,98%" over all rasters.

    Raises:
        UsageError: `text` has another form.
        GeomatchError: percentiles are of a band that has no valid pixel.
    """
    parts = [part.strip() for part in text.split(",")]
    percent = [part.endswith("%") for part in parts]
    try:
        low, high = (float(part.removesuffix("%")) for part in parts)
    except ValueError:
        low, high = math.nan, math.nan
    is_valid = low < high < math.inf and low > -math.inf
    if any(percent):
        is_valid = all(percent) and 0 <= low < high <= 100
    if not is_valid:
        raise UsageError(f"--stretch {text} is neither MIN,MAX nor percentiles such as 2%,98%")
    bands = rasters[0].bands
    if not any(percent):
        return Stretch((low,) * bands, (high,) * bands)
    chosen = np.unique(np.linspace(0, len(rasters) - 1, STRETCH_FILES).astype(int))
    samples: list[list[NDArray[Any]]] = [[] for _ in range(bands)]
    for raster in (rasters[i] for i in chosen):
        with guarded(raster.path), open_view(raster) as source:
            shape = (min(source.height, STRETCH_SIDE), min(source.width, STRETCH_SIDE))
            for band in range(bands):
                values = source.read(band + 1, out_shape=shape, masked=True)
                if has_alpha(source):  # GDAL's mask has it only beside one or three bands
                    values[source.read(bands + 1, out_shape=shape) == 0] = np.ma.masked
                valid = values.compressed()
                samples[band].append(valid[np.isfinite(valid)])
    found = [np.concatenate(band) for band in samples]
    for values, number in zip(found, rasters[0].layout.bands, strict=True):
        if not len(values):
            more = f" and {len(rasters) - 1} more" if len(rasters) > 1 else ""
            raise GeomatchError(
                f"band {number} of {rasters[0].path}{more} has no valid pixel to measure "
                f"--stretch {text} by",
                "Leave the year out, correct its nodata value, or give --stretch MIN,MAX.",
            )
    limits = [np.percentile(band, [low, high]) for band in found]
    return Stretch(tuple(float(v[0]) for v in limits), tuple(float(v[1]) for v in limits))

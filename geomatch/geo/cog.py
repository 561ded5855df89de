"""Cloud Optimized GeoTIFFs of tiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.transform import from_bounds

MEDIA_TYPE = "image/tiff; application=geotiff; profile=cloud-optimized"


def write(path: Path, pixels: NDArray[np.uint8], crs: str, bounds: NDArray[np.float64]) -> None:
    """Write a tile.

    Args:
        pixels: (h, w, c).
        crs: "EPSG:n".
        bounds: left, bottom, right, top in it.
    """
    height, width, count = pixels.shape
    with rasterio.open(
        path,
        "w",
        driver="COG",
        height=height,
        width=width,
        count=count,
        dtype=pixels.dtype,
        crs=crs,
        transform=from_bounds(*bounds.tolist(), width, height),
        compress="deflate",
    ) as target:
        target.write(np.moveaxis(pixels, -1, 0))

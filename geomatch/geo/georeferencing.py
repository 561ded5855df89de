"""Images without a place: reading them whole but reduced, and writing where they lie."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio.shutil
from numpy.typing import NDArray
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Resampling
from rasterio.transform import Affine, from_origin
from rasterio.vrt import WarpedVRT

from geomatch.errors import GeomatchError
from geomatch.geo.coordinates import GDAL_ERRORS
from geomatch.geo.grid import Float64Array
from geomatch.geo.rasters import guarded, has_alpha, open_raster
from geomatch.geo.stretch import Stretch

PERCENTILES = 2, 98
"""Those of an image that is not 8-bit become 0 and 255, for matching alone."""
POINTS_HEADER = "mapX,mapY,sourceX,sourceY,enable,dX,dY,residual"


@dataclass(frozen=True)
class Scan:
    """The size in pixels of an image file, whatever place the file says it has."""

    path: str
    width: int
    height: int

    @classmethod
    def open(cls, path: str) -> Scan:
        """Read the header.

        Raises:
            BadFileError: GDAL cannot open the file.
        """
        with open_raster(path) as source:
            return cls(path, source.width, source.height)

    @property
    def corners(self) -> Float64Array:
        """(4, 2) points of the corners, in the order of going round."""
        w, h = self.width, self.height
        return np.array([[0, 0], [w, 0], [w, h], [0, h]], np.float64)

    def read(self, reduced: float) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """The image with sides divided by about `reduced`: (h, w, bands) and where it is valid.

        The mean of all bands but alpha serves for matching. Files of another dtype than uint8 are
        stretched.

        Raises:
            GeomatchError: it is damaged.
        """
        shape = (math.ceil(self.height / reduced), math.ceil(self.width / reduced))
        with guarded(self.path), open_raster(self.path) as source:
            kinds = source.colorinterp
            bands = [n for n, kind in enumerate(kinds, 1) if kind != ColorInterp.alpha]
            form = {"out_shape": shape, "resampling": Resampling.average}
            if kinds[0] == ColorInterp.palette:
                form["resampling"] = Resampling.nearest
            values = np.stack([source.read(band, **form) for band in bands])
            valid = source.dataset_mask(out_shape=shape) > 0
            if kinds[0] == ColorInterp.palette:
                table = source.colormap(1)
                colours = np.array([table.get(i, (0, 0, 0, 0))[:3] for i in range(256)], np.uint8)
                values = np.moveaxis(colours[values[0]], -1, 0)
        if values.dtype != np.uint8:
            known = values[:, valid] if valid.any() else values.reshape(len(values), -1)
            low, high = np.nanpercentile(known, PERCENTILES, axis=1)
            values = Stretch(tuple(low.tolist()), tuple(high.tolist()))(values)
        return np.moveaxis(values, 0, -1), valid


def write_geotiff(scan: Scan, matrix: Float64Array, epsg: int, path: Path) -> float:
    """Write an image as a GeoTIFF, north up, block by block; invalid ground is transparent.

    Args:
        matrix: (2, 3) transform from points of the scan to x, y.
        epsg: code of the CRS of these.

    Returns:
        Metres per pixel, those of the scan.

    Raises:
        GeomatchError: the scan is damaged, or the file cannot be written.
    """
    gsd = float(f"{math.sqrt(abs(np.linalg.det(matrix[:, :2]))):.4g}")
    x, y = (scan.corners @ matrix[:, :2].T + matrix[:, 2]).T
    left, top = math.floor(x.min() / gsd) * gsd, math.ceil(y.max() / gsd) * gsd
    (a, b, c), (d, e, f) = matrix.tolist()
    crs = CRS.from_epsg(epsg)
    options = {"tiled": True, "compress": "deflate", "bigtiff": "if_safer"}
    with (
        guarded(scan.path),
        open_raster(scan.path) as source,
        WarpedVRT(
            source,
            src_crs=crs,
            src_transform=Affine(a, b, c, d, e, f),
            crs=crs,
            resampling=Resampling.nearest
            if source.colorinterp[0] == ColorInterp.palette
            else Resampling.bilinear,
            transform=from_origin(left, top, gsd, gsd),
            width=math.ceil((x.max() - left) / gsd),
            height=math.ceil((top - y.min()) / gsd),
            add_alpha=not has_alpha(source) and source.nodata is None,
        ) as vrt,
    ):
        try:
            rasterio.shutil.copy(vrt, path, driver="GTiff", **options)
        except GDAL_ERRORS as error:
            raise GeomatchError(
                f"{scan.path} cannot be written as {path}: {error}",
                "Free space and check permissions; check the image with gdalinfo.",
            ) from error
    return gsd


def write_points(
    path: Path, at: Float64Array, to: Float64Array, residuals: Float64Array, epsg: int
) -> None:
    """Write ground control points as QGIS's georeferencer does.

    Args:
        at: (n, 2) points of the scan.
        to: (n, 2) where they lie, x, y.
        residuals: (n, 2) in pixels of the scan, from the point to where the transform has it.
        epsg: code of the CRS of x and y.
    """
    lines = [f"#CRS: {CRS.from_epsg(epsg).to_wkt(version='WKT2_2019')}", POINTS_HEADER]
    for (px, py), (x, y), (dx, dy) in zip(
        at.tolist(), to.tolist(), residuals.tolist(), strict=True
    ):
        # QGIS counts rows of an image from 0 downward as negative y.
        values = [x, y, px, -py, 1, dx, -dy, math.hypot(dx, dy)]
        lines.append(",".join(format(value + 0.0, ".10g") for value in values))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_vrt(scan: Scan, path: Path, at: Float64Array, to: Float64Array, epsg: int) -> None:
    """Write a GDAL VRT that gives a scan its ground control points; see `write_points`."""
    with guarded(scan.path), open_raster(scan.path) as source:
        rasterio.shutil.copy(source, path, driver="VRT")
    points = [
        GroundControlPoint(row=py, col=px, x=x, y=y)
        for (px, py), (x, y) in zip(at.tolist(), to.tolist(), strict=True)
    ]
    with open_raster(str(path), "r+") as target:
        target.gcps = points, CRS.from_epsg(epsg)

"""Tile indexes, as gdaltindex writes them: vector files that name a raster in each feature."""

from __future__ import annotations

import contextlib
import os

from geomatch.geo.files import gdal_path

FIELD = "location"
GTI_SUFFIXES = (".gti.gpkg", ".gti.fgb", ".gti")
IMAGE_SUFFIXES = (".tif", ".tiff", ".jp2", ".vrt", ".img", ".png", ".jpg", ".jpeg")


def rasters_of(path: str) -> list[str] | None:
    """The rasters that a tile index names, in its order; None where `path` is not one.

    Relative names are taken from the folder of the index. A GDAL tile index (GTI) is a raster.
    """
    if path.lower().endswith((*GTI_SUFFIXES, *IMAGE_SUFFIXES)):
        return None
    import pyogrio  # here, as in `labels`
    from pyogrio.errors import DataLayerError, DataSourceError

    index = gdal_path(path)
    with contextlib.suppress(DataSourceError, DataLayerError):
        for layer, _ in pyogrio.list_layers(index):
            if FIELD in pyogrio.read_info(index, layer=layer)["fields"]:
                _, _, _, (names,) = pyogrio.raw.read(
                    index, layer=layer, columns=[FIELD], read_geometry=False
                )
                folder = os.path.dirname(path)
                return [os.path.normpath(os.path.join(folder, str(name))) for name in names if name]
    return None

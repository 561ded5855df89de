"""Vector files for GIS programs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from geomatch.errors import GeomatchError
from geomatch.geo.grid import CRS84


@dataclass(frozen=True)
class Layer:
    """Features of one type.

    Attributes:
        geometry: (n, k, 2) coordinates of closed rings, or of lines.
        fields: a column of n values by name; None is null.
    """

    name: str
    geometry: NDArray[np.float64]
    fields: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(self.geometry)

    @property
    def kind(self) -> str:
        """ "Polygon" or "LineString"."""
        return "Polygon" if self.geometry.shape[1] > 2 else "LineString"

    def wkb(self) -> NDArray[np.object_]:
        """(n,) bytes of each geometry."""
        make = shapely.polygons if self.kind == "Polygon" else shapely.linestrings
        encoded: NDArray[np.object_] = shapely.to_wkb(make(self.geometry))
        return encoded


def or_none(values: NDArray[np.floating]) -> list[float | None]:
    """The values of a field, with null in place of NaN."""
    return [None if np.isnan(value) else value for value in values.tolist()]


def write(path: Path, layers: Iterable[Layer], driver: str, crs: str) -> None:
    """Write layers to a new file, in place of an earlier one.

    Args:
        layers: of a GeoPackage, each is written before the next is asked for, and joins an earlier
            one of its name.
        driver: of OGR: "GPKG", or "GeoJSON", which has one layer with the features of all.
        crs: of the coordinates, "EPSG:n", or "OGC:CRS84", which is written as EPSG:4326: its order
            of axes is that of these files anyway.

    Raises:
        GeomatchError: the file cannot be written.
    """
    # Imported here, since it imports pandas where that is installed.
    from pyogrio.errors import DataSourceError

    crs = "EPSG:4326" if crs == CRS84 else crs
    path.parent.mkdir(parents=True, exist_ok=True)
    # In a folder beside, since GDAL warns of other endings and writes files of its own meanwhile.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".geomatch-") as folder:
        temporary = Path(folder, "written").with_suffix(f".{driver.lower()}")
        try:
            if driver == "GeoJSON":
                _write(temporary, list(layers), driver, crs, RFC7946="YES")
            else:
                for layer in layers:
                    _write(temporary, [layer], driver, crs)
        except DataSourceError as error:
            raise GeomatchError(f"{path} cannot be written: {error}") from error
        os.replace(temporary, path)


def _write(path: Path, layers: Sequence[Layer], driver: str, crs: str, **options: str) -> None:
    """Write layers as one, or add it to a file."""
    import pyogrio

    (kind, *others) = {layer.kind for layer in layers}
    names = list(dict.fromkeys(name for layer in layers for name in layer.fields))
    columns = [
        _column([v for layer in layers for v in layer.fields.get(name, [None] * len(layer))])
        for name in names
    ]
    pyogrio.raw.write(
        path,
        np.concatenate([layer.wkb() for layer in layers]),
        [values for values, _ in columns],
        names,
        field_mask=[is_null for _, is_null in columns],
        layer=layers[0].name,
        driver=driver,
        geometry_type="Unknown" if others else kind,
        crs=crs,
        append=path.exists(),
        **options,
    )


def _column(values: Sequence[Any]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Values of one type as an array, and which of them are None."""
    is_null = np.array([value is None for value in values], bool)
    types = {type(value) for value in values if value is not None}
    dtype, empty = (object, "") if str in types else (int if types == {int} else float, 0)
    return np.array([empty if v is None else v for v in values], dtype), is_null

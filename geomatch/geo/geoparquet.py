"""GeoParquet for GDAL without its driver, such as that of pyogrio's wheels: as a GeoPackage."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from geomatch.errors import BadFileError
from geomatch.geo import files

ENDINGS = (".parquet", ".geoparquet", ".pq")
ROWS = 65_536
"""Features that are copied at a time."""


def is_geoparquet(path: str) -> bool:
    """Whether a file is named as GeoParquet is."""
    return path.lower().endswith(ENDINGS)


@functools.cache
def as_geopackage(path: str, stamp: tuple[int, ...]) -> str:
    """The path of a copy, which goes away with the process; made once for each `stamp`.

    Attributes that are lists or structures are left out. Features are numbered from 1.

    Raises:
        BadFileError: it is no GeoParquet, or not one with geometries in WKB.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    import pyogrio

    folder = files.scratch().name
    copy = os.path.join(folder, f"{len(os.listdir(folder))}.gpkg")
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            name, about = _geometry(path, schema.metadata or {})
            columns = [f.name for f in schema if f.name == name or not pa.types.is_nested(f.type)]
            kept = pa.schema([schema.field(column) for column in columns])
            batches = file.iter_batches(ROWS, columns=columns)
            pyogrio.write_arrow(
                pa.RecordBatchReader.from_batches(kept, batches),
                copy,
                driver="GPKG",
                layer=Path(path).stem,
                geometry_name=name,
                geometry_type="Unknown",
                crs=_crs(about),
            )
    except (
        *(pa.ArrowException, OSError, ValueError, KeyError),
        *(pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError),
    ) as error:
        raise BadFileError(
            path,
            f"cannot be read as GeoParquet: {error}",
            "Write it again, or as GeoPackage: ogr2ogr OUT.gpkg IN.parquet.",
        ) from error
    return copy


def _geometry(path: str, metadata: dict[bytes, bytes]) -> tuple[str, dict[str, Any]]:
    """The name of the geometry column and what the file says of it."""
    if b"geo" not in metadata:
        raise BadFileError(
            path,
            "is Parquet, but no GeoParquet: its footer says nothing of geometries",
            "Write it by geopandas or GDAL, or leave it out.",
        )
    about = json.loads(metadata[b"geo"])
    name = about["primary_column"]
    column = about["columns"][name]
    if column["encoding"].upper() != "WKB":
        raise BadFileError(
            path,
            f"has geometries as {column['encoding']}, not as WKB",
            "Write it with geometries in WKB, or as GeoPackage: ogr2ogr OUT.gpkg IN.parquet.",
        )
    return name, column


def _crs(column: dict[str, Any]) -> str | None:
    """Of a geometry column: by default longitude and latitude, and null where unknown."""
    crs = column.get("crs", "OGC:CRS84")
    return json.dumps(crs) if isinstance(crs, dict) else crs

"""GeoParquet 1.1: a WKB geometry column with bbox covering, zstd-compressed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from geomatch.errors import StaleError

BBOX = pa.struct([(name, pa.float64()) for name in ("xmin", "ymin", "xmax", "ymax")])


def geometry_columns(rings: NDArray[np.float64] | None, n: int) -> dict[str, pa.Array]:
    """Columns `geometry` and `bbox` of n closed rings (n, 5, 2); null without rings."""
    if rings is None:
        return {"geometry": pa.nulls(n, pa.binary()), "bbox": pa.nulls(n, BBOX)}
    low, high = rings.min(axis=1), rings.max(axis=1)
    parts = [low[:, 0], low[:, 1], high[:, 0], high[:, 1]]
    return {
        "geometry": pa.array(shapely.to_wkb(shapely.polygons(rings)), pa.binary()),
        "bbox": pa.StructArray.from_arrays([pa.array(p) for p in parts], fields=list(BBOX)),
    }


def write(
    path: Path,
    schema: pa.Schema,
    batches: Iterable[pa.Table],
    crs: dict[str, Any] | None,
    footer: dict[str, dict[str, Any]],
) -> None:
    """Write tables of one schema, one row group each, in bounded memory.

    Args:
        crs: PROJJSON of the geometry; None means OGC:CRS84, the format's default.
        footer: additional JSON metadata by key.
    """
    box = {name: ["bbox", name] for name in ("xmin", "ymin", "xmax", "ymax")}
    column: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": ["Polygon"],
        "covering": {"bbox": box},
    }
    if crs is not None:
        column["crs"] = crs
    # Not later than 1.1.0: readers in use refuse 2.0.
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    metadata = {key: json.dumps(value) for key, value in {"geo": geo, **footer}.items()}
    with pq.ParquetWriter(path, schema.with_metadata(metadata), compression="zstd") as writer:
        for table in batches:
            writer.write_table(table.cast(schema).replace_schema_metadata(metadata))


def read_footer(path: Path, key: str, command: str) -> dict[str, Any]:
    """Read the JSON metadata that `write` stored under `key`.

    Raises:
        StaleError: the file is damaged, of an older format or of another program; `command` makes
            it again.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
        value: dict[str, Any] = json.loads(metadata.get(key.encode(), b"null"))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StaleError(f"{path} cannot be read: {error}", f"Run: {command}") from error
    if value is None:
        raise StaleError(
            f"{path} has no {key!r} metadata: an older geomatch or another program wrote it",
            f"Run: {command}",
        )
    return value

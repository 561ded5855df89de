"""A place of many tiles with descriptors, to test filters and engines on, and what they find."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import shapely
from hand_made import hand_made_tiles

from geomatch.data.filters import Filter, Place
from geomatch.data.tiles import TileTable
from geomatch.geo import footprints

SIDE = 40
"""Columns and rows, each tile in two years."""


def tiles() -> TileTable:
    """3,200 tiles of 8 m in two UTM zones and three splits, of which a few are for validation."""
    col, row = (axis.ravel() for axis in np.meshgrid(np.arange(SIDE), np.arange(SIDE)))
    col, row = (np.tile(axis, 2) for axis in (col + 62_500, row + 625_000))
    n = len(col)
    made = hand_made_tiles(
        col.tolist(),
        row.tolist(),
        np.repeat([0, 1], n // 2).tolist(),
        np.where(np.arange(n) % 100 == 0, 1, np.arange(n) % 3 * 2 % 4).tolist(),
    )
    return replace(
        made,
        grid=replace(made.grid, crs="utm"),
        epsg=np.where(row >= 625_000 + SIDE - 5, 32631, 32630),
        store_row=np.arange(n),
    )


def descriptors(size: int = 32, seed: int = 0) -> np.ndarray:
    """(n, size) descriptors in clusters, alike in both years of a place."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(60, size))
    places = centres[rng.integers(60, size=SIDE**2)] + 0.4 * rng.normal(size=(SIDE**2, size))
    return np.concatenate([places + 0.15 * rng.normal(size=places.shape) for _ in range(2)])


def scores(vectors: np.ndarray, query: np.ndarray, metric: str) -> np.ndarray:
    """Cosine similarity or negative distance (n,) in float64."""
    vectors, query = vectors.astype(np.float64), query.astype(np.float64)
    if metric == "euclidean":
        return -np.linalg.norm(vectors - query, axis=1)
    return vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)


def filters(table: TileTable) -> dict[str, Filter]:
    """Every filter, and some together."""
    degrees = footprints.lonlat(table.epsg, table.centres())
    epsg, (x, y), (lon, lat) = table.epsg[820], table.centres()[820], degrees[820]
    here = Place(int(epsg), float(x), float(y), float(lon), float(lat))
    box = (lon - 0.001, lat - 0.0005, lon + 0.0005, lat + 0.001)
    # With a hole, and a part apart from it.
    area = shapely.union(
        shapely.Point(lon, lat).buffer(0.001).difference(shapely.Point(lon, lat).buffer(0.0003)),
        shapely.box(lon + 0.0015, lat, lon + 0.002, lat + 0.002),
    )
    return {
        "none": Filter(),
        "year": Filter(years=(1,)),
        "both years": Filter(years=(0, 1), without=(3,)),
        "split": Filter(split=2),
        "few": Filter(split=1, years=(1,)),
        "box": Filter(box=box),
        "across the date line": Filter(box=(box[2], box[1], box[0], box[3])),
        "area": Filter(area=area),
        "nowhere": Filter(area=shapely.Polygon()),
        "away": Filter(away=(here, 100.0)),
        "far": Filter(away=(here, 1e6)),
        "together": Filter(
            years=(0,), split=0, box=box, area=area, away=(here, 40.0), without=(820,)
        ),
    }


def passing(table: TileTable, wanted: Filter) -> np.ndarray:
    """Positions in the index of the tiles that pass, by a plain loop."""
    order = np.argsort(table.year, kind="stable")
    degrees, centres = footprints.lonlat(table.epsg, table.centres()), table.centres()
    found = []
    for position, tile in enumerate(order.tolist()):
        lon, lat = degrees[tile]
        if wanted.years is not None and table.year[tile] not in wanted.years:
            continue
        if wanted.split is not None and table.split[tile] != wanted.split:
            continue
        if wanted.box:
            west, south, east, north = wanted.box
            inside = west <= lon <= east if west <= east else lon >= west or lon <= east
            if not (inside and south <= lat <= north):
                continue
        if wanted.area is not None and not wanted.area.contains(shapely.Point(lon, lat)):
            continue
        if wanted.away:
            place, least = wanted.away
            metres = footprints.distance(
                np.array([place.epsg]),
                np.array([[place.x, place.y]]),
                table.epsg[[tile]],
                centres[[tile]],
            )
            if metres[0] < least:
                continue
        if position not in wanted.without:
            found.append(position)
    return np.array(found, np.int64)

"""Answers as files: CSV, GeoJSON and GeoPackage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch import project
from geomatch.geo import footprints
from geomatch.geo.grid import CRS84
from geomatch.geo.layers import Layer, write
from geomatch.manifests import TileManifest
from geomatch.querying.answers import Matches
from geomatch.querying.targets import Query

Float64Array = NDArray[np.float64]
Centre = tuple[int | None, float | None, float | None]
"""EPSG code, x and y."""


def write_csv(path: Path, found: Sequence[Matches]) -> None:
    """Write a row for each answer, with the columns of `query --json` and the query's year."""
    rows = _rows(found)
    project.write_csv(path, list(_columns(rows)), rows)


def write_geojson(path: Path, found: Sequence[Matches], tiles: TileManifest) -> None:
    """Write the layers of `write_gpkg` as one, in longitude and latitude.

    The field `layer` tells them apart.
    """
    layers = [
        Layer(
            each.name,
            footprints.unbroken(each.geometry),
            {"layer": [each.name] * len(each), **each.fields},
        )
        for each in _layers(found, tiles, CRS84)
    ]
    write(path, layers, "GeoJSON", CRS84)


def write_gpkg(path: Path, found: Sequence[Matches], tiles: TileManifest) -> None:
    """Write footprints of answers and of queries, and the line from each query to each answer.

    The layers are "answers", "queries" and "links", in the CRS of the grid; of a "utm" grid, in
    longitude and latitude. Images without a place have neither footprint nor lines.
    """
    crs = CRS84 if tiles.crs == "utm" else str(tiles.crs)
    write(path, _layers(found, tiles, crs), "GPKG", crs)


def outlines(found: Sequence[Matches], half: float, crs: str) -> Float64Array:
    """Footprints (n, 5, 2) of the tiles that answer, or of scans in the places that do.

    Args:
        half: of a tile's side, in metres.
        crs: of the footprints.
    """
    rings = [np.empty((0, 5, 2))]
    for each in found:
        if not each.places:
            rings.append(_rings(each.centres, half, crs))
            continue
        assert each.query.pixels is not None
        ground = np.stack([place.ring(each.query.pixels.shape[:2]) for place in each.places])
        epsg = np.array([place.epsg for place in each.places])
        rings.append(footprints.in_crs(epsg, ground, crs))
    return np.concatenate(rings)


def _rows(found: Sequence[Matches]) -> list[dict[str, Any]]:
    return [
        {"query": each.query.name, "query_year": each.query.year, **row}
        for each in found
        for row in each.as_json()
    ]


def _layers(found: Sequence[Matches], tiles: TileManifest, crs: str) -> list[Layer]:
    half = tiles.size * (tiles.gsd or 0.0) / 2
    rows = _rows(found)
    queries = [each.query for each in found if each.query.epsg is not None]
    links = [i for i, each in enumerate(_repeated(found)) if each.epsg is not None]
    answers = [centre for each in found for centre in each.centres]
    starts = [(each.epsg, each.x, each.y) for each in _repeated(found)]
    lines = [_points([at[i] for i in links], crs) for at in (starts, answers)]
    asked = [(each.epsg, each.x, each.y) for each in queries]
    return [
        Layer("answers", outlines(found, half, crs), _columns(rows)),
        Layer("links", np.stack(lines, axis=1), _columns([rows[i] for i in links])),
        Layer(
            "queries",
            _rings(asked, half, crs),
            {"query": [q.name for q in queries], "query_year": [q.year for q in queries]},
        ),
    ]


def _repeated(found: Sequence[Matches]) -> list[Query]:
    """The query of each answer."""
    return [each.query for each in found for _ in each.matches]


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _rings(centres: Sequence[Centre], half: float, crs: str) -> Float64Array:
    epsg, points = _arrays(centres)
    return footprints.rings(epsg, np.concatenate([points - half, points + half], axis=1), crs)


def _points(centres: Sequence[Centre], crs: str) -> Float64Array:
    return footprints.in_crs(*_arrays(centres), crs)


def _arrays(centres: Sequence[Centre]) -> tuple[NDArray[np.int64], Float64Array]:
    """EPSG codes (n,) and points (n, 2)."""
    epsg = np.array([code for code, _, _ in centres], np.int64)
    return epsg, np.array([at for _, *at in centres], np.float64).reshape(-1, 2)

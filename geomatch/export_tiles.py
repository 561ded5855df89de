"""Export of tiles: footprints for GIS programs, pixels as Cloud Optimized GeoTIFFs, and STAC."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS, TileTable, date_of
from geomatch.errors import UsageError
from geomatch.geo import cog, footprints, layers
from geomatch.geo.grid import CRS84
from geomatch.geo.layers import Layer
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, replacing

BLOCK = 16_384
"""Footprints in memory at a time."""
BATCH = 64
"""Tiles whose pixels are in memory at a time."""
STAC = "1.0.0"


@dataclass(frozen=True)
class ExportedTiles:
    """What was written: the number of tiles, and the files or folders."""

    tiles: int
    files: tuple[Path, ...]


def export_tiles(
    project: Project,
    *,
    years: Sequence[str] = (),
    splits: Sequence[str] = (),
    gpkg: Path | None = None,
    geojson: Path | None = None,
    cogs: Path | None = None,
    stac: Path | None = None,
    progress: ProgressCallback = silent,
) -> ExportedTiles:
    """Write the tiles for other programs.

    Args:
        years, splits: only tiles of these; by default all.
        gpkg: GeoPackage for the footprints, in the CRS of the grid ("utm": in degrees).
        geojson: GeoJSON for the same in degrees.
        cogs: folder for YEAR/CELL.tif, the pixels of each tile without its label channels.
        stac: folder for `items.json`, a STAC item collection, and such files as its assets.

    Raises:
        UsageError: nothing is to be written, tiles have no georeference, none are chosen, or STAC
            is asked for years that are no dates.
    """
    if not (gpkg or geojson or cogs or stac):
        raise UsageError(
            "no file to write", "Add --gpkg FILE, --geojson FILE, --cog DIR or --stac DIR."
        )
    tiles = _chosen(project, years, splits)
    files = []
    assert tiles.grid is not None
    own = footprints.file_crs(tiles.grid)
    for path, driver, crs in ((gpkg, "GPKG", own), (geojson, "GeoJSON", CRS84)):
        if path:
            layers.write(path, _footprints(tiles, crs, progress), driver, crs)
            files.append(path)
    if stac:
        if undated := [year for year in tiles.years if date_of(year) is None]:
            raise UsageError(
                f"STAC needs dates, and {undated[0]} is none",
                "Tile with years such as 2019 or 2019-06-03, or write --cog DIR.",
            )
        _write_items(stac / "items.json", tiles, progress)
    for folder in filter(None, (cogs, stac)):
        _write_pixels(project, tiles, folder, progress)
        files.append(folder)
    return ExportedTiles(len(tiles), tuple(files))


def _chosen(project: Project, years: Sequence[str], splits: Sequence[str]) -> TileTable:
    """The tiles of some years and splits.

    Raises:
        UsageError: they have no georeference, there is no such year, or there are none of both.
    """
    if not project.tile_manifest().on_ground:
        raise UsageError(
            "the images have no georeference, so their tiles have no footprints",
            "They are in the folder that they were read from.",
        )
    tiles = TileTable.load(project.catalogue)
    chosen = np.ones(len(tiles), bool)
    tiles.check_years(years)
    if years:
        chosen &= np.isin(tiles.year, [tiles.years.index(year) for year in years])
    if splits:
        chosen &= np.isin(tiles.split, [SPLITS.index(split) for split in splits])
    if not chosen.any():
        raise UsageError("no tile is of these years and splits", "See: geomatch info")
    return tiles.select(chosen)


def _footprints(tiles: TileTable, crs: str, progress: ProgressCallback) -> Iterator[Layer]:
    years = np.asarray(tiles.years, object)
    sources = np.asarray(tiles.sources, object)
    for start in range(0, len(tiles), BLOCK):
        part = tiles.select(slice(start, start + BLOCK))
        changed = [None] * len(part) if part.changed is None else layers.or_none(part.changed)
        fields = {
            "id": part.ids(),
            "cell": part.cells(),
            "year": years[part.year].tolist(),
            "split": np.asarray(SPLITS, object)[part.split].tolist(),
            "source": sources[part.source].tolist(),
            "valid": part.valid.tolist(),
            "changed": changed,
        }
        rings = footprints.rings(part.epsg, part.bounds(), crs)
        yield Layer("tiles", footprints.unbroken(rings) if crs == CRS84 else rings, fields)
        progress("writing footprints", min(start + BLOCK, len(tiles)), len(tiles))


def _write_pixels(
    project: Project, tiles: TileTable, folder: Path, progress: ProgressCallback
) -> None:
    """Write a file for each tile that has none yet."""
    store, channels = TileStore.open(project.pixels), project.tile_manifest().channels.image
    for start in range(0, len(tiles), BATCH):
        part = tiles.select(slice(start, start + BATCH))
        paths = [folder / name for name in _names(part)]
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        if missing:
            pixels, bounds = store.read(part.store_row[missing])[..., :channels], part.bounds()
            for i, tile in zip(missing, pixels, strict=True):
                with replacing(paths[i]) as temporary:
                    cog.write(temporary, tile, f"EPSG:{part.epsg[i]}", bounds[i])
        progress("writing tiles", start + len(part), len(tiles))


def _names(tiles: TileTable) -> list[str]:
    """The path of each tile's file within the folder."""
    years = [tiles.years[code] for code in tiles.year.tolist()]
    return [f"{year}/{cell}.tif" for year, cell in zip(years, tiles.cells(), strict=True)]


def _write_items(path: Path, tiles: TileTable, progress: ProgressCallback) -> None:
    """Write a STAC item collection, one item after the other."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as handle:
        handle.write('{"type": "FeatureCollection", "features": [')
        for start in range(0, len(tiles), BLOCK):
            part = tiles.select(slice(start, start + BLOCK))
            for i, item in enumerate(_items(part), start):
                handle.write(("," if i else "") + "\n" + json.dumps(item))
            progress("writing items", start + len(part), len(tiles))
        handle.write("\n]}\n")


def _items(tiles: TileTable) -> Iterator[dict[str, Any]]:
    """STAC items; positions are in degrees, with longitudes past 180 where a tile crosses that."""
    rings = footprints.unbroken(footprints.rings(tiles.epsg, tiles.bounds(), CRS84))
    dates = [f"{date_of(year)}Z" for year in tiles.years]
    shapes = zip(tiles.ids(), _names(tiles), rings, strict=True)
    for row, (tile_id, name, ring) in enumerate(shapes):
        yield {
            "type": "Feature",
            "stac_version": STAC,
            "id": tile_id,
            "geometry": {"type": "Polygon", "coordinates": [ring.tolist()]},
            "bbox": [*ring.min(axis=0).tolist(), *ring.max(axis=0).tolist()],
            "properties": {
                "datetime": dates[tiles.year[row]],
                "proj:epsg": int(tiles.epsg[row]),
                "geomatch:split": SPLITS[tiles.split[row]],
                "geomatch:valid": float(tiles.valid[row]),
            },
            "assets": {"image": {"href": f"./{name}", "type": cog.MEDIA_TYPE, "roles": ["data"]}},
            "links": [],
        }

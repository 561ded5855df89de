"""What is written as GeoParquet passes an independent validator."""

from __future__ import annotations

import dataclasses

import geoparquet_validator
import numpy as np
import pytest
from hand_made import hand_made_classes, hand_made_embedding_manifest, hand_made_tiles

from geomatch.data.embeddings import Embeddings
from geomatch.geo import footprints


def tiles_on_ground(crs):
    """Tiles of two years, some of which overlap; a "utm" grid has them in two zones."""
    years = [0, 0, 0, 1, 1, 1]
    tiles = hand_made_tiles([62_000, 62_001, 63_000] * 2, [600_000] * 6, years, stride=4)
    zones = np.array([32630, 32630, 32731] * 2) if crs == "utm" else tiles.epsg
    return dataclasses.replace(tiles, grid=dataclasses.replace(tiles.grid, crs=crs), epsg=zones)


def write(folder, tiles):
    """The catalogue and embeddings of tiles."""
    geometry = footprints.file_geometry(tiles.grid)
    catalogue, described = folder / "tiles.parquet", folder / "run1@0.parquet"
    tiles.save(catalogue, *geometry)
    vectors = np.ones((len(tiles), 4), np.float32)
    Embeddings(vectors, hand_made_embedding_manifest(4)).save(described, tiles, *geometry)
    return catalogue, described


@pytest.mark.parametrize("crs", ["EPSG:32630", "utm"])
def test_tiles_on_the_ground_are_conformant_in_every_class(tmp_path, crs):
    for path in write(tmp_path, tiles_on_ground(crs)):
        report = geoparquet_validator.check(str(path))
        assert report["version"] == "1.1.0"
        assert not [found for found in report["outcomes"] if found["status"] == "fail"], path
        # No class passes because it was not looked at.
        status = {found["id"]: found["status"] for found in report["outcomes"]}
        for test in ("core/wkb", "covering/bbox-paths", "distribution/geospatial-statistics"):
            assert status[f"/conf/{test}"] == "pass"


def test_tiles_without_a_ground_are_conformant(tmp_path):
    for path in write(tmp_path, hand_made_classes([0, 1, 0])):
        report = geoparquet_validator.check(str(path))
        # The third class asks for the extent of each row group, and there is none.
        assert not geoparquet_validator.failed(report, "core"), path
        assert not geoparquet_validator.failed(report, "covering"), path


def test_the_validator_sees_metres_that_are_declared_as_degrees(tmp_path):
    tiles = tiles_on_ground("EPSG:32630")
    footprint, _ = footprints.file_geometry(tiles.grid)
    tiles.save(tmp_path / "tiles.parquet", footprint, None)
    report = geoparquet_validator.check(str(tmp_path / "tiles.parquet"))
    assert geoparquet_validator.failed(report) == ["/conf/core/crs-default"]

"""Manifests: written as JSON and read again."""

from __future__ import annotations

import dataclasses
import json

import pytest
from small_project import hand_made_embedding_manifest, hand_made_tile_manifest

from geomatch.errors import StaleError
from geomatch.geo.grid import Grid
from geomatch.manifests import (
    EmbeddingManifest,
    IndexManifest,
    RunManifest,
    TileManifest,
    TileRequest,
    YearOfTiles,
)
from geomatch.project import FORMAT, read_manifest, write_json, write_manifest

STRETCH = {"low": [0.0], "high": [4000.0]}
TILES = hand_made_tile_manifest(
    Grid("EPSG:2154", 256, 0.5, 256),
    12,
    asked=TileRequest(source=({"year": "2010", "images": "é"},), set=("grid.gsd=0.5",)),
    years={"2010": YearOfTiles(2, "roads.gpkg", None), "2020": YearOfTiles(1, 0, STRETCH)},
)
ORIGIN = {"name": "r@6", "tiles": "t", "model": "m", "run": "runs/r", "run_id": "i", "step": 6}
MANIFESTS = [
    TILES,
    dataclasses.replace(TILES, crs=None, gsd=None, stride=None, placement="none", unreadable={}),
    RunManifest(
        geomatch="0", jax="0", settings={"model": {"stage": 5}}, form={"size": 8}, id="a",
        gsd=None, tiles="t",
    ),
    hand_made_embedding_manifest(5, centres=[[0.5, 1.0], [2.0, -1.0]]),
    IndexManifest(
        **ORIGIN, metric="euclidean", centres=None, years=("a", "b"), counts=(3, 4), embeddings="e"
    ),
]  # fmt: skip


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: type(manifest).__name__)
def test_a_manifest_is_read_as_it_was_written(tmp_path, manifest):
    path = tmp_path / "manifest.json"
    write_manifest(path, manifest)
    assert read_manifest(path, type(manifest), "geomatch tile") == manifest
    assert json.loads(path.read_text())["format"] == FORMAT


def test_the_json_of_tiles_is_what_other_programs_read():
    written = json.loads(json.dumps(TILES.as_json()))
    assert written["channels"] == {"image": 3, "label": 0}
    assert written["years"]["2020"] == {"files": 1, "labels": 0, "stretch": STRETCH}
    assert written["asked"]["set"] == ["grid.gsd=0.5"]
    assert "unreadable" not in written


@pytest.mark.parametrize("kind", [TileManifest, RunManifest, EmbeddingManifest, IndexManifest])
def test_a_manifest_that_lacks_a_field_is_stale(tmp_path, kind):
    write_json(tmp_path / "manifest.json", {"geomatch": "0"})
    with pytest.raises(StaleError, match="does not say") as failed:
        read_manifest(tmp_path / "manifest.json", kind, "geomatch tile")
    assert failed.value.hint == "Run: geomatch tile"


def test_placement_says_what_distances_mean():
    real, fictitious, none = (
        dataclasses.replace(TILES, placement=placement)
        for placement in ("real", "fictitious", "none")
    )
    assert [m.on_ground for m in (real, fictitious, none)] == [True, True, False]
    assert [m.in_metres for m in (real, fictitious, none)] == [True, False, False]

"""Manifests: written as JSON and read again."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hand_made import hand_made_embedding_manifest, hand_made_split_metrics, hand_made_tile_manifest

from geomatch.data.eval_report import (
    CalibrationMetrics,
    ChangeMetrics,
    ClassFolderMetrics,
    ClassMetrics,
    ContentMetrics,
    RegionMetrics,
    SplitMetrics,
    VerificationMetrics,
    YearPairMetrics,
)
from geomatch.errors import StaleError
from geomatch.geo.grid import Grid
from geomatch.manifests import (
    EmbeddingManifest,
    IndexEngine,
    IndexManifest,
    RunManifest,
    TileManifest,
    TileRequest,
    YearOfTiles,
)
from geomatch.project import FORMAT, read_record, write_json, write_record

STRETCH = {"low": [0.0], "high": [4000.0]}
TILES = hand_made_tile_manifest(
    Grid("EPSG:2154", 256, 0.5, 256),
    12,
    request=TileRequest(source=({"year": "2010", "images": "é"},), set=("grid.gsd=0.5",)),
    years={
        "2010": YearOfTiles(2, "roads.gpkg", None),
        "2020": YearOfTiles(1, 0, STRETCH, "newest", 3),
    },
)
ORIGIN = {"name": "r@6", "tiles": "t", "model": "m", "run": "runs/r", "run_id": "i", "step": 6}
MANIFESTS = [
    TILES,
    dataclasses.replace(TILES, crs=None, gsd=None, stride=None, placement="none", unreadable={}),
    RunManifest(
        geomatch="0", jax="0", settings={"model": {"stage": 5}}, form={"size": 8}, id="a",
        gsd=None, tiles="t",
    ),
    RunManifest(
        geomatch="0", jax="0", settings={}, form={}, id="a", gsd=0.5, tiles="t",
        label_classes=("road", "sport ground"),
    ),
    dataclasses.replace(TILES, label_classes={"road": 0.25, "sea": 0.0}, broken={"a.gpkg": 3}),
    hand_made_embedding_manifest(5, centres=[[0.5, 1.0], [2.0, -1.0]]),
    IndexManifest(
        **ORIGIN, metric="euclidean", centres=None, years=("a", "b"), counts=(3, 4),
        embeddings="e",
        engine=IndexEngine(
            kind="hnsw", dtype="int8", segments=(0, 4), parts=(0,), effort=64, recall=0.97,
            queries=7,
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: type(manifest).__name__)
def test_a_manifest_is_read_as_it_was_written(tmp_path, manifest):
    path = tmp_path / "manifest.json"
    write_record(path, manifest)
    assert read_record(path, type(manifest), "geomatch tile") == manifest
    assert json.loads(path.read_text())["format"] == FORMAT


def ranks(queries=3):
    values = {"map5": 0.5, "recall1": 0.25, "recall5": 0.75, "recall10": None, "median_rank": 2.0}
    return {"queries": queries, **values}


def test_split_metrics_are_read_as_they_were_written(tmp_path):
    calibration = CalibrationMetrics(
        slope=1.5, intercept=-1.0, error=0.1, probability=(0.5,), share=(0.25,), pairs=(4,)
    )
    roc = VerificationMetrics(
        auc=0.9, eer=0.1, threshold=0.3, fpr=0.01, tpr=0.5, confusion=((9, 1), (2, 8)),
        curve={"fpr": (0.0, 1.0)}, pr={"recall": (0.0, 1.0)}, histogram={"edges": (0.0, 1.0)},
        calibration=calibration,
    )  # fmt: skip
    distances = {"database": 9, "median_error_m": None, "mean_rank": 2.5, "mrr": 0.5}
    near = dict.fromkeys(("within_1_tiles", "within_2_tiles", "within_5_tiles"), 0.25)
    years = {"query_year": "2010", "database_year": "2020"}
    precision = {f"precision{k}": 0.5 for k in (1, 5, 10)}
    recall = {f"relevant_recall{k}": 0.5 for k in (1, 5, 10)}
    one_class = ClassMetrics(label="a", queries=2, hit5=1.0, map=0.5, map5=None)
    metrics = hand_made_split_metrics(
        3,
        9,
        intervals={"map@5": (0.25, 0.75), "recall@1": None},
        content=(ContentMetrics(content="blank", **ranks()),),
        pairs=(YearPairMetrics(**years, **ranks(), **distances, **near),),
        roc=roc,
        changed=(ChangeMetrics(changed="0", **ranks()),),
        regions=(RegionMetrics(region="a.tif", **ranks()),),
        class_folders=ClassFolderMetrics(map=0.5, **precision, **recall, classes=(one_class,)),
    )
    write_record(tmp_path / "split.json", metrics)
    assert read_record(tmp_path / "split.json", SplitMetrics, "geomatch eval") == metrics
    written = json.loads((tmp_path / "split.json").read_text())
    assert written["classes"] == [
        {"class": "a", "queries": 2, "hit@5": 1.0, "map": 0.5, "map@5": None}
    ]
    assert list(written)[1:8] == [
        "queries", "database", "map@5", "recall@1", "recall@5", "recall@10", "median_rank"
    ]  # fmt: skip


def test_the_json_of_tiles_is_what_other_programs_read():
    written = json.loads(json.dumps(TILES.as_json()))
    assert written["channels"] == {"image": 3, "label": 0}
    # Tiles of the previous version do not say how sheets overlap.
    assert written["years"] == {
        "2010": {"files": 2, "labels": "roads.gpkg", "stretch": None},
        "2020": {"files": 1, "labels": 0, "stretch": STRETCH, "overlap": "newest", "seams": 3},
    }
    assert written["asked"]["set"] == ["grid.gsd=0.5"]
    assert "unreadable" not in written


@pytest.mark.parametrize("kind", [TileManifest, RunManifest, EmbeddingManifest, IndexManifest])
def test_a_manifest_that_lacks_a_field_is_stale(tmp_path, kind):
    write_json(tmp_path / "manifest.json", {"geomatch": "0"})
    with pytest.raises(StaleError, match="lacks the field") as failed:
        read_record(tmp_path / "manifest.json", kind, "geomatch tile")
    assert failed.value.hint == "Run: geomatch tile"


@pytest.mark.parametrize(
    "wrong",
    [
        {"channels": [3, 0]},
        {"channels": {"image": "3", "label": 0}},
        {"tiles": None},
        {"placement": "somewhere"},
        {"splits": {"train": 1.5}},
    ],
    ids=str,
)
def test_a_manifest_with_a_value_of_another_type_is_damaged(tmp_path, wrong):
    write_json(tmp_path / "manifest.json", {**TILES.as_json(), **wrong})
    with pytest.raises(StaleError, match="is damaged") as failed:
        read_record(tmp_path / "manifest.json", TileManifest, "geomatch tile")
    assert failed.value.hint == "Run: geomatch tile"


def test_placement_says_what_distances_mean():
    real, fictitious, none = (
        dataclasses.replace(TILES, placement=placement)
        for placement in ("real", "fictitious", "none")
    )
    assert [m.on_ground for m in (real, fictitious, none)] == [True, True, False]
    assert [m.in_metres for m in (real, fictitious, none)] == [True, False, False]

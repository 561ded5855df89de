"""Artefacts: what is saved is loaded, and what is of another version or origin is told."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from hand_made import hand_made_embedding_manifest, hand_made_split_metrics, hand_made_tiles
from small_project import evaluate, retile, settings

from geomatch.data.embeddings import DescriptorFile, Embeddings, write
from geomatch.data.tiles import TileTable
from geomatch.embed import embed
from geomatch.errors import GeomatchError, StaleError, UsageError
from geomatch.evaluate import Report
from geomatch.geo import footprints
from geomatch.geo.grid import Grid
from geomatch.index import index
from geomatch.info import info
from geomatch.nn.checkpoint import Checkpoints
from geomatch.nn.step import State
from geomatch.project import FORMAT, Project, read_json, replacing, write_json
from geomatch.query import query
from geomatch.runs import load_encoder, read_run
from geomatch.train import train
from geomatch.training.setup import resolve_settings


def footprint(epsg, bounds):
    return footprints.rings(epsg, bounds, "OGC:CRS84")


def assert_same_tiles(found, wanted):
    for field in dataclasses.fields(TileTable):
        mine, theirs = getattr(found, field.name), getattr(wanted, field.name)
        if isinstance(theirs, np.ndarray):
            assert mine.dtype == theirs.dtype, field.name
            np.testing.assert_array_equal(mine, theirs, err_msg=field.name)
        else:
            assert mine == theirs, field.name


# Round trips


@pytest.mark.parametrize("crs", ["EPSG:32630", "utm"])
def test_a_catalogue_is_loaded_as_it_was_saved(tmp_path, crs):
    tiles = dataclasses.replace(
        hand_made_tiles([-3, 0, 7, 7], [5, -6, 0, 0], [0, 2, 1, 2], [0, 1, 2, 2]),
        grid=Grid(crs, 8, 0.2, 4),
        years=("before", "after", "later"),
        sources=("a.tif", "b.tif"),
        source=np.array([0, 1, 0, 1]),
        valid=np.array([1, 0.995, 0.5, 1], np.float32),
        store_row=np.array([4, 0, 9, 2]),
    )
    if crs == "utm":
        tiles = dataclasses.replace(tiles, epsg=np.array([32630, 32730, 32631, 32631]))
    tiles.save(tmp_path / "tiles.parquet", footprint, None)
    found = TileTable.load(tmp_path / "tiles.parquet")
    assert_same_tiles(found, tiles)
    assert found.ids() == tiles.ids()


def test_descriptors_are_loaded_as_they_were_saved(tmp_path):
    tiles = hand_made_tiles([0, 1, 2], [0, 0, 0], [0, 0, 1])
    vectors = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    saved = Embeddings(vectors, hand_made_embedding_manifest(5, fingerprint="é"))
    saved.save(tmp_path / "some.parquet", tiles, footprint, None)
    found = Embeddings.load(tmp_path / "some.parquet")
    np.testing.assert_array_equal(found.vectors, vectors)
    assert found.vectors.dtype == np.float32
    assert found.manifest == saved.manifest


def test_rows_of_a_file_of_descriptors_are_those_of_the_array(tmp_path):
    tiles = hand_made_tiles([*range(10)], [0] * 10, [0] * 10)
    vectors = np.random.default_rng(0).normal(size=(10, 5)).astype(np.float32)
    manifest, path = hand_made_embedding_manifest(5), tmp_path / "some.parquet"
    # Three row groups.
    write(path, [vectors[:4], vectors[4:5], vectors[5:]], tiles, footprint, None, manifest)
    found = DescriptorFile(path)
    assert len(found) == 10
    assert found.manifest == manifest
    for rows in ([9, 0, 4, 4, 5, 3], [], [7], slice(None), slice(3, 6), slice(8, 99), slice(2, 2)):
        wanted = vectors[rows if isinstance(rows, slice) else np.array(rows, int)]
        read = found[rows if isinstance(rows, slice) else np.array(rows, int)]
        np.testing.assert_array_equal(read, wanted)
        assert read.dtype == np.float32


def test_a_report_is_loaded_as_it_was_saved(tmp_path):
    report = Report("run1@3", "all", {"test": hand_made_split_metrics(0, 4, map5=None)})
    report.save(tmp_path / "deep" / "report.json")
    assert Report.load(tmp_path / "deep" / "report.json") == report


def state_of(value):
    return State(
        {"dense": {"kernel": np.full((2, 3), value, np.float32)}},
        {"norm": {"mean": np.full(3, value, np.float32)}},
        (np.array(value, np.int32), {"mu": np.full((2, 3), -value, np.float32)}),
        {},
    )


def averaged_state_of(value):
    state = state_of(value)
    half = state_of(value / 2)
    return state._replace(average={"params": half.params, "batch_stats": half.batch_stats})


def test_the_last_two_and_the_best_checkpoint_are_kept(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.last is checkpoints.best is None
        for step, metric in ((0, 0.1), (5, 0.9), (7, None), (9, 0.2), (10, 0.4)):
            checkpoints.save(step, state_of(step), metric)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps == [5, 9, 10]
        assert (checkpoints.last, checkpoints.best) == (10, 5)
        assert (checkpoints.metric(5), checkpoints.metric(10)) == (0.9, 0.4)
        found = checkpoints.restore(5, state_of(0))
        model = checkpoints.restore_model(10, state_of(0))
    wanted = state_of(5)
    np.testing.assert_array_equal(found.params["dense"]["kernel"], wanted.params["dense"]["kernel"])
    np.testing.assert_array_equal(found.batch_stats["norm"]["mean"], [5, 5, 5])
    assert int(found.optimizer[0]) == 5
    np.testing.assert_array_equal(found.optimizer[1]["mu"], wanted.optimizer[1]["mu"])
    np.testing.assert_array_equal(model["params"]["dense"]["kernel"], np.full((2, 3), 10))


def test_the_untrained_checkpoint_goes_with_the_first_trained_one(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(0, state_of(0), 0.5)
        assert checkpoints.steps == [0]
        checkpoints.save(5, state_of(5), 0.5)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps == [5]


def test_an_untrained_checkpoint_that_is_the_best_is_kept(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step, metric in ((0, 0.5), (5, 0.4), (9, 0.3), (12, 0.2)):
            checkpoints.save(step, state_of(step), metric)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert (checkpoints.steps, checkpoints.best) == ([0, 9, 12], 0)


def test_averaged_weights_are_kept_as_the_model_and_the_others_beside_them(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(4, averaged_state_of(4), 0.5)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        found = checkpoints.restore(4, averaged_state_of(0))
        model = checkpoints.restore_model(4, averaged_state_of(0))
    wanted = averaged_state_of(4)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for mine, theirs in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(model["params"]["dense"]["kernel"], np.full((2, 3), 2))
    np.testing.assert_array_equal(model["batch_stats"]["norm"]["mean"], np.full(3, 2))


def test_without_validation_the_last_checkpoint_is_the_best(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(2, state_of(2), None)
        checkpoints.save(4, state_of(4), None)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert (checkpoints.last, checkpoints.best) == (4, 4)
        assert checkpoints.metric(4) is None


def test_a_checkpoint_of_another_shape_is_reported(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(2, state_of(2), 0.5)
    other = state_of(0)._replace(params={"dense": {"other": np.zeros(4, np.float32)}})
    with (
        Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints,
        pytest.raises(StaleError, match="checkpoint 2 of"),
    ):
        checkpoints.restore_model(2, other)


def damage(checkpoint, item):
    """Cut the largest file of an item ("model", "optimizer") of a checkpoint short."""
    files = [path for path in (checkpoint / item / "d").iterdir() if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints 5, the best, and 10."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(5, state_of(5), 0.9)
        checkpoints.save(10, state_of(10), 0.4)
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("item", ["model", "optimizer"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(saved, item):
    damage(saved / "10", item)
    with Checkpoints(saved) as checkpoints:
        step, state, remark = checkpoints.restore_last(state_of(0))
        assert (step, int(state.optimizer[0])) == (5, 5)
        np.testing.assert_array_equal(state.params["dense"]["kernel"], np.full((2, 3), 5))
        assert remark.startswith("checkpoint 10 of ")
        assert remark.endswith(" Checkpoint 5 is used.")
        assert checkpoints.steps == [5]
        checkpoints.save(10, state_of(11), 0.5)
    with Checkpoints(saved) as checkpoints:
        step, state, remark = checkpoints.restore_last(state_of(0))
    assert (step, int(state.optimizer[0]), remark) == (10, 11, "")


def test_another_model_stands_for_a_damaged_best(saved):
    """What is damaged stays, since reading changes nothing."""
    with Checkpoints(saved, read_only=True) as checkpoints:
        assert checkpoints.restore_best(state_of(0))[::2] == (5, "")
    damage(saved / "5", "model")
    with Checkpoints(saved, read_only=True) as checkpoints:
        step, model, remark = checkpoints.restore_best(state_of(0))
        assert checkpoints.steps == [5, 10]
    assert step == 10
    np.testing.assert_array_equal(model["params"]["dense"]["kernel"], np.full((2, 3), 10))
    assert remark.startswith("checkpoint 5 of ")


def test_an_untrained_model_does_not_stand_for_a_damaged_one(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(0, state_of(0), 0.1)
        checkpoints.save(5, state_of(5), 0.9)
    damage(tmp_path / "checkpoints" / "5", "model")
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for restore in (checkpoints.restore_last, checkpoints.restore_best):
            with pytest.raises(StaleError, match="checkpoint 5 of"):
                restore(state_of(0))


def test_damaged_checkpoints_alone_are_an_error_and_stay(saved):
    for step in (5, 10):
        damage(saved / str(step), "model")
    with Checkpoints(saved) as checkpoints:
        for restore in (checkpoints.restore_last, checkpoints.restore_best):
            with pytest.raises(StaleError, match=r"checkpoint (10|5) of .* cannot be restored"):
                restore(state_of(0))
        assert checkpoints.steps == [5, 10]


def test_damaged_metrics_of_a_checkpoint_are_named(saved):
    path = saved / "10" / "metrics" / "metrics"
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(StaleError, match="10/metrics/metrics is damaged") as caught:
        Checkpoints(saved, read_only=True)
    assert caught.value.hint.endswith(f"rm -r {path.parent}")
    shutil.rmtree(path.parent)
    with Checkpoints(saved, read_only=True) as checkpoints:
        assert (checkpoints.best, checkpoints.last) == (5, 10)


def test_a_damaged_checkpoint_is_one_error_or_a_remark(trained, copied):
    """In a process of its own, where what libraries print would show."""
    project = copied(trained)
    command = [sys.executable, "-m", "geomatch", "embed", "-p", str(project.root), "-q"]
    command += ["--engine", "jax"]
    before, best = sorted((project.run("run1") / "checkpoints").iterdir())
    damage(best, "model")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert len(said) == 2, done.stderr
    assert said[0].startswith(f"checkpoint {best.name} of ")
    assert said[0].endswith(f" Checkpoint {before.name} is used.")
    assert f"run1@{before.name}" in said[1]
    damage(before, "model")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error.startswith(f"error: checkpoint {best.name} of ")
    assert "--run NEW" in hint


def test_a_file_takes_its_place_whole_or_not_at_all(tmp_path):
    path = tmp_path / "some.json"
    write_json(path, {"a": 1})

    def half():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        half()
    assert json.loads(path.read_text()) == {"format": FORMAT, "a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["some.json"]


# Other versions, damage


def of_another_version(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": FORMAT + 1}))


@pytest.mark.parametrize(
    ("manifest", "use", "command"),
    [
        ("tiles/manifest.json", lambda p: evaluate(p), "geomatch tile"),
        ("tiles/manifest.json", lambda p: train(p, settings()), "geomatch tile"),
        ("runs/run1/config.json", lambda p: embed(p), "geomatch train"),
        ("runs/run1/config.json", lambda p: train(p, settings()), "geomatch train"),
        ("index/*/manifest.json", lambda p: query(p, "0_0@2010", build=False), "geomatch index"),
    ],
)
@pytest.mark.parametrize("damage", ["version", "cut off"])
def test_a_manifest_that_cannot_be_used_names_the_command(
    indexed, copied, manifest, use, command, damage
):
    project = copied(indexed)
    (path,) = project.root.glob(manifest)
    if damage == "version":
        of_another_version(path)
    else:
        path.write_text(path.read_text()[:20])
    with pytest.raises(StaleError) as failed:
        use(project)
    assert path.name in failed.value.message
    assert command in failed.value.hint
    if damage == "version":
        assert f"format {FORMAT + 1}" in failed.value.message


def test_a_report_of_another_version_is_reported(tmp_path):
    Report("r@1", "split", {}).save(tmp_path / "report.json")
    of_another_version(tmp_path / "report.json")
    with pytest.raises(StaleError) as failed:
        Report.load(tmp_path / "report.json")
    assert failed.value.hint == "Run: geomatch eval"


@pytest.mark.parametrize("text", ["[]", "null"])
def test_a_manifest_that_is_not_an_object_is_reported(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StaleError) as failed:
        read_json(tmp_path / "manifest.json", "geomatch tile")
    assert failed.value.hint == "Run: geomatch tile"


@pytest.mark.parametrize(
    ("file", "use", "command"),
    [
        ("tiles/tiles.parquet", lambda p: evaluate(p), "geomatch tile"),
        ("embeddings/*.parquet", lambda p: evaluate(p), "geomatch embed"),
        ("embeddings/*.parquet", lambda p: index(p), "geomatch embed"),
    ],
)
def test_a_damaged_table_names_the_command(indexed, copied, file, use, command):
    project = copied(indexed)
    (path,) = project.root.glob(file)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StaleError) as failed:
        use(project)
    assert command in failed.value.hint


def test_damaged_embeddings_are_made_again(indexed, copied):
    project = copied(indexed)
    (path,) = project.embeddings.glob("*.parquet")
    whole = Embeddings.load(path)
    path.write_bytes(path.read_bytes()[:100])
    again = embed(project, settings=settings())
    np.testing.assert_array_equal(Embeddings.load(again.path).vectors, whole.vectors)


def test_a_run_without_a_checkpoint_is_reported(indexed, copied):
    project = copied(indexed)
    for path in (project.run("run1") / "checkpoints").iterdir():
        path.rename(project.root / path.name)
    with pytest.raises(GeomatchError) as failed:
        load_encoder(project, None, None)
    assert failed.value.hint == "Run: geomatch train"


def test_a_folder_without_a_project_is_reported(tmp_path):
    with pytest.raises(UsageError) as failed:
        Project.open(tmp_path)
    assert "geomatch init" in failed.value.hint


# What is stale


def test_all_that_was_made_of_other_tiles_is_stale(indexed, copied):
    project = copied(indexed)
    tile = indexed.tiles.ids()[0]
    fresh = info(project)
    assert [entry["stale"] for entry in fresh["embeddings"] + fresh["indexes"]] == [False, False]
    assert "geomatch query" in fresh["next"]
    retile(project, indexed.imagery, "grid.size=16")
    for use in (lambda: query(project, tile), lambda: index(project), lambda: evaluate(project)):
        with pytest.raises(StaleError) as failed:
            use()
        assert failed.value.hint == "Run: geomatch embed, then geomatch index"
    with pytest.raises(GeomatchError, match="16 px"):
        embed(project)
    found = info(project)
    assert [entry["stale"] for entry in found["embeddings"] + found["indexes"]] == [True, True]
    assert found["runs"][0]["other_tiles"] is True
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_tiling_alike_leaves_all_fresh(indexed, copied):
    project = copied(indexed)
    retile(project, indexed.imagery)
    assert query(project, indexed.tiles.ids()[0]).matches


def test_info_names_the_next_command_at_each_stage(tiled, trained, copied):
    assert info(tiled.project)["next"] == "geomatch train"
    project = copied(trained)
    about = info(project)
    assert about["next"] == "geomatch embed"
    run = about["runs"][0]
    assert (run["name"], run["finished"], run["last"]) == ("run1", True, 18)
    assert (run["best"], run["map@5"]) == (trained.trained.best, trained.trained.map5)
    embed(project)
    assert info(project)["next"] == "geomatch index"
    index(project)
    assert "geomatch query" in info(project)["next"]


def test_a_run_s_settings_are_its_own(trained):
    wanted, _, manifest = read_run(trained.project.run("run1"))
    assert wanted.model == resolve_settings(settings(), trained.project.root).model
    assert manifest.gsd == 1.0
    encoding = load_encoder(trained.project, "run1@18", None)
    assert (encoding.name, encoding.step, encoding.dimension) == ("run1@18", 18, 192)

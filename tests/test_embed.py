"""Embedding: the encoder's own values, in parts that survive, in a file others read."""

from __future__ import annotations

import json
from functools import partial

import geopandas
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import run_command
from processes import finish, python
from small_project import CRS, make_project, settings

from geomatch import embed as module
from geomatch.data import embeddings
from geomatch.data.embeddings import Embeddings
from geomatch.data.store import TileStore
from geomatch.embedding import parts
from geomatch.errors import GeomatchError, StaleError, UsageError
from geomatch.geo.grid import Grid
from geomatch.info import info
from geomatch.nn.describe import describe
from geomatch.runs import load_encoder
from geomatch.train import train

embed = partial(module.embed, settings=settings())


class BrokenOffError(Exception):
    """What ends embedding from within."""


@pytest.fixture
def counted(monkeypatch):
    """Parts of 20 tiles; counts those begun, and breaks off before one that is named."""
    monkeypatch.setattr(parts, "PART", 20)

    class Parts:
        begun = 0
        stop = None

    real = parts.describe_with

    def describe_or_raise(*arguments):
        if Parts.begun == Parts.stop:
            raise BrokenOffError
        Parts.begun += 1
        return real(*arguments)

    monkeypatch.setattr(parts, "describe_with", describe_or_raise)
    return Parts


def test_values_are_the_encoder_s_in_the_order_of_the_catalogue(indexed):
    found = Embeddings.load(indexed.embedded.path)
    encoding = load_encoder(indexed.project, None, None)
    pixels = TileStore.open(indexed.project.pixels).read(indexed.tiles.store_row)
    forward = jax.jit(lambda tiles: encoding.model.apply(encoding.variables, tiles))
    wanted = np.asarray(forward(pixels))
    assert found.vectors.shape == (len(indexed.tiles), 192)
    assert found.vectors.dtype == np.float32
    np.testing.assert_allclose(found.vectors, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    # Different tiles differ by far more.
    assert np.abs(wanted[0] - wanted[1]).max() > 0.01 * np.abs(wanted).max()
    assert found.manifest.step == indexed.trained.best
    assert found.manifest.tiles == indexed.project.tile_manifest().fingerprint
    assert found.manifest.dimension == 192


@pytest.mark.parametrize("size", [3, 4, 7])
def test_batches_of_any_length_are_described_alike(indexed, size):
    encoding = load_encoder(indexed.project, None, None)
    pixels = TileStore.open(indexed.project.pixels).read(indexed.tiles.store_row[:7])
    batches = [pixels[start : start + size] for start in range(0, 7, size)]
    parts = list(describe(encoding.model, encoding.variables, batches, size))
    assert [len(part) for part in parts] == [len(batch) for batch in batches]
    wanted = Embeddings.load(indexed.embedded.path).vectors[:7]
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(np.concatenate(parts), wanted, rtol=1e-4, atol=1e-4 * scale)


def test_a_broken_command_resumes_and_ends_alike(trained, copied, counted, tmp_path):
    project = copied(trained)
    counted.stop = 3
    with pytest.raises(BrokenOffError):
        embed(project)
    assert not list(project.embeddings.glob("*.parquet"))
    counted.stop = None
    again = embed(project)
    # 88 tiles are five parts, of which three were kept.
    assert counted.begun == 5
    assert not list(project.embeddings.glob("*.partial"))
    broken = Embeddings.load(again.path)
    again.path.unlink()
    whole = Embeddings.load(embed(project).path)
    assert counted.begun == 10
    assert broken.manifest == whole.manifest
    np.testing.assert_array_equal(broken.vectors, whole.vectors)


def test_parts_of_another_origin_are_not_used(trained, copied, counted):
    project = copied(trained)
    counted.stop = 2
    with pytest.raises(BrokenOffError):
        embed(project)
    (record,) = project.embeddings.glob("*.partial/origin.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "model": "of another"}))
    for part in record.parent.glob("*.npy"):
        np.save(part, np.zeros_like(np.load(part)))
    counted.begun, counted.stop = 0, None
    made = Embeddings.load(embed(project).path)
    assert counted.begun == 5
    assert (np.abs(made.vectors).max(axis=1) > 0).all()


def test_what_is_up_to_date_is_left_alone(indexed, counted):
    before, notes = indexed.embedded.path.stat(), []
    content = indexed.embedded.path.read_bytes()
    made = embed(indexed.project, progress=lambda task, *_: notes.append(task))
    assert made == indexed.embedded
    assert notes == [f"embeddings {made.name} are up to date"]
    assert counted.begun == 0
    # Only its time is new: what was asked for last is what later stages take.
    assert made.path.stat().st_ino == before.st_ino
    assert made.path.read_bytes() == content


def test_another_checkpoint_is_embedded_beside(trained, copied):
    project = copied(trained)
    train(project, settings("train.epochs=0"), run="untrained")
    first, second = embed(project), embed(project, run="run1")
    assert first.name == "untrained@0"
    assert second.name == f"run1@{trained.trained.best}"
    a, b = (Embeddings.load(made.path) for made in (first, second))
    assert a.manifest.model != b.manifest.model
    assert a.manifest.fingerprint != b.manifest.fingerprint
    assert np.abs(a.vectors - b.vectors).max() > 0.01


def test_embed_before_train_names_the_command(tiled):
    with pytest.raises(GeomatchError) as failed:
        embed(tiled.project)
    assert failed.value.hint == "Run: geomatch train"


@pytest.mark.parametrize("run", ["nope", "run1@7", "run1@x"])
def test_an_unknown_run_is_reported_with_the_known_ones(trained, run):
    with pytest.raises(GeomatchError) as failed:
        embed(trained.project, run=run)
    assert "Available: " in failed.value.hint


def test_run_and_model_exclude_each_other(trained):
    with pytest.raises(UsageError):
        embed(trained.project, run="run1", model=trained.root)


@pytest.mark.parametrize(
    ("options", "labels", "words"),
    [
        (["grid.size=16"], False, "16 px, but run1@.* was trained on 32 px"),
        (["grid.gsd=0.5"], False, "0.5 m per pixel"),
        ([], True, "1 label channels"),
    ],
)
def test_a_model_of_other_tiles_is_refused(trained, tmp_path, options, labels, words):
    other = make_project(tmp_path / "other", trained.imagery, *options, labels=labels)
    words = words.replace("run1@", "project-run1@")
    with pytest.raises(GeomatchError, match=words) as failed:
        embed(other, model=trained.root)
    assert "geomatch train --run NEW" in failed.value.hint


@pytest.mark.parametrize("folder", ["", "runs/run1"])
def test_a_model_of_another_project_describes_these_tiles(indexed, copied, tiled, folder):
    project = copied(tiled)
    made = embed(project, model=indexed.root / folder)
    assert made.name == f"project-run1@{indexed.trained.best}"
    np.testing.assert_array_equal(
        Embeddings.load(made.path).vectors, Embeddings.load(indexed.embedded.path).vectors
    )


def test_a_folder_without_a_model_is_refused(tiled, tmp_path):
    with pytest.raises(GeomatchError, match="neither the folder of a run nor a project"):
        embed(tiled.project, model=tmp_path)


def test_the_file_is_geoparquet_that_others_read(indexed):
    frame = geopandas.read_parquet(indexed.embedded.path)
    assert frame.crs == CRS
    assert frame["id"].tolist() == indexed.tiles.ids()
    np.testing.assert_allclose(frame.geometry.bounds.to_numpy(), indexed.tiles.bounds())
    assert len(frame["embedding"][0]) == 192
    assert frame["year"].tolist() == [indexed.tiles.years[y] for y in indexed.tiles.year]
    assert [date.year for date in frame["datetime"]] == [int(y) for y in frame["year"]]


def test_the_footer_says_what_the_descriptors_are(indexed):
    metadata = pq.read_schema(indexed.embedded.path).metadata
    manifest = Embeddings.load(indexed.embedded.path).manifest
    assert json.loads(metadata[b"geomatch"]) == manifest.as_json()
    assert manifest.name == f"run1@{indexed.trained.best}"
    assert (manifest.dimension, manifest.normalise) == (192, False)
    assert manifest.run == "runs/run1"
    assert (manifest.engine, manifest.dtype) == ("jax", "float32")
    assert json.loads(metadata[b"geo"])["version"] == "1.1.0"
    assert json.loads(metadata[b"emb"]) == {
        "emb:type": "chip",
        "emb:dimensions": 192,
        "data_type": "float32",
        "gsd": 1.0,
        "emb:chip_layout": {
            "layout_type": "regular_grid",
            "chip_size": [32, 32],
            "stride": [32, 32],
            "grid_id": "EPSG:32630/32m/32px",
        },
    }


@pytest.mark.parametrize("crs", ["EPSG:2154", "utm"])
def test_the_convention_s_layout_is_that_of_the_grid(crs):
    layout = embeddings.convention(8, Grid(crs, 256, 0.5, 128))["emb:chip_layout"]
    assert (layout["chip_size"], layout["stride"]) == ([256, 256], [128, 128])
    assert layout["grid_id"] == f"{crs}/128m/256px/stride128px"


def test_without_a_ground_the_convention_says_nothing_of_it():
    assert embeddings.convention(8, None) == {
        "emb:type": "chip",
        "emb:dimensions": 8,
        "data_type": "float32",
    }


def test_embeddings_of_the_older_format_are_made_again(indexed, copied):
    project = copied(indexed)
    (path,) = project.embeddings.glob("*.parquet")
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata)
    metadata[b"emb"] = metadata.pop(b"geomatch")
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(StaleError, match="an older geomatch") as caught:
        Embeddings.load(path)
    assert caught.value.hint == "Run: geomatch embed"
    (shown,) = info(project)["embeddings"]
    assert (shown["name"], shown["stale"]) == (path.stem, True)
    embed(project)
    assert path.read_bytes() == indexed.embedded.path.read_bytes()


KEPT = """
import sys
from geomatch.nn import backend
def noted():
    print("kept", "pyarrow" in sys.modules)
    raise SystemExit
backend.keep_memory = noted
from geomatch.cli.commands import app
app(["embed", *sys.argv[1:]])
"""


@pytest.mark.parametrize("engine", ["jax", "onnxruntime"])
def test_memory_is_kept_before_pyarrow_s_threads_and_for_jax_alone(trained, tmp_path, engine):
    project = trained.copied(tmp_path / "copy")
    options = ["-p", str(project.root), "-q", "--engine", engine, "--dtype", "float32"]
    told = finish(python("-c", KEPT, *options))
    assert told == ("kept False\n" if engine == "jax" else "")


def test_the_engine_is_chosen_once(trained, tmp_path, monkeypatch):
    chosen = []
    choose = module.engines.choose
    monkeypatch.setattr(
        module.engines, "choose", lambda *asked: (chosen.append(asked), choose(*asked))[1]
    )
    project = trained.copied(tmp_path / "copy")
    options = ["-p", str(project.root), "-q", "--engine", "jax", "--dtype", "float32"]
    done = run_command("embed", *options)
    assert done.exit_code == 0, done.stderr
    assert chosen == [("jax", "float32")]

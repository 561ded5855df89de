"""What a run starts from: weights of others, a fitted whitening, and what is left to choose."""

from __future__ import annotations

import json
import shutil
from functools import partial

import numpy as np
import pytest
from command_line import run_command
from small_project import QUICK, evaluate, settings

from geomatch import embed as embedding
from geomatch.data.embeddings import Embeddings
from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS
from geomatch.errors import GeomatchError, UsageError
from geomatch.index import index
from geomatch.nn.checkpoint import Checkpoints
from geomatch.nn.describe import describe
from geomatch.nn.encoder import Siamese, build
from geomatch.nn.pretrained import conversion as module
from geomatch.nn.pretrained.conversion import Weights, packaged_weights, write_weights
from geomatch.nn.step import abstract_state
from geomatch.project import Project
from geomatch.query import query
from geomatch.runs import load_encoder, read_run
from geomatch.train import train
from geomatch.training import setup

embed = partial(embedding.embed, settings=settings("model.descriptor=24"))


@pytest.fixture(scope="module")
def pretrained(tiled, tmp_path_factory):
    """The small project embedded without training."""
    root = tmp_path_factory.mktemp("pretrained") / "project"
    project = tiled.copied(root)
    embed(project, model="imagenet")
    index(project)
    return project


def checkpoint(project, run="run1"):
    """Variables of a run's last checkpoint."""
    wanted, form, _ = read_run(project.run(run))
    like = abstract_state(build(wanted, form), wanted, form)
    with Checkpoints(project.run(run) / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore_model(checkpoints.last, like)


def trunk(variables):
    return variables["params"]["encoder"]["trunk"]


def random_trunk(project, seed=5):
    """Weights of a resnet10 that was never trained, as a file's would be."""
    wanted = setup.resolve_settings(settings("train.seed=5"), project.root)
    model = build(wanted, setup.form_of(project.tile_manifest()))
    state = setup.initial_state(model, wanted, setup.form_of(project.tile_manifest()))
    parts = (part["encoder"]["trunk"] for part in (state.params, state.batch_stats))
    return Weights("resnet10", "geomatch", *parts, "1x1", 2e-5, "caffe")


# The encoder that needs no training


def test_descriptors_are_centred_in_each_year(pretrained, tiled):
    found = Embeddings.load(pretrained.embeddings / "imagenet@0.parquet")
    assert found.vectors.shape == (len(tiled.tiles), 24)
    training = tiled.tiles.split == SPLITS.index("train")
    for year in (0, 1):
        mine = found.vectors[training & (tiled.tiles.year == year)]
        np.testing.assert_allclose(mine.mean(axis=0), 0, atol=1e-4)
        assert mine.std() > 0.1
    assert np.shape(found.manifest.centres) == (2, 24)


def test_it_finds_places_and_is_no_run(pretrained):
    metrics = evaluate(pretrained).splits["test"]
    assert metrics.map5 > 0.9
    assert pretrained.run_names() == []


def test_an_image_is_centred_as_its_year_is(pretrained, tiled, tmp_path):
    from rasterio import open as open_raster

    sheet = tiled.imagery / "test_2010.tif"
    with open_raster(sheet) as source:
        window = ((0, 32), (0, 32))
        pixels, place = source.read(window=window), source.window_transform(window)
        form = {**source.profile, "height": 32, "width": 32, "transform": place}
    with open_raster(tmp_path / "cut.tif", "w", **form) as target:
        target.write(pixels)
    found = query(
        pretrained, str(tmp_path / "cut.tif"), same_year=True, from_year="2010", years=("2010",)
    )
    assert found.matches[0].distance_m < 1
    assert found.matches[0].score > 0.999


def test_it_is_made_once_and_again_for_another_size(pretrained, tmp_path):
    shutil.copytree(pretrained.root, tmp_path / "copy")
    project, notes = Project(tmp_path / "copy"), []
    before = (project.pretrained / "imagenet" / "config.json").read_text()
    embed(project, model="imagenet", progress=lambda task, *_: notes.append(task))
    assert notes == ["embeddings imagenet@0 are up to date"]
    assert (project.pretrained / "imagenet" / "config.json").read_text() == before
    made = embed(project, model="imagenet", settings=settings("model.descriptor=12"))
    assert Embeddings.load(made.path).vectors.shape[1] == 12


def test_training_tiles_alone_are_whitened_on(tiled, copied, monkeypatch):
    seen, real = [], TileStore.read

    def read(self, rows):
        seen.extend(rows.tolist())
        return real(self, rows)

    project = copied(tiled)
    with monkeypatch.context() as patch:
        patch.setattr(TileStore, "read", read)
        setup.pretrained(project, settings("model.descriptor=8"), tiled.tiles, lambda *_: None)
    training = tiled.tiles.store_row[tiled.tiles.split == SPLITS.index("train")]
    assert set(seen) == set(training.tolist())


def test_a_pca_larger_than_the_training_tiles_is_refused(tiled, copied):
    with pytest.raises(GeomatchError, match="a PCA to 500 values") as failed:
        embed(copied(tiled), model="imagenet", settings=settings("model.descriptor=500"))
    assert "model.descriptor=" in failed.value.hint


def test_weights_that_are_not_installed_are_named(tiled, copied, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GeomatchError) as failed:
        embed(copied(tiled), model="imagenet")
    assert "geomatch[pretrained]" in failed.value.hint


# train.init


def test_imagenet_weights_are_trained_on_from(tiled, copied):
    project = copied(tiled)
    wanted = settings(
        "train.epochs=0", "train.init=imagenet", "model.trunk=efficientnet_lite0", "model.stage=2"
    )
    train(project, wanted)
    told, _, _ = read_run(project.run("run1"))
    assert (told.model.preprocessing, told.model.epsilon) == ("lite", 1e-3)
    published = packaged_weights("efficientnet_lite0").params
    found = trunk(checkpoint(project))
    assert set(found) == {"stem", "stage1_block1", "stage2_block1", "stage2_block2"}
    np.testing.assert_array_equal(found["stem"]["kernel"], published["stem"]["kernel"])


def test_a_file_says_what_its_weights_are_applied_with(tiled, copied):
    project = copied(tiled)
    weights = random_trunk(project)
    write_weights(project.root / "mine.safetensors", weights)
    options = ["train.init=mine.safetensors", "train.epochs=1"]
    train(project, settings(*options, 'train.freeze=["trunk"]'))
    told, _, _ = read_run(project.run("run1"))
    assert (told.model.preprocessing, told.model.stride_in) == ("caffe", "1x1")
    assert told.model.epsilon == pytest.approx(2e-5)
    kept = trunk(checkpoint(project))
    np.testing.assert_array_equal(
        kept["stage1_block1"]["conv1"]["kernel"], weights.params["stage1_block1"]["conv1"]["kernel"]
    )
    # The file is not asked for again.
    (project.root / "mine.safetensors").unlink()
    train(
        project, settings("train.init=mine.safetensors", "train.epochs=2", 'train.freeze=["trunk"]')
    )
    assert read_run(project.run("run1"))[0].train.epochs == 2


def test_what_is_set_beats_what_the_file_says(tiled, copied):
    project = copied(tiled)
    write_weights(project.root / "mine.safetensors", random_trunk(project))
    options = ["train.init=mine.safetensors", "model.preprocessing=none"]
    told = setup.resolve_settings(settings(*options), project.root)
    assert (told.model.preprocessing, told.model.stride_in) == ("none", "1x1")


def test_weights_of_another_trunk_are_refused_and_leave_no_run(tiled, copied):
    project = copied(tiled)
    write_weights(project.root / "mine.safetensors", random_trunk(project))
    with pytest.raises(GeomatchError):
        train(project, settings("train.init=mine.safetensors", "model.trunk=resnet18"))
    assert project.run_names() == []
    with pytest.raises(GeomatchError, match=r"nowhere\.pth"):
        train(project, settings("train.init=nowhere.pth"))


def test_a_stage_past_the_last_is_refused(tiled, copied):
    with pytest.raises(UsageError) as failed:
        train(copied(tiled), settings("model.stage=5"))
    assert "resnet10 has 4 stages" in failed.value.hint


# Heads and parts, through training


def test_a_whitening_head_whitens_training_tiles(tiled, copied):
    project = copied(tiled)
    form = ["model.head=pca", "model.descriptor=10", "augment.flips=false", "augment.turns=false"]
    train(project, settings("train.epochs=0", *form))
    encoding = load_encoder(project, None, None)
    tiles = tiled.tiles.select(tiled.tiles.split == SPLITS.index("train"))
    pixels = TileStore.open(project.pixels).read(tiles.store_row)
    vectors = np.array(next(describe(encoding.model, encoding.variables, [pixels], len(pixels))))
    np.testing.assert_allclose(vectors.mean(axis=0), 0, atol=0.05)
    for year in (0, 1):
        vectors[tiles.year == year] -= vectors[tiles.year == year].mean(axis=0)
    np.testing.assert_allclose(vectors.T @ vectors / (len(vectors) - 1), np.eye(10), atol=0.05)


def test_parts_thaw_after_their_epochs(tiled, copied):
    project = copied(tiled)
    frozen = ['train.freeze=["trunk"]', "train.freeze_epochs=1"]
    train(project, settings("train.epochs=0"), run="fresh")
    train(project, settings("train.epochs=1", *frozen), run="run1")
    before = trunk(checkpoint(project, "fresh"))["stem"]["kernel"]
    np.testing.assert_array_equal(trunk(checkpoint(project))["stem"]["kernel"], before)
    train(project, settings("train.epochs=2", *frozen), run="run1")
    assert np.abs(trunk(checkpoint(project))["stem"]["kernel"] - before).max() > 0


def test_an_unknown_part_is_reported_with_the_known_ones(tiled, copied):
    with pytest.raises(UsageError, match="no parameter group 'neck'") as failed:
        train(copied(tiled), settings('train.freeze=["neck"]'))
    assert "trunk" in failed.value.hint


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(
            ("model.pooling=gem", "model.head=mlp", "model.hidden=[8]", "model.descriptor=4"),
            marks=pytest.mark.slow,
        ),
        ("model.pooling=rmac", "model.head=pca", "model.descriptor=4", "model.normalise=true"),
        ("model.trunk=convnet", "model.pooling=flatten", "model.descriptor=2"),
    ],
)
def test_other_forms_train_and_embed(tiled, copied, form):
    project = copied(tiled)
    train(project, settings("train.epochs=1", *form))
    made = Embeddings.load(embed(project).path)
    assert np.isfinite(made.vectors).all()
    assert (np.ptp(made.vectors, axis=0) > 0).any()


# The command line


def test_weights_are_imported_for_training(tiled, copied, tmp_path):
    project = copied(tiled)
    weights = random_trunk(project)
    write_weights(tmp_path / "mine.safetensors", weights)
    done = run_command(
        "weights",
        "import",
        tmp_path / "mine.safetensors",
        "--trunk",
        "resnet10",
        "-p",
        project.root,
    )
    assert done.exit_code == 0, done.output
    assert "train.init=weights/mine.safetensors" in done.stderr
    chosen = [f"--set={text}" for text in (*QUICK, "train.epochs=0")]
    done = run_command(
        "train", "-p", project.root, *chosen, "--set=train.init=weights/mine.safetensors"
    )
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(
        trunk(checkpoint(project))["stem"]["kernel"], weights.params["stem"]["kernel"]
    )


@pytest.mark.parametrize(("file", "option"), [("none.pth", "resnet10"), ("bad.pth", "resnet10")])
def test_a_missing_file_ends_in_one_line(tiled, copied, tmp_path, file, option):
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    project = copied(tiled)
    done = run_command("weights", "import", tmp_path / file, "--trunk", option, "-p", project.root)
    assert done.exit_code == 1
    assert "Traceback" not in done.output
    assert file in done.stderr
    assert not list(project.root.glob("weights/*"))


def test_an_unknown_trunk_is_reported_with_the_known_ones(tiled, tmp_path):
    done = run_command(
        "weights", "import", tmp_path / "x.pth", "--trunk", "resnet51", "-p", tiled.root
    )
    assert done.exit_code == 2
    assert "resnet50" in done.stderr


def test_models_are_exported(trained, copied, tmp_path):
    import onnxruntime
    from safetensors.numpy import load_file

    project = copied(trained)
    done = run_command(
        "export",
        "model",
        "-p",
        project.root,
        "--onnx",
        tmp_path / "m.onnx",
        "--safetensors",
        tmp_path / "model.safetensors",
    )
    assert done.exit_code == 0, done.output
    pixels = TileStore.open(project.pixels).read(trained.tiles.store_row[:5])
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (found,) = session.run(None, {"tiles": pixels})
    encoding = load_encoder(project, None, None)
    wanted = next(describe(encoding.model, encoding.variables, [pixels], 5))
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    tensors = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(
        tensors["params.encoder.trunk.stem.kernel"],
        encoding.variables["params"]["encoder"]["trunk"]["stem"]["kernel"],
    )
    card = json.loads((tmp_path / "model.json").read_text())
    assert card["model"]["trunk"] == "resnet10"
    assert card["input"]["size"] == 32
    assert card["trained_on"] == project.tile_manifest().fingerprint
    assert card["validation"]["map@5"] == trained.trained.map5
    assert card["test"] is None


def test_an_export_of_nothing_says_what_to_name(trained):
    done = run_command("export", "model", "-p", trained.root)
    assert done.exit_code == 2
    assert "--onnx FILE" in done.stderr


def test_features_are_what_a_head_is_given(trained):
    """The model's own pooled map, which a whitening is fitted on."""
    encoding = load_encoder(trained.project, None, None)
    pixels = TileStore.open(trained.project.pixels).read(trained.tiles.store_row[:3])
    found = encoding.model.apply(encoding.variables, pixels, method=Siamese.features)
    wanted = encoding.model.apply(encoding.variables, pixels)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)

"""Baselines and other runs beside a run: descriptors, metrics and paired differences."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from command_line import run_command
from small_project import evaluate, settings

from geomatch.data import embeddings
from geomatch.data.embeddings import Embeddings
from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.embed import embed
from geomatch.errors import GeomatchError
from geomatch.evaluate import Report
from geomatch.evaluation.baselines import baselines
from geomatch.evaluation.handcrafted import colour_histogram, hog
from geomatch.geo import footprints
from geomatch.progress import silent
from geomatch.train import train


@pytest.fixture(scope="module")
def several(indexed, tmp_path_factory):
    """The small project with a run, the same untrained, and random descriptors."""
    root = tmp_path_factory.mktemp("several") / "project"
    project = indexed.copied(root)
    bare = settings("train.epochs=0")
    train(project, bare, run="bare")
    embed(project, run="bare", settings=bare)
    tiles = TileTable.load(project.catalogue)
    manifest = embeddings.read_manifest(project.embeddings / f"{indexed.embedded.name}.parquet")
    vectors = np.random.default_rng(0).normal(size=(len(tiles), manifest.dimension))
    random = Embeddings(vectors.astype(np.float32), dataclasses.replace(manifest, name="random@1"))
    file_geometry = footprints.file_geometry(tiles.grid)
    random.save(project.embeddings / "random@1.parquet", tiles, *file_geometry)
    return project, indexed.embedded.name


@pytest.fixture(scope="module")
def made(several):
    project, name = several
    manifest = embeddings.read_manifest(project.embeddings / f"{name}.parquet")
    tiles = TileTable.load(project.catalogue)
    return tiles, {found: rest for found, *rest in baselines(project, tiles, manifest, silent)}


def test_each_baseline_describes_every_tile(several, made):
    project, _ = several
    tiles, found = made
    assert list(found) == ["untrained", "imagenet", "colour histogram", "HOG"]
    pixels = TileStore.open(project.pixels).read(tiles.store_row)
    for name, vectors in (("colour histogram", colour_histogram(pixels)), ("HOG", hog(pixels))):
        for year in (0, 1):
            mine, known = tiles.year == year, tiles.split == SPLITS.index("train")
            wanted = vectors[mine] - vectors[mine & known].mean(axis=0)
            np.testing.assert_allclose(found[name][0][mine], wanted, atol=1e-6)
    assert {len(vectors) for vectors, _ in found.values()} == {len(tiles)}
    assert {metric for _, metric in found.values()} == {"cosine"}


def test_the_untrained_encoder_is_a_run_of_no_epochs(several, made):
    project, _ = several
    name = next(name for name in project.embedding_names() if name.startswith("bare"))
    wanted = Embeddings.load(project.embeddings / f"{name}.parquet").vectors
    found = made[1]["untrained"][0]
    close = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert close.min() > 0.999


def test_that_of_imagenet_is_what_embed_gives(several, made):
    project, _ = several
    given = embed(project, model="imagenet", settings=settings())
    wanted = Embeddings.load(given.path).vectors
    given.path.unlink()
    found = made[1]["imagenet"][0]
    close = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert np.median(close) > 0.99


def test_others_stand_beside_with_paired_differences(several):
    project, name = several
    alone = evaluate(project, run="random@1")
    report = evaluate(project, run=name, others=["random@1", name])
    other, itself = report.others
    assert (other.name, itself.name) == ("random@1", name)
    for split in SPLITS:
        mine, theirs = report.splits[split].as_json(), other.splits[split].as_json()
        assert theirs == alone.splits[split].as_json()
        for key in ("map@5", "recall@1", "recall@5", "recall@10"):
            value, low, high = other.differences[split][key]
            assert value == pytest.approx(mine[key] - theirs[key])
            assert low <= value <= high
            assert itself.differences[split][key] == (0, 0, 0)
    value, low, _ = other.differences["train"]["map@5"]
    assert low > 0, "a trained run is better than chance"
    assert Report.load(project.reports / report.name / "report.json") == report


def test_paired_intervals_are_narrower_than_two_alone(several):
    project, name = several
    report = evaluate(project, run=name, others=["bare@0"])
    _, low, high = report.others[0].differences["train"]["map@5"]
    alone = [
        np.ptp(splits["train"].intervals["map@5"])
        for splits in (report.splits, report.others[0].splits)
    ]
    assert high - low < sum(alone)


def test_the_command_shows_them_in_one_table(several):
    project, name = several
    arguments = ["eval", "-p", str(project.root), "--run", name, "-q", "--compare", "random@1"]
    result = run_command(*arguments, "--baselines")
    assert result.exit_code == 0, result.output
    for text in ("random@1", "untrained", "imagenet", "colour histogram", "HOG", "side by side"):
        assert text in result.stdout
    found = json.loads(run_command(*arguments, "--json").stdout)
    assert [other["name"] for other in found["others"]] == ["random@1"]
    assert "others" not in json.loads(run_command(*arguments[:-2], "--json").stdout)


def test_an_unknown_run_is_reported(several):
    project, name = several
    with pytest.raises(GeomatchError, match="no embeddings 'else@1'"):
        evaluate(project, run=name, others=["else@1"])

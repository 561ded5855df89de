"""Compare: two image files, the score of their tiles, and the threshold of validation."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import run_command
from PIL import Image
from small_project import evaluate, make_project

from geomatch.compare import compare
from geomatch.data.embeddings import Embeddings
from geomatch.data.pair_scores import ScoredPairs
from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS
from geomatch.errors import GeomatchError, StaleError, UsageError


@pytest.fixture(scope="module")
def measured(indexed, tmp_path_factory):
    """The small project, evaluated, and a picture of each test tile."""
    root = tmp_path_factory.mktemp("measured") / "project"
    project = indexed.copied(root)
    report = evaluate(project)
    store, paths = TileStore.open(project.pixels), {}
    for i in np.flatnonzero(indexed.tiles.split == SPLITS.index("test")):
        paths[i] = root.parent / f"{i}.png"
        Image.fromarray(store.read(indexed.tiles.store_row[[i]])[0]).save(paths[i])
    return project, report, paths


def scores_of(project):
    vectors = Embeddings.load(next(project.embeddings.glob("*.parquet"))).vectors
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit @ unit.T


def test_a_score_is_that_of_the_tiles_and_the_threshold_that_of_eval(measured):
    project, report, paths = measured
    scores = scores_of(project)
    roc = report.splits["validation"].roc.as_json()
    a, b, *_ = paths
    found = compare(project, str(paths[a]), str(paths[b]))
    assert found.score == pytest.approx(scores[a, b], abs=1e-4)
    assert found.distance == pytest.approx(1 - found.score)
    assert found.threshold == roc["threshold"]
    assert found.match == (found.score >= found.threshold)
    fitted = roc["calibration"]
    logit = fitted["slope"] * found.score + fitted["intercept"]
    assert found.probability == pytest.approx(1 / (1 + np.exp(-logit)))


def test_the_same_image_matches_and_the_least_alike_does_not(measured):
    project, _, paths = measured
    rows = list(paths)
    scores = scores_of(project)[np.ix_(rows, rows)]
    a, b = np.unravel_index(scores.argmin(), scores.shape)
    same = compare(project, str(paths[rows[a]]), str(paths[rows[a]]))
    other = compare(project, str(paths[rows[a]]), str(paths[rows[b]]))
    assert same.score == pytest.approx(1, abs=1e-5)
    assert (same.match, other.match) == (True, False)
    assert same.probability > 0.5 > other.probability


def test_a_wanted_rate_moves_the_threshold(measured):
    project, _, paths = measured
    a, b, *_ = map(str, paths.values())
    thresholds = [compare(project, a, b, fpr=fpr).threshold for fpr in (0.0, 0.2, 1.0)]
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[0] > thresholds[-1]
    assert compare(project, a, b, fpr=1.0).match


@pytest.mark.parametrize("other", [False, True])
def test_the_command_answers_and_ends_well_either_way(measured, other):
    project, _, paths = measured
    rows = list(paths)
    scores = scores_of(project)[np.ix_(rows, rows)]
    a, b = np.unravel_index(scores.argmin(), scores.shape)
    named = [str(paths[rows[a]]), str(paths[rows[b if other else a]])]
    arguments = ["compare", *named, "-p", str(project.root), "-q"]
    result = run_command(*arguments)
    assert result.exit_code == 0, result.output
    assert ("not the same place" in result.stdout) == other
    result = run_command(*arguments, "--json", "--fpr", "0.05")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found == compare(project, *named, fpr=0.05).as_json()
    keys = ["a", "b", "score", "distance", "probability", "threshold", "fpr", "match"]
    assert list(found) == keys
    assert found["match"] != other


def test_without_a_threshold_the_remedy_is_eval(indexed, copied, measured):
    a, b, *_ = map(str, measured[2].values())
    fresh = copied(indexed)
    name = fresh.embedding_names()[-1]
    # Other tests may have evaluated what was copied.
    (fresh.embeddings / f"{name}.npz").unlink(missing_ok=True)
    with pytest.raises(GeomatchError, match="no threshold") as failed:
        compare(fresh, a, b)
    assert failed.value.hint == f"Run: geomatch eval --run {name}"
    ScoredPairs(np.ones(2, np.float32), np.zeros(2, np.float32), "train", "others").save(
        fresh.embeddings / f"{name}.npz"
    )
    with pytest.raises(StaleError) as failed:
        compare(fresh, a, b)
    assert failed.value.hint == f"Run: geomatch eval --run {name}"


def test_what_cannot_be_compared_is_reported(measured, tmp_path, tiled):
    project, _, paths = measured
    a = str(next(iter(paths.values())))
    (tmp_path / "broken.png").write_bytes(b"none")
    for path in ("broken.png", "absent.png"):
        with pytest.raises(GeomatchError, match=path):
            compare(project, a, str(tmp_path / path))
    with pytest.raises(UsageError, match="--fpr"):
        compare(project, a, a, fpr=2)
    empty = make_project(tmp_path / "empty", tiled.imagery)
    with pytest.raises(GeomatchError) as failed:
        compare(empty, a, a)
    assert failed.value.hint == "Run: geomatch embed"

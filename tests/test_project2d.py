"""Descriptors in two dimensions: projections, the picture's colours, the animation."""

from __future__ import annotations

import numpy as np
import pytest
from command_line import run_command
from hand_made import describe_by_hand, hand_made_tiles
from matplotlib import colormaps
from PIL import Image

from geomatch.errors import GeomatchError, UsageError
from geomatch.project2d import _links, project2d
from geomatch.report.projection import animate, frame, pca, scatter, tsne

LEFT, RIGHT = 0.09, 0.83
"""The part of the picture's width that has points."""


def shades(path, legend=False):
    """Colours of a picture's points, or of its legend."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    edge = int(RIGHT * pixels.shape[1])
    part = pixels[:, edge + 2 :] if legend else pixels[:, int(LEFT * pixels.shape[1]) + 2 : edge]
    return np.unique(part.reshape(-1, 3), axis=0) / 255


def shows(path, code, palette="tab10", legend=False):
    """Whether a picture has points of a colour, which lie on paper as they are: 0.8 opaque."""
    colour = np.array(colormaps[palette](code)[:3])
    if not legend:
        colour = 0.8 * colour + 0.2
    return np.abs(shades(path, legend) - colour).max(axis=1).min() < 0.02


def test_descriptors_of_two_values_are_as_they_are():
    vectors = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    assert pca(vectors) is vectors


def test_pca_is_the_singular_value_decomposition_of_directions():
    vectors = np.random.default_rng(0).normal(size=(40, 6)) * [9, 5, 1, 1, 1, 1]
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    u, s, vt = np.linalg.svd(directions - directions.mean(axis=0), full_matrices=False)
    wanted = (u * s)[:, :2] * np.sign(vt[[0, 1], np.abs(vt[:2]).argmax(axis=1)])
    np.testing.assert_allclose(pca(vectors), wanted, atol=1e-6)
    # The length of a descriptor is nothing that a cosine sees.
    np.testing.assert_allclose(pca(vectors * 7), wanted, atol=1e-6)


def test_an_axis_keeps_its_sign_through_a_training():
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(60, 8)) * [6, 4, 1, 1, 1, 1, 1, 1]
    first, later = pca(vectors), pca(vectors + rng.normal(0, 0.05, vectors.shape))
    for axis in range(2):
        assert np.corrcoef(first[:, axis], later[:, axis])[0, 1] > 0.99


@pytest.mark.parametrize("shape", [(1, 5), (2, 5), (3, 1), (0, 5)])
def test_few_descriptors_or_values_are_projected_too(shape):
    points = pca(np.random.default_rng(0).normal(size=shape))
    assert points.shape == (shape[0], 2)
    assert np.isfinite(points).all()


def test_descriptors_of_nan_are_not_drawn(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(20, 5))
    vectors[3, 2] = np.nan
    points = pca(vectors)
    assert np.isnan(points[3]).all()
    np.testing.assert_allclose(np.delete(points, 3, 0), pca(np.delete(vectors, 3, 0)))
    scatter(points, np.zeros(20, int), "", tmp_path / "broken.png")


def test_tsne_keeps_groups_together():
    rng = np.random.default_rng(0)
    group = np.arange(60) % 3
    vectors = np.eye(3)[group].repeat(20, axis=1) + rng.normal(0, 0.05, (60, 60))
    points = tsne(vectors)
    np.testing.assert_array_equal(points, tsne(vectors))
    distance = np.linalg.norm(points[:, None] - points, axis=-1)
    np.fill_diagonal(distance, np.inf)
    np.testing.assert_array_equal(group[distance.argmin(axis=1)], group)
    with pytest.raises(GeomatchError, match="four"):
        tsne(vectors[:3])


def test_colours_are_of_labels(tmp_path):
    points = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    path = tmp_path / "points.png"
    scatter(points, np.array([0, 0, 2, 2]), "", path, names=("ash", "birch", "cedar"))
    assert [shows(path, code) for code in range(4)] == [True, False, True, False]
    # The legend has all names, so that colours mean the same in every picture.
    assert [shows(path, code, legend=True) for code in range(4)] == [True, True, True, False]
    scatter(points, np.array(["x", "x", "x", "y"]), "", path)
    assert [shows(path, code) for code in range(3)] == [True, True, False]


@pytest.mark.slow
def test_many_labels_are_not_told_apart(tmp_path):
    points = np.random.default_rng(0).normal(size=(21, 2))
    scatter(points[:20], np.arange(20), "", tmp_path / "twenty.png")
    assert all(shows(tmp_path / "twenty.png", code, "tab20") for code in range(20))
    scatter(points, np.arange(21), "", tmp_path / "more.png")
    assert shows(tmp_path / "more.png", 0)
    assert not shows(tmp_path / "more.png", 3)
    assert len(shades(tmp_path / "more.png", legend=True)) == 1


def test_limits_hold_a_picture_still(tmp_path):
    limits = (-2.0, 2.0, -2.0, 2.0)
    for name, scale in (("small", 0.01), ("large", 1.9)):
        points = scale * np.array([[-1, -1, 0], [1, 1, 0]])[:, :2]
        frame(points, np.zeros(2, int), "", tmp_path / f"{name}.png", limits)
    spans = {}
    for name in ("small", "large"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("RGB"), int)
        blue = np.abs(pixels - [76, 146, 195]).max(axis=2) < 12
        spans[name] = np.ptp(np.flatnonzero(blue.any(axis=0)))
    assert spans["small"] < 30
    assert spans["large"] > 450


def test_an_animation_has_a_frame_of_each_picture_in_order(tmp_path):
    folder = tmp_path / "figures"
    vectors = np.random.default_rng(0).normal(size=(30, 4))
    for step in (200, 0, 1000):
        frame(vectors, np.arange(30) % 2, f"step {step}", folder / f"{step:08d}.png")
    path = animate(folder)
    assert path == folder / "embedding.gif"
    with Image.open(path) as animation:
        assert animation.n_frames == 3
        for i, step in enumerate((0, 200, 1000)):
            animation.seek(i)
            drawn = np.asarray(animation.convert("RGB"), int)
            with Image.open(folder / f"{step:08d}.png") as picture:
                wanted = np.asarray(picture.convert("RGB"), int)
            assert np.abs(drawn - wanted).max() < 60
            assert np.abs(drawn - wanted).mean() < 0.5
    # Again, with one more: the animation is no frame of its own.
    frame(vectors, np.arange(30) % 2, "step 1200", folder / "00001200.png")
    with Image.open(animate(folder)) as animation:
        assert animation.n_frames == 4
    with pytest.raises(GeomatchError, match="no frames"):
        animate(tmp_path)


def test_lines_join_the_tiles_of_a_place():
    tiles = hand_made_tiles([0, 0, 1, 0, 2], [0, 0, 0, 0, 0], [2, 0, 1, 1, 0])
    points = np.arange(10.0).reshape(5, 2)
    # Place (0, 0) is seen in three years: from each to the next.
    np.testing.assert_array_equal(_links(tiles, points), points[[[1, 3], [3, 0]]])
    many = hand_made_tiles(list(range(201)), [0] * 201, [0] * 201)
    assert _links(many, np.zeros((201, 2))) is None


def test_a_split_is_drawn(tiled, copied, tmp_path):
    project = copied(tiled)
    describe_by_hand(project, np.random.default_rng(0).normal(size=(88, 6)))
    path = project2d(project)
    assert path == project.reports / "hand@1" / "project2d-test-pca.png"
    assert shows(path, 0)
    assert shows(path, 1)
    out = tmp_path / "deeper" / "train.png"
    arguments = ["project2d", "-p", str(project.root), "--split", "train", "--method", "tsne"]
    result = run_command(*arguments, "--out", str(out))
    assert result.exit_code == 0, result.output
    assert str(out) in result.stderr.replace("\n", "")
    assert shows(out, 0)
    for wrong in ({"split": "tset"}, {"method": "umap"}):
        with pytest.raises(UsageError, match="cannot project"):
            project2d(project, **wrong)

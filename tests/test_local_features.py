"""Local features: turned, scaled and shifted images are found where they are, others are not."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from textures import texture

from geomatch.search import local_features
from geomatch.search.local_features import Alignment, Finding, Sought, transformed

GROUND = texture(256, 300)
FEATURES = local_features.features(GROUND)


def cut(turn, scale, centre, side=128, ground=GROUND):
    """A square of the ground, and the transform (2, 3) that puts its points where they were.

    To lie as the ground does, it is turned by `turn` degrees counter-clockwise and resampled to
    `scale` pixels for each of its own.
    """
    angle = np.radians(turn)
    matrix = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    truth = np.column_stack([matrix, np.array(centre) - matrix @ [side / 2, side / 2]])
    # From the centres of pixels, as OpenCV counts, to corners and back.
    shift = matrix @ [0.5, 0.5] + truth[:, 2] - 0.5
    moved = np.column_stack([matrix, shift])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(ground, moved, (side, side), flags=flags), truth


@pytest.mark.parametrize(
    ("turn", "scale", "centre"),
    [(0, 1, (150, 128)), (37, 1, (150, 128)), (200, 0.8, (130, 110)), (90, 1.25, (150, 128))],
)
def test_an_image_is_found_where_it_was_cut(turn, scale, centre):
    image, truth = cut(turn, scale, centre)
    found = local_features.find(Sought.of(image), FEATURES)
    assert found.is_confirmed
    assert found.inliers == len(found.alignment.reference) > 20
    assert (found.alignment.turn - turn + 180) % 360 - 180 == pytest.approx(0, abs=1)
    assert found.alignment.scale == pytest.approx(scale, rel=0.01)
    corners = np.array([[0, 0], [128, 0], [128, 128], [0, 128], [64, 64]], np.float64)
    error = transformed(corners, found.alignment.matrix) - transformed(corners, truth)
    assert np.hypot(*error.T).max() < 1
    assert np.hypot(*found.alignment.residuals.T).max() < 1.5 * local_features.REACH


def test_an_affine_transform_follows_a_shear_that_a_similarity_cannot():
    truth = np.array([[1.03, 0.02, 60.0], [-0.03, 0.97, 50.0]])
    shift = truth[:, :2] @ [0.5, 0.5] + truth[:, 2] - 0.5
    moved = np.column_stack([truth[:, :2], shift])
    image = cv2.warpAffine(GROUND, moved, (160, 160), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    similar = local_features.align(local_features.features(image), FEATURES)
    fitted = local_features.affine(similar)
    corners = np.array([[0, 0], [160, 0], [160, 160], [0, 160]], np.float64)
    errors = [
        np.hypot(*(transformed(corners, each.matrix) - transformed(corners, truth)).T).max()
        for each in (similar, fitted)
    ]
    assert errors[0] > 2
    assert errors[1] < 0.7


def test_a_few_inliers_give_no_affine_transform():
    few = Alignment(np.eye(2, 3), np.zeros((5, 2)), np.zeros((5, 2)))
    assert local_features.affine(few) is few


@pytest.mark.parametrize("seed", range(1, 6))
def test_other_ground_and_a_mirror_image_are_not_confirmed(seed):
    other = texture(128, 128, seed)
    assert not local_features.find(Sought.of(other), FEATURES, [np.eye(2, 3)]).is_confirmed
    mirrored = np.ascontiguousarray(cut(0, 1, (150, 128))[0][:, ::-1])
    found = local_features.find(Sought.of(mirrored), FEATURES)
    assert found.chance > 20
    assert not found.is_confirmed


def test_a_guess_guides_the_search_and_scales_bound_it():
    image, truth = cut(37, 1, (150, 128))
    near = truth + np.array([[0, 0, 5], [0, 0, -5]])
    found = local_features.align(local_features.features(image), FEATURES, [near])
    assert np.abs(found.matrix - truth)[:, 2].max() < 1.5
    bounded = local_features.find(Sought.of(image), FEATURES, [near], (1.5, 4.0))
    assert not bounded.is_confirmed


def test_a_blank_image_has_no_features_and_is_not_found():
    blank = np.full((64, 64), 90, np.uint8)
    assert len(local_features.features(blank)) == 0
    found = local_features.find(Sought.of(blank), FEATURES, [np.eye(2, 3)])
    assert found == Finding(None, 0)
    assert not found.is_confirmed


def test_no_feature_is_near_invalid_pixels():
    valid = np.zeros(GROUND.shape[:2], bool)
    valid[50:200, 60:250] = True
    points = local_features.features(GROUND, valid).points
    assert len(points) > 50
    low, high = points.min(axis=0), points.max(axis=0)
    assert (low > [62, 52]).all()
    assert (high < [248, 198]).all()


def test_features_are_where_opencv_has_them_counted_from_the_corner():
    keys = cv2.SIFT.create(
        nfeatures=local_features.MOST, contrastThreshold=0.01, edgeThreshold=15,
        enable_precise_upscale=True,
    ).detect(np.rint(GROUND.mean(axis=-1)).astype(np.uint8))  # fmt: skip
    assert FEATURES.points == pytest.approx(np.array([key.pt for key in keys]) + 0.5)
    assert np.linalg.norm(FEATURES.descriptors, axis=1) == pytest.approx(1, abs=1e-3)


def test_an_image_is_warped_as_it_lies():
    image, truth = cut(37, 1, (150, 128))
    lying, valid = local_features.warped(image, np.ones((128, 128), bool), truth, GROUND.shape[:2])
    inside = cv2.erode(valid.astype(np.uint8), np.ones((5, 5))) > 0
    assert 0.15 < inside.mean() < 0.22
    off = np.abs(lying[inside].astype(int) - GROUND[inside])
    assert off.mean() < 3
    assert not lying[cv2.dilate(valid.astype(np.uint8), np.ones((3, 3))) == 0].any()

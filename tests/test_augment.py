"""Augmentation: one warp for image and labels, light on the image alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geomatch.config import Augment
from geomatch.nn.augment import augment

STILL = Augment(flips=False, turns=False, brightness=0.0, contrast=0.0, label_dropout=0.0)
WARP = Augment(flips=True, turns=True, brightness=0.0, contrast=0.0, label_dropout=0.0)
TRIPLET = [(0, 1)]


def changed(tiles, settings, image_channels=3, seed=0, pairs=TRIPLET):
    found = augment(jax.random.key(seed), jnp.asarray(tiles), image_channels, settings, pairs)
    return np.asarray(found)


def random_tiles(roles=3, batch=32, size=4, channels=4, seed=0):
    shape = (roles, batch, size, size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def symmetries(tile):
    """All eight flips and quarter turns of a tile (h, h, c), the unchanged one first."""
    turned = [np.rot90(tile, k) for k in range(4)]
    return turned + [t[:, ::-1] for t in turned]


def which(before, after):
    """The one symmetry that leads from a tile to another."""
    found = [i for i, tile in enumerate(symmetries(before)) if np.array_equal(tile, after)]
    assert len(found) == 1
    return found[0]


def warps(before, after):
    """(roles, batch) the symmetry of each tile."""
    return np.array(
        [
            [which(b, a) for b, a in zip(*role, strict=True)]
            for role in zip(before, after, strict=True)
        ]
    )


def test_nothing_asked_is_nothing_changed():
    tiles = random_tiles()
    found = changed(tiles, STILL)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, tiles)


def test_a_place_is_turned_alike_in_both_years():
    tiles = random_tiles(roles=6, batch=64)
    found = warps(tiles, changed(tiles, WARP, pairs=[(0, 1), (3, 4)]))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[3], found[4])
    assert set(found[0]) == set(range(8))
    for other in (2, 3, 5):
        assert (found[0] != found[other]).any()


def test_years_are_turned_apart_on_request():
    tiles = random_tiles(batch=64)
    settings = Augment(independent=True, brightness=0.0, contrast=0.0, label_dropout=0.0)
    found = warps(tiles, changed(tiles, settings))
    assert (found[0] == found[1]).mean() < 0.5


@pytest.mark.parametrize(
    ("flips", "turns", "possible"), [(True, False, 2), (False, True, 4), (True, True, 8)]
)
def test_flips_and_turns_are_drawn_as_asked(flips, turns, possible):
    tiles = random_tiles(batch=64)
    settings = Augment(flips, turns, brightness=0.0, contrast=0.0, label_dropout=0.0)
    found = warps(tiles, changed(tiles, settings))
    assert len(set(found.ravel())) == possible
    if not flips:
        assert set(found.ravel()) == {0, 1, 2, 3}


@pytest.mark.parametrize("labels", [1, 3])
def test_labels_get_the_image_s_warp_and_no_new_values(labels):
    rng = np.random.default_rng(0)
    image = random_tiles(channels=3)
    tiles = np.concatenate([image, rng.choice([7, 250], (3, 32, 4, 4, labels))], -1).astype(
        np.uint8
    )
    # The first image channel again as a label shows that both went the same way.
    tiles[..., 3] = tiles[..., 0]
    warped = changed(tiles, WARP)
    np.testing.assert_array_equal(warped[..., 3], warped[..., 0])
    lit = changed(tiles, Augment(brightness=0.5, contrast=0.5, label_dropout=0.0))
    np.testing.assert_array_equal(lit[..., 3:], warped[..., 3:])
    assert (lit[..., :3] != warped[..., :3]).mean() > 0.5
    if labels == 3:
        assert set(np.unique(lit[..., 4:])) == {7, 250}


def test_label_dropout_drops_all_or_none_of_a_tile():
    tiles = np.maximum(random_tiles(batch=64), 1)

    def kept(share):
        settings = Augment(brightness=0.0, contrast=0.0, label_dropout=share)
        found = changed(tiles, settings)
        assert (found[..., :3] > 0).all()
        known = (found[..., 3:] > 0).reshape(-1, 16)
        np.testing.assert_array_equal(known.any(axis=1), known.all(axis=1))
        return known.any(axis=1).mean()

    assert kept(0.0) == 1
    assert kept(1.0) == 0
    assert 0.3 < kept(0.5) < 0.7


def test_light_changes_stay_within_their_bounds():
    tiles = np.full((3, 64, 4, 4, 3), 100, np.uint8)
    settings = Augment(flips=False, turns=False, brightness=0.2, contrast=0.0)
    shift = changed(tiles, settings).astype(int) - 100
    assert (shift == shift[:, :, :1, :1, :1]).all()
    assert shift.min() < -25
    assert shift.max() > 25
    assert np.abs(shift).max() <= round(0.2 * 255)


def test_contrast_keeps_the_mean_and_scales_about_it():
    tiles = np.full((3, 64, 4, 4, 3), 100, np.uint8)
    tiles[:, :, :2] = 140
    settings = Augment(flips=False, turns=False, brightness=0.0, contrast=0.5)
    found = changed(tiles, settings).astype(float)
    np.testing.assert_allclose(found.mean(axis=(2, 3, 4)), 120, atol=1)
    spread = found[:, :, 0, 0, 0] - found[:, :, 3, 0, 0]
    assert 20 <= spread.min() < 30
    assert 50 < spread.max() <= 60


def test_light_saturates_instead_of_wrapping():
    tiles = np.full((3, 64, 4, 4, 3), 250, np.uint8)
    tiles[:, :, :2] = 5
    found = changed(tiles, Augment(flips=False, turns=False, brightness=0.2, contrast=0.0))
    assert (found[:, :, 0].astype(int) <= 5 + 51).all()
    assert (found[:, :, 3] >= 250 - 51).all()
    assert (found == 255).any()
    assert (found == 0).any()


def test_the_key_decides_all():
    tiles = random_tiles()
    first, again, other = (changed(tiles, Augment(), seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()

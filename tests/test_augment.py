"""Augmentation: one warp for image and labels, light on the image alone."""

from __future__ import annotations

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from geomatch.config import AugmentConfig
from geomatch.nn.augment import (
    YIQ,
    adjust_colour,
    augment,
    flip_and_turn,
    jpeg_compress,
    warp_tiles,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")

STILL = AugmentConfig(flips=False, turns=False, brightness=0.0, contrast=0.0, label_dropout=0.0)
WARP = AugmentConfig(flips=True, turns=True, brightness=0.0, contrast=0.0, label_dropout=0.0)
ALL = AugmentConfig(
    rotation=30.0,
    zoom=0.3,
    shift=0.2,
    saturation=0.5,
    hue=0.1,
    blur=1.0,
    jpeg=0.5,
    per_year=True,
)
TRIPLET = [(0, 1)]

compiled = jax.jit(augment, static_argnums=(3, 4, 5))


def changed(tiles, settings, image_channels=3, seed=0, pairs=TRIPLET, years=None):
    years = jnp.zeros(tiles.shape[:2], jnp.int32) if years is None else jnp.asarray(years)
    key, pairs = jax.random.key(seed), tuple(pairs)
    return np.asarray(compiled(key, jnp.asarray(tiles), years, image_channels, settings, pairs))


def still(**changes):
    """Settings of these changes alone."""
    return dataclasses.replace(STILL, **changes)


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


def test_without_settings_nothing_changes():
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
    settings = AugmentConfig(independent=True, brightness=0.0, contrast=0.0, label_dropout=0.0)
    found = warps(tiles, changed(tiles, settings))
    assert (found[0] == found[1]).mean() < 0.5


@pytest.mark.parametrize(
    ("flips", "turns", "possible"), [(True, False, 2), (False, True, 4), (True, True, 8)]
)
def test_flips_and_turns_follow_the_settings(flips, turns, possible):
    tiles = random_tiles(batch=64)
    settings = AugmentConfig(flips, turns, brightness=0.0, contrast=0.0, label_dropout=0.0)
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
    lit = changed(tiles, AugmentConfig(brightness=0.5, contrast=0.5, label_dropout=0.0))
    np.testing.assert_array_equal(lit[..., 3:], warped[..., 3:])
    assert (lit[..., :3] != warped[..., :3]).mean() > 0.5
    if labels == 3:
        assert set(np.unique(lit[..., 4:])) == {7, 250}


def test_label_dropout_drops_all_or_none_of_a_tile():
    tiles = np.maximum(random_tiles(batch=64), 1)

    def kept(share):
        settings = AugmentConfig(brightness=0.0, contrast=0.0, label_dropout=share)
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
    settings = AugmentConfig(flips=False, turns=False, brightness=0.2, contrast=0.0)
    shift = changed(tiles, settings).astype(int) - 100
    assert (shift == shift[:, :, :1, :1, :1]).all()
    assert shift.min() < -25
    assert shift.max() > 25
    assert np.abs(shift).max() <= round(0.2 * 255)


def test_contrast_keeps_the_mean_and_scales_about_it():
    tiles = np.full((3, 64, 4, 4, 3), 100, np.uint8)
    tiles[:, :, :2] = 140
    settings = AugmentConfig(flips=False, turns=False, brightness=0.0, contrast=0.5)
    found = changed(tiles, settings).astype(float)
    np.testing.assert_allclose(found.mean(axis=(2, 3, 4)), 120, atol=1)
    spread = found[:, :, 0, 0, 0] - found[:, :, 3, 0, 0]
    assert 20 <= spread.min() < 30
    assert 50 < spread.max() <= 60


def test_light_saturates_instead_of_wrapping():
    tiles = np.full((3, 64, 4, 4, 3), 250, np.uint8)
    tiles[:, :, :2] = 5
    found = changed(tiles, AugmentConfig(flips=False, turns=False, brightness=0.2, contrast=0.0))
    assert (found[:, :, 0].astype(int) <= 5 + 51).all()
    assert (found[:, :, 3] >= 250 - 51).all()
    assert (found == 255).any()
    assert (found == 0).any()


@pytest.mark.parametrize("settings", [AugmentConfig(), ALL], ids=["default", "all"])
def test_the_key_decides_all(settings):
    tiles = random_tiles(size=16)
    first, again, other = (changed(tiles, settings, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def smooth_tiles(roles=1, batch=4, size=64, channels=3, seed=0):
    """Tiles of detail some pixels wide, which interpolation follows."""
    noise = np.random.default_rng(seed).normal(size=(roles, batch, size, size, channels))
    noise = ndimage.gaussian_filter(noise, (0, 0, 2, 2, 0), mode="reflect")
    return np.clip(128 + 40 * noise / noise.std(), 0, 255).astype(np.uint8)


def warp(tiles, image_channels=3, flip=0, degrees=0.0, zoom=1.0, shift=(0.0, 0.0)):
    """`warp_tiles` with the same numbers for all tiles."""
    count = len(tiles)
    found = warp_tiles(
        jnp.asarray(tiles),
        image_channels,
        jnp.full(count, flip),
        jnp.full(count, np.radians(degrees)),
        jnp.full(count, zoom),
        jnp.tile(jnp.asarray(shift)[:, None], count),
    )
    return np.concatenate(found, axis=-1)


def test_a_warp_by_nothing_is_the_tile():
    tiles = random_tiles(size=17)[0]
    np.testing.assert_array_equal(warp(tiles), tiles)


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize("turn", range(4))
def test_a_warp_by_quarters_is_a_flip_and_turn(flip, turn):
    tiles = random_tiles(size=16)[0]
    asked = jnp.full(len(tiles), flip), jnp.full(len(tiles), turn)
    expected = np.asarray(jax.vmap(flip_and_turn)(jnp.asarray(tiles), *asked))
    found = warp(tiles, flip=flip, degrees=90.0 * turn)
    np.testing.assert_array_equal(np.rint(found), expected)


@pytest.mark.parametrize("degrees", [-170.0, -20.0, 7.0, 45.0])
def test_rotation_matches_scipy_and_pillow(degrees):
    tile = smooth_tiles()[0, 0]
    found = warp(tile[None], degrees=degrees)[0]
    # SciPy turns the axes (0, 1) anticlockwise, as Pillow does.
    scipy_s = ndimage.rotate(
        tile.astype(float), degrees, reshape=False, order=1, mode="reflect", prefilter=False
    )
    np.testing.assert_allclose(found, scipy_s, atol=0.01)
    pillow_s = np.asarray(Image.fromarray(tile).rotate(degrees, Image.Resampling.BILINEAR))
    inside = np.hypot(*(np.indices((64, 64)) - 31.5)) < 30
    assert np.abs(found - pillow_s)[inside].max() < 2


def test_zoom_and_shift_are_scipy_s_reflected_at_the_edges():
    tile = smooth_tiles()[0, 0]
    found = warp(tile[None], flip=1, degrees=25.0, zoom=0.4, shift=(7.5, -11.0))[0]
    angle = np.radians(25.0)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    matrix = np.diag([1, -1]) @ turn / 0.4
    centre = np.array([31.5, 31.5])
    offset = centre - matrix @ (centre + np.array([7.5, -11.0]))
    expected = np.stack(
        [
            ndimage.affine_transform(band, matrix, offset, order=1, mode="reflect")
            for band in tile.transpose(2, 0, 1).astype(float)
        ],
        axis=-1,
    )
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_a_shift_by_whole_pixels_reads_the_mirrored_pixel():
    tiles = random_tiles(size=8)[0]
    found = warp(tiles, shift=(3.0, -2.0))
    mirrored = np.pad(tiles, ((0, 0), (3, 0), (0, 2), (0, 0)), mode="symmetric")
    np.testing.assert_array_equal(found, mirrored[:, :8, 2:])


def test_a_larger_zoom_shows_things_larger():
    tile = np.zeros((1, 32, 32, 3), np.uint8)
    tile[:, 12:20, 12:20] = 255
    # Reflections come in at the edges of the smaller.
    middle = np.s_[0, 8:24, 8:24, 0]
    areas = [(warp(tile, zoom=zoom)[middle] > 127).sum() for zoom in (0.5, 1.0, 2.0)]
    assert areas == [16, 64, 256]


FREE = still(flips=True, turns=True, rotation=180.0, zoom=0.5, shift=0.2)


def places(roles=3, batch=16, size=64):
    """Tiles whose image and label say where they are: row, column and none; row, column."""
    row, column = np.indices((size, size)) * (256 // size)
    tile = np.stack([row, column, 0 * row, row, column], axis=-1).astype(np.uint8)
    return np.broadcast_to(tile, (roles, batch, *tile.shape))


def test_image_and_labels_get_one_warp():
    tiles = places()
    found = changed(tiles, FREE).astype(int)
    assert (found[..., :2] != tiles[..., :2]).mean() > 0.9
    # A pixel is four grey levels, and the nearest at most half a pixel away.
    assert np.abs(found[..., 3:] - found[..., :2]).max() == 2


def test_a_warp_gives_labels_no_new_values():
    rng = np.random.default_rng(0)
    tiles = random_tiles(size=32, channels=5)
    tiles[..., 3] = rng.choice([7, 100, 250], tiles.shape[:-1])
    tiles[..., 4] = rng.choice([0, 255], tiles.shape[:-1])
    found = changed(tiles, FREE)
    assert set(np.unique(found[..., 3])) == {7, 100, 250}
    assert set(np.unique(found[..., 4])) == {0, 255}


def test_a_place_is_warped_alike_in_all_views():
    found = changed(places(roles=4), FREE, pairs=[(0, 1), (0, 3)])
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[3])
    assert all((a != b).any() for a, b in zip(found[0], found[2], strict=True))
    apart = changed(places(roles=4), dataclasses.replace(FREE, independent=True))
    assert all((a != b).any() for a, b in zip(apart[0], apart[1], strict=True))


def drawn_matrices(settings, batch=256):
    """(n, 2, 2) the linear part of each warp, (n, 2) where the centre comes from; both in pixels.

    Read off the middle of coordinates, which bilinear interpolation keeps.
    """
    row, column = np.indices((64, 64)) * 4
    tile = np.stack([row, column, row], axis=-1).astype(np.uint8)
    tiles = np.broadcast_to(tile, (1, batch, *tile.shape))
    found = changed(tiles, settings, pairs=[])[0, ..., :2].astype(float) / 4
    down, right = found[:, 38, 32] - found[:, 26, 32], found[:, 32, 38] - found[:, 32, 26]
    centre = found[:, 31:33, 31:33].mean(axis=(1, 2))
    return np.stack([down, right], axis=-1) / 12, centre


def test_rotation_is_drawn_within_its_bounds():
    matrices, centre = drawn_matrices(still(rotation=20.0))
    degrees = np.degrees(np.arctan2(matrices[:, 0, 1], matrices[:, 0, 0]))
    assert -21 < degrees.min() < -18
    assert 18 < degrees.max() < 21
    np.testing.assert_allclose(np.linalg.det(matrices), 1, atol=0.05)
    np.testing.assert_allclose(centre, 31.5, atol=0.2)


def test_zoom_is_drawn_within_its_bounds_evenly_in_and_out():
    matrices, centre = drawn_matrices(still(zoom=0.5))
    zoom = 1 / matrices[:, 0, 0]
    np.testing.assert_allclose(matrices[:, 1, 1], matrices[:, 0, 0], atol=0.03)
    assert 1 / 1.5 - 0.03 < zoom.min() < 0.7
    assert 1.4 < zoom.max() < 1.53
    assert abs(np.log(zoom).mean()) < 0.06
    np.testing.assert_allclose(centre, 31.5, atol=0.2)


def test_shift_is_drawn_within_its_bounds_both_ways():
    matrices, centre = drawn_matrices(still(shift=0.25))
    np.testing.assert_allclose(matrices, np.broadcast_to(np.eye(2), matrices.shape), atol=0.05)
    for moved in (centre - 31.5).T:
        assert -16.2 < moved.min() < -14
        assert 14 < moved.max() < 16.2


LIGHT = still(brightness=0.2, contrast=0.2, saturation=0.9, hue=0.5, blur=1.5, jpeg=1.0)


def test_light_leaves_labels():
    tiles = random_tiles(size=16, channels=5)
    found = changed(tiles, LIGHT)
    np.testing.assert_array_equal(found[..., 3:], tiles[..., 3:])
    assert (found[..., :3] != tiles[..., :3]).mean() > 0.5


@pytest.mark.parametrize(
    "change",
    [
        {"brightness": 0.2},
        {"contrast": 0.9},
        {"saturation": 0.9},
        {"hue": 0.5},
        {"blur": 2.0},
        {"jpeg": 1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_one_year_has_one_light(change):
    # The same tile throughout, so that light alone makes the difference.
    tiles = np.broadcast_to(random_tiles(1, 1, size=16, channels=3), (3, 4, 16, 16, 3))
    years = np.array([[0, 1, 7, 0], [1, 1, 0, 7], [7, 0, 1, 0]], np.int32)
    found = changed(tiles, still(per_year=True, **change), years=years)
    by_year = [found[years == year] for year in (0, 1, 7)]
    for alike in by_year:
        assert (alike == alike[0]).all()
    assert len({alike[0].tobytes() for alike in by_year}) == 3
    apart = changed(tiles, still(**change), years=years)
    assert len({tile.tobytes() for tile in apart.reshape(12, -1)}) > 6


def test_hue_and_saturation_keep_grey_and_luminance():
    tiles = random_tiles(batch=64, size=8, channels=3)
    # Mild colours, which no turn takes out of range.
    tiles = (108 + tiles // 6).astype(np.uint8)
    tiles[:, :, :2] = tiles[:, :, :2, :, :1]
    found = changed(tiles, still(saturation=0.5, hue=0.5))
    np.testing.assert_array_equal(found[:, :, :2], tiles[:, :, :2])
    assert (found[:, :, 2:] != tiles[:, :, 2:]).mean() > 0.5
    assert np.abs(found @ YIQ[0] - tiles @ YIQ[0]).max() < 1


def chrominance(tiles):
    """(roles, b) the complex number that each tile's chrominance is multiplied by."""
    i, q = np.moveaxis(tiles @ YIQ[1:].T, -1, 0)
    return (i + 1j * q).mean(axis=(2, 3))


def test_hue_turns_colours_within_its_bounds():
    tiles = np.broadcast_to(np.array([150, 120, 100], np.uint8), (3, 64, 4, 4, 3))
    change = chrominance(changed(tiles, still(hue=0.1))) / chrominance(tiles)
    turn = np.angle(change) / (2 * np.pi)
    np.testing.assert_allclose(np.abs(change), 1, atol=0.04)
    assert -0.105 < turn.min() < -0.085
    assert 0.085 < turn.max() < 0.105


def test_saturation_scales_colours_within_its_bounds():
    tiles = np.broadcast_to(np.array([150, 120, 100], np.uint8), (3, 64, 4, 4, 3))
    change = chrominance(changed(tiles, still(saturation=0.5))) / chrominance(tiles)
    np.testing.assert_allclose(np.angle(change), 0, atol=0.05)
    assert 0.47 < np.abs(change).min() < 0.55
    assert 1.45 < np.abs(change).max() < 1.53


def test_no_saturation_is_grey():
    image = jnp.asarray(random_tiles(channels=3)[0], jnp.float32)
    zeros = jnp.zeros((len(image), 1, 1, 1))
    grey = np.asarray(image) @ YIQ[:1].T
    np.testing.assert_allclose(
        adjust_colour(image, zeros, zeros), np.repeat(grey, 3, -1), atol=1e-3
    )


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_colour_changes_are_of_the_first_three_of_at_least_three_bands(channels):
    tiles = random_tiles(size=8, channels=channels)
    found = changed(tiles, still(saturation=0.9, hue=0.5), image_channels=channels)
    if channels < 3:
        np.testing.assert_array_equal(found, tiles)
    else:
        np.testing.assert_array_equal(found[..., 3:], tiles[..., 3:])
        assert (found[..., :3] != tiles[..., :3]).mean() > 0.5


def test_blur_keeps_the_mean_and_lowers_the_variance():
    tiles = random_tiles(batch=16, size=24, channels=3)
    found = changed(tiles, still(blur=2.0))
    np.testing.assert_allclose(
        found.mean(axis=(2, 3), dtype=float), tiles.mean(axis=(2, 3), dtype=float), atol=0.2
    )
    spread = found.std(axis=(2, 3)).mean(-1) / tiles.std(axis=(2, 3)).mean(-1)
    assert spread.max() < 1.001
    assert spread.min() < 0.2
    assert np.median(spread) < 0.5


def test_blur_matches_scipy_s_gaussian():
    tiles = random_tiles(1, 1, size=32, channels=3)
    found = changed(tiles, still(blur=2.0), seed=3, pairs=[])[0, 0].astype(float)

    def error(deviation):
        plain = tiles[0, 0].astype(float)
        kernel = (deviation, deviation, 0)
        return np.abs(
            ndimage.gaussian_filter(plain, kernel, mode="reflect", radius=(6, 6, 0)) - found
        ).max()

    # It is the Gaussian of some deviation within the bounds.
    assert min(error(deviation) for deviation in np.arange(0.01, 2.01, 0.01)) < 1.5


def jpeg(tiles, strength):
    """`jpeg_compress` with one strength, in bytes."""
    image = jnp.asarray(tiles, jnp.float32)
    found = jpeg_compress(image, jnp.full((len(tiles), 1, 1, 1), strength))
    return np.clip(np.rint(np.asarray(found)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("strength", "quality"), [(1.0, 10), (0.2, 50)])
@pytest.mark.parametrize("size", [64, 61])
def test_compression_matches_pillow(strength, quality, size):
    tile = smooth_tiles(size=size)[0, 0, ..., 0]
    file = io.BytesIO()
    Image.fromarray(tile).save(file, "jpeg", quality=quality)
    pillow_s = np.asarray(Image.open(file)).astype(int)
    error = np.abs(jpeg(tile[None, ..., None], strength)[0, ..., 0] - pillow_s)
    assert np.abs(pillow_s - tile).max() > 10
    # Pillow's coefficients are whole eighths, of which a few are rounded the other way.
    assert np.mean(error <= 1) > 0.93


def test_no_compression_is_the_tile():
    tiles = random_tiles(size=24)[0]
    np.testing.assert_array_equal(jpeg(tiles, 0.0), tiles)


def test_compression_leaves_blocks():
    tiles = smooth_tiles(batch=16, size=64)[0]
    found = jpeg(tiles, 1.0).astype(int)
    steps = np.abs(np.diff(found, axis=2))
    within, across = np.delete(steps, np.s_[7::8], axis=2), steps[:, :, 7::8]
    before = np.abs(np.diff(tiles.astype(int), axis=2))
    assert across.mean() > 1.2 * within.mean()
    assert before[:, :, 7::8].mean() < 1.05 * np.delete(before, np.s_[7::8], axis=2).mean()
    # Each block is compressed for itself.
    np.testing.assert_array_equal(jpeg(tiles[:, 8:16, 16:24], 1.0), found[:, 8:16, 16:24])


def test_compression_is_drawn_from_none_to_its_bound():
    tiles = np.broadcast_to(smooth_tiles(batch=1), (1, 64, 64, 64, 3))
    found = changed(tiles, still(jpeg=1.0), pairs=[]).astype(int)
    loss = np.abs(found - tiles).mean(axis=(2, 3, 4))
    worst = np.abs(jpeg(tiles[0, :1], 1.0).astype(int) - tiles[0, :1]).mean()
    assert loss.min() < 0.2 * worst
    assert 0.8 * worst < loss.max() < 1.05 * worst


def test_what_is_off_leaves_no_trace_in_the_program():
    tiles, years = jnp.zeros((3, 4, 16, 16, 4), jnp.uint8), jnp.zeros((3, 4), jnp.int32)

    def program(settings, channels=4):
        given = tiles[..., :channels]
        text = jax.make_jaxpr(lambda key: augment(key, given, years, 3, settings, TRIPLET))
        return str(text(jax.random.key(0)))

    default, everything = program(AugmentConfig()), program(ALL)
    for operation in (" cos ", " exp ", " dot_general", " floor ", " pow "):
        assert operation not in default.replace("=", " "), operation
        assert operation in everything.replace("=", " "), operation
    draws = [program(AugmentConfig(), channels).count("random_bits") for channels in (3, 4)]
    assert draws[0] == draws[1] - 1


@pytest.mark.parametrize("per_year", [False, True])
def test_a_part_of_a_batch_is_augmented_as_in_the_whole(per_year):
    tiles = random_tiles(size=16, batch=8)
    roles, batch = tiles.shape[:2]
    years = np.arange(roles * batch, dtype=np.int32).reshape(roles, batch) % 3
    settings = dataclasses.replace(ALL, per_year=per_year, label_dropout=0.5)

    @jax.jit
    def change(tiles, years, first):
        return augment(jax.random.key(0), tiles, years, 3, settings, TRIPLET, first, batch)

    def changed_from(first, count):
        part = slice(first, first + count)
        return np.asarray(change(tiles[:, part], years[:, part], first)).astype(int)

    whole, half = changed_from(0, batch), batch // 2
    for first in (0, half):
        error = np.abs(changed_from(first, half) - whole[:, first : first + half])
        # But for what is rounded, or quantised, the other way.
        assert np.mean(error <= 1) > 0.99


def test_mapped_over_devices_it_gives_the_same():
    tiles = np.stack([random_tiles(size=16, seed=seed) for seed in (0, 1)])
    years = np.random.default_rng(0).integers(0, 3, tiles.shape[:3], np.int32)
    expected = [changed(tiles[i], ALL, seed=i, years=years[i]).astype(int) for i in (0, 1)]

    def change(key, tiles, years):
        return augment(key, tiles, years, 3, ALL, TRIPLET)

    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
    assert len(jax.local_devices()) == 2
    for mapped in (jax.jit(jax.vmap(change)), jax.pmap(change)):
        error = np.abs(np.asarray(mapped(keys, tiles, years)).astype(int) - expected)
        # But for what is rounded, or quantised, the other way.
        assert np.mean(error <= 1) > 0.99

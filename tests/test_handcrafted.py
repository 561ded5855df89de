"""Descriptors made by hand: counted again in plain loops, and what they see."""

from __future__ import annotations

import math

import numpy as np
import pytest

from geomatch.evaluation.handcrafted import BINS, colour_histogram, hog


def tiles(n=3, size=24, channels=3):
    rng = np.random.default_rng(0)
    return rng.integers(256, size=(n, size, size, channels)).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_histogram_counts_each_channel(channels):
    pixels = tiles(channels=channels)
    found = colour_histogram(pixels)
    assert found.shape == (3, BINS * channels)
    for i in range(3):
        for c in range(channels):
            count, _ = np.histogram(pixels[i, ..., c], BINS, (0, 256))
            mine = found[i, c * BINS : (c + 1) * BINS]
            np.testing.assert_allclose(mine, np.sqrt(count / 24**2), rtol=1e-6)


def test_a_histogram_knows_no_places():
    pixels = tiles()
    np.testing.assert_array_equal(colour_histogram(pixels), colour_histogram(pixels[:, ::-1]))


def hog_by_hand(grey):
    """Of one tile in grey, in plain loops over pixels, cells and blocks."""
    rows, cols = grey.shape[0] // 16 * 2, grey.shape[1] // 16 * 2
    cells = np.zeros((rows, cols, 8))
    for y in range(rows * 8):
        for x in range(cols * 8):
            inner_x, inner_y = 0 < x < grey.shape[1] - 1, 0 < y < grey.shape[0] - 1
            dx = grey[y, x + 1] - grey[y, x - 1] if inner_x else 0.0
            dy = grey[y + 1, x] - grey[y - 1, x] if inner_y else 0.0
            turn = math.atan2(dy, dx) % math.tau / math.tau
            cells[y // 8, x // 8, min(int(turn * 8), 7)] += math.hypot(dx, dy) / 64
    found = np.zeros((rows // 2, 2, cols // 2, 2, 8))
    for row in range(0, rows, 2):
        for col in range(0, cols, 2):
            block = cells[row : row + 2, col : col + 2]
            found[row // 2, :, col // 2] = block / np.linalg.norm(block)
    return found.ravel()


@pytest.mark.parametrize("size", [32, 43])
def test_gradients_are_those_counted_by_hand(size):
    pixels = tiles(size=size)
    found = hog(pixels)
    assert found.shape == (3, (size // 16) ** 2 * 32)
    # In float32 here too: rounding may put a gradient at the edge of a bin into the next one.
    greys = (pixels.astype(np.float32) * np.float32([0.299, 0.587, 0.114])).sum(axis=-1)
    for mine, grey in zip(found, greys.astype(float), strict=True):
        wanted = hog_by_hand(grey)
        np.testing.assert_allclose(mine, wanted, atol=5e-3)
        assert np.median(np.abs(mine - wanted)) < 1e-4


def test_gradients_mind_directions_but_not_light():
    stripes = (
        np.zeros((1, 32, 32, 1), np.uint8) + (np.arange(32) // 4 % 2 * 40).astype(np.uint8)[:, None]
    )
    base, lighter = hog(stripes)[0], hog(3 * stripes + 20)[0]
    np.testing.assert_allclose(lighter, base, atol=1e-5)
    across = hog(stripes.transpose(0, 2, 1, 3))[0]
    assert base @ base > 1
    assert base @ across == 0
    # One edge, from dark to light and from light to dark.
    edge = np.repeat(np.array([0, 90], np.uint8), 16)[None, None, :, None].repeat(32, 1)
    darker, lighter = hog(edge)[0], hog(edge[:, :, ::-1])[0]
    assert darker @ darker > 1
    assert darker @ lighter == 0


def test_blank_tiles_are_numbers():
    for describe in (colour_histogram, hog):
        assert np.isfinite(describe(np.zeros((2, 16, 16, 3), np.uint8))).all()
        assert np.isfinite(describe(np.full((2, 16, 16, 1), 9, np.uint8))).all()

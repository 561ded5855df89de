"""Phase correlation: shifts known by construction, and no answer where there is none to give."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from geomatch.geo.phase_correlation import shift, spectrum


def ground(seed, side=400):
    """Blobs of all sizes, as grey levels."""
    rng = np.random.default_rng(seed)
    layers = [ndimage.gaussian_filter(rng.normal(size=(side, side)), s) * s for s in (1, 3, 9)]
    return 120 + 80 * sum(layers)


def cut(image, side=256):
    """The middle of an image as uint8."""
    start = (len(image) - side) // 2
    return np.clip(image[start : start + side, start : start + side], 0, 255).astype(np.uint8)


@pytest.mark.parametrize("moved", [(0.0, 0.0), (3.4, -1.25), (-20.6, 0.5), (45.0, 60.0)])
def test_a_known_shift_is_found_to_a_tenth_of_a_pixel(moved):
    """In other light, and with noise of its own."""
    image = ground(0)
    noise = np.random.default_rng(1).normal(0, 5, image.shape)
    other = 0.6 * ndimage.shift(image, moved, order=3, mode="mirror") + 60 + noise
    found = shift(spectrum(cut(image)), spectrum(cut(other)))
    assert found == pytest.approx(moved, abs=0.1)
    back = shift(spectrum(cut(other)), spectrum(cut(image)))
    assert back == pytest.approx([-v for v in found], abs=0.06)


@pytest.mark.parametrize("side", [128, 64])
def test_small_images_are_enough_for_small_shifts(side):
    image = ground(0)
    other = ndimage.shift(image, (3.4, -1.25), order=3, mode="mirror")
    found = shift(spectrum(cut(image, side)), spectrum(cut(other, side)))
    assert found == pytest.approx((3.4, -1.25), abs=0.1)


@pytest.mark.parametrize("side", [256, 128, 64])
def test_different_ground_gives_no_answer(side):
    """Of 190 pairs at most two answer."""
    spectra = [spectrum(cut(ground(seed), side)) for seed in range(20)]
    answers = [shift(a, b) for i, a in enumerate(spectra) for b in spectra[:i]]
    assert len(answers) == 190
    assert answers.count(None) >= 188


@pytest.mark.parametrize("other", ["flat", "noise", "ground"])
def test_a_flat_image_gives_no_answer(other):
    images = {
        "flat": np.full((256, 256), 90, np.uint8),
        "noise": np.random.default_rng(0).integers(88, 92, (256, 256)).astype(np.uint8),
        "ground": cut(ground(0)),
    }
    assert shift(spectrum(images["flat"]), spectrum(images[other])) is None


def test_stripes_give_no_answer():
    """They look alike wherever they are shifted along themselves, and at every wavelength."""
    rows = np.arange(256)[:, None]
    fields = np.broadcast_to(np.where(rows % 40 < 20, 60, 160), (256, 256)).astype(float)
    rng = np.random.default_rng(0)
    a, b = (np.clip(fields + rng.normal(0, 5, fields.shape), 0, 255) for _ in range(2))
    assert shift(spectrum(a), spectrum(b)) is None

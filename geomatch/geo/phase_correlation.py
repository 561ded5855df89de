"""The shift between two images of the same ground, by phase correlation.

The surface of the correlation is searched to the pixel and then, around its peak, to 1/20 px with
the upsampled Fourier transform of Guizar-Sicairos, Thurman and Fienup 2008. A peak is only believed
where it stands out: images of different ground have peaks too.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import NDArray

BAND = 0.15
"""Standard deviation, in cycles per pixel, of the weights of frequencies: fine detail is noise
between years."""
APART = 5
"""Radius of a peak in pixels."""
DISTINCT = {256: 1.5, 128: 1.8, 64: 2.3}
"""How many times as high as any other a peak must be to be believed, by the side of the images: the
smaller, the more often chance makes such a peak. Of pairs that show different ground, 1.5 % or
fewer pass (measured in towns, at 10 m, and among fields with parallel edges, the hardest)."""
STEPS = 20
"""Fractions of a pixel."""

Spectrum = NDArray[np.complex64]


def spectrum(image: NDArray[Any]) -> Spectrum:
    """The Fourier transform of a square image (n, n), less its mean, under a Hann window."""
    hann = _hann(len(image))
    centred = image.astype(np.float32) - np.float32((image * hann).sum() / hann.sum())
    transformed: Spectrum = scipy.fft.fft2(centred * hann)
    return transformed


def shift(a: Spectrum, b: Spectrum) -> tuple[float, float] | None:
    """How far the content of `b` is from that of `a`: (rows down, columns to the right) in pixels.

    Shifts are sought up to a quarter of the side.

    Args:
        a, b: `spectrum` of images of one of the sides of `DISTINCT`.

    Returns:
        None where no peak stands out: the images are flat, or show different things.
    """
    n = len(a)
    cross = a.conj() * b
    cross *= _weights(n) / np.maximum(np.abs(cross), np.float32(1e-6))
    reach = np.arange(-(n // 4), n // 4 + 1)
    surface = scipy.fft.ifft2(cross).real[np.ix_(reach, reach)]
    row, col = np.unravel_index(surface.argmax(), surface.shape)
    down, right = reach[row], reach[col]
    elsewhere = (reach[:, None] - down) ** 2 + (reach - right) ** 2 > APART**2
    if not surface[row, col] > DISTINCT[n] * surface[elsewhere].max():
        return None
    offsets = np.arange(-STEPS, STEPS + 1) / STEPS
    frequency = np.fft.fftfreq(n)
    rows = np.exp(2j * np.pi * np.outer(down + offsets, frequency))
    cols = np.exp(2j * np.pi * np.outer(frequency, right + offsets))
    fine = (rows @ cross @ cols).real
    row, col = np.unravel_index(fine.argmax(), fine.shape)
    return float(down + offsets[row]), float(right + offsets[col])


@functools.lru_cache
def _hann(n: int) -> NDArray[np.float32]:
    window = np.hanning(n + 2)[1:-1].astype(np.float32)
    return np.outer(window, window)


@functools.lru_cache
def _weights(n: int) -> NDArray[np.float32]:
    frequency = np.fft.fftfreq(n)
    squared = frequency[:, None] ** 2 + frequency**2
    return np.exp(-squared / (2 * BAND**2)).astype(np.float32)

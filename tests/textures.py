"""Ground that looks like something: noise of several sizes, as local features need it."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(h, w, 3) uint8 with detail of 1.5 to 12 pixels."""
    rng = np.random.default_rng(seed)
    planes = np.zeros((height, width, 3))
    for sigma in (1.5, 3, 6, 12):
        noise = gaussian_filter(rng.normal(size=(height, width, 3)), (sigma, sigma, 0))
        planes += noise / noise.std()
    return np.clip(128 + 25 * planes, 0, 255).astype(np.uint8)

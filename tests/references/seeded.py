"""Weights as a function of name and shape, so that a reference need not store any."""

from __future__ import annotations

import math
import zlib

import numpy as np


def seeded(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 variable of a network whose activations neither vanish nor explode.

    Args:
        name: of torch's, such as "bn1.running_var", or LAYER/VARIABLE of Keras's.
        shape: with four axes, of a kernel: height and width last in torch, first in Keras.
    """
    draws = np.random.Generator(np.random.PCG64(zlib.crc32(f"{name} {shape}".encode())))
    values = draws.random(shape)
    if len(shape) > 1:
        inputs = shape[:-1] if "/" in name else shape[1:]
        # He's variance, of a uniform distribution.
        values = (2 * values - 1) * math.sqrt(6 / math.prod(inputs))
    elif name.endswith(("var", "variance")):
        values = 0.5 + values
    elif name.endswith(("mean", "bias", "beta")):
        values = 0.4 * values - 0.2
    else:
        values = 0.6 + 0.4 * values
    return np.asarray(values, np.float32)


def pixels() -> np.ndarray:
    """One uint8 image (1, 64, 96, 3): waves of each colour, and noise."""
    draws = np.random.Generator(np.random.PCG64(0))
    y, x = np.mgrid[:64, :96]
    waves = [np.sin(y / 5 * (c + 1)) + np.cos(x / 7 + c) for c in range(3)]
    image = 128 + 50 * np.stack(waves, axis=-1) + 30 * (draws.random((64, 96, 3)) - 0.5)
    return image.clip(0, 255).astype(np.uint8)[None]

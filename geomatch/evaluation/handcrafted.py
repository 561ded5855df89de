"""Descriptors without any learning, which training has to beat."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
Pixels = NDArray[np.uint8]

BINS = 32
CELL, ORIENTATIONS, BLOCK = 8, 8, 2
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def colour_histogram(tiles: Pixels) -> Float32Array:
    """Square roots of the shares of pixels in 32 bins of each channel.

    Their inner product is the Bhattacharyya coefficient. Swain and Ballard 1991, "Color Indexing".

    Args:
        tiles: (n, h, w, c).

    Returns:
        (n, 32 c).
    """
    n, c = len(tiles), tiles.shape[-1]
    code = (tiles.astype(np.int64) * BINS // 256).reshape(n, -1, c)
    code += BINS * np.arange(c) + BINS * c * np.arange(n)[:, None, None]
    count = np.bincount(code.ravel(), minlength=n * c * BINS).reshape(n, -1)
    return np.sqrt(count / code.shape[1]).astype(np.float32)


def hog(tiles: Pixels) -> Float32Array:
    """Histograms of oriented gradients: 8 px cells, 8 orientations, normalised in 2 x 2 cells.

    Dalal and Triggs 2005, "Histograms of Oriented Gradients for Human Detection", but blocks do not
    overlap, which makes descriptors a quarter of the size, and orientations cover the whole circle,
    since on the ground it matters which side of an edge is darker. Partial blocks are left out.

    Args:
        tiles: (n, h, w, c), at least 16 px each way; the first three of several channels are
            colours.

    Returns:
        (n, d).
    """
    colours = tiles[..., :3].astype(np.float32)
    # Not a matrix product, whose rounding depends on where the arrays lie in memory.
    grey = (colours * LUMA).sum(axis=-1) if colours.shape[-1] == 3 else colours[..., 0]
    across, down = np.zeros_like(grey), np.zeros_like(grey)
    across[:, :, 1:-1] = grey[:, :, 2:] - grey[:, :, :-2]
    down[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    # In float64: an angle rounded to an edge of the bins falls into the next one.
    turn = np.arctan2(down, across, dtype=np.float64) / (2 * np.pi) % 1
    code = np.minimum((turn * ORIENTATIONS).astype(np.int64), ORIENTATIONS - 1)
    n, side = len(tiles), CELL * BLOCK
    rows, cols = grey.shape[1] // side, grey.shape[2] // side
    whole = np.s_[:, : rows * side, : cols * side]
    cell = np.arange(n * rows * BLOCK * cols * BLOCK).reshape(n, rows * BLOCK, 1, cols * BLOCK, 1)
    index = cell * ORIENTATIONS + code[whole].reshape(n, rows * BLOCK, CELL, cols * BLOCK, CELL)
    strength = np.hypot(across, down)[whole]
    total = np.bincount(index.ravel(), strength.ravel(), cell.size * ORIENTATIONS)
    blocks = total.reshape(n, rows, BLOCK, cols, BLOCK, ORIENTATIONS)
    size = np.sqrt(np.square(blocks).sum(axis=(2, 4, 5), keepdims=True))
    return (blocks / np.maximum(size, 1e-6)).reshape(n, -1).astype(np.float32)

"""Collars: black or white pixels that are connected to the border of a raster.

A raster of any size is read in strips, of which only runs of pixels along the rows are kept.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.windows import Window

Bools = NDArray[np.bool_]
Runs = NDArray[np.int64]
"""(n, 3) row, first column and column past the last of runs of pixels, in reading order."""

STRIP_ROWS = 256
LOSSY_TOLERANCE = 15
"""Grey values, of 255, by which compression may change black and white; as in GDAL's nearblack."""


def is_lossy(source: Any) -> bool:
    """Whether an open raster is compressed in a way that changes black and white a little."""
    tags = source.tags(ns="IMAGE_STRUCTURE")
    reversible = tags.get("COMPRESSION_REVERSIBILITY", "LOSSY" if "JP2" in source.driver else "")
    return "JPEG" in tags.get("COMPRESSION", "") or reversible.startswith("LOSSY")


def write_mask(
    view: Any,
    path: str,
    read: Callable[[Window], tuple[NDArray[Any], Bools]],
    tolerance: int,
) -> None:
    """Write a raster that is 0 in the collar and where another is invalid, and else 255.

    Black is 0 and white the highest value of an integer dtype, in all bands alike; floating point
    has no white. Both are connected to the border each on its own, along rows and columns, or
    through invalid pixels.

    Args:
        view: the other raster, open.
        read: reads a window of it: bands (n, h, w), and where they are valid (h, w).
        tolerance: how far black and white may be off.
    """
    black: list[Runs] = []
    white: list[Runs] = []
    invalid: list[Runs] = []
    for window in _strips(view):
        values, valid = read(window)
        rows = range(window.row_off, window.row_off + window.height)
        invalid.append(_runs(~valid, rows))
        # What is connected to no border of its strip is connected to none of the raster.
        is_black = ((values >= 0) & (values <= tolerance)).all(axis=0)
        black.append(_connected(_runs(is_black | ~valid, rows), rows, view.width))
        if values.dtype.kind != "f":
            is_white = (values >= np.iinfo(values.dtype).max - tolerance).all(axis=0)
            white.append(_connected(_runs(is_white | ~valid, rows), rows, view.width))
    rows = range(view.height)
    collar = [_connected(np.concatenate(runs), rows, view.width) for runs in (black, white) if runs]
    _write(view, path, np.concatenate([*collar, *invalid]))


def _strips(view: Any) -> Iterator[Window]:
    for top in range(0, view.height, STRIP_ROWS):
        yield Window(0, top, view.width, min(STRIP_ROWS, view.height - top))


def _runs(mask: Bools, rows: range) -> Runs:
    """Runs of True in (h, w) of these rows."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    row, first = np.nonzero(edges == 1)
    past = np.nonzero(edges == -1)[1]
    return np.stack([row + rows.start, first, past], axis=1)


def _connected(runs: Runs, rows: range, width: int) -> Runs:
    """The runs that are connected to the border of a box of all columns and some rows."""
    row, first, past = runs.T
    # Runs in the next row that overlap a run are neighbours in reading order.
    step = width + 1
    below = np.searchsorted(row * step + past, (row + 1) * step + first, side="right")
    stop = np.searchsorted(row * step + first, (row + 1) * step + past, side="left")
    counts = np.maximum(stop - below, 0)
    upper = np.repeat(np.arange(len(runs)), counts)
    offset = np.arange(len(upper)) - np.repeat(np.cumsum(counts) - counts, counts)
    lower = np.repeat(below, counts) + offset
    # Late: it takes longer to import than a query, which has no collars, takes.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(upper), bool), (upper, lower)), shape=(len(runs),) * 2)
    _, group = connected_components(links, directed=False)
    at_border = (row == rows[0]) | (row == rows[-1]) | (first == 0) | (past == width)
    found: Runs = runs[np.isin(group, group[at_border])]
    return found


def _write(view: Any, path: str, runs: Runs) -> None:
    """Write 0 in runs and 255 elsewhere, beside its place first: several processes may,
    also on other machines."""
    beside = f"{path}.{secrets.token_hex(4)}"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    form = {"driver": "GTiff", "count": 1, "dtype": "uint8", "compress": "deflate", "tiled": True}
    form |= {"height": view.height, "width": view.width, "BIGTIFF": "IF_SAFER"}
    form |= {"crs": view.crs, "transform": view.transform}
    runs = runs[np.argsort(runs[:, 0], kind="stable")]
    with rasterio.open(beside, "w", **form) as target:
        for window in _strips(view):
            top, bottom = window.row_off, window.row_off + window.height
            row, first, past = runs[slice(*np.searchsorted(runs[:, 0], (top, bottom)))].T
            edges = np.zeros((window.height, view.width + 1), np.int32)
            np.add.at(edges, (row - top, first), 1)
            np.add.at(edges, (row - top, past), -1)
            outside = np.cumsum(edges[:, :-1], axis=1) > 0
            target.write(np.where(outside, 0, 255).astype(np.uint8), 1, window=window)
    os.replace(beside, path)

"""Batches of pixels and places, read ahead of the device."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch.data.store import TileStore
from geomatch.training.mining import Mined
from geomatch.training.sampler import Sampler

READ_AHEAD = 4
"""Batches read at once, the current one included."""

Batch = tuple[NDArray[np.uint8], NDArray[np.int32]]
"""Tiles (devices, roles, b, h, w, c) and their places (devices, roles, b, 4)."""


class BatchFeed:
    """Reads the next batches while the device works.

    Args:
        devices: number of devices that share a batch.
        own: those of them that are read for; by default all.
    """

    def __init__(
        self, sampler: Sampler, store: TileStore, devices: int, own: slice = slice(None)
    ) -> None:
        self._sampler, self._store, self._devices, self._own = sampler, store, devices, own
        self._pool = ThreadPoolExecutor(2)
        self._mined: Mined | None = None
        self._ahead: dict[int, Future[Batch]] = {}

    def __enter__(self) -> BatchFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def batch(self, step: int, mined: Mined | None) -> Batch:
        """The batch of a step."""
        batch = self.peek(step, mined)
        del self._ahead[step]
        return batch

    def peek(self, step: int, mined: Mined | None) -> Batch:
        """The batch of a step, which `batch` will return again."""
        if mined is not self._mined:
            self._ahead.clear()
            self._mined = mined
        for coming in range(step, step + READ_AHEAD):
            if coming not in self._ahead:
                self._ahead[coming] = self._pool.submit(self._read, coming, mined)
        return self._ahead[step].result()

    def _read(self, step: int, mined: Mined | None) -> Batch:
        drawn = self._sampler.draw(step, mined)
        drawn = drawn.reshape(len(drawn), self._devices, -1)[:, self._own]
        table, rows = self._sampler.tiles, drawn.reshape(-1)
        if table.grid is not None:
            place = table.epsg[rows], table.col[rows], table.row[rows], table.year[rows]
        else:
            zeros = np.zeros(len(rows), np.int64)
            place = zeros, table.label[rows], zeros, table.year[rows] if table.dated else rows

        def per_device(values: NDArray[Any]) -> NDArray[Any]:
            return np.moveaxis(values.reshape(*drawn.shape, *values.shape[1:]), 0, 1)

        return per_device(self._store.read(table.store_row[rows])), per_device(
            np.stack(place, axis=1).astype(np.int32)
        )

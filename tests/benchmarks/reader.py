"""What the reader of training batches delivers, alone and beside a simulated device.

    python tests/benchmarks/reader.py [--tiles 20000] [--size 128] [--batch 128] [--rate 2000]

It writes a store of random tiles, which lies in the page cache afterwards, and reads batches of
triplets as `train` does. The device is a wait of the time that it would take for a batch at
`--rate` images/s, during which batches are read; the share of the rest is an upper bound of what
`train/input_wait` tells. Processor time says what reading costs, also on a machine with other jobs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from geomatch import config
from geomatch.data.store import TileStore, shard_rows
from geomatch.data.tiles import TileTable
from geomatch.geo.grid import Grid
from geomatch.training.feed import BatchFeed
from geomatch.training.sampler import Sampler

ROLES = 3


def table(places: int) -> TileTable:
    """Two years of a square."""
    side = int(np.ceil(np.sqrt(places)))
    col, row = (np.tile(axis, 2) for axis in (np.arange(places) % side, np.arange(places) // side))
    nothing = np.zeros(2 * places, np.int64)
    return TileTable(
        grid=Grid("EPSG:32630", 128, 0.5, 128),
        years=("2010", "2020"),
        sources=("2010.tif", "2020.tif"),
        classes=(),
        label=nothing - 1,
        epsg=nothing + 32630,
        col=col,
        row=row,
        year=np.arange(2 * places) // places,
        split=nothing,
        source=nothing,
        valid=np.ones(2 * places, np.float32),
        store_row=np.arange(2 * places),
    )


def write(path: Path, count: int, size: int) -> TileStore:
    """A store of random tiles of six bits, which zstd has to decode."""
    store = TileStore.create(path, count, size, 3)
    rng = np.random.default_rng(0)
    shard = shard_rows(size, 3)
    for start in range(0, count, shard):
        shape = min(shard, count - start), size, size, 3
        store.write(start, rng.integers(96, 160, shape, np.uint8))
    return store


def measure(feed: BatchFeed, batch: int, seconds: float, rate: float) -> None:
    """Read for some seconds, with a device of `rate` images/s, or none if that is 0."""
    feed.batch(0, None)
    step, waited = 1, 0.0
    began, cpu = time.monotonic(), time.process_time()
    while (now := time.monotonic()) - began < seconds:
        feed.batch(step, None)
        read = time.monotonic()
        waited += read - now
        step += 1
        if rate:
            time.sleep(ROLES * batch / rate)
    elapsed, tiles = time.monotonic() - began, (step - 1) * ROLES * batch
    cost = 1e6 * (time.process_time() - cpu) / tiles
    device = f"device of {rate:.0f} images/s" if rate else "no device"
    print(
        f"{device}: {tiles / elapsed:.0f} tiles/s, {cost:.0f} us of processor time a tile, "
        f"waits {waited / elapsed:.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=128, help="anchors, each with three tiles")
    parser.add_argument("--rate", type=float, default=2000)
    parser.add_argument("--seconds", type=float, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = write(Path(folder) / "pixels.zarr", options.tiles, options.size)
        train = config.TrainConfig(batch=options.batch)
        sampler = Sampler(table(options.tiles // 2), train, config.MiningConfig(rule="none"))
        for rate in (0.0, options.rate):
            with BatchFeed(sampler, store, 1) as feed:
                measure(feed, options.batch, options.seconds, rate)


if __name__ == "__main__":
    main()

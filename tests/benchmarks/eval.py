"""Time and memory of `eval` on random descriptors.

    python tests/benchmarks/eval.py [--tiles 100000] [--size 128]

Each tile of one year is a query among as many tiles of the other. Half of the queries find their
match first; the others have random descriptors, which is the most work.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from geomatch.data.tiles import TileTable
from geomatch.evaluation.measure import Conditions, measure
from geomatch.geo.grid import Grid
from geomatch.progress import silent


def tiles_of(count):
    """Two years of `count` places in a square, all in the test split."""
    place = np.arange(2 * count) % count
    side = int(np.ceil(np.sqrt(count)))
    nothing = np.zeros(2 * count, np.int64)
    return TileTable(
        grid=Grid("EPSG:32630", 256, 0.5, 256),
        years=("2010", "2020"),
        sources=("sheet.tif",),
        classes=(),
        label=nothing - 1,
        epsg=nothing + 32630,
        col=4000 + place % side,
        row=40_000 + place // side,
        year=np.arange(2 * count) // count,
        split=nothing + 2,
        source=nothing,
        valid=np.ones(2 * count, np.float32),
        store_row=np.arange(2 * count),
    )


def vectors_of(count, size):
    """Descriptors; those of every second place differ between the years only by noise."""
    rng = np.random.default_rng(0)
    older, newer = (rng.normal(size=(count, size)).astype(np.float32) for _ in range(2))
    newer[::2] = older[::2] + 0.5 * newer[::2]
    return np.concatenate([older, newer])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiles", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=128)
    args = parser.parse_args()
    tiles, vectors = tiles_of(args.tiles), vectors_of(args.tiles, args.size)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, busy = time.monotonic(), time.process_time()
    found = measure(
        vectors, "cosine", tiles, True, Conditions(years=("2020",)), fpr=0.01, progress=silent
    )
    measured, busy = time.monotonic(), time.process_time() - busy
    with tempfile.TemporaryDirectory() as folder:
        found.queries.save(Path(folder) / "queries.parquet", tiles)
    saved = time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{args.tiles} queries, {args.tiles} tiles, d {args.size}:")
    print(
        f"measured in {measured - start:.1f} s ({busy:.1f} s of processor time), "
        f"queries saved in {saved - measured:.1f} s"
    )
    print(f"{peak / 2**20:.2f} GB of peak memory, {before / 2**20:.2f} GB of it before measuring")
    metrics = found.splits["test"]
    print(f"mAP@5 {metrics.map5:.4f}, recall@1 {metrics.recall1:.4f}")


if __name__ == "__main__":
    main()

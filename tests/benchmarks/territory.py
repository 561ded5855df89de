"""Time and memory of the commands that search a territory, on random descriptors.

    python tests/benchmarks/territory.py [--places 500000] [--size 128] [--folder DIR]

It makes a project of two years without imagery, in which every place has a descriptor that
differs a little from year to year, and runs each command as a process of its own. A folder that
holds such a project already is used again; give one, to compare two versions of geomatch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from hand_made import hand_made_embedding_manifest, hand_made_tile_manifest

from geomatch.data import embeddings
from geomatch.data.tiles import TileTable
from geomatch.geo import footprints
from geomatch.geo.grid import Grid
from geomatch.geo.splits import block_side, by_blocks
from geomatch.project import Project, write_record

GRID = Grid("EPSG:32630", 256, 0.5, 256)
PART = 4096
"""Descriptors of a row group, as `embed` writes them."""
NOISE = 0.6
"""Of a place's descriptor from year to year, relative to that of one place from another."""


def tiles_of(places: int) -> TileTable:
    """Two years of a square, split by blocks, in the order of `tile`."""
    side = int(np.ceil(np.sqrt(places)))
    col, row = 4000 + np.arange(places) % side, 40_000 + np.arange(places) // side
    order = np.lexsort((col, row, col // 16, row // 16))
    col, row = (np.tile(axis[order], 2) for axis in (col, row))
    nothing = np.zeros(2 * places, np.int64)
    return TileTable(
        grid=GRID,
        years=("2010", "2020"),
        sources=("2010.tif", "2020.tif"),
        classes=(),
        label=nothing - 1,
        epsg=nothing + 32630,
        col=col,
        row=row,
        year=np.arange(2 * places) // places,
        split=by_blocks(GRID, nothing + 32630, col, row, block_side(GRID, 2 * places), 0),
        source=np.arange(2 * places) // places,
        valid=np.ones(2 * places, np.float32),
        store_row=np.arange(2 * places),
    )


def vectors_of(places: int, size: int) -> Iterator[np.ndarray]:
    """Descriptors of the tiles in their order; a part of a place's is the same in both years."""
    for year in range(2):
        for start in range(0, places, PART):
            shape = min(PART, places - start), size
            ground = np.random.default_rng([0, start]).normal(size=shape)
            noise = np.random.default_rng([1 + year, start]).normal(size=shape)
            yield (ground + NOISE * noise).astype(np.float32)


def make(root: Path, places: int, size: int) -> None:
    """Write the project: a catalogue and embeddings, no pixels."""
    tiles = tiles_of(places)
    project = Project(root)
    project.tiles.mkdir(parents=True)
    project.config.write_text("")
    geometry = footprints.file_geometry(GRID)
    tiles.save(project.catalogue, *geometry)
    write_record(project.tiles_manifest, hand_made_tile_manifest(GRID, len(tiles)))
    project.embeddings.mkdir()
    manifest = hand_made_embedding_manifest(size)
    path = project.embeddings / f"{manifest.name}.parquet"
    embeddings.write(path, vectors_of(places, size), tiles, *geometry, manifest)


MEASURE = """
import json, os, resource, subprocess, sys, time
start = time.monotonic()
try:
    done = subprocess.run(sys.argv[2:], capture_output=True, text=True, timeout=float(sys.argv[1]))
    outcome = "ok" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
except subprocess.TimeoutExpired:
    outcome = f"not done in {sys.argv[1]} s"
seconds, used = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([outcome, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""
"""A small process that starts the command, whose peak would else be at least that of this one."""


def measured(*arguments: str, limit: float) -> tuple[str, float, float, float]:
    """Outcome, seconds, seconds of processor time and MB of peak memory of a command."""
    command = [sys.executable, "-m", "geomatch", *arguments]
    watched = [sys.executable, "-S", "-c", MEASURE, str(limit), *command]
    done = subprocess.run(watched, stdout=subprocess.PIPE, text=True, check=True)
    outcome, seconds, processor, megabytes = json.loads(done.stdout)
    return outcome, seconds, processor, megabytes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--places", type=int, default=500_000)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--folder", type=Path, help="of the project; by default a temporary one")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a command")
    parser.add_argument("--only", nargs="*", help="commands to run, such as eval")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.folder or Path(temporary) / "territory"
        if not root.exists():
            start = time.monotonic()
            make(root, args.places, args.size)
            print(f"made in {time.monotonic() - start:.1f} s")
        tiles = TileTable.load(Project(root).catalogue)
        tile = tiles.select(np.array([len(tiles) // 3]))
        lon, lat = footprints.lonlat(tile.epsg, tile.centres())[0]
        commands = {
            "index": ["index"],
            "query ID": ["query", tile.ids()[0]],
            "query LON,LAT": ["query", f"{lon},{lat}"],
            "info": ["info"],
            "change": ["change", *tiles.years, "--gpkg", str(root / "change.gpkg")],
            "eval": ["eval", "--no-html"],
        }
        print(f"{len(tiles)} tiles; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        print("| command | s | s of processor time | MB at most | |\n|---|---|---|---|---|")
        for name, arguments in commands.items():
            if args.only and name.split()[0] not in args.only:
                continue
            outcome, *figures = measured(*arguments, "-p", str(root), limit=args.limit)
            print(f"| {name} | " + " | ".join(f"{x:.1f}" for x in figures) + f" | {outcome} |")


if __name__ == "__main__":
    main()

"""Speed of `tile` beside GDAL's own tools and plain reading, on a mosaic of real orthophotos.

    python tests/benchmarks/tile.py [--side 12288] [--repeats 3] [--forms lzw jp2] [--folder DIR]

Contenders take turns, each as a process; the table has medians, as ratios of wall time and of
processor time (user and system, with the worker processes). The source and the grid are on one
lattice, but for `warp`, which goes to the neighbouring UTM zone. `gdal_retile.py` and `gdalwarp`
(Debian: python3-gdal, gdal-bin) are left out where they are missing. Pictures come from
`levir/before` in `../shared/data`, or where `GEOMATCH_DATA` points.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.transform import from_origin
from rasterio.windows import Window

CELL = 256
SUBREAPER = 36
"""Linux: the parent of processes whose own parent ended, whose processor time is counted too."""
CRS, TARGET = "EPSG:32614", "EPSG:32615"
PLACE = from_origin(600_064.0, 3_358_720.0, 0.5, 0.5)
TILED: dict[str, Any] = {"driver": "GTiff", "tiled": True}
STRIPED: dict[str, Any] = {"driver": "GTiff", "tiled": False}
FORMS: dict[str, dict[str, Any]] = {
    "jpeg": TILED | {"compress": "jpeg", "photometric": "ycbcr", "quality": 90},
    "deflate": TILED | {"compress": "deflate", "blockxsize": 512, "blockysize": 512},
    "raw": STRIPED,
    "lzw": STRIPED | {"compress": "lzw"},
    "jp2": {"driver": "JP2OpenJPEG", "quality": 25},
    "warp": TILED | {"compress": "jpeg", "photometric": "ycbcr", "quality": 90},
}


def write_mosaic(path: Path, side: int, form: dict[str, Any]) -> None:
    """A mosaic of all scenes, turned anew each time that they are used up."""
    folder = Path(os.environ.get("GEOMATCH_DATA", "../shared/data")) / "levir" / "before"
    scenes = sorted(folder.glob("*.tif"))
    size = {"width": side, "height": side, "count": 3, "dtype": "uint8"}
    if form["driver"] != "GTiff":  # which cannot be written in parts
        with tempfile.TemporaryDirectory() as name:
            write_mosaic(Path(name) / "mosaic.tif", side, STRIPED)
            with rasterio.open(Path(name) / "mosaic.tif") as mosaic:
                values = mosaic.read()
        with rasterio.open(path, "w", crs=CRS, transform=PLACE, **size, **form) as target:
            target.write(values)
        return
    with rasterio.open(path, "w", crs=CRS, transform=PLACE, **size, **form) as target:
        step = 1024
        strip = np.empty((3, step, side), np.uint8)
        for number in range((side // step) ** 2):
            row, col = divmod(number, side // step)
            turn, scene = divmod(number, len(scenes))
            with rasterio.open(scenes[scene]) as source:
                strip[:, :, col * step : (col + 1) * step] = np.rot90(source.read(), turn, (1, 2))
            if (col + 1) * step == side:
                target.write(strip, window=Window(0, row * step, side, step))


def read_windows(path: str) -> None:
    """What a script with `rasterio` does: a window for each cell, row by row."""
    with rasterio.open(path) as source:
        for top in range(0, source.height, CELL):
            for left in range(0, source.width, CELL):
                source.read(window=Window(left, top, CELL, CELL))


def read_blocks(path: str) -> None:
    """Decode every block once."""
    with rasterio.open(path) as source:
        for _, window in source.block_windows(1):
            source.read(window=window)


READERS = {"windows": read_windows, "blocks": read_blocks}


def contenders(name: str, source: Path, folder: Path, workers: int) -> dict[str, list[str]]:
    """The commands that are compared; each gets an empty folder `folder`."""
    out = str(folder)
    crs = TARGET if name == "warp" else CRS
    tile = [sys.executable, "-m", "geomatch", "tile", f"2020={source}", "-p", out, "-q"]
    tile += ["--size", str(CELL), "--gsd", "0.5", "--crs", crs, "--split", "source"]
    tile += ["--set", "grid.min_valid=0"]
    found = {
        "geomatch": [*tile, "--workers", str(workers)],
        **{reader: [sys.executable, __file__, "--read", reader, str(source)] for reader in READERS},
        "gdal_retile.py": [
            *("gdal_retile.py", "-q", "-ps", str(CELL), str(CELL)),
            *("-targetDir", out, str(source)),
        ],
    }
    if name == "warp":
        warp = ["gdalwarp", "-q", "-r", "bilinear", "-t_srs", TARGET, "-tr", "0.5", "0.5"]
        warp += ["-co", "TILED=YES", "-multi", "-wo", f"NUM_THREADS={workers}"]
        found = {
            "geomatch": found["geomatch"],
            "gdalwarp": [*warp, str(source), f"{out}/warped.tif"],
        }
    return {key: command for key, command in found.items() if shutil.which(command[0])}


def measure(command: list[str], folder: Path) -> tuple[float, float, int]:
    """Seconds of wall and of processor time of a command with all its processes, and MB of memory
    of the largest of these."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "geomatch.toml").touch()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        assert process.stderr is not None
        raise SystemExit(f"{' '.join(command)}: {process.stderr.read().decode()}")
    found = [usage]
    with contextlib.suppress(ChildProcessError):  # those that a command leaves behind
        while True:
            found.append(os.wait3(0)[2])
    seconds = sum(each.ru_utime + each.ru_stime for each in found)
    return wall, seconds, max(each.ru_maxrss for each in found) // 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", type=int, default=12_288, help="pixels; jp2 has half of it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--folder", type=Path, help="keeps the mosaics for the next time")
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        READERS[args.read[0]](args.read[1])
        return
    ctypes.CDLL(None).prctl(SUBREAPER, 1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        print("| source | contender | s | processor s | s, of ours | processor s, of ours | MB |")
        print("|---|---|---|---|---|---|---|")
        for name in args.forms:
            side = args.side // 2 if name == "jp2" else args.side
            source = folder / f"{name}_{side}.{'jp2' if name == 'jp2' else 'tif'}"
            if not source.exists():
                write_mosaic(source, side, FORMS[name])
            commands = contenders(name, source, Path(temporary) / "out", args.workers)
            runs: dict[str, list[tuple[float, float, int]]] = {key: [] for key in commands}
            for _ in range(args.repeats):
                for key, command in commands.items():
                    runs[key].append(measure(command, Path(temporary) / "out"))
            medians = {
                key: [statistics.median(column) for column in zip(*found, strict=True)]
                for key, found in runs.items()
            }
            wall, cpu, _ = medians["geomatch"]
            for key, found in medians.items():
                print(
                    f"| {name} | {key} | {found[0]:.1f} | {found[1]:.1f} | {found[0] / wall:.2f} "
                    f"| {found[1] / cpu:.2f} | {found[2]:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

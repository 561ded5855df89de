"""How well local features confirm right answers and refuse wrong ones, on tiles of real imagery.

    python tests/benchmarks/local_features.py joplin post pre --size 128 --gsd 0.6 --crs EPSG:26915
        [--features xfeat]

Each query is a tile of one year as it is, turned by 37 degrees, shifted by a quarter of a tile, and
at 0.8 and 1.25 of its scale. It is looked for around its own place and five others of the other
year, as `geomatch query --verify` does. The threshold is the one at which 1 % of the others pass;
what passes the program's own is beside it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import cv2
import numpy as np

from geomatch import config
from geomatch.data import index_rows
from geomatch.data.mosaic import Ground
from geomatch.data.store import TileStore
from geomatch.geo import footprints
from geomatch.project import Project
from geomatch.querying.confirming import KNOWN
from geomatch.querying.detectors import detector_of
from geomatch.search import local_features
from geomatch.search.local_features import Sought, transformed
from geomatch.tile import tile

VARIANTS = {
    "upright": (0, 1, 0),
    "turned by 37 degrees": (37, 1, 0),
    "shifted by a quarter": (0, 1, 0.25),
    "scale 0.8": (0, 0.8, 0),
    "scale 1.25": (0, 1.25, 0),
}
"""Turn in degrees, scale, and shift in tiles."""
OTHERS, FPR = 5, 0.01


def tiled(root, name, years, size, gsd, crs):
    """A set of imagery tiled, as `Ground` reads it, and its tiles."""
    data = Path(os.environ.get("GEOMATCH_DATA", "../shared/data")).absolute() / name
    paths = {year: next(iter(data.glob(f"*_{year}*.tif")), data / year) for year in years}
    project = Project(root)
    project.config.write_text("")
    wanted = [f"grid.size={size}", f"grid.gsd={gsd}", f"grid.crs={crs}", "split.by=source"]
    sources = tuple(config.SourceConfig(year=y, images=str(p)) for y, p in paths.items())
    tiles = tile(project, config.with_overrides(config.Config(source=sources), wanted)).table
    index_rows.write(root, tiles, footprints.lonlat)
    channels = project.tile_manifest().channels.image
    store = TileStore.open(project.pixels)
    return Ground(
        index_rows.IndexRows(root, np.bincount(tiles.year).tolist()), store, tiles.grid, channels
    ), tiles


def query(ground, epsg, centre, year, turn, scale, shift):
    """A tile cut from the ground of its year, so that it is turned, scaled and shifted."""
    size, side = ground.grid.size, ground.grid.side
    mosaic = ground.mosaic(epsg, centre, 1.5 * side, year)
    angle = np.radians(turn)
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / scale
    middle = np.array(mosaic.valid.shape[::-1]) / 2 + shift * size - 0.5
    moved = np.column_stack([matrix, middle - matrix @ np.full(2, size / 2 - 0.5)])
    flags = cv2.INTER_AREA | cv2.WARP_INVERSE_MAP
    cut = cv2.warpAffine(mosaic.pixels, moved, (size, size), flags=flags)
    return cut.reshape(size, size, -1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("years", nargs=2, help="of queries, then of the ground")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--gsd", type=float, default=0.5)
    parser.add_argument("--crs", default="auto")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--features", choices=("sift", "xfeat"), default="sift")
    parser.add_argument("--fictitious", action="store_true", help="errors in pixels, not metres")
    asked = parser.parse_args()
    rng = np.random.default_rng(0)
    detector = detector_of(asked.features)
    with tempfile.TemporaryDirectory() as folder:
        ground, tiles = tiled(
            Path(folder), asked.name, asked.years, asked.size, asked.gsd, asked.crs
        )
        codes = [tiles.years.index(year) for year in asked.years]
        cells = np.stack([tiles.col, tiles.row], axis=1)
        own, there = ({tuple(c) for c in cells[tiles.year == code].tolist()} for code in codes)
        places = np.array(sorted(own & there))
        epsg, size, side = int(tiles.epsg[0]), ground.grid.size, ground.grid.side
        known: dict[tuple[int, int], local_features.Features] = {}

        def features(col, row):
            if (col, row) not in known:
                (centre,) = ground.grid.centres(np.array([col]), np.array([row])).tolist()
                mosaic = ground.mosaic(epsg, tuple(centre), side, asked.years[1])
                known[col, row] = detector.upright(mosaic.pixels, mosaic.valid)
            return known[col, row]

        chosen = places[rng.permutation(len(places))[: asked.queries]]
        print(f"{asked.name}: {len(places)} places of {side:g} m, {len(chosen)} queries")
        titles = "right confirmed at 1 %", "threshold", "right, wrong confirmed", "error"
        print(f"| {asked.features} | {' | '.join(titles)} |")
        print("|---|---|---|---|---|")
        for name, (turn, scale, shift) in VARIANTS.items():
            right, wrong, errors = [], [], []
            for col, row in chosen.tolist():
                (centre,) = ground.grid.centres(np.array([col]), np.array([row])).tolist()
                pixels = query(ground, epsg, tuple(centre), asked.years[0], turn, scale, shift)
                sought = Sought.of(pixels, pixels.any(axis=-1), detector.any_turn)
                far = places[np.abs(places - [col, row]).max(axis=1) > 2]
                others = far[rng.permutation(len(far))[:OTHERS]].tolist()
                guess = np.array([[1, 0, size / 2], [0, 1, size / 2]], np.float64)
                for at in ([col, row], *others):
                    found = local_features.find(sought, features(*at), [guess], KNOWN)
                    if at != [col, row]:
                        wrong.append(found.score)
                        continue
                    right.append(found.score)
                    errors.append(np.inf)
                    if found.alignment:
                        middle = np.full((1, 2), size / 2)
                        lies = transformed(middle, found.alignment.matrix)
                        errors[-1] = float(np.hypot(*(lies - size - shift * size)[0]))
            at_most = np.sort(wrong)[::-1][int(FPR * len(wrong))]
            passed = np.array(right) > at_most
            error = np.array(errors)[passed] * (1 if asked.fictitious else ground.grid.gsd)
            unit = "px" if asked.fictitious else "m"
            spread = np.quantile(error, [0.5, 0.9]) if len(error) else [np.nan, np.nan]
            told = [np.mean(np.array(scores) >= found.needed) for scores in (right, wrong)]
            print(
                f"| {name} | {passed.mean():.2f} | {at_most:.1f} | {told[0]:.2f}, {told[1]:.3f} "
                f"| {spread[0]:.1f} {unit} (90 %: {spread[1]:.1f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""Whether `change` ranks places by how much they changed, on levir and naip.

    python tests/benchmarks/change.py levir [--data ../shared/data] [--keep FOLDER]
    python tests/benchmarks/change.py naip

levir: Spearman's correlation of scores with the share of a tile's pixels that are new buildings,
with 95 % intervals over scenes, beside other scores of the same descriptors and of colours.

naip: ten dates of farmland without labels, but near infrared tells water from land. Printed is how
often a place where water came or went is ranked before one of dry fields (0.5 is chance), and how
scores of dry fields follow the change of their vegetation index, which crop rotation makes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from geomatch import config
from geomatch.change import change
from geomatch.data.embeddings import DescriptorFile
from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS
from geomatch.embed import embed
from geomatch.project import Project
from geomatch.tile import tile

DRAWS = 1000
CHANGED = 0.1
"""Share of a tile by which its water changed."""
WATER = 60
"""Near infrared of naip below which there is water: few pixels are near it."""


def project_of(folder, sources, *overrides):
    """A project whose tiles are described by ImageNet features; made once for a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "geomatch.toml").touch()
    project = Project(folder)
    settings = config.with_overrides(config.Config(source=tuple(sources)), list(overrides))
    tile(project, settings)
    if not project.embedding_names():
        embed(project, model="imagenet", settings=settings)
    return project


def spearman(a, b, times=None):
    """Spearman's correlation; `times` says how often each value counts."""
    ranks = rankdata(a), rankdata(b)
    return np.cov(*ranks, fweights=times)[0, 1] / np.sqrt(
        np.prod([np.cov(r, fweights=times) for r in ranks])
    )


def resampled(scores, truth, scene):
    """Correlations (scores, draws) with whole scenes drawn; ranks stay those of all places."""
    rng, count = np.random.default_rng(0), scene.max() + 1
    draws = [np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(DRAWS)]
    return {k: np.array([spearman(v, truth, t[scene]) for t in draws]) for k, v in scores.items()}


def levir(data, folder):
    years = ("before", "after")
    sources = [
        config.SourceConfig(
            year=year,
            images=str(data / "levir" / year),
            changed=str(data / "levir" / "changed_buildings") if year == "after" else "",
            placement="fictitious",
        )
        for year in years
    ]
    split = ['split.validation=["scene_029*", "scene_03[0-4]*"]']
    split += ['split.test=["scene_03[5-9]*", "scene_040*"]']
    size = ("grid.size=128", "grid.gsd=0.5", "split.by=source")
    project = project_of(folder, sources, *size, *split)
    found = change(project, *years)
    tiles, truth = found.tiles, found.tiles.changed[found.after]
    scores = {"change": found.score, **rivals(project, found)}
    for name, splits in (("all", SPLITS), ("validation and test", SPLITS[1:]), ("test", ("test",))):
        rows = np.isin(tiles.split[found.after], [SPLITS.index(split) for split in splits])
        report(name, {k: v[rows] for k, v in scores.items()}, truth[rows], tiles, found.after[rows])


def rivals(project, found):
    """Other scores (n,) of the same places, from their descriptors and from their pixels."""
    name = project.embedding_names()[-1]
    descriptors = DescriptorFile(project.embeddings / f"{name}.parquet")
    store, rows = TileStore.open(project.pixels), found.tiles.store_row
    a, b = descriptors[found.before], descriptors[found.after]
    cosine = np.einsum("nd,nd->n", a, b) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    moved = b - a
    moved = moved - moved.mean(axis=0)
    c, d = (store.read(rows[each]).astype(np.float32) for each in (found.before, found.after))
    colour = d.mean(axis=(1, 2)) - c.mean(axis=(1, 2))
    pixels = [(x - x.mean(axis=(0, 1, 2))) / x.std(axis=(0, 1, 2)) for x in (c, d)]
    white = np.linalg.solve(np.linalg.cholesky(np.cov(moved.T)), moved.T)
    return {
        "1 - cosine": 1 - cosine,
        "mean difference taken out": np.linalg.norm(moved, axis=1),
        "whitened by all places (full covariance)": np.linalg.norm(white, axis=0),
        "mean colour, mean difference taken out": np.linalg.norm(colour - colour.mean(0), axis=1),
        "colour of each pixel, standardised": np.linalg.norm(pixels[1] - pixels[0], axis=-1).mean(
            axis=(1, 2)
        ),
    }


def report(name, scores, truth, tiles, rows):
    scene = np.unique([tiles.sources[i] for i in tiles.source[rows]], return_inverse=True)[1]
    draws = resampled(scores, truth, scene)
    print(f"\n{name}: {len(truth)} places of {scene.max() + 1} scenes")
    for key, values in scores.items():
        low, high = np.percentile(draws[key], [2.5, 97.5])
        ahead = np.percentile(draws["change"] - draws[key], [2.5, 97.5])
        print(
            f"{key:42} {spearman(values, truth):.3f} [{low:.3f}, {high:.3f}]; "
            f"change is ahead by [{ahead[0]:.3f}, {ahead[1]:.3f}]"
        )


def naip(data, folder):
    files = {path.stem.rsplit("_", 1)[1]: path for path in sorted((data / "naip").glob("*.tif"))}
    years = list(files)
    sources = [config.SourceConfig(year=year, images=str(path)) for year, path in files.items()]
    project = project_of(folder, sources, "grid.size=32", "grid.gsd=5.0")
    store = TileStore.open(project.pixels)
    # In 2015, water is as bright as land.
    for span in [(years[0], years[-1]), (years[0], years[2]), *pairwise(years[5:])]:
        found = change(project, *span)
        rows = [found.tiles.store_row[each] for each in (found.before, found.after)]
        red, _, _, infrared = np.moveaxis([store.read(r).astype(float) for r in rows], -1, 0)
        water = (infrared < WATER).mean(axis=(2, 3))
        crops = ((infrared - red) / (infrared + red + 1)).mean(axis=(2, 3))
        grown = np.abs(crops[1] - crops[0] - np.median(crops[1] - crops[0]))
        wet, dry = np.abs(water[1] - water[0]) > CHANGED, (water < 0.01).all(axis=0)
        print(
            f"\n{' to '.join(span)}: water came or went in {wet.sum()}, none was in "
            f"{dry.sum()} of {len(wet)} places"
        )
        for name, score in {"change": found.score, **rivals(project, found)}.items():
            ahead = (score[wet][:, None] > score[dry]).mean()
            print(
                f"{name:42} water before dry fields {ahead:.2f}; Spearman with the change of "
                f"NDVI of dry fields {spearman(score[dry], grown[dry]):+.2f}"
            )
    change(project, years[0], years[-1], picture=folder / "change.png")
    print(f"the first places of {years[0]} to {years[-1]}: {folder / 'change.png'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("imagery", choices=("levir", "naip"))
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("GEOMATCH_DATA", "../shared/data"))
    )
    parser.add_argument("--keep", type=Path, help="folder for the project, kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = args.keep or Path(folder)
        {"levir": levir, "naip": naip}[args.imagery](args.data.absolute(), root)


if __name__ == "__main__":
    main()

"""A tiny learnable project, and what it takes to make one; fixtures make it once a session."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rasterio
from rasterio.transform import from_origin

from geomatch import config
from geomatch import evaluate as evaluation
from geomatch.data.eval_report import Report
from geomatch.data.tiles import TileTable
from geomatch.project import Project
from geomatch.tile import tile

if TYPE_CHECKING:
    from geomatch.embed import Embedded
    from geomatch.train import Trained

SIZE = 32
CRS = "EPSG:32630"
LEFT, BOTTOM = 500_000, 5_000_000
"""South-west corner: whole tiles from the origin of the CRS, at a negative longitude."""
SHEETS = {"train": (6, 4), "validation": (2, 4), "test": (3, 4)}
"""Columns and rows of each split, side by side from west to east with an empty column between."""
YEARS = ("2010", "2020")
SPLIT = ("split.by=source", "split.validation=validation*", "split.test=test*")
QUICK = (
    "model.trunk=resnet10",
    "model.head=pool",
    "train.epochs=3",
    "train.batch=4",
    "train.lr=2e-3",
    "train.save_minutes=0.0",
    "mining.every=1",
    "mining.truth_within=1",
    "augment.brightness=0.05",
    "augment.contrast=0.05",
    "embed.engine=jax",
    "embed.dtype=float32",
)

TIMES = ("train/images_per_s", "train/input_wait")
"""Metrics of time."""


def new_project(root: Path) -> Project:
    """An empty project with default settings."""
    root.mkdir()
    (root / "geomatch.toml").write_text("")
    return Project.open(root)


def settings(*overrides: str) -> config.Config:
    """The tests' usual configuration, with others laid over it."""
    return config.with_overrides(config.Config(), [*QUICK, *SPLIT, *overrides])


def write_imagery(folder: Path, seed: int = 0, size: int = SIZE) -> None:
    """Sheets `SPLIT_YEAR.tif`, and `labels_SPLIT_YEAR.tif`, of patches that differ by place.

    Both years show the same patches; the later one is lighter, and each has its own noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    start = 0
    for name, (cols, rows) in SHEETS.items():
        patches = rng.integers(40, 200, (3, 4 * rows, 4 * cols))
        ground = patches.repeat(size // 4, axis=1).repeat(size // 4, axis=2)
        origin = (LEFT + start * size, BOTTOM + rows * size)
        for i, year in enumerate(YEARS):
            noise = rng.normal(0, 4, ground.shape)
            pixels = np.clip(ground + 30 * i + noise, 0, 255).astype(np.uint8)
            write_tiff(folder / f"{name}_{year}.tif", pixels, origin)
            labels = np.where(ground[:1] > 120, 200, 60).astype(np.uint8)
            write_tiff(folder / f"labels_{name}_{year}.tif", labels, origin)
        start += cols + 1


def write_tiff(path: Path, pixels: np.ndarray, origin: tuple[float, float]) -> None:
    """A GeoTIFF of 1 m pixels from `origin` (left, top) on."""
    form = {"driver": "GTiff", "count": len(pixels), "dtype": pixels.dtype, "crs": CRS}
    height, width = pixels.shape[1:]
    place = from_origin(*origin, 1.0, 1.0)
    with rasterio.open(path, "w", height=height, width=width, transform=place, **form) as target:
        target.write(pixels)


def make_project(
    root: Path, imagery: Path, *overrides: str, labels: bool = False, placement: str = "real"
) -> Project:
    """A project in `root` with the sheets of `imagery` tiled."""
    root.mkdir(parents=True, exist_ok=True)
    project = Project(root)
    project.config.write_text("")
    retile(project, imagery, *overrides, labels=labels, placement=placement)
    return project


def tile_sources(
    project: Project,
    images: dict[str, str | Path],
    *overrides: str,
    labels: dict[str, str | Path] | None = None,
    changed: dict[str, str | Path] | None = None,
    tables: Sequence[dict[str, Any]] = (),
    workers: int = 1,
    **options: Any,
) -> TileTable:
    """Tile imagery by year; 32 px at 1 m, all in train, unless `overrides` say otherwise.

    Args:
        tables: of `[[labels]]`.
        options: further arguments of `tile`.
    """
    sources = tuple(
        config.SourceConfig(
            year=year,
            images=str(path),
            labels=str((labels or {}).get(year, "")),
            changed=str((changed or {}).get(year, "")),
        )
        for year, path in images.items()
    )
    wanted = ("grid.size=32", "grid.gsd=1.0", "split.by=source", *overrides)
    known = config.from_dict({"labels": tables}, "tables").labels
    settings = config.with_overrides(config.Config(source=sources, labels=known), wanted)
    return tile(project, settings, workers=workers, **options).table


def retile(
    project: Project,
    imagery: Path,
    *overrides: str,
    labels: bool = False,
    placement: str = "real",
) -> TileTable:
    """Tile a project (again)."""
    sources = [
        config.SourceConfig(
            year=year,
            images=str(imagery / f"[!l]*_{year}.tif"),
            labels=str(imagery / f"labels_*_{year}.tif") if labels else "",
            placement=placement,  # type: ignore[arg-type]
        )
        for year in YEARS
    ]
    wanted = [f"grid.size={SIZE}", *SPLIT, *overrides]
    return tile(
        project,
        config.with_sources(config.with_overrides(config.Config(), wanted), sources),
        overrides=wanted,
        workers=1,
    ).table


@dataclasses.dataclass(frozen=True)
class Small:
    """A project, the imagery it was tiled from, and what was made of it."""

    project: Project
    imagery: Path
    tiles: TileTable
    trained: Trained | None = None
    embedded: Embedded | None = None

    @property
    def root(self) -> Path:
        return self.project.root

    def copied(self, root: Path) -> Project:
        """The project again, at `root`, to be changed."""
        shutil.copytree(self.root, root)
        return Project(root)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return metrics(self.project)


def evaluate(project: Project, **options: Any) -> Report:
    """`eval` without its page, which most tests do not look at."""
    return evaluation.evaluate(project, html=False, **options)


def metrics(project: Project, run: str = "run1", timed: bool = False) -> list[dict[str, Any]]:
    """Lines of a run's `metrics.jsonl`, without times, which no two runs share."""
    text = (project.run(run) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if timed or k not in TIMES} for line in lines]

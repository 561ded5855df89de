"""A tiny learnable project, and what it takes to make one; `small_fixtures` has it made once."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rasterio
from rasterio.transform import from_origin

from geomatch import config
from geomatch import evaluate as evaluation
from geomatch.data.eval_report import Report, SplitMetrics
from geomatch.data.tiles import TileTable
from geomatch.embed import Embedded
from geomatch.geo.grid import Grid
from geomatch.manifests import Channels, EmbeddingManifest, TileManifest, TileRequest
from geomatch.project import Project
from geomatch.tile import tile
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
    """Lines of a run's `metrics.jsonl`, without the speed, which no two runs share."""
    text = (project.run(run) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if timed or k != "train/images_per_s"} for line in lines]


def python(*arguments: str, devices: int = 2, **options: Any) -> subprocess.Popen[str]:
    """A Python process of its own, with that many virtual devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen[str], timeout: float = 300) -> str:
    """What a process prints, once it has ended well."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return out


def hand_made_tiles(
    col: list[int], row: list[int], year: list[int], split: list[int] | None = None, stride: int = 8
) -> TileTable:
    """Tiles of 8 px at 1 m in EPSG:32630, every `stride` px, of as many years as are named."""
    n = len(col)
    return TileTable(
        grid=Grid(CRS, 8, 1.0, stride),
        years=("2000", "2010", "2020")[: max(year) + 1],
        sources=("sheet.tif",),
        classes=(),
        label=np.full(n, -1),
        epsg=np.full(n, 32630),
        col=np.array(col),
        row=np.array(row),
        year=np.array(year),
        split=np.array(split if split is not None else [0] * n),
        source=np.zeros(n, np.int64),
        valid=np.ones(n, np.float32),
        store_row=np.arange(n),
    )


def hand_made_tile_manifest(grid: Grid, tiles: int, **changes: Any) -> TileManifest:
    """The manifest of tiles in three colours, with `changes` of its fields."""
    manifest = TileManifest(
        geomatch="0",
        fingerprint="tiles",
        tiles=tiles,
        planned=tiles,
        classes=0,
        splits={},
        request="request",
        asked=TileRequest(source=(), set=()),
        grid=grid.id,
        crs=grid.crs,
        size=grid.size,
        gsd=grid.gsd,
        stride=grid.stride,
        channels=Channels(3, 0),
        placement="real",
        years={},
    )
    return dataclasses.replace(manifest, **changes)


def hand_made_embedding_manifest(dimension: int, **changes: Any) -> EmbeddingManifest:
    """The manifest of descriptors that no encoder made, with `changes` of its fields."""
    manifest = EmbeddingManifest(
        geomatch="0",
        name="hand@1",
        tiles="tiles",
        model="none",
        run="hand",
        run_id="none",
        step=1,
        metric="cosine",
        centres=None,
        dimension=dimension,
        normalise=False,
        engine="none",
        dtype="float32",
        fingerprint="by hand",
    )
    return dataclasses.replace(manifest, **changes)


def hand_made_split_metrics(queries: int, database: int, **changes: Any) -> SplitMetrics:
    """Metrics of 0.5 throughout, without groups of queries, with `changes` of its fields."""
    metrics = SplitMetrics(
        queries=queries,
        database=database,
        map5=0.5,
        recall1=0.5,
        recall5=0.5,
        recall10=0.5,
        median_rank=0.5,
        median_error_m=0.5,
        mean_rank=0.5,
        mrr=0.5,
        within_1_tiles=0.5,
        within_2_tiles=0.5,
        within_5_tiles=0.5,
        intervals={},
        content=(),
        pairs=(),
        roc=None,
    )
    return dataclasses.replace(metrics, **changes)


def hand_made_classes(label: list[int], split: list[int] | None = None) -> TileTable:
    """Images without a ground or years, of classes "a", "b" and so on."""
    n = len(label)
    return dataclasses.replace(
        hand_made_tiles([0] * n, [0] * n, [0] * n, split),
        grid=None,
        years=("",),
        sources=tuple(f"{'abcdefgh'[code]}/{i}.png" for i, code in enumerate(label)),
        source=np.arange(n),
        classes=tuple("abcdefgh"[: max(label) + 1]),
        label=np.array(label),
        epsg=np.zeros(n, np.int64),
    )

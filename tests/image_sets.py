"""Folders of small images of noise, and their tiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from geomatch import config
from geomatch.data.tiles import TileTable
from geomatch.project import Project
from geomatch.tile import tile


def draw_noise(
    path: Path, height: int = 12, width: int = 12, bands: int = 3, seed: int | None = None
) -> np.ndarray:
    """Write an image of noise; the seed is drawn from its name unless it is given."""
    seed = sum(map(ord, path.name)) if seed is None else seed
    shape = (height, width, bands) if bands > 1 else (height, width)
    values = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return values


def class_folders(root: Path, sizes: dict[str, int], **options: Any) -> Path:
    """Write `root/CLASS/CLASS_i.png`, as many as `sizes` says for each class; returns `root`."""
    for name, n in sizes.items():
        for i in range(n):
            draw_noise(root / name / f"{name}_{i:03d}.png", **options)
    return root


def tile_folders(
    project: Project,
    *paths: Path,
    pairs: Sequence[Path] = (),
    notes: list[str] | None = None,
    **images_or_more: Any,
) -> TileTable:
    """Tile folders of images; further settings as `least=3` or `**{"grid.size": 8}`."""
    more = {key if "." in key else f"images.{key}": v for key, v in images_or_more.items()}
    overrides = [f"{key}={config.toml(value)}" for key, value in more.items()]
    overrides.append(f"images.folders={config.toml([str(path) for path in paths])}")
    overrides.append(f"images.pairs={config.toml([str(path) for path in pairs])}")
    wanted = config.with_overrides(config.Config(), overrides)

    def progress(task: str, done: int = 0, total: int = 0, detail: str = "") -> None:
        if notes is not None and not total:
            notes.append(task)

    return tile(project, wanted, overrides=overrides, workers=2, progress=progress).table

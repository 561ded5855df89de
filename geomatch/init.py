"""Init: a new project folder with its `geomatch.toml`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from geomatch import config
from geomatch.errors import UsageError
from geomatch.project import Project

PACKAGE = Path(__file__).parent
EXAMPLES = (PACKAGE / "examples", PACKAGE.parent / "examples")
"""Folders of examples: a wheel packs them into the package, in a checkout they stand beside it."""

START = (
    "model.stage=3",
    "model.pooling=grid",
    "model.instance_norm=true",
    "model.head=pca",
    "model.descriptor=256",
    "model.centre=true",
    "train.epochs=30",
    "train.batch=32",
    "train.loss=infonce",
    "train.optimizer=adamw",
    "train.lr=5e-4",
    "train.weight_decay=0.01",
    "train.schedule=cosine",
    "train.warmup=1.0",
    "train.clip=1.0",
    "train.ema=0.99",
    "mining.rule=neighbours",
    "mining.every=3",
    "augment.zoom=0.2",
    "augment.shift=0.02",
    "augment.contrast=0.3",
    "augment.saturation=0.3",
    "augment.hue=0.02",
)
"""Settings that a project without preset starts with: what found most places, from random weights.

The defaults of the keys themselves are those of Khokhlova et al. 2020 (preset `cross-year`).
"""


def init(folder: Path, *, preset: str | None = None, overrides: Sequence[str] = ()) -> Project:
    """Make a project folder with a `geomatch.toml`.

    Args:
        preset: name of an example whose settings the project starts with; by default the file
            lists all keys, with `START` set and the others commented out.
        overrides: "table.key=value" strings that are written into the file.

    Raises:
        UsageError: there is a project already, there is no such preset, or an override is wrong.
    """
    if preset is None:
        text = config.template([*START, *overrides])
    elif path := presets().get(preset):
        text = config.edited(path.read_text(encoding="utf-8"), overrides)
    else:
        raise UsageError(f"there is no preset {preset!r}", f"Available: {', '.join(presets())}.")
    project = Project(folder)
    if project.config.exists():
        raise UsageError(f"{project.config} already exists", "Name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    project.config.write_text(text, encoding="utf-8")
    return project


def presets() -> dict[str, Path]:
    """The `geomatch.toml` of each example, by the example's name."""
    files = [path for folder in EXAMPLES for path in folder.glob("*/geomatch.toml")]
    return {path.parent.name: path for path in sorted(files)}

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


def init(folder: Path, *, preset: str | None = None, overrides: Sequence[str] = ()) -> Project:
    """Make a project folder with a `geomatch.toml`.

    Args:
        preset: name of an example whose settings the project starts with; by default the file
            lists all keys, commented out, with their defaults.
        overrides: "table.key=value" strings that are written into the file.

    Raises:
        UsageError: there is a project already, there is no such preset, or an override is wrong.
    """
    if preset is None:
        text = config.template(overrides)
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

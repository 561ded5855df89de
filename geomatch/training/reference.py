"""Reference: what a run is compared with, the features of ImageNet without any training."""

from __future__ import annotations

from collections.abc import Mapping

from geomatch import config
from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.errors import GeomatchError
from geomatch.progress import ProgressCallback
from geomatch.project import Project, read_json, write_json
from geomatch.runs import load_encoder
from geomatch.training import setup
from geomatch.training.rounds import Validator

LEAST = 64
"""Side of the smallest tiles, in pixels, whose layout the features keep."""


def imagenet_map5(
    project: Project,
    settings: config.Config,
    splits: Mapping[str, TileTable],
    progress: ProgressCallback,
) -> float | None:
    """mAP@5 on validation of `geomatch embed --model imagenet`, as a round of training measures it.

    It is measured once for the same tiles and settings, and kept beside the encoder.

    Args:
        splits: tiles of "train" and "validation".

    Returns:
        None without validation queries, where tiles have no years or are smaller than `LEAST`, or
        where the weights are not installed or do not fit.
    """
    training, validation = splits["train"], splits["validation"]
    if not training.dated or not len(validation) or project.tile_manifest().size < LEAST:
        return None
    with project.lock(setup.IMAGENET):
        try:
            folder = setup.pretrained(project, settings, training, progress)
        except GeomatchError:
            return None
        known = folder / "validation.json"
        if not known.exists():
            encoding = load_encoder(project, None, folder)
            store = TileStore.open(project.pixels)
            validator = Validator(encoding.model, encoding.settings, store, splits, folder)
            measured = validator.round(encoding.variables, 0, 0, progress).map5("validation")
            write_json(known, {"map@5": measured})
        found: float | None = read_json(known, "geomatch train")["map@5"]
        return found

"""Image files as tiles: cut, and described by the encoder of some embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch.data import pictures
from geomatch.errors import StaleError
from geomatch.geo import images
from geomatch.geo.grid import Grid
from geomatch.geo.images import Cut
from geomatch.nn import backend
from geomatch.nn.describe import describe
from geomatch.project import Project
from geomatch.runs import Encoding, load_encoder


def encoder_of(
    project: Project, facts: dict[str, Any], tiles: dict[str, Any], made: str, then: str
) -> Encoding:
    """The encoder that made what is described by `facts`.

    Args:
        facts: of embeddings, or of an index of them.
        tiles: the manifest of the tiles.
        made: begins the error, as "the index is".
        then: the stage that makes it, after `embed`.

    Raises:
        StaleError: the run has other weights by now.
        GeomatchError: the run is gone, or of tiles of another form.
    """
    backend.prepare()
    encoding = load_encoder(project, None, project.root / facts["run"], facts["step"])
    if encoding.fingerprint != facts["model"]:
        raise StaleError(
            f"{made} of another checkpoint than {encoding.name}",
            f"Run: geomatch embed, then geomatch {then}",
        )
    encoding.check_tiles(tiles)
    return encoding


def cut(path: str, encoding: Encoding, tiles: dict[str, Any]) -> Cut:
    """An image file as a tile: its centre, at the ground sample distance where it has a place.

    Raises:
        GeomatchError: it cannot be read, or has other bands or dtype.
    """
    channels = encoding.form.image_channels
    if tiles["placement"] == "none":
        pixels = pictures.read(Path(path), encoding.form.size, channels)
        return Cut(pixels, None, 0.0, 0.0, f"{path}: its centre square, as all tiles are")
    grid = Grid(tiles["crs"], tiles["size"], tiles["gsd"], tiles["stride"])
    return images.read(path, grid, channels)


def describe_cuts(
    encoding: Encoding, cuts: Sequence[Cut], facts: dict[str, Any], year: int | None = None
) -> NDArray[np.float32]:
    """Descriptors (n, d) of images, whose labels are unknown, as `facts` says of all others.

    Args:
        year: code of the year they are of; None where it is not known.
    """
    form = encoding.form
    tiles = np.zeros((len(cuts), form.size, form.size, form.channels), np.uint8)
    tiles[..., : form.image_channels] = [image.pixels for image in cuts]
    vectors = next(iter(describe(encoding.model, encoding.variables, [tiles], len(cuts))))
    if facts["centres"] is None:
        return vectors
    centres = np.asarray(facts["centres"], np.float32)
    return vectors - (centres.mean(axis=0) if year is None else centres[year])

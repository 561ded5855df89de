"""Descriptors to measure a run against: untrained, of ImageNet, and made by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch import begin
from geomatch.data.embeddings import centres
from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import GeomatchError
from geomatch.nn import backend, engines
from geomatch.nn.describe import describe_with
from geomatch.nn.step import build
from geomatch.progress import Reporter
from geomatch.project import Project, read_manifest
from geomatch.runs import Encoding, load_encoder
from geomatch.search import handmade
from geomatch.search.exact import Metric

BATCH = 32
LEAST = handmade.CELL * handmade.BLOCK
"""Pixels of a side that make a block of gradients."""

Floats = NDArray[np.float32]


def baselines(
    project: Project, tiles: TileTable, facts: dict[str, Any], report: Reporter
) -> Iterator[tuple[str, Floats, Metric]]:
    """Descriptors (n, d) of all tiles by other means, one after the other.

    Args:
        facts: of the embeddings that are measured; their run says which encoder is left untrained.

    Yields:
        "untrained", "imagenet" (where its weights are installed), "colour histogram" and "HOG"
        (where tiles have 16 px), each with its descriptors and metric. The last two are centred by
        the mean of each year's training tiles: what all tiles share tells none apart.
    """
    backend.prepare()
    store = TileStore.open(project.pixels)
    encoding = load_encoder(project, None, project.root / facts["run"], facts["step"])
    training = tiles.select(tiles.split == SPLITS.index("train"))
    bare = _untrained(encoding, project.root, training, store, report)
    yield "untrained", _encoded(bare, tiles, store, "untrained", report), facts["metric"]
    try:
        folder = project.pretrained / begin.IMAGENET
        if not _is_of(folder, project.tile_facts()):
            folder = begin.pretrained(project, encoding.settings, tiles, report)
    except GeomatchError as error:
        report(f"without the baseline of ImageNet: {error.message}")
    else:
        encoder = load_encoder(project, None, folder)
        vectors = _encoded(encoder, tiles, store, "imagenet", report)
        yield "imagenet", vectors, encoder.settings.metric
    made: dict[str, Callable[[NDArray[np.uint8]], Floats]] = {
        "colour histogram": handmade.colour_histogram
    }
    if encoding.form.size >= LEAST:
        made["HOG"] = handmade.hog
    for name, describe in made.items():
        batches = _images(tiles, store, name, report)
        parts = [describe(batch[..., : encoding.form.image_channels]) for batch in batches]
        yield name, _centred(np.concatenate(parts), tiles), "cosine"


def _is_of(folder: Path, facts: dict[str, Any]) -> bool:
    """Whether an encoder is there that was made of these tiles."""
    path = folder / "config.json"
    made = path.exists() and read_manifest(path, "geomatch embed --model imagenet")
    return bool(made and made["tiles"] == facts["fingerprint"])


def _untrained(
    encoding: Encoding, root: Path, training: TileTable, store: TileStore, report: Reporter
) -> Encoding:
    """The encoder of a run with random weights."""
    random = dataclasses.replace(encoding.settings.train, init="")
    settings = dataclasses.replace(encoding.settings, train=random)
    network = build(settings, encoding.form)
    state = begin.initial(network, settings, encoding.form, root, training, store, report)
    return dataclasses.replace(encoding, model=network, variables=state.variables)


def _encoded(
    encoding: Encoding, tiles: TileTable, store: TileStore, name: str, report: Reporter
) -> Floats:
    """Descriptors as `embed` makes them."""
    choice = engines.choose("auto", "auto")
    engine = engines.build(choice, encoding.model, encoding.variables, encoding.form, BATCH)
    batches = _images(tiles, store, name, report)
    vectors = np.concatenate(list(describe_with(engine, batches)))
    return _centred(vectors, tiles) if encoding.settings.model.centre else vectors


def _centred(vectors: Floats, tiles: TileTable) -> Floats:
    return vectors - centres([vectors], tiles)[tiles.year]


def _images(
    tiles: TileTable, store: TileStore, name: str, report: Reporter
) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(tiles), BATCH):
        yield store.read(tiles.store_row[start : start + BATCH])
        report(f"describing: {name}", min(start + BATCH, len(tiles)), len(tiles))

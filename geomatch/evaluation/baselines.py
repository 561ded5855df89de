"""Descriptors to measure a run against: untrained, of ImageNet, and made by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomatch.data.embeddings import centres
from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import GeomatchError
from geomatch.evaluation import handcrafted
from geomatch.manifests import EmbeddingManifest, RunManifest, TileManifest
from geomatch.nn import backend, engines
from geomatch.nn.describe import describe_with
from geomatch.nn.encoder import build
from geomatch.progress import ProgressCallback
from geomatch.project import Project, read_record
from geomatch.runs import Encoding, load_encoder
from geomatch.search.exact import Metric
from geomatch.training import setup

BATCH = 32
LEAST = handcrafted.CELL * handcrafted.BLOCK
"""Side in pixels of one block of HOG."""

Float32Array = NDArray[np.float32]


def baselines(
    project: Project, tiles: TileTable, made: EmbeddingManifest, progress: ProgressCallback
) -> Iterator[tuple[str, Float32Array, Metric]]:
    """Descriptors (n, d) of all tiles by other methods, one after the other.

    Args:
        made: the manifest of the embeddings that are measured; the untrained encoder is that of
            their run.

    Yields:
        "untrained", "imagenet" (where its weights are installed), "colour histogram" and "HOG"
        (where tiles have 16 px), each with its descriptors and metric. The last two are centred by
        the mean of each year's training tiles, since what all tiles share tells none apart.
    """
    backend.prepare()
    store = TileStore.open(project.pixels)
    encoding = load_encoder(project, None, project.root / made.run, made.step)
    training = tiles.select(tiles.split == SPLITS.index("train"))
    bare = _untrained(encoding, project.root, training, store, progress)
    yield "untrained", _encoded(bare, tiles, store, "untrained", progress), made.metric
    try:
        folder = project.pretrained / setup.IMAGENET
        if not _is_of(folder, project.tile_manifest()):
            folder = setup.pretrained(project, encoding.settings, tiles, progress)
    except GeomatchError as error:
        progress(f"the ImageNet baseline is left out: {error.message}")
    else:
        encoder = load_encoder(project, None, folder)
        vectors = _encoded(encoder, tiles, store, "imagenet", progress)
        yield "imagenet", vectors, encoder.settings.metric
    by_hand: dict[str, Callable[[NDArray[np.uint8]], Float32Array]] = {
        "colour histogram": handcrafted.colour_histogram
    }
    if encoding.form.size >= LEAST:
        by_hand["HOG"] = handcrafted.hog
    for name, describe in by_hand.items():
        batches = _images(tiles, store, name, progress)
        parts = [describe(batch[..., : encoding.form.image_channels]) for batch in batches]
        yield name, _centred(np.concatenate(parts), tiles), "cosine"


def _is_of(folder: Path, tiles: TileManifest) -> bool:
    """Whether `folder` holds an encoder that was made from these tiles."""
    path = folder / "config.json"
    if not path.exists():
        return False
    made = read_record(path, RunManifest, "geomatch embed --model imagenet")
    return made.tiles == tiles.fingerprint


def _untrained(
    encoding: Encoding,
    root: Path,
    training: TileTable,
    store: TileStore,
    progress: ProgressCallback,
) -> Encoding:
    """The encoder of a run with random weights."""
    random = dataclasses.replace(encoding.settings.train, init="")
    settings = dataclasses.replace(encoding.settings, train=random)
    network = build(settings, encoding.form)
    state = setup.initial(network, settings, encoding.form, root, training, store, progress)
    return dataclasses.replace(encoding, model=network, variables=state.variables)


def _encoded(
    encoding: Encoding, tiles: TileTable, store: TileStore, name: str, progress: ProgressCallback
) -> Float32Array:
    """Descriptors as `embed` makes them."""
    choice = engines.choose("auto", "auto")
    engine = engines.build(choice, encoding.model, encoding.variables, encoding.form, BATCH)
    batches = _images(tiles, store, name, progress)
    vectors = np.concatenate(list(describe_with(engine, batches)))
    return _centred(vectors, tiles) if encoding.settings.model.centre else vectors


def _centred(vectors: Float32Array, tiles: TileTable) -> Float32Array:
    return vectors - centres([vectors], tiles)[tiles.year]


def _images(
    tiles: TileTable, store: TileStore, name: str, progress: ProgressCallback
) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(tiles), BATCH):
        yield store.read(tiles.store_row[start : start + BATCH])
        progress(f"describing: {name}", min(start + BATCH, len(tiles)), len(tiles))

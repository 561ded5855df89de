"""Embed: every tile of the catalogue through the encoder, part by part."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomatch import __version__, config
from geomatch.data import embeddings
from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import StaleError
from geomatch.geo import footprints
from geomatch.manifests import EmbeddingManifest
from geomatch.nn import backend, engines
from geomatch.nn.describe import describe_with
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, fingerprint, read_json, replacing, write_json
from geomatch.runs import Encoding, load_encoder
from geomatch.training import setup

BATCH = 32
CALIBRATION = 300
DEFAULTS = config.Config()
PART = 4096
"""Tiles of one part: what a killed command may lose."""


@dataclass(frozen=True)
class Embedded:
    """What `embed` made: the file, and how many tiles it holds."""

    name: str
    path: Path
    tiles: int


def embed(
    project: Project,
    *,
    run: str | None = None,
    model: Path | str | None = None,
    settings: config.Config = DEFAULTS,
    progress: ProgressCallback = silent,
) -> Embedded:
    """Describe every tile with a run's best checkpoint.

    Args:
        run: "NAME" or "NAME@STEP"; by default the latest run's best checkpoint.
        model: folder of a run, of this or another project, in place of `run`; or "imagenet", which
            needs no training.
        settings: the engine and its precision; for "imagenet" also the size of descriptors and
            of the grid.

    Raises:
        GeomatchError: there is no run, or its tiles are of another form.
    """
    choice = engines.choose(settings.embed.engine, settings.embed.dtype)
    backend.prepare(choice.dtype if choice.engine == "jax" else "float32")
    if model == setup.IMAGENET and not Path(model).exists():
        with project.lock("tiles", shared=True), project.lock(setup.IMAGENET):
            tiles = TileTable.load(project.catalogue)
            model = setup.pretrained(project, settings, tiles, progress)
    encoding = load_encoder(project, run, Path(model) if model else None)
    name = encoding.name
    path = project.embeddings / f"{name}.parquet"
    with project.lock("tiles", shared=True), project.lock(f"embeddings/{name}"):
        manifest = project.tile_manifest()
        encoding.check_tiles(manifest)
        made_from = {
            "tiles": manifest.fingerprint,
            "model": encoding.fingerprint,
            "run_id": encoding.run_id,
            "engine": choice.engine,
            "dtype": choice.dtype,
        }
        if _up_to_date(path, made_from):
            path.touch()  # what was asked for last is what later stages take
            progress(f"embeddings {name} are up to date")
            return Embedded(name, path, manifest.tiles)
        tiles = TileTable.load(project.catalogue)
        parts = project.embeddings / f"{name}.partial"
        _prepare(parts, made_from)
        _describe_parts(parts, TileStore.open(project.pixels), tiles, encoding, choice, progress)
        digest = _join(parts, path, tiles, encoding, made_from)
        shutil.rmtree(parts)
        progress(f"embeddings {name}: {len(tiles)} tiles, fingerprint {digest}")
        return Embedded(name, path, len(tiles))


def _up_to_date(path: Path, made_from: dict[str, str]) -> bool:
    try:
        before = embeddings.read_manifest(path)
    except StaleError:  # damaged, missing or of an older version
        return False
    return all(getattr(before, key) == value for key, value in made_from.items())


def _prepare(parts: Path, made_from: dict[str, str]) -> None:
    """Make the folder of unfinished parts, or keep the one that is of the same origin."""
    record = parts / "origin.json"
    if record.exists():
        before = read_json(record, "geomatch embed")
        if all(before.get(key) == value for key, value in made_from.items()):
            return
    shutil.rmtree(parts, ignore_errors=True)
    write_json(record, made_from)


def _describe_parts(
    parts: Path,
    store: TileStore,
    tiles: TileTable,
    encoding: Encoding,
    choice: engines.EngineChoice,
    progress: ProgressCallback,
) -> None:
    engine = engines.build(
        choice,
        encoding.model,
        encoding.variables,
        encoding.form,
        BATCH,
        _calibration(store, tiles),
    )
    progress(f"embedding with {engine.name}")
    begun, done, fresh = time.monotonic(), 0, 0
    for start in range(0, len(tiles), PART):
        rows = tiles.store_row[start : start + PART]
        path = _part(parts, start)
        if path.exists():
            done += len(rows)
            continue
        batches = (store.read(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH))
        found: list[NDArray[np.float32]] = []
        for vectors in describe_with(engine, batches):
            found.append(vectors)
            done, fresh = done + len(vectors), fresh + len(vectors)
            rate = fresh / (time.monotonic() - begun)
            progress("embedding", done, len(tiles), f"{rate:.0f} tiles/s")
        with replacing(path) as temporary, temporary.open("wb") as handle:
            np.save(handle, np.concatenate(found))


def _calibration(store: TileStore, tiles: TileTable) -> Iterator[NDArray[np.uint8]]:
    """Training tiles spread over the territory, to see what values a network meets."""
    rows = tiles.store_row[tiles.split == SPLITS.index("train")]
    rows = rows[:: max(1, len(rows) // CALIBRATION)][:CALIBRATION]
    for start in range(0, len(rows), BATCH):
        yield store.read(rows[start : start + BATCH])


def _part(parts: Path, start: int) -> Path:
    return parts / f"{start:09d}.npy"


def _join(
    parts: Path, path: Path, tiles: TileTable, encoding: Encoding, made_from: dict[str, str]
) -> str:
    """Write all parts as one file; its fingerprint."""
    files = [_part(parts, start) for start in range(0, len(tiles), PART)]
    centred = encoding.settings.model.centre
    centres = embeddings.centres(map(np.load, files), tiles) if centred else None
    digest = fingerprint([fingerprint(file.read_bytes()) for file in files])
    manifest = EmbeddingManifest(
        geomatch=__version__,
        name=encoding.name,
        run=_within(encoding.folder, path.parent.parent),
        step=encoding.step,
        dimension=encoding.dimension,
        normalise=encoding.settings.model.normalise,
        metric=encoding.settings.metric,
        fingerprint=digest,
        centres=None if centres is None else centres.tolist(),
        **made_from,
    )

    def vectors() -> Iterator[NDArray[np.float32]]:
        for i, file in enumerate(files):
            part = np.load(file)
            yield part if centres is None else part - centres[tiles.year[i * PART :][: len(part)]]

    with replacing(path) as temporary:
        embeddings.write(
            temporary,
            vectors(),
            tiles,
            *footprints.file_geometry(tiles.grid),
            manifest,
        )
    return digest


def _within(folder: Path, root: Path) -> str:
    """`folder` from `root`, where it is inside: a project may be moved."""
    folder, root = folder.absolute(), root.absolute()
    return str(folder.relative_to(root) if folder.is_relative_to(root) else folder)

"""Embed: the descriptor of every tile in the catalogue, computed part by part.

What brings pyarrow is imported inside functions: memory has to be kept before its threads start
(`geomatch.nn.backend.keep_memory`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from geomatch import __version__, config
from geomatch.errors import StaleError
from geomatch.manifests import EmbeddingManifest
from geomatch.nn import backend, engines
from geomatch.nn.describe import describe_with
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, fingerprint, read_json, replacing, write_json

if TYPE_CHECKING:
    from geomatch.data.store import TileStore
    from geomatch.data.tiles import TileTable
    from geomatch.runs import Encoding

BATCH = 32
CALIBRATION = 300
"""Training tiles that int8 is calibrated on."""
PART = 4096
"""Tiles per part: at most so many are lost when a command is killed."""


@dataclass(frozen=True)
class Embedded:
    """The result of `embed`: the file, the number of tiles in it, and `Encoding.remark`."""

    name: str
    path: Path
    tiles: int
    remark: str


def embed(
    project: Project,
    *,
    run: str | None = None,
    model: Path | str | None = None,
    settings: config.Config | None = None,
    progress: ProgressCallback = silent,
) -> Embedded:
    """Compute the descriptor of every tile with the best checkpoint of a run.

    With the JAX engine on a CPU, memory that is freed stays with the process from then on, which
    makes batches faster. Threads that exist already (after `tile` or `train` in the same process,
    or an import of pyarrow) gain less: for full speed, embed in a process of its own, as the
    command line does.

    Args:
        run: "NAME" or "NAME@STEP"; by default the best checkpoint of the latest run.
        model: folder of a run, of this or another project, instead of `run`; or "imagenet", which
            needs no training.
        settings: the engine and its precision; for "imagenet" also the size of descriptors and
            the bins of the pooling grid. By default those of `geomatch.toml`.

    Raises:
        GeomatchError: there is no run, or its tiles have another form.
    """
    settings = settings or config.load(project.config)
    choice = engines.choose(settings.embed.engine, settings.embed.dtype)
    if choice.engine == "jax":
        backend.keep_memory()
    backend.prepare(choice.dtype if choice.engine == "jax" else "float32")
    from geomatch.data.store import TileStore
    from geomatch.data.tiles import TileTable
    from geomatch.runs import load_encoder
    from geomatch.training import setup

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
            path.touch()  # later stages take the latest
            progress(f"embeddings {name} are up to date")
            return Embedded(name, path, manifest.tiles, encoding.remark)
        tiles = TileTable.load(project.catalogue)
        parts = project.embeddings / f"{name}.partial"
        _prepare(parts, made_from)
        _describe_parts(parts, TileStore.open(project.pixels), tiles, encoding, choice, progress)
        digest = _join(parts, path, tiles, encoding, made_from)
        shutil.rmtree(parts)
        progress(f"embeddings {name}: {len(tiles)} tiles, fingerprint {digest}")
        return Embedded(name, path, len(tiles), encoding.remark)


def _up_to_date(path: Path, made_from: dict[str, str]) -> bool:
    from geomatch.data import embeddings

    try:
        before = embeddings.read_manifest(path)
    except StaleError:  # damaged, missing or of an older version
        return False
    return all(getattr(before, key) == value for key, value in made_from.items())


def _prepare(parts: Path, made_from: dict[str, str]) -> None:
    """Make the folder of unfinished parts, or keep the one that has the same origin."""
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
    """Training tiles spread over the area, which show the range of a network's values."""
    from geomatch.data.tiles import SPLITS

    rows = tiles.store_row[tiles.split == SPLITS.index("train")]
    rows = rows[:: max(1, len(rows) // CALIBRATION)][:CALIBRATION]
    for start in range(0, len(rows), BATCH):
        yield store.read(rows[start : start + BATCH])


def _part(parts: Path, start: int) -> Path:
    return parts / f"{start:09d}.npy"


def _join(
    parts: Path, path: Path, tiles: TileTable, encoding: Encoding, made_from: dict[str, str]
) -> str:
    """Write all parts to one file and return its fingerprint."""
    from geomatch.data import embeddings
    from geomatch.geo import footprints

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
    """`folder` relative to `root` if it lies inside, since a project may be moved."""
    folder, root = folder.absolute(), root.absolute()
    return str(folder.relative_to(root) if folder.is_relative_to(root) else folder)

"""Embed: every tile of the catalogue through the encoder, part by part."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch import __version__
from geomatch.data import embeddings
from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.errors import StaleError
from geomatch.geo import footprints
from geomatch.nn.describe import describe
from geomatch.progress import Reporter, silent
from geomatch.project import FORMAT, Project, fingerprint, read_manifest, replacing, write_json
from geomatch.runs import Encoding, load_encoder

BATCH = 32
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
    model: Path | None = None,
    report: Reporter = silent,
) -> Embedded:
    """Describe every tile with a run's best checkpoint.

    Args:
        run: "NAME" or "NAME@STEP"; by default the latest run's best checkpoint.
        model: folder of a run, of this or another project, in place of `run`.

    Raises:
        GeomatchError: there is no run, or its tiles are of another form.
    """
    encoding = load_encoder(project, run, model)
    name = encoding.name
    path = project.embeddings / f"{name}.parquet"
    with project.lock("tiles", shared=True), project.lock(f"embeddings/{name}"):
        facts = project.tile_facts()
        encoding.check_tiles(facts)
        made_from = {
            "tiles": facts["fingerprint"],
            "model": encoding.fingerprint,
            "run_id": encoding.run_id,
        }
        if _up_to_date(path, made_from):
            path.touch()  # what was asked for last is what later stages take
            report(f"embeddings {name} are up to date")
            return Embedded(name, path, facts["tiles"])
        tiles = TileTable.load(project.catalogue)
        parts = project.embeddings / f"{name}.partial"
        _prepare(parts, made_from)
        _describe_parts(parts, TileStore.open(project.pixels), tiles, encoding, report)
        digest = _join(parts, path, tiles, encoding, made_from)
        shutil.rmtree(parts)
        report(f"embeddings {name}: {len(tiles)} tiles, fingerprint {digest}")
        return Embedded(name, path, len(tiles))


def _up_to_date(path: Path, made_from: dict[str, str]) -> bool:
    try:
        before = embeddings.read_facts(path)
    except StaleError:  # damaged, or not there
        return False
    return all(before.get(key) == value for key, value in made_from.items())


def _prepare(parts: Path, made_from: dict[str, str]) -> None:
    """Make the folder of unfinished parts, or keep the one that is of the same origin."""
    record = parts / "origin.json"
    wanted = {"format": FORMAT, **made_from}
    if not record.exists() or read_manifest(record, "geomatch embed") != wanted:
        shutil.rmtree(parts, ignore_errors=True)
        write_json(record, wanted)


def _describe_parts(
    parts: Path, store: TileStore, tiles: TileTable, encoding: Encoding, report: Reporter
) -> None:
    begun, done, fresh = time.monotonic(), 0, 0
    for start in range(0, len(tiles), PART):
        rows = tiles.store_row[start : start + PART]
        path = _part(parts, start)
        if path.exists():
            done += len(rows)
            continue
        batches = (store.read(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH))
        found: list[NDArray[np.float32]] = []
        for vectors in describe(encoding.model, encoding.variables, batches, BATCH):
            found.append(vectors)
            done, fresh = done + len(vectors), fresh + len(vectors)
            rate = fresh / (time.monotonic() - begun)
            report("embedding", done, len(tiles), f"{rate:.0f} tiles/s")
        with replacing(path) as temporary, temporary.open("wb") as handle:
            np.save(handle, np.concatenate(found))


def _part(parts: Path, start: int) -> Path:
    return parts / f"{start:09d}.npy"


def _join(
    parts: Path, path: Path, tiles: TileTable, encoding: Encoding, made_from: dict[str, str]
) -> str:
    """Write all parts as one file; its fingerprint."""
    files = [_part(parts, start) for start in range(0, len(tiles), PART)]
    digest = fingerprint([fingerprint(file.read_bytes()) for file in files])
    facts: dict[str, Any] = {
        "format": FORMAT,
        "geomatch": __version__,
        "name": encoding.name,
        "run": str(encoding.folder.absolute()),
        "step": encoding.step,
        "dimension": encoding.dimension,
        "normalise": encoding.settings.model.normalise,
        "fingerprint": digest,
        **made_from,
    }
    with replacing(path) as temporary:
        embeddings.write(
            temporary,
            (np.load(file) for file in files),
            tiles,
            *footprints.drawing(tiles.grid),
            facts,
        )
    return digest

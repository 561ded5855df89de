"""Descriptors that are computed part by part: each part is a file, whoever computes it.

What brings pyarrow is imported inside functions: see `geomatch.embed`.
"""

from __future__ import annotations

import collections
import functools
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from geomatch.errors import GeomatchError
from geomatch.nn import backend, engines
from geomatch.nn.describe import describe_with
from geomatch.progress import ProgressCallback
from geomatch.project import Project, read_json, replacing, write_json
from geomatch.shares import Share, check_same

if TYPE_CHECKING:
    from geomatch.data.store import TileStore
    from geomatch.data.tiles import TileTable
    from geomatch.nn.describe import Engine
    from geomatch.runs import Encoding

COMMAND = "geomatch embed"
BATCH = 32
CALIBRATION = 300
"""Training tiles that int8 is calibrated on."""
PART = 4096
"""Tiles per part: at most so many are lost when a command is killed."""


def made_from(project: Project, encoding: Encoding, choice: engines.EngineChoice) -> dict[str, str]:
    """What descriptors depend on.

    Raises:
        GeomatchError: the tiles have another form than those that the encoder was trained on.
    """
    manifest = project.tile_manifest()
    encoding.check_tiles(manifest)
    return {
        "tiles": manifest.fingerprint,
        "model": encoding.fingerprint,
        "run_id": encoding.run_id,
        "engine": choice.engine,
        "dtype": choice.dtype,
    }


def prepare(parts: Path, made_from: dict[str, str], share: Share | None = None) -> int:
    """Make the folder of unfinished parts, or keep the one that has the same origin.

    Returns:
        The number of shares in which the work is done, 0 for none.

    Raises:
        GeomatchError: others work on shares that have another origin.
        UsageError: there is another number of shares.
    """
    record = parts / "origin.json"
    before = read_json(record, COMMAND) if record.exists() else {}
    of = before.get("of", 0)
    if made_from.items() <= before.items():
        if share is None or of == share.of:
            return of
        check_same(share, of or share.of, COMMAND)
    elif share and of:
        raise GeomatchError(
            "descriptors of other tiles, or with another encoder or engine, are being computed",
            f"Give every shard the same command, with --engine and --dtype; to begin anew, delete "
            f"{parts}",
        )
    else:
        shutil.rmtree(parts, ignore_errors=True)
        of = 0
    write_json(record, {**made_from, "of": share.of if share else of})
    return share.of if share else of


@dataclass(frozen=True)
class Work:
    """Descriptors that are computed part by part, each in a file of its own.

    Parts and their batches are the same however the work is shared, and so are the descriptors.

    Attributes:
        folder: of the files.
    """

    folder: Path
    tiles: TileTable
    store: TileStore
    encoding: Encoding
    choice: engines.EngineChoice

    @classmethod
    def of(cls, project: Project, encoding: Encoding, choice: engines.EngineChoice) -> Work:
        from geomatch.data.store import TileStore
        from geomatch.data.tiles import TileTable

        folder = project.embeddings / f"{encoding.name}.partial"
        tiles = TileTable.load(project.catalogue)
        return cls(folder, tiles, TileStore.open(project.pixels), encoding, choice)

    @property
    def numbers(self) -> range:
        """Of all parts."""
        return range(-(-len(self.tiles) // PART))

    def rows(self, number: int) -> NDArray[np.int64]:
        """The rows of the store that are in a part."""
        return self.tiles.store_row[number * PART :][:PART]

    def file(self, number: int) -> Path:
        return self.folder / f"{number * PART:09d}.npy"

    def missing(self, numbers: range) -> list[int]:
        """Those of some parts that are not computed."""
        return [number for number in numbers if not self.file(number).exists()]

    def describe(self, numbers: range, progress: ProgressCallback) -> None:
        """Compute what is missing of some parts."""
        missing = self.missing(numbers)
        if not missing:
            return
        engine = self.engine()
        progress(f"embedding with {engine.name}")
        total = sum(len(self.rows(number)) for number in numbers)
        begun, fresh = time.monotonic(), 0
        done = total - sum(len(self.rows(number)) for number in missing)
        for number in missing:
            for count in self.write(number, engine):
                done, fresh = done + count, fresh + count
                rate = fresh / (time.monotonic() - begun)
                progress("embedding", done, total, f"{rate:.0f} tiles/s")

    def engine(self) -> Engine:
        return engines.build(
            self.choice,
            self.encoding.model,
            self.encoding.variables,
            self.encoding.form,
            BATCH,
            _calibration(self.store, self.tiles),
        )

    def write(self, number: int, engine: Engine) -> Iterator[int]:
        """Compute a part; yields the length of each batch."""
        rows = self.rows(number)
        batches = (self.store.read(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH))
        found: list[NDArray[np.float32]] = []
        for vectors in describe_with(engine, batches):
            found.append(vectors)
            yield len(vectors)
        with replacing(self.file(number), shared=True) as temporary, temporary.open("wb") as handle:
            np.save(handle, np.concatenate(found))


def _calibration(store: TileStore, tiles: TileTable) -> Iterator[NDArray[np.uint8]]:
    """Training tiles spread over the area, which show the range of a network's values."""
    from geomatch.data.tiles import SPLITS

    rows = tiles.store_row[tiles.split == SPLITS.index("train")]
    rows = rows[:: max(1, len(rows) // CALIBRATION)][:CALIBRATION]
    for start in range(0, len(rows), BATCH):
        yield store.read(rows[start : start + BATCH])


# On a cluster


@dataclass(frozen=True)
class _Order:
    """Some part of the work, for a worker of a cluster."""

    root: Path
    model: Path
    step: int
    choice: engines.EngineChoice
    made_from: tuple[tuple[str, str], ...]
    number: int


def describe_on(
    address: str, work: Work, made_from: dict[str, str], progress: ProgressCallback
) -> None:
    """Compute what is missing on a cluster."""
    from geomatch import cluster

    todo = work.missing(work.numbers)
    if not todo:
        return
    root, model = work.folder.parent.parent.absolute(), work.encoding.folder.absolute()
    common = root, model, work.encoding.step, work.choice, tuple(made_from.items())
    done = sum(len(work.rows(number)) for number in set(work.numbers) - set(todo))
    with cluster.connect(address, work.folder.absolute(), progress) as workers:
        orders = (_Order(*common, number) for number in todo)
        for order, _ in workers.run(_fulfil, orders, lambda each: f"part {each.number}", progress):
            done += len(work.rows(order.number))
            progress("embedding", done, len(work.tiles), f"{workers.threads} threads")


ONE_AT_A_TIME = threading.Lock()
"""An engine uses all cores, and a worker may have several threads."""


def _fulfil(order: _Order) -> None:
    """On a worker: compute one part.

    Raises:
        GeomatchError: the worker sees other tiles or another encoder.
    """
    with ONE_AT_A_TIME:
        work, engine = _opened(order.root, order.model, order.step, order.choice, order.made_from)
        if work.missing(range(order.number, order.number + 1)):
            collections.deque(work.write(order.number, engine), maxlen=0)


@functools.lru_cache(maxsize=1)
def _opened(
    root: Path,
    model: Path,
    step: int,
    choice: engines.EngineChoice,
    expected: tuple[tuple[str, str], ...],
) -> tuple[Work, Engine]:
    """On a worker: the work, and the engine that is built once for all parts."""
    backend.prepare(choice.dtype if choice.engine == "jax" else "float32")
    from geomatch.runs import load_encoder

    project = Project.open(root)
    encoding = load_encoder(project, None, model, step)
    if made_from(project, encoding, choice) != dict(expected):
        raise GeomatchError(
            f"{root} has other tiles or another encoder here than where the work is given out",
            "Keep the project in a folder that all machines mount alike.",
        )
    work = Work.of(project, encoding, choice)
    return work, work.engine()

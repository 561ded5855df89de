"""Embed: the descriptor of every tile in the catalogue, computed part by part.

What brings pyarrow is imported inside functions: memory has to be kept before its threads start
(`geomatch.nn.backend.keep_memory`).
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

from geomatch import __version__, config
from geomatch.errors import GeomatchError, StaleError
from geomatch.manifests import EmbeddingManifest
from geomatch.nn import backend, engines
from geomatch.nn.describe import describe_with
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, fingerprint, read_json, replacing, write_json
from geomatch.shares import Share, check_same, missing

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
    join: bool = False,
    scheduler: str | None = None,
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
        join: compute nothing, since `embed_share` did.
        scheduler: address of a dask.distributed scheduler whose workers compute the descriptors;
            they see the project at the same path.

    Raises:
        GeomatchError: there is no run, or its tiles have another form; or a share is missing.
    """
    encoding, choice = _encoding(project, run, model, settings, progress)
    name = encoding.name
    path = project.embeddings / f"{name}.parquet"
    with project.lock("tiles", shared=True), project.lock(f"embeddings/{name}"):
        made_from = _made_from(project, encoding, choice)
        if _up_to_date(path, made_from):
            path.touch()  # later stages take the latest
            progress(f"embeddings {name} are up to date")
            return Embedded(name, path, project.tile_manifest().tiles, encoding.remark)
        work = _Work.of(project, encoding, choice)
        of = _prepare(work.folder, made_from)
        if join and (lacking := work.missing(work.numbers)):
            raise missing(lacking, len(work.numbers), of, COMMAND)
        if scheduler:
            _describe_on(scheduler, work, made_from, progress)
        else:
            work.describe(work.numbers, progress)
        digest = _join(work, path, made_from)
        shutil.rmtree(work.folder)
        progress(f"embeddings {name}: {len(work.tiles)} tiles, fingerprint {digest}")
        return Embedded(name, path, len(work.tiles), encoding.remark)


def embed_share(
    project: Project,
    share: Share,
    *,
    run: str | None = None,
    model: Path | str | None = None,
    settings: config.Config | None = None,
    progress: ProgressCallback = silent,
) -> int:
    """Compute one share of the descriptors, which `embed(join=True)` puts together.

    Several processes may do so at once, also on other machines over a shared folder. What is
    computed already is not computed again.

    Args:
        run, model, settings: as for `embed`; the same for each share.

    Returns:
        The number of tiles in the share.

    Raises:
        GeomatchError: as for `embed`; or another share is of other tiles or another encoder.
        UsageError: there is another number of shares.
    """
    encoding, choice = _encoding(project, run, model, settings, progress)
    name = encoding.name
    lock = f"embeddings/{name}"
    with (
        project.lock("tiles", shared=True),
        project.lock(lock, shared=True),
        project.lock(f"{lock}.{share.lock}"),
    ):
        made_from = _made_from(project, encoding, choice)
        if _up_to_date(project.embeddings / f"{name}.parquet", made_from):
            progress(f"embeddings {name} are up to date")
            return 0
        work = _Work.of(project, encoding, choice)
        with project.lock(f"{lock}.plan", wait=True):
            _prepare(work.folder, made_from, share)
        numbers = share.part(len(work.numbers))
        work.describe(numbers, progress)
        return sum(len(work.rows(number)) for number in numbers)


def _encoding(
    project: Project,
    run: str | None,
    model: Path | str | None,
    settings: config.Config | None,
    progress: ProgressCallback,
) -> tuple[Encoding, engines.EngineChoice]:
    """The encoder that is asked for, and what computes it."""
    settings = settings or config.load(project.config)
    choice = engines.choose(settings.embed.engine, settings.embed.dtype)
    if choice.engine == "jax":
        backend.keep_memory()
    backend.prepare(choice.dtype if choice.engine == "jax" else "float32")
    from geomatch.data.tiles import TileTable
    from geomatch.runs import load_encoder
    from geomatch.training import setup

    if model == setup.IMAGENET and not Path(model).exists():
        with project.lock("tiles", shared=True), project.lock(setup.IMAGENET, wait=True):
            tiles = TileTable.load(project.catalogue)
            model = setup.pretrained(project, settings, tiles, progress)
    return load_encoder(project, run, Path(model) if model else None), choice


def _made_from(
    project: Project, encoding: Encoding, choice: engines.EngineChoice
) -> dict[str, str]:
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


def _up_to_date(path: Path, made_from: dict[str, str]) -> bool:
    from geomatch.data import embeddings

    try:
        before = embeddings.read_manifest(path)
    except StaleError:  # damaged, missing or of an older version
        return False
    return all(getattr(before, key) == value for key, value in made_from.items())


def _prepare(parts: Path, made_from: dict[str, str], share: Share | None = None) -> int:
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
class _Work:
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
    def of(cls, project: Project, encoding: Encoding, choice: engines.EngineChoice) -> _Work:
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


def _describe_on(
    address: str, work: _Work, made_from: dict[str, str], progress: ProgressCallback
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
    made_from: tuple[tuple[str, str], ...],
) -> tuple[_Work, Engine]:
    """On a worker: the work, and the engine that is built once for all parts."""
    backend.prepare(choice.dtype if choice.engine == "jax" else "float32")
    from geomatch.runs import load_encoder

    project = Project.open(root)
    encoding = load_encoder(project, None, model, step)
    if _made_from(project, encoding, choice) != dict(made_from):
        raise GeomatchError(
            f"{root} has other tiles or another encoder here than where the work is given out",
            "Keep the project in a folder that all machines mount alike.",
        )
    work = _Work.of(project, encoding, choice)
    return work, work.engine()


def _calibration(store: TileStore, tiles: TileTable) -> Iterator[NDArray[np.uint8]]:
    """Training tiles spread over the area, which show the range of a network's values."""
    from geomatch.data.tiles import SPLITS

    rows = tiles.store_row[tiles.split == SPLITS.index("train")]
    rows = rows[:: max(1, len(rows) // CALIBRATION)][:CALIBRATION]
    for start in range(0, len(rows), BATCH):
        yield store.read(rows[start : start + BATCH])


def _join(work: _Work, path: Path, made_from: dict[str, str]) -> str:
    """Write all parts to one file and return its fingerprint."""
    from geomatch.data import embeddings
    from geomatch.geo import footprints

    tiles, encoding = work.tiles, work.encoding
    files = [work.file(number) for number in work.numbers]
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

"""Embed: the descriptor of every tile in the catalogue, computed part by part.

What brings pyarrow is imported inside functions: memory has to be kept before its threads start
(`geomatch.nn.backend.keep_memory`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from geomatch import __version__, config
from geomatch.embedding import parts
from geomatch.errors import StaleError
from geomatch.manifests import EmbeddingManifest
from geomatch.nn import backend, engines
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, fingerprint, replacing
from geomatch.shares import Share, missing

if TYPE_CHECKING:
    from geomatch.runs import Encoding


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
        made_from = parts.made_from(project, encoding, choice)
        if _up_to_date(path, made_from):
            path.touch()  # later stages take the latest
            progress(f"embeddings {name} are up to date")
            return Embedded(name, path, project.tile_manifest().tiles, encoding.remark)
        work = parts.Work.of(project, encoding, choice)
        of = parts.prepare(work.folder, made_from)
        if join and (lacking := work.missing(work.numbers)):
            raise missing(lacking, len(work.numbers), of, parts.COMMAND)
        if scheduler:
            parts.describe_on(scheduler, work, made_from, progress)
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
        made_from = parts.made_from(project, encoding, choice)
        if _up_to_date(project.embeddings / f"{name}.parquet", made_from):
            progress(f"embeddings {name} are up to date")
            return 0
        work = parts.Work.of(project, encoding, choice)
        with project.lock(f"{lock}.plan", wait=True):
            parts.prepare(work.folder, made_from, share)
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


def _up_to_date(path: Path, made_from: dict[str, str]) -> bool:
    from geomatch.data import embeddings

    try:
        before = embeddings.read_manifest(path)
    except StaleError:  # damaged, missing or of an older version
        return False
    return all(getattr(before, key) == value for key, value in made_from.items())


def _join(work: parts.Work, path: Path, made_from: dict[str, str]) -> str:
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
            years = tiles.year[i * parts.PART :][: len(part)]
            yield part if centres is None else part - centres[years]

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

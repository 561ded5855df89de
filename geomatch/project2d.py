"""Project descriptors to two dimensions: as a scatter plot, or for TensorBoard's projector."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomatch.config import ProjectionMethod, Split
from geomatch.data.embeddings import Embeddings
from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import GeomatchError, UsageError
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, replace_folder, replacing
from geomatch.report import projection

SAMPLE = 5_000
"""Largest number of tiles in a plot."""
PROJECTED = 10_000
"""Largest number of tiles for TensorBoard: more are slow in a browser."""
BATCH = 64
LINKED = 200
"""Largest number of places whose tiles are joined by lines."""


def project2d(
    project: Project,
    *,
    run: str | None = None,
    split: Split = "test",
    method: ProjectionMethod = "pca",
    out: Path | None = None,
    progress: ProgressCallback = silent,
) -> Path:
    """Plot the descriptors of a split, coloured by class, or by year if there are many classes.

    Args:
        run: name of the embeddings ("RUN@STEP"); by default the latest.
        method: "pca" or "tsne"; descriptors of two dimensions are plotted as they are.
        out: PNG to write; by default in the reports of the embeddings.

    Raises:
        UsageError: the split or the method is unknown.
        GeomatchError: there are no embeddings, they are stale, or the split has no tiles.
    """
    if split not in SPLITS or method not in ("pca", "tsne"):
        raise UsageError(
            f"cannot project the split {split} by {method}",
            f"Splits: {', '.join(SPLITS)}. Methods: pca, tsne.",
        )
    name, embeddings, tiles = _load(project, run)
    inside = np.flatnonzero(tiles.split == SPLITS.index(split))
    if not len(inside):
        raise GeomatchError(f"the {split} split has no tiles", "Choose another one with --split.")
    chosen = np.sort(np.random.default_rng(0).permutation(inside)[:SAMPLE])
    shown, vectors = tiles.select(chosen), embeddings.vectors[chosen]
    progress(f"projecting {len(chosen)} descriptors of {vectors.shape[1]} dimensions")
    flat = method == "pca" or vectors.shape[1] == 2
    points = projection.pca(vectors) if flat else projection.tsne(vectors)
    if 0 < len(tiles.classes) <= projection.COLOURS:
        labels, names = shown.label, tiles.classes
    else:
        labels, names = shown.year, tiles.years
    path = out or project.reports / name / f"project2d-{split}-{method}.png"
    with replacing(path) as temporary:
        projection.scatter(
            points,
            labels,
            f"{name}, {split}: {len(chosen)} tiles",
            temporary,
            names=names,
            links=_links(shown, points) if tiles.dated else None,
        )
    return path


def projector(
    project: Project, *, run: str | None = None, progress: ProgressCallback = silent
) -> Path:
    """Write descriptors of all splits for TensorBoard's Embedding Projector.

    Of more than `PROJECTED` tiles, the projector gets a random sample, always the same.

    Args:
        run: as for `project2d`.

    Returns:
        The folder, in the reports of the embeddings.

    Raises:
        GeomatchError: there are no embeddings, or they are stale.
    """
    from geomatch.report.tensorboard import write_projector

    name, embeddings, tiles = _load(project, run)
    chosen = np.sort(np.random.default_rng(0).permutation(len(tiles))[:PROJECTED])
    shown = tiles.select(chosen)
    columns = {"id": shown.ids(), "place" if tiles.dated else "class": shown.cells()}
    if tiles.dated:
        columns["year"] = [tiles.years[code] for code in shown.year]
    columns["split"] = [SPLITS[code] for code in shown.split]
    store = TileStore.open(project.pixels)
    channels = project.tile_manifest().channels.image

    def pictures() -> Iterator[NDArray[np.uint8]]:
        for start in range(0, len(shown), BATCH):
            rows = shown.store_row[start : start + BATCH]
            yield from store.read(rows)[..., :channels]
            progress("drawing tiles", start + len(rows), len(shown))

    target = project.reports / name / "projector"
    folder = target.with_name(f".{target.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_projector(folder, name, embeddings.vectors[chosen], columns, pictures())
    replace_folder(folder, target)
    return target


def _load(project: Project, run: str | None) -> tuple[str, Embeddings, TileTable]:
    """The name of the embeddings, the embeddings, and the tiles they describe."""
    name = project.embeddings_of(run)
    embeddings = Embeddings.load(project.embeddings / f"{name}.parquet")
    project.check_fresh(embeddings.manifest)
    return name, embeddings, TileTable.load(project.catalogue)


def _links(tiles: TileTable, points: NDArray[np.floating]) -> NDArray[np.floating] | None:
    """Lines (m, 2, 2) from each tile to the next of its place; None for many places."""
    place = tiles.places()
    if len(np.unique(place)) > LINKED:
        return None
    order = np.lexsort((tiles.year, place))
    same = np.flatnonzero(place[order][1:] == place[order][:-1])
    return np.stack([points[order[same]], points[order[same + 1]]], axis=1)

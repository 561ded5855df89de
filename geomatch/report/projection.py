"""Descriptors in two dimensions: projections, scatter plots and animations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from geomatch.errors import GeomatchError

FloatArray = NDArray[np.floating]

COLOURS = 20
"""Largest number of labels that are told apart by colour."""
INK, GREY, LINE = "#24292f", "#57606a", "#d0d7de"
SIDE, DPI = 6.4, 120
MILLISECONDS, LAST = 400, 2000
"""Duration of a frame of an animation, and of its last frame."""


def pca(vectors: FloatArray) -> FloatArray:
    """Project descriptors (n, d), scaled to unit length, to two principal components (n, 2).

    Two-dimensional descriptors are returned as they are. The largest loading of a component is
    positive, so that frames of one training look alike. Rows with NaN stay NaN.
    """
    if vectors.shape[1] == 2:
        return vectors
    points = np.full((len(vectors), 2), np.nan)
    rows = np.isfinite(vectors).all(axis=1)
    points[rows] = 0
    size = min(2, rows.sum() - 1, vectors.shape[1])
    if size > 0:
        fitted = PCA(size, svd_solver="randomized", random_state=0)
        points[rows, :size] = fitted.fit_transform(_directions(vectors[rows]))
    return points


def tsne(vectors: FloatArray, seed: int = 0) -> FloatArray:
    """t-SNE (n, 2) of descriptors (n, d), scaled to unit length; van der Maaten and Hinton 2008.

    Raises:
        GeomatchError: there are fewer than four descriptors, or some are NaN or infinite.
    """
    if len(vectors) < 4 or not np.isfinite(vectors).all():
        raise GeomatchError(
            "t-SNE needs at least four descriptors, all finite", "Use --method pca."
        )
    directions = _directions(vectors)
    if min(directions.shape) > 50:
        # As its authors do: it saves most of the time and removes some noise.
        directions = PCA(50, svd_solver="randomized", random_state=seed).fit_transform(directions)
    perplexity = min(30, (len(vectors) - 1) / 3)
    return TSNE(2, perplexity=perplexity, random_state=seed).fit_transform(directions)


def _directions(vectors: FloatArray) -> FloatArray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def scatter(
    points: FloatArray,
    labels: NDArray[np.generic],
    title: str,
    path: Path,
    *,
    names: Sequence[str] = (),
    links: FloatArray | None = None,
    limits: tuple[float, float, float, float] | None = None,
) -> None:
    """Draw points (n, 2) as a PNG, coloured by label if there are at most `COLOURS` labels.

    Args:
        labels: (n,) names, or codes into `names`.
        links: (m, 2, 2) end points of lines, drawn below the points.
        limits: left, right, bottom and top of the plot; by default around the points.
    """
    figure = Figure((SIDE, SIDE), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.07, 0.74, 0.86))
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=8)
    axes.set_aspect("equal", adjustable="datalim" if limits is None else "box")
    axes.tick_params(colors=GREY, labelsize=8, length=3, color=LINE)
    for spine in axes.spines.values():
        spine.set_color(LINE)
    if links is not None:
        axes.add_collection(LineCollection(list(links), colors=LINE, linewidths=0.8, zorder=1))
    values = np.arange(len(names)) if names else np.unique(labels)
    palette = colormaps["tab10" if len(values) <= 10 else "tab20"]
    codes = np.zeros(len(points), int)
    if 1 < len(values) <= COLOURS:
        codes = np.searchsorted(values, labels)
        marks = [
            Line2D([], [], marker="o", linestyle="", markersize=5, color=palette(i), label=name)
            for i, name in enumerate(names or values.astype(str))
        ]
        axes.legend(
            handles=marks,
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            frameon=False,
            fontsize=8,
            labelcolor=INK,
            handletextpad=0.2,
        )
    size = float(np.clip(6000 / max(len(points), 1), 5, 30))
    x, y = points.T
    axes.scatter(x, y, size, palette(codes), alpha=0.8, linewidths=0, zorder=2)
    if limits is not None:
        axes.set(xlim=limits[:2], ylim=limits[2:])
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(path)


def frame(
    vectors: FloatArray,
    labels: NDArray[np.generic],
    title: str,
    path: Path,
    limits: tuple[float, float, float, float] | None = None,
    names: Sequence[str] = (),
) -> None:
    """Draw the principal components of descriptors (n, d) as a frame of an animation."""
    scatter(pca(vectors), labels, title, path, names=names, limits=limits)


def animate(folder: Path) -> Path:
    """Join the PNGs of a folder in the order of their names to `embedding.gif`.

    Raises:
        GeomatchError: there are none.
    """
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise GeomatchError(f"{folder} has no frames", "Train with train.frames set.")
    frames = []
    for path in paths:
        with Image.open(path) as picture:
            frames.append(picture.convert("RGB").quantize(128))
    animation = folder / "embedding.gif"
    frames[0].save(
        animation,
        save_all=True,
        append_images=frames[1:],
        duration=[MILLISECONDS] * (len(frames) - 1) + [LAST],
        loop=0,
    )
    return animation

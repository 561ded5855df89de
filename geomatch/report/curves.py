"""The curves of a report: their data, and drawings as PNGs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay

from geomatch.data.eval_report import SplitMetrics
from geomatch.project import replacing

INK, GREY, LINE = "#24292f", "#57606a", "#d0d7de"
COLOURS = {
    "train": "#8c959f",
    "validation": "#e69f00",
    "test": "#0072b2",
    "same place": "#0072b2",
    "other places": "#d55e00",
}
"""Colours by Okabe and Ito, which are safe for colour-blind readers."""
OTHERS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
"""Colours of series with other names, in turn."""
SIZE, DPI = (6.4, 4.4), 120

Points = list[tuple[float, float | None]]


@dataclass(frozen=True)
class Chart:
    """The data of a chart.

    Attributes:
        name: of its file.
        x, y: labels of the axes.
        series: (x, y) points by name.
        share: both axes range from 0 to 1.
        diagonal: draw the line x = y.
        bins: points are left edges of bins with their counts; the last point is the right edge.
        mark: label and x of a vertical line.
    """

    name: str
    title: str
    x: str
    y: str
    series: Mapping[str, Points]
    share: bool = False
    diagonal: bool = False
    bins: bool = False
    mark: tuple[str, float] | None = None


def charts(
    splits: Mapping[str, SplitMetrics], split: str, training: Mapping[str, Any] | None
) -> list[Chart]:
    """The charts for which there is data.

    Args:
        splits: metrics by split, as `eval` reports them.
        split: the split whose scores are shown.
        training: "epoch" of the evaluated weights, and "series" of (epoch, value) points by name.
    """
    return [*(_training_charts(training) if training else []), *_pair_charts(splits, split)]


def training_series(path: Path) -> dict[str, list[tuple[float, float]]]:
    """(epoch, value) points of each metric in a run's `metrics.jsonl`; none without that file."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    per_epoch = steps_per_epoch(lines)
    series: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if "/" in name and value is not None and math.isfinite(value):
                series.setdefault(name, []).append((line["step"] / per_epoch, value))
    return series


def steps_per_epoch(lines: Sequence[Mapping[str, Any]]) -> float:
    """Steps of an epoch, by the lines of a run's metrics that tell the epoch."""
    return max((x["step"] / x["epoch"] for x in lines if x.get("epoch")), default=1.0)


def _training_charts(training: Mapping[str, Any]) -> Iterator[Chart]:
    mark = "this checkpoint", training["epoch"]
    for name, title, label, key in (
        ("loss", "Training loss", "loss", "/loss"),
        ("map5", "mAP@5 during training", "mAP@5", "/map@5"),
    ):
        series = {n.removesuffix(key): p for n, p in training["series"].items() if n.endswith(key)}
        # An encoder that was not trained has a single point, which is not a curve.
        if any(len(points) > 1 for points in series.values()):
            yield Chart(name, title, "epoch", label, series, mark=mark)


def _pair_charts(splits: Mapping[str, SplitMetrics], split: str) -> Iterator[Chart]:
    checked = {name: metrics.roc for name, metrics in splits.items() if metrics.roc}

    def shares(
        name: str, title: str, curves: Mapping[str, Points], x: str, y: str, diagonal: bool = True
    ) -> Chart:
        return Chart(name, title, x, y, curves, share=True, diagonal=diagonal)

    if not checked:
        return
    points = {s: _points(roc.curve["fpr"], roc.curve["tpr"]) for s, roc in checked.items()}
    title = "ROC of pairs of the same or different places"
    yield shares("roc", title, points, "false positive rate", "true positive rate")
    points = {s: _points(roc.pr["recall"], roc.pr["precision"]) for s, roc in checked.items()}
    title = "Precision and recall of pairs"
    yield shares("pr", title, points, "recall", "precision", diagonal=False)
    calibrations = {s: roc.calibration for s, roc in checked.items()}
    points = {s: _points(bins.probability, bins.share) for s, bins in calibrations.items()}
    title = "Calibration of the probability"
    same = "of the same place"
    yield shares("calibration", title, points, f"probability {same}", f"share {same}")
    if split in checked:
        bins = checked[split].histogram
        counts = {
            name: _points(bins["edges"], [*bins[key], None])
            for name, key in (("same place", "same"), ("other places", "other"))
        }
        mark = "threshold", checked[split].threshold
        title = f"Scores of pairs, {split}"
        yield Chart("scores", title, "score", "pairs", counts, bins=True, mark=mark)


def _points(x: Sequence[float], y: Sequence[float | None]) -> Points:
    return list(zip(x, y, strict=True))


def draw(drawn: Sequence[Chart], folder: Path) -> None:
    """Draw each chart as NAME.png in a folder."""
    for chart in drawn:
        canvas, axes = _canvas(chart.title)
        axes.set_xlabel(chart.x, color=GREY, fontsize=9)
        axes.set_ylabel(chart.y, color=GREY, fontsize=9)
        axes.grid(color=LINE, linewidth=0.5)
        axes.set_axisbelow(True)
        if chart.diagonal:
            axes.plot([0, 1], [0, 1], color=LINE, linewidth=1)
        for i, (name, points) in enumerate(chart.series.items()):
            x, y = zip(*points, strict=True)
            colour = COLOURS.get(name, OTHERS[i % len(OTHERS)])
            if chart.bins:
                axes.stairs(y[:-1], x, fill=True, color=colour, alpha=0.55, label=name)
            else:
                axes.plot(x, y, color=colour, linewidth=1.6, label=name)
        if chart.share:
            axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        if chart.mark:
            what, where = chart.mark
            axes.axvline(where, color=INK, linewidth=1, linestyle="--", label=what)
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
        with replacing(folder / f"{chart.name}.png") as temporary:
            canvas.print_png(temporary)


def draw_confusion(counts: Sequence[Sequence[int]], split: str, folder: Path) -> None:
    """Draw a confusion matrix as `confusion.png`.

    Args:
        counts: [[true negatives, false positives], [false negatives, true positives]].
    """
    canvas, axes = _canvas(f"Confusion matrix at the threshold, {split}")
    names = ["other place", "same place"]
    shown = ConfusionMatrixDisplay(np.asarray(counts), display_labels=names)
    shown.plot(ax=axes, cmap="Blues", colorbar=False, values_format=",")
    axes.set_xlabel("predicted", color=GREY, fontsize=9)
    axes.set_ylabel("actual", color=GREY, fontsize=9)
    with replacing(folder / "confusion.png") as temporary:
        canvas.print_png(temporary)


def _canvas(title: str) -> tuple[FigureCanvasAgg, Axes]:
    """A canvas with empty axes."""
    figure = Figure(SIZE, dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=8)
    axes.tick_params(colors=GREY, labelsize=8, length=3, color=LINE)
    axes.spines[:].set_visible(False)
    return FigureCanvasAgg(figure), axes

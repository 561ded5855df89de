"""The figures of `eval` as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from geomatch.cli import console
from geomatch.evaluate import Report

MOST = 40
"""Groups of queries that are still a table; of more, the report has them all."""
RECALL = {"R@1": "recall@1", "R@5": "recall@5", "R@10": "recall@10"}
GRADED = {"mAP": "trapezoidal map", "mP@1": "mp@1", "mP@5": "mp@5", "mP@10": "mp@10"}
MAIN = {
    "queries": "queries",
    "tiles": "database",
    "mAP": "map",
    "mAP@5": "map@5",
    **RECALL,
    "rank": "median_rank",
    "error m": "median_error_m",
}
RATES = {"AUC": "auc", "EER": "eer", "threshold": "threshold", "FPR": "fpr", "TPR": "tpr"}
GROUP = {"queries": "queries", "mAP@5": "map@5", **RECALL, "rank": "median_rank"}
CLASS = {"queries": "queries", "mAP": "map", "mAP@5": "map@5", "hit@5": "hit@5"}
"""Titles of columns, and the figures of the report that stand there."""

Columns = Mapping[str, str]
Metrics = Mapping[str, Any]


def show(report: Report, fpr: float) -> None:
    """Print what was measured.

    Args:
        fpr: the share of false positives that the threshold was chosen for.
    """
    _splits(report)
    if checked := [(split, f["roc"]) for split, f in report.splits.items() if f["roc"]]:
        _table(f"the same place or not, at FPR {fpr:g}", "split", RATES, checked)
    if report.others:
        _others(report)
    if report.graded:
        searched = "{queries} graded queries among {database} tiles".format(**report.graded)
        grades = [(grade, report.graded[grade]) for grade in ("easy", "medium", "hard")]
        _table(f"{searched}, revisited Oxford and Paris protocol", "", GRADED, grades)
    for key, name, title, columns in (
        ("changed", "changed", "test, by the share of ground that changed", GROUP),
        ("content", "content", "test, by what tells a tile from others", GROUP),
        ("regions", "region", "test, by region", GROUP),
        ("classes", "class", "test, by class", CLASS),
    ):
        listed = report.splits["test"].get(key, [])
        if 1 < len(listed) <= MOST:
            _table(title, name, columns, [(group[name], group) for group in listed])


def _splits(report: Report) -> None:
    known = {key for split in report.splits.values() for key in split if split[key] is not None}
    columns = {title: key for title, key in MAIN.items() if key in known}
    rows: list[tuple[str, Metrics]] = []
    for split, metrics in report.splits.items():
        rows.append((split, metrics))
        if len(metrics["pairs"]) > 1:
            rows += [
                (f"  {pair['query_year']} in {pair['database_year']}", pair)
                for pair in metrics["pairs"]
            ]
    medians = "rank and error are medians" if "error m" in columns else "rank is the median"
    title = f"{report.embeddings}, exact search; {medians}, ± is of 95 % intervals"
    _table(title, "split", columns, rows)


def _others(report: Report) -> None:
    """Baselines and other runs on the split that matters most."""
    filled = (s for s in ("test", "validation") if report.splits[s]["queries"])
    split = next(filled, "train")
    rows = [(report.embeddings, {**report.splits[split], "behind": None})]
    for other in report.others:
        behind = other["differences"][split]["map@5"]
        told = None if behind is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(*behind)
        rows.append((other["name"], {**other["splits"][split], "behind": told}))
    title = f"{split}, side by side; of how far others are behind, the paired 95 % interval"
    _table(title, "", {"mAP@5": "map@5", **RECALL, "behind in mAP@5": "behind"}, rows)


def _table(title: str, head: str, columns: Columns, rows: Iterable[tuple[str, Metrics]]) -> None:
    """Print named rows of figures."""
    shown = [(name, *(_told(metrics, key) for key in columns.values())) for name, metrics in rows]
    console.table(title, (head, *columns), shown, numbers=tuple(columns))


def _told(metrics: Metrics, key: str) -> Any:
    """A figure; mAP@5 with half its interval, where there is one."""
    interval = metrics.get("intervals", {}).get("map@5") if key == "map@5" else None
    if interval is None:
        return metrics[key]
    return f"{metrics[key]:.3f} ±{(interval[1] - interval[0]) / 2:.3f}"

"""The metrics of `eval` as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from geomatch.cli import console
from geomatch.data.eval_report import Report

MOST = 40
"""Groups of queries that still make a table; the report has all of them."""
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
NO_MATCH = {"queries": "queries", "threshold": "threshold", "FPR": "fpr", "TPR": "tpr"}
RATES = {"AUC": "auc", "EER": "eer", "threshold": "threshold", "FPR": "fpr", "TPR": "tpr"}
GROUP = {"queries": "queries", "mAP@5": "map@5", **RECALL, "rank": "median_rank"}
CLASS = {"queries": "queries", "mAP": "map", "mAP@5": "map@5", "hit@5": "hit@5"}
"""Titles of columns, and the names of their metrics in JSON."""

Columns = Mapping[str, str]
Metrics = Mapping[str, Any]


def show(report: Report, fpr: float) -> None:
    """Print what was measured.

    Args:
        fpr: the share of false positives that the threshold was chosen for.
    """
    splits = {split: metrics.as_json() for split, metrics in report.splits.items()}
    _splits(report.embeddings, splits)
    for title, key, columns, what in (
        ("the same place or not", "roc", RATES, "pairs of different places pass for one"),
        ("a match or none", "no_match", NO_MATCH, "queries without a match get one"),
    ):
        if told := [(s, metrics[key]) for s, metrics in splits.items() if metrics.get(key)]:
            _table(f"{title}, at FPR {fpr:g}", "split", columns, told)
            if (metrics := dict(told).get("test")) and metrics.get("holds") is False:
                low, high = metrics["fpr_interval"]
                console.note(
                    f"warning: {low:.1%} to {high:.1%} of test's {what}, more than the {fpr:.1%} "
                    "that the threshold was chosen for"
                )
    if report.others:
        _others(report)
    if graded := report.graded:
        title = (
            f"{graded.queries} graded queries among {graded.database} tiles, "
            "revisited Oxford and Paris protocol"
        )
        grades = {"easy": graded.easy, "medium": graded.medium, "hard": graded.hard}
        _table(title, "", GRADED, grades.items())
    for key, name, title, columns in (
        ("changed", "changed", "test, by the share of ground that changed", GROUP),
        ("content", "content", "test, by how distinct a tile is", GROUP),
        ("regions", "region", "test, by region", GROUP),
        ("classes", "class", "test, by class", CLASS),
    ):
        groups = splits["test"].get(key, [])
        if 1 < len(groups) <= MOST:
            _table(title, name, columns, [(group[name], group) for group in groups])


def _splits(embeddings: str, splits: Mapping[str, Metrics]) -> None:
    defined = {key for metrics in splits.values() for key in metrics if metrics[key] is not None}
    columns = {title: key for title, key in MAIN.items() if key in defined}
    rows: list[tuple[str, Metrics]] = []
    for split, metrics in splits.items():
        rows.append((split, metrics))
        if len(metrics["pairs"]) > 1:
            rows += [
                (f"  {pair['query_year']} in {pair['database_year']}", pair)
                for pair in metrics["pairs"]
            ]
    medians = "rank and error are medians" if "error m" in columns else "rank is the median"
    title = f"{embeddings}, exact search; {medians}, ± is half of a 95 % interval"
    _table(title, "split", columns, rows)


def _others(report: Report) -> None:
    """Baselines and other runs, on the test split if it has queries."""
    filled = (split for split in ("test", "validation") if report.splits[split].queries)
    split = next(filled, "train")
    rows = [(report.embeddings, {**report.splits[split].as_json(), "behind": None})]
    for other in report.others:
        interval = other.differences[split]["map@5"]
        behind = None if interval is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(*interval)
        rows.append((other.name, {**other.splits[split].as_json(), "behind": behind}))
    title = f"{split}, side by side; how far others are behind, with the paired 95 % interval"
    _table(title, "", {"mAP@5": "map@5", **RECALL, "behind in mAP@5": "behind"}, rows)


def _table(title: str, head: str, columns: Columns, rows: Iterable[tuple[str, Metrics]]) -> None:
    """Print named rows of metrics."""
    shown = [(name, *(_cell(metrics, key) for key in columns.values())) for name, metrics in rows]
    console.table(title, (head, *columns), shown, numbers=tuple(columns))


def _cell(metrics: Metrics, key: str) -> Any:
    """A metric; mAP@5 with half of its interval, and of how many queries some were drawn."""
    if key == "queries" and (total := metrics.get("drawn_from")):
        return f"{metrics[key]} of {total}"
    if key == "map@5":
        interval = metrics.get("intervals", {}).get(key)
    else:
        interval = metrics.get(f"{key}_interval")
    if interval is None:
        return metrics[key]
    return f"{metrics[key]:.3f} ±{(interval[1] - interval[0]) / 2:.3f}"

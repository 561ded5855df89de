"""A page that compares runs: settings that differ, metrics and curves."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from geomatch import __version__
from geomatch.project import replacing
from geomatch.report.curves import Chart, Points, draw

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #24292f; max-width: 60rem; margin: 2rem auto }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { text-align: left; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid #d0d7de }
img { max-width: 100% }
footer { color: #57606a; font-size: 85% }
"""

TITLES = {"train/loss": ("Training loss", "loss"), "validation/map@5": ("Validation", "mAP@5")}


def write_run_page(
    path: Path,
    runs: Sequence[str],
    metrics: Mapping[str, Sequence[str]],
    settings: Mapping[str, Sequence[str]],
    curves: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
) -> None:
    """Write a page, a file of its own.

    Args:
        runs: their names.
        metrics, settings: a text for each run, by name of the row.
        curves: (epoch, value) points by metric and run.
    """
    same = "" if settings else "<p>All settings are the same.</p>"
    parts = [
        f"<h1>{escape(' and '.join(runs))}</h1>",
        "<h2>Metrics</h2>",
        _table(runs, metrics),
        f"<h2>Settings that differ</h2>{same}",
        _table(runs, settings) if settings else "",
        "<h2>Curves</h2>",
        *(f'<p><img alt="{title}" src="{uri}"></p>' for title, uri in _pictures(curves)),
        f"<footer>geomatch {__version__}</footer>",
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    text = (
        f'<!doctype html>\n<html lang="en"><head>{head}<link rel="icon" href="data:,">'
        f"<title>geomatch runs</title><style>{STYLE}</style></head>\n<body>"
    )
    with replacing(path) as temporary:
        temporary.write_text("\n".join([text, *parts, "</body></html>\n"]), encoding="utf-8")


def _table(runs: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    def row(cells: Sequence[Any], kind: str = "td") -> str:
        first, *rest = (escape(str(cell)) for cell in cells)
        texts = "".join(f"<{kind}>{cell}</{kind}>" for cell in rest)
        return f'<tr><th scope="row">{first}</th>{texts}</tr>'

    body = "\n".join(row((name, *values)) for name, values in rows.items())
    return f"<table>\n<thead>{row(('', *runs), 'th')}</thead>\n<tbody>{body}</tbody>\n</table>"


def _pictures(
    curves: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
) -> list[tuple[str, str]]:
    """Titles and data URIs of the curves that there are."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for key, (title, label) in TITLES.items():
            if key in curves:
                series: dict[str, Points] = {
                    run: [(x, y) for x, y in points] for run, points in curves[key].items()
                }
                draw([Chart("curve", title, "epoch", label, series)], Path(folder))
                png = base64.b64encode((Path(folder) / "curve.png").read_bytes()).decode()
                found.append((title, f"data:image/png;base64,{png}"))
    return found

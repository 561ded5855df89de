"""The report of `eval` as one page: figures, curves, matches and a map, in a file of its own."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from geomatch import __version__
from geomatch.data import embeddings
from geomatch.data.eval_report import Report
from geomatch.data.query_results import QueryTable
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.manifests import EmbeddingManifest, TileManifest
from geomatch.project import Project, read_json, replacing
from geomatch.report import curves
from geomatch.report.contact_sheet import picture
from geomatch.report.matches import TilePictures, match_folder

LARGE, SMALL, QUALITY = 96, 64, 70
"""Sides of thumbnails of shown queries and of the map, in pixels, and their quality as JPEG."""
SHOWN = 6
"""Queries shown as best, as worst and at random, each."""
SHEET = 16
"""Thumbnails of the map along a side of one JPEG: a header for each would take a third."""
BYTES = 14_000_000
"""Size of a page at the most; the map's thumbnails that would take it beyond are left out."""
SQUARES = 100_000
"""Queries on a map, at the most."""
EARTH = 6_371_008.8
"""Radius of the mean sphere in metres."""

Ints = NDArray[np.int64]
FloatArray = NDArray[np.floating]


def write_page(project: Project, folder: Path) -> Path:
    """Write `report.html` beside what `eval` measured.

    Its curves are PNGs in `figures/`, and the queries it shows in `matches/`.

    Args:
        folder: of the report, with `report.json` and `queries.parquet`.

    Raises:
        StaleError: one of these is missing or damaged.
    """
    report = Report.load(folder / "report.json")
    queries = QueryTable.load(folder / "queries.parquet")
    thumbnails, manifest = Thumbnails.of(project), project.tile_manifest()
    tiles = thumbnails.tiles
    made = embeddings.read_manifest(project.embeddings / f"{report.embeddings}.parquet")
    split = next((s for s in reversed(SPLITS) if report.splits[s].queries), SPLITS[-1])
    asked = queries.select(tiles.split[queries.tile] == SPLITS.index(split))
    ground, drawn = _ground(tiles, asked, manifest.in_metres)
    shown = curves.charts(report.splits, split, _training(project, made))
    curves.draw(shown, folder / "figures")
    if checked := report.splits[split].roc:
        curves.draw_confusion(checked.confusion, split, folder / "figures")
    chosen = _chosen(tiles.places(), asked)
    match_folder(thumbnails, asked, chosen, folder / "matches")
    page = {
        "version": __version__,
        "split": split,
        "report": report.as_json(),
        "charts": [asdict(chart) for chart in shown],
        "distribution": _distribution(tiles),
        "shown": {
            name: [_answered(asked, row, thumbnails) for row in rows]
            for name, rows in chosen.items()
        },
        "map": ground,
        "measured": _measured(project, manifest, made),
    }
    path = folder / "report.html"
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        before, after = _filled(page).split("{{sheets}}")
        size = file.write(before) + len(after)
        for sheet in thumbnails.sheets(drawn):
            size += len(sheet)
            if size > BYTES:
                break
            file.write(sheet)
        file.write(after)
    return path


def _filled(page: Mapping[str, Any]) -> str:
    """The template with its parts, but for the sheets."""
    data = json.dumps(page, allow_nan=False, separators=(",", ":"))
    text = _packaged("template.html")
    for name in ("page.css", "page.js"):
        text = text.replace(f"{{{{{name}}}}}", _packaged(name))
    # In a script element, the name of a file must not end it.
    return text.replace("{{page}}", data.replace("<", "\\u003c"))


def _packaged(name: str) -> str:
    return resources.files("geomatch.report").joinpath(name).read_text("utf-8")


class Thumbnails(TilePictures):
    """Small pictures of a project's tiles, as JPEG."""

    def uri(self, row: int) -> str:
        """A tile of the catalogue, as a data URI."""
        (image,) = self._pictures(np.array([row]), LARGE)
        return f"data:image/jpeg;base64,{_jpeg(image)}"

    def sheets(self, rows: Ints) -> Iterator[str]:
        """Tiles of the catalogue, `SHEET` x `SHEET` to an element of the page."""
        for start in range(0, len(rows), SHEET * SHEET):
            part = rows[start : start + SHEET * SHEET]
            canvas = Image.new("RGB", (SHEET * SMALL, -(-len(part) // SHEET) * SMALL))
            for i, image in enumerate(self._pictures(part, SMALL)):
                canvas.paste(image, (i % SHEET * SMALL, i // SHEET * SMALL))
            yield f'<script type="text/plain" class="sheet">{_jpeg(canvas)}</script>\n'

    def _pictures(self, rows: Ints, side: int) -> Iterator[Image.Image]:
        for start in range(0, len(rows), SHEET):
            some = self.tiles.store_row[rows[start : start + SHEET]]
            for pixels in self.store.read(some):
                yield picture(pixels[..., : self.channels], side)


def _jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _training(project: Project, made: EmbeddingManifest) -> dict[str, Any] | None:
    """Figures of the run that made the embeddings, as (epoch, value) by name; None without."""
    path = project.root / made.run / "metrics.jsonl"
    if not path.exists():
        return None
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    per_epoch = max((x["step"] / x["epoch"] for x in lines if x.get("epoch")), default=1.0)
    series: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            shown = name == "train/loss" or name.endswith("/map@5")
            if shown and value is not None and math.isfinite(value):
                series.setdefault(name, []).append((line["step"] / per_epoch, value))
    return {"epoch": made.step / per_epoch, "series": series}


def _distribution(tiles: TileTable) -> list[dict[str, Any]]:
    """Tiles of each year, or class, by split."""
    names, codes = (tiles.years, tiles.year) if tiles.dated else (tiles.classes, tiles.label)
    counts = np.zeros((len(names), len(SPLITS)), np.int64)
    np.add.at(counts, (codes, tiles.split), 1)
    return [
        {"year" if tiles.dated else "class": name, **dict(zip(SPLITS, row, strict=True))}
        for name, row in zip(names, counts.tolist(), strict=True)
    ]


def _measured(
    project: Project, tiles: TileManifest, made: EmbeddingManifest
) -> dict[str, dict[str, Any]]:
    """What the tiles and the embeddings are, and the settings of the run."""
    shown = ("grid", "placement", "channels", "tiles", "geomatch", "fingerprint")
    left_out = ("name", "centres")
    about = {
        "tiles": {key: tiles.as_json()[key] for key in shown},
        "embeddings": {key: v for key, v in made.as_json().items() if key not in left_out},
    }
    path = project.root / made.run / "config.json"
    if path.exists():
        settings = read_json(path, "geomatch train")["settings"]
        about |= {f"[{table}]": keys for table, keys in settings.items()}
    return about


# Queries with their answers


def _chosen(places: Ints, asked: QueryTable) -> dict[str, list[int]]:
    """The best, the worst and some other queries, one of each place; indices into `asked`."""
    first = asked.top_score[:, 0]
    orders = {
        "best": np.lexsort((-first, asked.rank)),
        "worst": np.lexsort((-first, -asked.rank)),
        "random": np.random.default_rng(0).permutation(len(asked)),
    }
    chosen = {}
    for name, order in orders.items():
        of_place = np.unique(places[asked.tile[order]], return_index=True)[1]
        chosen[name] = order[np.sort(of_place)[:SHOWN]].tolist()
    return chosen


def _answered(asked: QueryTable, row: int, thumbnails: Thumbnails) -> dict[str, Any]:
    query, top = asked.tile[row], asked.top[row][asked.top[row] >= 0]
    scores, metres = _numbers(asked.top_score[row], 3), _numbers(asked.distance_m[row], 0)
    shown = thumbnails.tiles.select(np.array([query, *top]))
    ids, cells, years = shown.ids(), shown.cells(), [shown.years[code] for code in shown.year]
    return {
        "id": ids[0],
        "place": cells[0],
        "year": years[0],
        "rank": int(asked.rank[row]),
        "picture": thumbnails.uri(query),
        "answers": [
            {
                "id": ids[i],
                "place": cells[i],
                "year": years[i],
                "score": scores[i - 1],
                "away": metres[i - 1],
                "right": cells[i] == cells[0],
                "picture": thumbnails.uri(tile),
            }
            for i, tile in enumerate(top, start=1)
        ],
    }


# The map


def _ground(
    tiles: TileTable, asked: QueryTable, placed: bool
) -> tuple[dict[str, Any] | None, Ints]:
    """What a map of the queries is drawn from, and the tiles it shows.

    Tiles are numbered in the order of a draw, so that any beginning of them is a fair sample.

    Args:
        placed: whether tiles lie where they say.
    """
    if tiles.grid is None or not len(asked):
        return None, np.empty(0, np.int64)
    rows = np.random.default_rng(0).permutation(len(asked))[:SQUARES]
    some = asked.select(rows)
    first = some.top[:, 0]
    pair = np.stack([tiles.year[some.tile], tiles.year[some.match]], axis=1)
    pairs, which = np.unique(pair, axis=0, return_inverse=True)
    both = np.stack([some.tile, first], axis=1).reshape(-1)
    shown, at = np.unique(both[both >= 0], return_index=True)
    shown = shown[np.argsort(at)]
    number = np.full(len(tiles) + 1, -1)  # of no answer, -1, the last
    number[shown] = np.arange(len(shown))
    x, y = _plan(tiles.select(some.tile), some)
    return {
        "total": len(asked),
        "pairs": [[tiles.years[a], tiles.years[b]] for a, b in pairs],
        "metres": tiles.grid.step if placed else None,
        "pair": which.reshape(-1).tolist(),
        "x": _numbers(x, 2),
        "y": _numbers(y, 2),
        "rank": some.rank.tolist(),
        "query": number[some.tile].tolist(),
        "answer": number[first].tolist(),
        "score": _numbers(some.top_score[:, 0], 3),
        "away": _numbers(some.distance_m[:, 0], 0),
        "ids": tiles.select(shown).ids(),
    }, shown


def _plan(tiles: TileTable, asked: QueryTable) -> tuple[FloatArray, FloatArray]:
    """East and north of each query in steps of the grid, from the south-west.

    Over several zones, of a cylinder that is true in the middle.
    """
    assert tiles.grid is not None
    if (tiles.epsg == tiles.epsg[0]).all():
        x, y = tiles.col.astype(float), tiles.row.astype(float)
    else:
        east = np.radians(asked.lon) * math.cos(math.radians(float(np.median(asked.lat))))
        x, y = (EARTH * a / tiles.grid.step for a in (east, np.radians(asked.lat)))
    return x - x.min(), y - y.min()


def _numbers(values: FloatArray, digits: int) -> list[float | None]:
    """Rounded; None for what is no number."""
    rounded = np.round(values.astype(float), digits).tolist()
    return [None if not math.isfinite(v) else int(v) if v == int(v) else v for v in rounded]

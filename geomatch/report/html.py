"""The report of `eval` as a self-contained HTML page: metrics, curves, matches and a map."""

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
from geomatch.manifests import EmbeddingManifest, RunManifest, TileManifest
from geomatch.project import Project, read_record, replacing
from geomatch.report import curves
from geomatch.report.contact_sheet import picture
from geomatch.report.matches import TilePictures, match_folder

LARGE, SMALL, QUALITY = 96, 64, 70
"""Sides in pixels of the thumbnails of shown queries and of the map, and their JPEG quality."""
SHOWN = 6
"""Queries shown in each selection: best, worst and random."""
SHEET = 16
"""Map thumbnails along each side of a JPEG: single JPEGs would be a third headers."""
BYTES = 14_000_000
"""Largest size of a page; map thumbnails beyond it are left out."""
SQUARES = 100_000
"""Largest number of queries on the map."""
EARTH = 6_371_008.8
"""Mean radius in metres."""

Ints = NDArray[np.int64]
FloatArray = NDArray[np.floating]


def write_page(project: Project, folder: Path) -> Path:
    """Write `report.html`, with curves as PNGs in `figures/` and shown queries in `matches/`.

    Args:
        folder: of the report, with `report.json` and `queries.parquet`.

    Raises:
        StaleError: one of these files is missing or damaged.
    """
    report = Report.load(folder / "report.json")
    queries = QueryTable.load(folder / "queries.parquet")
    thumbnails, tile_manifest = Thumbnails.of(project), project.tile_manifest()
    tiles = thumbnails.tiles
    manifest = embeddings.read_manifest(project.embeddings / f"{report.embeddings}.parquet")
    split = next((s for s in reversed(SPLITS) if report.splits[s].queries), SPLITS[-1])
    selected = queries.select(tiles.split[queries.tile] == SPLITS.index(split))
    map_data, map_tiles = _map_data(tiles, selected, tile_manifest.in_metres)
    shown = curves.charts(report.splits, split, _training(project, manifest))
    curves.draw(shown, folder / "figures")
    if checked := report.splits[split].roc:
        curves.draw_confusion(checked.confusion, split, folder / "figures")
    chosen = _choose(tiles.places(), selected)
    match_folder(thumbnails, selected, chosen, folder / "matches")
    page = {
        "version": __version__,
        "split": split,
        "report": report.as_json(),
        "charts": [asdict(chart) for chart in shown],
        "distribution": _distribution(tiles),
        "shown": {
            name: [_shown_query(selected, row, thumbnails) for row in rows]
            for name, rows in chosen.items()
        },
        "map": map_data,
        "measured": _provenance(project, tile_manifest, manifest),
    }
    path = folder / "report.html"
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        before, after = _fill_template(page).split("{{sheets}}")
        size = file.write(before) + len(after)
        for sheet in thumbnails.sheets(map_tiles):
            size += len(sheet)
            if size > BYTES:
                break
            file.write(sheet)
        file.write(after)
    return path


def _fill_template(page: Mapping[str, Any]) -> str:
    """The template with everything but the sheets of thumbnails."""
    data = json.dumps(page, allow_nan=False, separators=(",", ":"))
    text = _packaged("template.html")
    for name in ("page.css", "page.js"):
        text = text.replace(f"{{{{{name}}}}}", _packaged(name))
    # A file name must not end the script element.
    return text.replace("{{page}}", data.replace("<", "\\u003c"))


def _packaged(name: str) -> str:
    return resources.files("geomatch.report").joinpath(name).read_text("utf-8")


class Thumbnails(TilePictures):
    """Thumbnails of a project's tiles as JPEG."""

    def uri(self, row: int) -> str:
        """The thumbnail of a tile of the catalogue as a data URI."""
        (image,) = self._pictures(np.array([row]), LARGE)
        return f"data:image/jpeg;base64,{_jpeg(image)}"

    def sheets(self, rows: Ints) -> Iterator[str]:
        """Thumbnails of tiles of the catalogue, `SHEET` x `SHEET` per element of the page."""
        for start in range(0, len(rows), SHEET * SHEET):
            part = rows[start : start + SHEET * SHEET]
            canvas = Image.new("RGB", (SHEET * SMALL, -(-len(part) // SHEET) * SMALL))
            for i, image in enumerate(self._pictures(part, SMALL)):
                canvas.paste(image, (i % SHEET * SMALL, i // SHEET * SMALL))
            yield f'<script type="text/plain" class="sheet">{_jpeg(canvas)}</script>\n'

    def _pictures(self, rows: Ints, side: int) -> Iterator[Image.Image]:
        for start in range(0, len(rows), SHEET):
            stored = self.tiles.store_row[rows[start : start + SHEET]]
            for pixels in self.store.read(stored):
                yield picture(pixels[..., : self.channels], side)


def _jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _training(project: Project, manifest: EmbeddingManifest) -> dict[str, Any] | None:
    """Metrics during the run that made the embeddings; see `curves.charts`. None without a log."""
    path = project.run_of(manifest) / "metrics.jsonl"
    if not path.exists():
        return None
    shown = {
        name: points
        for name, points in curves.training_series(path).items()
        if name == "train/loss" or name.endswith("/map@5")
    }
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {"epoch": manifest.step / curves.steps_per_epoch(lines), "series": shown}


def _distribution(tiles: TileTable) -> list[dict[str, Any]]:
    """Number of tiles of each year, or class, by split."""
    names, codes = (tiles.years, tiles.year) if tiles.dated else (tiles.classes, tiles.label)
    counts = np.zeros((len(names), len(SPLITS)), np.int64)
    np.add.at(counts, (codes, tiles.split), 1)
    return [
        {"year" if tiles.dated else "class": name, **dict(zip(SPLITS, row, strict=True))}
        for name, row in zip(names, counts.tolist(), strict=True)
    ]


def _provenance(
    project: Project, tiles: TileManifest, manifest: EmbeddingManifest
) -> dict[str, dict[str, Any]]:
    """Manifests of the tiles and of the embeddings, the last start of the run and its settings."""
    shown = ("grid", "placement", "channels", "tiles", "geomatch", "fingerprint")
    omitted = ("name", "centres")
    found = {
        "tiles": {key: tiles.as_json()[key] for key in shown},
        "embeddings": {key: v for key, v in manifest.as_json().items() if key not in omitted},
    }
    path = project.run_of(manifest) / "config.json"
    if path.exists():
        run = read_record(path, RunManifest, "geomatch train")
        for last in run.sessions[-1:]:
            values = last.as_json()
            found["run"] = values | values.pop("versions") | (values.pop("git") or {})
        found |= {f"[{table}]": keys for table, keys in run.settings.items()}
    return found


# Queries with their answers


def _choose(places: Ints, queries: QueryTable) -> dict[str, list[int]]:
    """Indices of the best, the worst and random queries, one per place."""
    first = queries.top_score[:, 0]
    orders = {
        "best": np.lexsort((-first, queries.rank)),
        "worst": np.lexsort((-first, -queries.rank)),
        "random": np.random.default_rng(0).permutation(len(queries)),
    }
    chosen = {}
    for name, order in orders.items():
        of_place = np.unique(places[queries.tile[order]], return_index=True)[1]
        chosen[name] = order[np.sort(of_place)[:SHOWN]].tolist()
    return chosen


def _shown_query(queries: QueryTable, row: int, thumbnails: Thumbnails) -> dict[str, Any]:
    query, top = queries.tile[row], queries.top[row][queries.top[row] >= 0]
    scores, metres = _numbers(queries.top_score[row], 3), _numbers(queries.distance_m[row], 0)
    shown = thumbnails.tiles.select(np.array([query, *top]))
    ids, cells, years = shown.ids(), shown.cells(), [shown.years[code] for code in shown.year]
    return {
        "id": ids[0],
        "place": cells[0],
        "year": years[0],
        "rank": int(queries.rank[row]),
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


def _map_data(
    tiles: TileTable, queries: QueryTable, in_metres: bool
) -> tuple[dict[str, Any] | None, Ints]:
    """The data of the map of queries, and its tiles in the order of their numbers on the map.

    That order is random, so that thumbnails of the first tiles alone are a fair sample.

    Args:
        in_metres: whether distances on the grid are distances on the ground.
    """
    if tiles.grid is None or not len(queries):
        return None, np.empty(0, np.int64)
    rows = np.random.default_rng(0).permutation(len(queries))[:SQUARES]
    some = queries.select(rows)
    first = some.top[:, 0]
    pair = np.stack([tiles.year[some.tile], tiles.year[some.match]], axis=1)
    pairs, which = np.unique(pair, axis=0, return_inverse=True)
    both = np.stack([some.tile, first], axis=1).reshape(-1)
    shown, at = np.unique(both[both >= 0], return_index=True)
    shown = shown[np.argsort(at)]
    number = np.full(len(tiles) + 1, -1)  # a missing answer is -1, the last element
    number[shown] = np.arange(len(shown))
    x, y = _grid_positions(tiles.select(some.tile), some)
    return {
        "total": len(queries),
        "pairs": [[tiles.years[a], tiles.years[b]] for a, b in pairs],
        "metres": tiles.grid.step if in_metres else None,
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


def _grid_positions(tiles: TileTable, queries: QueryTable) -> tuple[FloatArray, FloatArray]:
    """Easting and northing of each query in grid steps from the south-west.

    Several UTM zones are shown in an equirectangular projection, true at the median latitude.
    """
    assert tiles.grid is not None
    if (tiles.epsg == tiles.epsg[0]).all():
        x, y = tiles.col.astype(float), tiles.row.astype(float)
    else:
        east = np.radians(queries.lon) * math.cos(math.radians(float(np.median(queries.lat))))
        x, y = (EARTH * a / tiles.grid.step for a in (east, np.radians(queries.lat)))
    return x - x.min(), y - y.min()


def _numbers(values: FloatArray, digits: int) -> list[float | None]:
    """Round values; None for NaN and infinity."""
    rounded = np.round(values.astype(float), digits).tolist()
    return [None if not math.isfinite(v) else int(v) if v == int(v) else v for v in rounded]

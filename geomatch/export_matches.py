"""Export of matches: what each query of an evaluation found, for GIS programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from geomatch.data import embeddings
from geomatch.data.eval_report import Report
from geomatch.data.query_results import QueryTable
from geomatch.data.tiles import TileTable
from geomatch.errors import UsageError
from geomatch.geo import footprints, layers
from geomatch.geo.grid import CRS84
from geomatch.geo.layers import Layer
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, latest, replacing

BLOCK = 16_384
"""Queries in memory at a time."""
RANKS = {
    "1": (0.5, 1.5, "26,150,65,150"),
    "2 to 5": (1.5, 5.5, "166,217,106,150"),
    "6 to 50": (5.5, 50.5, "253,174,97,150"),
    "later": (50.5, 1e9, "215,25,28,150"),
}
"""Bounds of the rank of the match, and red, green, blue and alpha of the fill."""


@dataclass(frozen=True)
class ExportedMatches:
    """What was written: name of the report, the number of queries, and the files."""

    report: str
    queries: int
    files: tuple[Path, ...]


def export_matches(
    project: Project,
    *,
    report: str | None = None,
    gpkg: Path | None = None,
    geojson: Path | None = None,
    progress: ProgressCallback = silent,
) -> ExportedMatches:
    """Write the queries of an evaluation with the rank of their match, and lines to their answers.

    The layer "queries" has footprints; "links" has a line from each query to each of its first
    answers that is elsewhere. A style for QGIS, which colours queries by rank, is written beside
    each file as FILE.qml.

    Args:
        report: its name; by default the latest.
        gpkg: GeoPackage, in the CRS of the grid ("utm": in degrees).
        geojson: GeoJSON, of the queries alone, in degrees.

    Raises:
        UsageError: nothing is to be written, or the tiles have no georeference.
        GeomatchError: there is no report, or its tiles are not those of the project.
    """
    if not (gpkg or geojson):
        raise UsageError("no file to write", "Add --gpkg FILE or --geojson FILE.")
    if not project.tile_manifest().on_ground:
        raise UsageError(
            "the images have no georeference, so queries have no footprints",
            "The answers are in reports/NAME/queries.parquet.",
        )
    name = latest(project.report_names(), report, "report", "geomatch eval")
    folder = project.reports / name
    described = Report.load(folder / "report.json").embeddings
    project.check_fresh(embeddings.read_manifest(project.embeddings / f"{described}.parquet"))
    queries = QueryTable.load(folder / "queries.parquet")
    tiles = TileTable.load(project.catalogue)
    assert tiles.grid is not None
    files = []
    for path, driver, crs in (
        (gpkg, "GPKG", footprints.file_crs(tiles.grid)),
        (geojson, "GeoJSON", CRS84),
    ):
        if path:
            found = _layers(queries, tiles, crs, driver == "GPKG", progress)
            layers.write(path, found, driver, crs)
            style = path.with_suffix(".qml")
            _write_style(style)
            files += [path, style]
    return ExportedMatches(name, len(queries), tuple(files))


def _layers(
    queries: QueryTable, tiles: TileTable, crs: str, linked: bool, progress: ProgressCallback
) -> Iterator[Layer]:
    for start in range(0, len(queries), BLOCK):
        part = queries.select(slice(start, start + BLOCK))
        yield _footprints(part, tiles, crs)
        if linked:
            links = _links(part, tiles, crs)
            if len(links):
                yield links
        progress("writing queries", start + len(part), len(queries))


def _footprints(queries: QueryTable, tiles: TileTable, crs: str) -> Layer:
    asked = tiles.select(queries.tile)
    rings = footprints.rings(asked.epsg, asked.bounds(), crs)
    table = queries.arrow(tiles)
    names = ["id", "split", "year", "database_year", "rank", "match", "match_score"]
    names += ["first", "first_score", "distance_m"]
    return Layer(
        "queries",
        footprints.unbroken(rings) if crs == CRS84 else rings,
        {name: table[name].to_pylist() for name in names},
    )


def _links(queries: QueryTable, tiles: TileTable, crs: str) -> Layer:
    """Lines (n, 2, 2) from queries to answers whose tile is elsewhere."""
    query, position = np.nonzero(queries.top >= 0)
    asked = tiles.select(queries.tile[query])
    answers = tiles.select(queries.top[query, position])
    apart = (asked.centres() != answers.centres()).any(axis=1) | (asked.epsg != answers.epsg)
    query, position = query[apart], position[apart]
    asked, answers = asked.select(apart), answers.select(apart)
    ends = [footprints.in_crs(each.epsg, each.centres(), crs) for each in (asked, answers)]
    lines = np.stack(ends, axis=1)
    fields = {
        "query": asked.ids(),
        "answer": answers.ids(),
        "rank": (position + 1).tolist(),
        "score": queries.top_score[query, position].tolist(),
        "distance_m": layers.or_none(queries.distance_m[query, position]),
    }
    return Layer("links", footprints.unbroken(lines) if crs == CRS84 else lines, fields)


def _write_style(path: Path) -> None:
    """Write a style for QGIS (QML) that colours the layer "queries" by rank."""
    root = ElementTree.Element("qgis", styleCategories="Symbology")
    renderer = ElementTree.SubElement(
        root, "renderer-v2", type="graduatedSymbol", attr="rank", graduatedMethod="GraduatedColor"
    )
    ranges = ElementTree.SubElement(renderer, "ranges")
    symbols = ElementTree.SubElement(renderer, "symbols")
    for i, (label, (lower, upper, colour)) in enumerate(RANKS.items()):
        bounds = {"lower": str(lower), "upper": str(upper), "symbol": str(i), "label": label}
        ElementTree.SubElement(ranges, "range", bounds, render="true")
        symbol = ElementTree.SubElement(symbols, "symbol", type="fill", name=str(i))
        fill = {"class": "SimpleFill", "enabled": "1", "pass": "0"}
        options = ElementTree.SubElement(
            ElementTree.SubElement(symbol, "layer", fill), "Option", type="Map"
        )
        for name, value in (("color", colour), ("style", "solid"), ("outline_width", "0.1")):
            ElementTree.SubElement(options, "Option", type="QString", name=name, value=value)
    ElementTree.indent(root)
    with replacing(path) as temporary:
        ElementTree.ElementTree(root).write(temporary, encoding="utf-8")

"""Queries whose answers a user has graded, by the revisited Oxford and Paris protocol."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomatch.data.eval_report import GradedMetrics
from geomatch.data.tiles import TileTable
from geomatch.errors import GeomatchError, UsageError
from geomatch.evaluation import oxford
from geomatch.evaluation.oxford import Truth
from geomatch.search import exact
from geomatch.search.exact import Metric, Rows

COLUMNS = ("query", "tile", "grade")
GRADES = Truth._fields
Ints = NDArray[np.int64]


def read(path: Path, tiles: TileTable) -> dict[int, Truth]:
    """The relevant answers of each query, as rows of the catalogue.

    Args:
        path: a CSV file with the columns query, tile and grade: two ids of the catalogue, and
            "easy", "hard" or "junk".

    Raises:
        GeomatchError: the file is missing or malformed, or names tiles that do not exist.
    """
    row_of = {name: row for row, name in enumerate(tiles.ids())}
    graded: dict[int, dict[int, str]] = {}
    for where, line in _lines(path):
        for name in (line["query"], line["tile"]):
            if name not in row_of:
                raise GeomatchError(
                    f"{where}: there is no tile {name!r}",
                    f"Tile ids look like {next(iter(row_of), '0_0@2020')}.",
                )
        if line["grade"] not in GRADES:
            raise GeomatchError(
                f"{where}: the grade is {line['grade']!r}", "Available: easy, hard, junk."
            )
        grades = graded.setdefault(row_of[line["query"]], {})
        answer = row_of[line["tile"]]
        if answer in grades:
            raise GeomatchError(f"{where}: {line['tile']} is graded twice for this query")
        grades[answer] = line["grade"]
    if not graded:
        raise GeomatchError(f"{path} grades no answers")
    return {
        query: Truth(
            *(np.array(sorted(a for a, g in grades.items() if g == name), int) for name in GRADES)
        )
        for query, grades in graded.items()
    }


def _lines(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Lines of the file by column, each with its place in the file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (lines.fieldnames or ())]:
                raise UsageError(
                    f"{path} has no column {missing[0]}", f"Its first line is: {','.join(COLUMNS)}"
                )
            for line in lines:
                yield f"{path}, line {lines.line_num}", line
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise GeomatchError(f"{path} cannot be read: {error}") from error


def measure(
    vectors: Rows, metric: Metric, searched: Ints, truths: dict[int, Truth]
) -> GradedMetrics:
    """Metrics of the graded queries; see `oxford.evaluate`.

    Args:
        vectors: (n, d) descriptors, one row per tile.
        searched: (m,) rows of the database; the queries of `truths` among them are left out.
    """
    queries = np.array(list(truths))
    database = np.setdiff1d(searched, queries)
    among = [
        Truth(*(np.flatnonzero(np.isin(database, graded)) for graded in truth))
        for truth in truths.values()
    ]
    found = oxford.evaluate(_rankings(vectors, metric, queries, database, among), among)
    return GradedMetrics(queries=len(queries), database=len(database), **found)


def _rankings(
    vectors: Rows, metric: Metric, queries: Ints, database: Ints, truths: list[Truth]
) -> Iterator[Ints]:
    """Positions in the database, best first, for each query in turn."""
    prepared = exact.as_database(vectors[database], metric)
    for query, truth in zip(exact.as_queries(vectors[queries], metric), truths, strict=True):
        products = prepared @ query
        right = np.zeros(len(database), bool)
        right[[*truth.easy, *truth.hard]] = True
        # Ties never help: relevant answers come last among equals.
        yield np.lexsort((right, -products))

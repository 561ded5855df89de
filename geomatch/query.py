"""Query: find the place of a tile, a point or an image in other years, by an index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch.data.filters import Filter
from geomatch.errors import GeomatchError
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project
from geomatch.querying.answers import Match, Matches, Unanswered
from geomatch.querying.opened import OpenIndex
from geomatch.querying.options import Options
from geomatch.querying.targets import Query, Targets

CHUNK = 32
"""Targets that are described at a time."""


def query(
    project: Project, target: str, *, progress: ProgressCallback = silent, **options: Any
) -> Matches:
    """Find the nearest tiles to a tile, a point or an image.

    Args:
        target: a tile id, "LON,LAT", or the path of an image.
        options: fields of `querying.options.Options`, such as `top=5` and `years=("2010",)`.

    Raises:
        GeomatchError: there is no index, it is stale, or the target is not found.
    """
    (found,) = query_each(project, [target], Options(**options), progress=progress)
    if isinstance(found, Unanswered):
        raise found.error
    return found


def query_each(
    project: Project,
    targets: Iterable[str],
    options: Options,
    *,
    progress: ProgressCallback = silent,
) -> Iterator[Matches | Unanswered]:
    """Answer queries one after another, with one start of the network.

    Yields:
        For each target in order its answers, or why there are none.

    Raises:
        GeomatchError: there is no index, or it is stale.
    """
    with OpenIndex.open(project, options.index) as index:
        yield from _answers(index, targets, options, progress)


def _answers(
    index: OpenIndex, targets: Iterable[str], options: Options, progress: ProgressCallback
) -> Iterator[Matches | Unanswered]:
    years = [index.year_code(year) for year in options.years]
    from_code = index.year_code(options.from_year) if options.from_year else None
    finder = Targets(index, from_code, progress)
    answered: list[Matches] = []
    remaining = iter(targets)
    while chunk := list(islice(remaining, CHUNK)):
        found = [_find(finder, target) for target in chunk]
        vectors = finder.vectors([each for each in found if isinstance(each, Query)])
        for each in found:
            if isinstance(each, Unanswered):
                yield each
                continue
            result = _answer(index, each, next(vectors), options, years)
            if options.sheet:
                answered.append(result)
            yield result
    if options.sheet and answered:
        _draw(index.project, answered, options.sheet)


def _find(finder: Targets, target: str) -> Query | Unanswered:
    try:
        return finder.find(target)
    except GeomatchError as error:
        return Unanswered(target, error)


def _answer(
    index: OpenIndex,
    query: Query,
    vector: NDArray[np.float32],
    options: Options,
    years: list[int],
) -> Matches:
    if not years:
        every_year = options.same_year or index.manifest.years == ("",)
        years = [y for y in range(len(index.manifest.years)) if every_year or y != query.year]
    wanted = Filter(years=tuple(years), without=query.position)
    scores, positions = index.vectors.search(vector[None], options.top, wanted)
    return _matches(index, query, scores[0], positions[0])


def _matches(
    index: OpenIndex, query: Query, scores: NDArray[np.float32], positions: NDArray[np.int64]
) -> Matches:
    answers = index.rows.take(positions.tolist())
    distances: list[float | None] = [None] * len(answers)
    if query.epsg is not None and index.tiles.in_metres:
        from geomatch.geo.footprints import distance

        from_xy = np.broadcast_to([[query.x, query.y]], (len(answers), 2))
        to_xy = np.array([(row["x"], row["y"]) for row in answers]).reshape(-1, 2)
        from_epsg = np.full(len(answers), query.epsg)
        to_epsg = np.array([row["epsg"] for row in answers], np.int64)
        distances = distance(from_epsg, from_xy, to_epsg, to_xy).tolist()
    found = [
        Match(query.name, rank, row["id"], row["year"], score, row["lon"], row["lat"], metres)
        for rank, (score, row, metres) in enumerate(
            zip(scores.tolist(), answers, distances, strict=True), 1
        )
    ]
    return Matches(
        query=query,
        matches=tuple(found),
        rows=tuple(row["store_row"] for row in answers),
        centres=tuple((row["epsg"], row["x"], row["y"]) for row in answers),
    )


def _draw(project: Project, answered: list[Matches], path: Path) -> None:
    from geomatch.report.matches import match_sheet

    match_sheet(
        project,
        [(each.as_json(), each.rows, each.query.picture, each.query.name) for each in answered],
        path,
    )

"""Query: find the place of a tile, a point or an image in other years, by an index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch import config
from geomatch.data.confidence import ANSWERS
from geomatch.errors import GeomatchError, UsageError
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project
from geomatch.querying.answers import Match, Matches, Unanswered
from geomatch.querying.opened import OpenIndex, wanted
from geomatch.querying.options import Options
from geomatch.querying.targets import Query, Targets, is_several

CHUNK = 32
"""Targets that are described at a time."""


def query(
    project: Project,
    target: str,
    *,
    settings: config.Config | None = None,
    progress: ProgressCallback = silent,
    **options: Any,
) -> Matches:
    """Find the nearest tiles to a tile, a point or an image.

    Args:
        target: a tile id, "LON,LAT", or the path of an image; for several, see `query_each`.
        settings: see `query_each`.
        options: fields of `querying.options.Options`, such as `top=5` and `years=("2010",)`.

    Raises:
        GeomatchError: there is no index, it is stale, or the target is not found.
    """
    if is_several(target):
        raise UsageError(f"{target} stands for several queries", "Call query_each.")
    asked = Options(**options)
    (found,) = query_each(project, [target], asked, settings=settings, progress=progress)
    if isinstance(found, Unanswered):
        raise found.error
    return found


def query_each(
    project: Project,
    targets: Iterable[str],
    options: Options,
    *,
    settings: config.Config | None = None,
    progress: ProgressCallback = silent,
) -> Iterator[Matches | Unanswered]:
    """Answer queries one after another, with one start of the network.

    Args:
        targets: tile ids, points "LON,LAT" and paths of images; boxes "W,S,E,N" in degrees for the
            tiles whose centres are in them, folders and globs for the images in them.
        settings: how an index is made; by default as `geomatch.toml` says.

    Yields:
        For each target in order its answers, or why there are none.

    Raises:
        GeomatchError: there is no index and nothing to make it of.
        StaleError: embeddings, or an index that is not to be made again, are stale.
    """
    if options.build:
        options = replace(options, index=_made(project, options.index, settings, progress))
    index = OpenIndex.open(project, options.index)
    years = [index.year_code(year) for year in options.years]
    from_code = index.year_code(options.from_year) if options.from_year else None
    if options.geojson or options.gpkg:
        index.check_ground("--geojson" if options.geojson else "--gpkg")
    finder = Targets(index, from_code, progress)
    answered: list[Matches] = []
    remaining = (found for target in targets for found in _find(finder, target))
    while found := list(islice(remaining, CHUNK)):
        vectors = finder.vectors([each for each in found if isinstance(each, Query)])
        for each in found:
            if isinstance(each, Unanswered):
                yield each
                continue
            result = _answer(index, each, next(vectors), options, years)
            answered += [result] if options.files else []
            yield result
    if answered:
        _write(index, answered, options)


def _made(
    project: Project, name: str | None, settings: config.Config | None, progress: ProgressCallback
) -> str:
    """The name of the index to search, which is made where it is missing or stale."""
    name, is_fresh = wanted(project, name)
    if not is_fresh and name in project.embedding_names():
        from geomatch.index import index

        progress(f"the index of {name} is missing or stale: making it")
        metric = (settings or config.load(project.config)).index.metric
        index(project, run=name, metric=metric, progress=progress)
    return name


def _find(finder: Targets, target: str) -> Iterator[Query | Unanswered]:
    """What a target names, which may be many tiles or images."""
    try:
        for each in finder.each(target):
            try:
                yield finder.find(each)
            except GeomatchError as error:
                yield Unanswered(each, error)
    except GeomatchError as error:
        yield Unanswered(target, error)


def _answer(
    index: OpenIndex,
    query: Query,
    vector: NDArray[np.float32],
    options: Options,
    years: list[int],
) -> Matches:
    if not years:
        own = None if options.same_year else query.year
        years = [code for code, year in enumerate(index.manifest.years) if year != own]
    searched = max(options.top, ANSWERS if index.confidence else 0)
    scores, positions = index.vectors.search(vector, years, searched + 1)
    keep = np.flatnonzero(positions != query.position)
    judgement = index.confidence and index.confidence.judge(scores[keep], options.fpr)
    keep = keep[: options.top]
    found = _matches(index, query, scores[keep], positions[keep])
    if judgement:
        pairs = zip(found.matches, judgement.probability, strict=False)
        judged = (replace(m, probability=p, match=judgement.is_match) for m, p in pairs)
        found = replace(found, matches=tuple(judged))
    return found


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


def _write(index: OpenIndex, found: list[Matches], options: Options) -> None:
    """Write the files that are asked for."""
    from geomatch.querying import outputs
    from geomatch.report.matches import match_sheet

    if options.csv:
        outputs.write_csv(options.csv, found)
    if options.geojson:
        outputs.write_geojson(options.geojson, found, index.tiles)
    if options.gpkg:
        outputs.write_gpkg(options.gpkg, found, index.tiles)
    if options.sheet:
        shown = [(each.as_json(), each.rows, each.query.picture, each.query.name) for each in found]
        match_sheet(index.project, shown, options.sheet)

"""Query: find the place of a tile, a point or an image in other years, by an index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch import config
from geomatch.data.confidence import ANSWERS
from geomatch.data.filters import Filter
from geomatch.errors import GeomatchError, UsageError
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project
from geomatch.querying import feedback, filters, turns
from geomatch.querying.answers import Match, Matches, Unanswered
from geomatch.querying.opened import OpenIndex, wanted
from geomatch.querying.options import Options
from geomatch.querying.targets import Query, Targets, is_several

CHUNK, VIEWS = 32, 256
"""Targets that are described at a time, and how often they are turned in all, at most."""


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
        options = replace(options, index=made(project, options.index, settings, progress))
    with OpenIndex.open(project, options.index) as index:
        yield from answers(index, targets, options, progress)


def answers(
    index: OpenIndex, targets: Iterable[str | Query], options: Options, progress: ProgressCallback
) -> Iterator[Matches | Unanswered]:
    """Answer queries by an index that is open already; see `query_each`.

    Args:
        targets: also queries, which were found before.
    """
    passing = filters.passing(index, options)
    if options.features != "sift":
        from geomatch.querying.detectors import detector_of

        detector_of(options.features)  # before anything is computed
    from_code = index.year_code(options.from_year) if options.from_year else None
    index.positions((*options.like, *options.unlike))  # before anything is computed
    if options.geojson or options.gpkg:
        option = "--geojson" if options.geojson else "--gpkg"
        index.check_ground(f"{option} needs footprints", "Write --csv FILE instead.")
    if options.scales:
        index.check_ground("a scan needs tiles with a place", "Ask without --gsd and --scales.")
    angles = turns.angles(options.rotate)
    finder = Targets(index, from_code, angles, bool(options.scales), progress)
    answered: list[Matches] = []
    remaining = (found for target in targets for found in _find(finder, target))
    together = 1 if options.scales else max(1, min(CHUNK, VIEWS // len(angles)))
    while found := list(islice(remaining, together)):
        vectors = finder.vectors([each for each in found if isinstance(each, Query)])
        for each in found:
            if isinstance(each, Unanswered):
                yield each
                continue
            result: Matches | Unanswered
            if each.is_scan:
                result = _locate(index, each, finder, angles, options, passing)
            else:
                result = _answer(index, each, next(vectors), angles, options, passing)
            if isinstance(result, Matches):
                result = _looked_at(index, result, options)
            if options.files and isinstance(result, Matches):
                answered.append(result)
            yield result
    if answered:
        _write(index, answered, options)


def made(
    project: Project, name: str | None, settings: config.Config | None, progress: ProgressCallback
) -> str:
    """The name of the index to search, which is made where it is missing or stale.

    Raises:
        GeomatchError: there is nothing to make it of.
    """
    name, is_fresh = wanted(project, name)
    if not is_fresh and name in project.embedding_names():
        from geomatch.index import index

        progress(f"the index of {name} is missing or stale: making it")
        settings = settings or config.load(project.config)
        index(project, run=name, settings=settings.index, progress=progress)
    return name


def _find(finder: Targets, target: str | Query) -> Iterator[Query | Unanswered]:
    """What a target names, which may be many tiles or images."""
    if isinstance(target, Query):
        yield target
        return
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
    vectors: NDArray[np.float32],
    angles: Sequence[float],
    options: Options,
    passing: Filter,
) -> Matches:
    """The best answers to any turn of a query.

    Args:
        vectors: (turns, d).
    """
    liked, unliked = (index.positions(ids) for ids in (options.like, options.unlike))
    if liked or unliked:
        vectors = feedback.rocchio(
            index.comparable(vectors), index.vectors_at(liked), index.vectors_at(unliked)
        )
    passing = filters.for_query(index, query, options, passing, unliked)
    # What a probability says holds for the scores of a query as it is, among all tiles of a year.
    is_changed = options.rotate or options.expand or liked or unliked or passing.columns
    confidence = None if is_changed else index.confidence
    most = max(options.top, options.expand, ANSWERS if confidence else 0)
    scores, positions, won = _nearest(index, vectors, passing, most)
    if options.expand and len(positions):
        chosen = index.comparable(vectors)[won[0]]
        expanded = feedback.expand(chosen, index.vectors_at(positions[: options.expand].tolist()))
        turn = won[0]
        scores, positions, won = _nearest(index, expanded[None], passing, options.top)
        won += turn
    judgement = confidence and confidence.judge(scores, options.fpr)
    shown = slice(options.top)
    degrees = [angles[code] if options.rotate else None for code in won[shown]]
    found = _matches(index, query, scores[shown], positions[shown], degrees)
    if judgement:
        pairs = zip(found.matches, judgement.probability, strict=False)
        judged = (replace(m, probability=p, match=judgement.is_match) for m, p in pairs)
        found = replace(found, matches=tuple(judged))
    return found


def _nearest(
    index: OpenIndex, vectors: NDArray[np.float32], passing: Filter, top: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Scores, positions and best turns of the tiles that are nearest to any turn (turns, d)."""
    scores, positions = index.vectors.search(vectors, top, passing)
    turn = np.repeat(np.arange(len(vectors)), positions.shape[1])
    order = np.argsort(-scores, axis=None, kind="stable")
    # The best of a tile's turns is its first.
    _, first = np.unique(positions.ravel()[order], return_index=True)
    best = order[np.sort(first)[:top]]
    return scores.ravel()[best], positions.ravel()[best], turn[best]


def _locate(
    index: OpenIndex,
    query: Query,
    finder: Targets,
    angles: Sequence[float],
    options: Options,
    passing: Filter,
) -> Matches | Unanswered:
    """The places where a scan may lie."""
    from geomatch.geo.footprints import lonlat
    from geomatch.querying import scan, votes

    assert query.pixels is not None
    tiles, gsds = index.tiles, options.scales
    poses = [scan.Pose(angle, gsd) for gsd in gsds for angle in angles]
    cut = scan.windows(query.pixels, poses, tiles.size, tiles.gsd or 0.0)
    found = votes.locate(index, cut, finder.describe, passing, options.top)
    if not found:
        at = ", ".join(f"{gsd:g}" for gsd in gsds)
        return Unanswered(
            query.name,
            GeomatchError(
                f"{query.name} has nothing to go by at {at} m per pixel",
                f"It must be larger than a tile of {tiles.size * (tiles.gsd or 0):g} m, and not "
                "blank: give other --scales.",
            ),
        )
    weights = np.array([place.weight for place in found])
    found = found[: options.top]
    epsg = np.array([place.epsg for place in found])
    degrees = lonlat(epsg, np.array([(place.x, place.y) for place in found]))
    rows = index.rows.take([place.tile for place in found])
    matches = [
        Match(
            query=query.name,
            rank=rank,
            tile=row["id"],
            year=row["year"],
            score=place.score,
            lon=lon,
            lat=lat,
            distance_m=None,
            turn=place.pose.turn,
            gsd=place.pose.gsd,
            confidence=max(0.0, 1 - np.delete(weights, rank - 1).max(initial=0) / place.weight),
            agreeing=place.agreeing,
            windows=place.windows,
        )
        for rank, (place, row, (lon, lat)) in enumerate(
            zip(found, rows, degrees.tolist(), strict=True), 1
        )
    ]
    return Matches(
        query=query,
        matches=tuple(matches),
        rows=tuple(row["store_row"] for row in rows),
        centres=tuple((place.epsg, place.x, place.y) for place in found),
        places=tuple(found),
    )


def _looked_at(index: OpenIndex, found: Matches, options: Options) -> Matches:
    """Answers verified by local features, and the image georeferenced, as far as is asked for.

    Raises:
        GeomatchError: the image lies at none of its answers.
    """
    if options.verify:
        from geomatch.querying.confirming import confirm

        found = confirm(index, found, options.verify, options.features)
    if options.georeference:
        from geomatch.querying.placing import georeference
        from geomatch.report.local_matches import draw_residuals

        placed = georeference(index, found, options.georeference, options.features)
        thumbnail, shares, metres = placed.picture()
        path = options.georeference.with_suffix(".residuals.png")
        draw_residuals(thumbnail, shares, metres, f"{placed}", path)
        found = replace(found, placed=placed)
    return found


def _matches(
    index: OpenIndex,
    query: Query,
    scores: NDArray[np.float32],
    positions: NDArray[np.int64],
    turns: Sequence[float | None],
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
        Match(
            query=query.name,
            rank=rank,
            tile=row["id"],
            year=row["year"],
            score=score,
            lon=row["lon"],
            lat=row["lat"],
            distance_m=metres,
            turn=turn,
        )
        for rank, (score, row, metres, turn) in enumerate(
            zip(scores.tolist(), answers, distances, turns, strict=True), 1
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
    if options.sheet and options.verify:
        from geomatch.report.local_matches import Pair, draw_pairs

        pairs = [
            Pair(seen.query, seen.around, seen.at, seen.to, caption, is_confirmed)
            for each in found
            for seen, caption, is_confirmed in each.pairs()
        ]
        draw_pairs(pairs, options.sheet)
    elif options.sheet:
        shown = [(each.as_json(), each.rows, each.query.picture, each.query.name) for each in found]
        match_sheet(index.project, shown, options.sheet)

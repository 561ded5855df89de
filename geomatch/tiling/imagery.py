"""Which files are the imagery of which year."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from geomatch.config import Overlap, SourceConfig
from geomatch.errors import GeomatchError, UsageError
from geomatch.geo import rasters, tile_index
from geomatch.tiling import stac

DATE = re.compile(
    r"(?<!\d)((?:19|20)\d{2})(?:-?(0[1-9]|1[0-2])(?:-?(0[1-9]|[12]\d|3[01]))?)?(?!\d)"
)
"""A year, month or day in a name: 2014, 2014-06, 20140603."""


def by_year(
    sources: Iterable[SourceConfig], overlap: Overlap = "first"
) -> list[tuple[SourceConfig, list[str]]]:
    """The images of each year, which sources name or their images tell by its `year_from`.

    Where several sources have images of a year, these are joined, in the order of the sources.

    Args:
        overlap: "newest" puts those of the latest date first.

    Raises:
        GeomatchError: there are no images, or one tells no year, or no date where it needs one.
        UsageError: `year_from` is not a regular expression, or `asset` is not of a STAC item; or
            sources of a year do not go together.
    """
    found: dict[str, tuple[SourceConfig, dict[str, str]]] = {}
    for source in sources:
        texts: dict[str, dict[str, str]] = {}
        if source.images and (source.year or source.year_from):
            for path, text in _images(source):
                year = _year(source, path, text) if source.year_from else source.year
                texts.setdefault(year, {})[path] = text
        for year, of_year in sorted(texts.items()) or [(source.year, {})]:
            here = replace(source, year=year)
            before, known = found.get(year, (here, {}))
            found[year] = _joined(before, here), known | of_year
    return [
        (source, _newest_first(texts) if overlap == "newest" else [*texts])
        for source, texts in found.values()
    ]


def _joined(one: SourceConfig, other: SourceConfig) -> SourceConfig:
    """Two sources of one year as one, of which `images` is that of the first.

    Raises:
        UsageError: both have labels or masks, or they differ in placement.
    """
    if other == one:
        return one
    if one.placement != other.placement:
        raise UsageError(
            f"year {one.year} has a real and a fictitious placement", "Give it one placement."
        )
    if not (other.labels or other.changed):
        return one
    if one.labels or one.changed:
        raise UsageError(
            f"year {one.year} has labels or masks of changed ground in several sources",
            "Name them in one of its sources.",
        )
    return replace(other, images=one.images)


def others(source: SourceConfig, found: list[str]) -> list[str]:
    """Those of labels or change masks that are of a source's year.

    Raises:
        GeomatchError: the name of one tells no year by `year_from`.
    """
    if not source.year_from:
        return found
    return [path for path in found if _year(source, path, os.path.basename(path)) == source.year]


def _newest_first(texts: Mapping[str, str]) -> list[str]:
    """Paths in the order of the dates in their texts; those of one date stay in order.

    Raises:
        GeomatchError: one of several has no date.
    """
    if len(texts) <= 1:
        return [*texts]
    dates = {path: DATE.search(text) for path, text in texts.items()}
    for path, date in dates.items():
        if date is None:
            raise GeomatchError(
                f"{path} tells no date",
                'grid.overlap = "newest" needs dates in the names, such as 2014 or 20140603; '
                'choose "first" or "nearest-centre".',
            )
    found = {path: "".join(filter(None, date.groups())) for path, date in dates.items() if date}
    return sorted(found, key=found.__getitem__, reverse=True)


def _images(source: SourceConfig) -> list[tuple[str, str]]:
    """Images, each with what tells its year: its file name, or the datetime of a STAC item."""
    found = rasters.find(source.images, f"year {source.year}" if source.year else "imagery")
    items = stac.read_items(Path(found[0])) if len(found) == 1 else None
    if items is not None:
        return list(stac.dated_assets(Path(found[0]), items, source.asset))
    if source.asset:
        raise UsageError(
            f"{source.images} has no STAC items, of which {source.asset!r} could be an asset",
            "Leave out --asset, or give an item collection: stac=PATH",
        )
    if len(found) == 1:
        indexed = tile_index.rasters_of(found[0])
        if indexed is None and source.year_from and found[0].lower().endswith(stac.SUFFIXES):
            raise GeomatchError(
                f"{found[0]} is neither a STAC item collection nor a tile index",
                "Give a GeoJSON of STAC items with assets, or name the imagery as YEAR=PATH.",
            )
        found = indexed or found
    return [(path, os.path.basename(path)) for path in found]


def _year(source: SourceConfig, path: str, text: str) -> str:
    """The year in a text: the groups of `year_from` joined by hyphens, or all that it matches."""
    try:
        match = re.search(source.year_from, text)
    except re.error as error:
        raise UsageError(
            f"--year-from {source.year_from} is not a regular expression: {error}",
            r"For example: --year-from '_(\d{4})_'",
        ) from error
    if match is None:
        raise GeomatchError(
            f"{path}: {text} tells no year by {source.year_from}",
            "Change --year-from, or narrow the path with a quoted glob.",
        )
    return "-".join(part for part in match.groups() if part) or match.group()

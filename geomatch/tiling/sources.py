"""The imagery, labels and change masks of each year; headers are read and compared."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from geomatch import config
from geomatch.data.tiles import in_time_order
from geomatch.errors import BadFileError, GeomatchError, UsageError
from geomatch.geo import labels, rasters
from geomatch.geo.rasters import Raster, Stretch
from geomatch.progress import ProgressCallback


@dataclass(frozen=True)
class YearSource:
    """The files of one year.

    Attributes:
        images: georeferenced rasters, all of the same bands and dtype.
        labels: label rasters; empty if there are none or they are a `vector` file.
        stretch: scales the images to uint8; None if they are uint8.
        placement: "real", or "fictitious" where coordinates are made up.
        changed: masks of changed ground.
        unreadable: paths of files that are left out, with the reason.
    """

    year: str
    images: tuple[Raster, ...]
    labels: tuple[Raster, ...]
    vector: str | None
    stretch: Stretch | None
    placement: str
    changed: tuple[Raster, ...] = ()
    unreadable: dict[str, str] = field(default_factory=dict)


def collect(settings: config.Config, progress: ProgressCallback) -> list[YearSource]:
    """Inspect the files of every year, in time order.

    Raises:
        GeomatchError: a file is missing or damaged, or files of a year differ in bands or dtype.
        UsageError: a year is invalid, has no images or is given twice, or a stretch is missing.
    """
    years = [source.year for source in settings.source]
    for source in settings.source:
        if not source.year or re.search(r"[@/\\\s]", source.year):
            raise UsageError(
                f"source: {source.year!r} is not a valid year",
                "Give each source a year, without '@', slashes or white space.",
            )
        if not source.images:
            raise UsageError(f"source {source.year} has no images", f"Add {source.year}=PATH.")
    if len(set(years)) != len(years):
        raise UsageError("a year is given twice", "Give each year one folder or glob.")
    by_year = {source.year: source for source in settings.source}
    return [_inspect(by_year[year], settings.grid, progress) for year in in_time_order(years)]


def _inspect(
    source: config.SourceConfig, grid: config.GridConfig, progress: ProgressCallback
) -> YearSource:
    paths = rasters.find(source.images, f"year {source.year}")
    unreadable: Unreadable = {} if grid.skip_bad else None
    read = itertools.count(1)

    def inspect(path: str) -> Raster:
        progress(f"reading headers of {source.year}", next(read), len(paths))
        image = rasters.inspect(path)
        if image.palette:
            raise BadFileError(
                path,
                "contains indices of a colour table",
                "Expand it first: gdal_translate -expand rgb IN OUT",
            )
        return image

    images = _usable(paths, inspect, unreadable)
    _, dtype = rasters.common_format(images, f"year {source.year}")
    measured: Stretch | None = None
    if dtype != "uint8":
        if not grid.stretch:
            raise UsageError(
                f"year {source.year}: {images[0].name} is {dtype}, tiles are uint8",
                "Give a stretch: --stretch 2%,98% or --stretch MIN,MAX",
            )
        while measured is None:
            try:
                measured = rasters.measure_stretch(images, grid.stretch)
            except BadFileError as error:
                images = tuple(image for image in images if image.path != error.path)
                if unreadable is None or not images:
                    raise
                unreadable[error.path] = error.reason
    vector, label_rasters = _labels(source, unreadable)
    return YearSource(
        source.year,
        tuple(images),
        label_rasters,
        vector,
        measured,
        source.placement,
        _masks(source, unreadable),
        unreadable or {},
    )


Unreadable = dict[str, str] | None
"""Files that are left out, with the reason; None where a bad file is an error."""


def _usable(
    paths: Sequence[str], inspect: Callable[[str], Raster], unreadable: Unreadable
) -> tuple[Raster, ...]:
    """Inspect files; bad ones are left out.

    Raises:
        BadFileError: a file is bad and `unreadable` is None, or all are.
    """
    found = []
    failure: BadFileError | None = None
    for path in paths:
        try:
            found.append(inspect(path))
        except BadFileError as error:
            if unreadable is None:
                raise
            failure = failure or error
            unreadable[error.path] = error.reason
    if failure and not found:
        raise failure
    return tuple(found)


def _labels(
    source: config.SourceConfig, unreadable: Unreadable
) -> tuple[str | None, tuple[Raster, ...]]:
    if not source.labels:
        return None, ()
    paths = rasters.find(source.labels, f"labels of {source.year}")
    if labels.is_vector(paths[0]):
        if len(paths) > 1:
            raise GeomatchError(
                f"labels of {source.year}: {len(paths)} vector files match",
                "Merge them as layers of one GeoPackage: ogr2ogr -update all.gpkg FILE",
            )
        labels.check_vector(paths[0])
        return paths[0], ()
    found = _usable(paths, labels.inspect_raster, unreadable)
    rasters.common_format(found, f"labels of {source.year}")
    return None, found


def _masks(source: config.SourceConfig, unreadable: Unreadable) -> tuple[Raster, ...]:
    if not source.changed:
        return ()
    paths = rasters.find(source.changed, f"changed {source.year}")
    found = _usable(paths, rasters.inspect, unreadable)
    for mask in found:
        if (mask.bands, mask.dtype) != (1, "uint8"):
            raise GeomatchError(
                f"{mask.path} has {mask.bands} bands of {mask.dtype}; a mask of changed ground has "
                "one of uint8, 0 meaning unchanged",
                "Convert it with gdal_translate -b 1 -ot Byte.",
            )
    return found


def channels(year_sources: Sequence[YearSource]) -> tuple[int, int]:
    """Number of (image, label) channels.

    Raises:
        GeomatchError: years differ in bands, or in label channels.
    """
    first = year_sources[0].images[0]
    for source in year_sources[1:]:
        other = source.images[0]
        if other.bands != first.bands:
            raise GeomatchError(
                f"{other.name} ({source.year}) has {other.bands} bands, "
                f"{first.name} ({year_sources[0].year}) has {first.bands}",
                "Give every year the same bands, for example: gdal_translate -b 1 -b 2 -b 3",
            )
    label_bands = {
        1 if c.vector else c.labels[0].bands for c in year_sources if c.vector or c.labels
    }
    if len(label_bands) > 1:
        raise GeomatchError(
            "label layers have one channel in some years and three in others",
            "Convert them alike.",
        )
    return first.bands, label_bands.pop() if label_bands else 0


def area_stamps(split: config.SplitConfig) -> list[Any]:
    """Paths, sizes and modification times of the polygon files that define the splits."""
    if split.by != "file":
        return []
    files = area_files((*split.validation, *split.test))
    return [[path, *labels.stamp(path)] for path in files]


def area_files(names: Sequence[str]) -> list[str]:
    """The polygon files that paths or globs of a split match.

    Raises:
        GeomatchError: one matches no file.
    """
    return [path for name in names for path in rasters.find(name, "split")]


def identity(source: YearSource) -> Any:
    """What tiles of a year depend on: paths, sizes and times of its files, how they are read."""
    vector = source.vector and [source.vector, *labels.stamp(source.vector)]
    return [
        [(r.path, r.stamp) for r in (*source.images, *source.labels, *source.changed)],
        vector,
        source.stretch and asdict(source.stretch),
        source.year,
        source.placement,
    ]

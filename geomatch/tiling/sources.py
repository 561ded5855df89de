"""The imagery, labels and change masks of each year; headers are read and compared."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from geomatch import config
from geomatch.data.tiles import in_time_order
from geomatch.errors import GeomatchError, UsageError
from geomatch.geo import labels, rasters
from geomatch.geo.rasters import Raster, Stretch
from geomatch.progress import ProgressCallback
from geomatch.tiling import files


@dataclass(frozen=True)
class YearSource:
    """The files of one year.

    Attributes:
        images: georeferenced rasters, all of the same bands and dtype.
        labels: label rasters; empty if there are none or they are a `vector` file.
        stretch: scales the images to uint8; None if they are uint8.
        placement: "real", or "fictitious" where coordinates are made up.
        changed: masks of changed ground.
        overlap: which image is seen where several overlap. They are in this order already, unless
            it differs from place to place.
    """

    year: str
    images: tuple[Raster, ...]
    labels: tuple[Raster, ...]
    vector: str | None
    stretch: Stretch | None
    placement: str
    changed: tuple[Raster, ...] = ()
    overlap: config.Overlap = "first"

    @property
    def by_centre(self) -> bool:
        """Whether the image whose centre is nearest is seen."""
        return self.overlap == "nearest-centre"


def collect(settings: config.Config, progress: ProgressCallback) -> list[YearSource]:
    """Inspect the files of every year, in time order.

    Raises:
        GeomatchError: a file is missing or damaged, or files of a year differ in bands or dtype.
        UsageError: a year is invalid, has no images or is given twice, or a stretch is missing.
    """
    overlap = settings.grid.overlap
    found = [each for source in settings.source for each in files.by_year(source, overlap)]
    settings = config.with_sources(settings, [source for source, _ in found])
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
    by_year = {source.year: (source, paths) for source, paths in found}
    return [_inspect(*by_year[year], settings.grid, progress) for year in in_time_order(years)]


def _inspect(
    source: config.SourceConfig,
    paths: list[str],
    settings: config.GridConfig,
    progress: ProgressCallback,
) -> YearSource:
    images = []
    for done, path in enumerate(paths, 1):
        images.append(rasters.inspect(path))
        if images[-1].palette:
            raise GeomatchError(
                f"{path} contains indices of a colour table",
                "Expand it first: gdal_translate -expand rgb IN OUT",
            )
        progress(f"reading headers of {source.year}", done, len(paths))
    _, dtype = rasters.common_format(images, f"year {source.year}")
    measured: Stretch | None = None
    if dtype != "uint8":
        if not settings.stretch:
            raise UsageError(
                f"year {source.year}: {images[0].name} is {dtype}, tiles are uint8",
                "Give a stretch: --stretch 2%,98% or --stretch MIN,MAX",
            )
        measured = rasters.measure_stretch(images, settings.stretch)
    vector, label_rasters = _labels(source)
    return YearSource(
        source.year,
        tuple(images),
        label_rasters,
        vector,
        measured,
        source.placement,
        _masks(source),
        settings.overlap,
    )


def _labels(source: config.SourceConfig) -> tuple[str | None, tuple[Raster, ...]]:
    if not source.labels:
        return None, ()
    paths = files.others(source, source.labels, f"labels of {source.year}")
    if not paths:
        return None, ()
    if labels.is_vector(paths[0]):
        if len(paths) > 1:
            raise GeomatchError(
                f"labels of {source.year}: {len(paths)} vector files match",
                "Merge them as layers of one GeoPackage: ogr2ogr -update all.gpkg FILE",
            )
        labels.check_vector(paths[0])
        return paths[0], ()
    found = tuple(labels.inspect_raster(path) for path in paths)
    rasters.common_format(found, f"labels of {source.year}")
    return None, found


def _masks(source: config.SourceConfig) -> tuple[Raster, ...]:
    if not source.changed:
        return ()
    paths = files.others(source, source.changed, f"changed {source.year}")
    found = tuple(rasters.inspect(path) for path in paths)
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
    stats = [(path, os.stat(path)) for path in area_files((*split.validation, *split.test))]
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def area_files(names: Sequence[str]) -> list[str]:
    """The polygon files that paths or globs of a split match.

    Raises:
        GeomatchError: one matches no file.
    """
    return [path for name in names for path in rasters.find(name, "split")]


def identity(source: YearSource) -> Any:
    """What tiles of a year depend on: paths, sizes and times of its files, how they are read."""
    vector = source.vector and [source.vector, os.stat(source.vector).st_mtime_ns]
    return [
        [(r.path, r.stamp) for r in (*source.images, *source.labels, *source.changed)],
        vector,
        source.stretch and asdict(source.stretch),
        source.year,
        source.placement,
        *(["nearest-centre"] if source.by_centre else []),
    ]

"""The imagery, labels and change masks of each year; headers are read and compared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from geomatch import config
from geomatch.data.tiles import in_time_order
from geomatch.errors import BadFileError, GeomatchError, UsageError
from geomatch.geo import labels, rasters, views
from geomatch.geo.headers import Headers
from geomatch.geo.labels import Layer, RasterLayer
from geomatch.geo.rasters import Raster
from geomatch.geo.stretch import Stretch, measure_stretch
from geomatch.geo.views import Reading
from geomatch.progress import ProgressCallback
from geomatch.tiling import imagery, label_layers
from geomatch.tiling.label_layers import YearLabels
from geomatch.tiling.usable import Unreadable, usable


@dataclass(frozen=True)
class YearSource:
    """The files of one year.

    Attributes:
        images: georeferenced rasters, all of the same bands and dtype.
        labels: what is known of the ground.
        stretch: scales the images to uint8; None if they are uint8.
        placement: "real", or "fictitious" where coordinates are made up.
        changed: masks of changed ground.
        unreadable: paths of files that are left out, with the reason.
        overlap: which image is seen where several overlap. They are in this order already, unless
            it differs from place to place.
    """

    year: str
    images: tuple[Raster, ...]
    labels: YearLabels
    stretch: Stretch | None
    placement: str
    changed: tuple[Raster, ...] = ()
    unreadable: dict[str, str] = field(default_factory=dict)
    overlap: config.Overlap = "first"

    @property
    def by_centre(self) -> bool:
        """Whether the image whose centre is nearest is seen."""
        return self.overlap == "nearest-centre"


def collect(
    settings: config.Config, headers: Headers, masks: Path, progress: ProgressCallback
) -> list[YearSource]:
    """Inspect the files of every year, in time order.

    Args:
        headers: what is known of them, and takes up what is found.
        masks: folder for masks of collars.

    Raises:
        GeomatchError: a file is missing or damaged, or files of a year differ in bands or dtype.
        UsageError: a year is invalid, has no images or is given twice, or a stretch is missing.
    """
    overlap = settings.grid.overlap
    found = [each for source in settings.source for each in imagery.by_year(source, overlap)]
    settings = config.with_sources(settings, [source for source, _ in found])
    years = [source.year for source in settings.source]
    for source in settings.source:
        if not source.year.strip(".") or re.search(r"[@/\\\s]", source.year):
            raise UsageError(
                f"source: {source.year!r} is not a valid year",
                "Give each source a year, without '@', slashes or white space.",
            )
        if not source.images:
            raise UsageError(f"source {source.year} has no images", f"Add {source.year}=PATH.")
    if len(set(years)) != len(years):
        raise UsageError("a year is given twice", "Give each year one folder or glob.")
    by_year = {source.year: (source, paths) for source, paths in found}
    unreadable: Unreadable = {} if settings.grid.skip_bad else None
    known = label_layers.collect(settings, unreadable, progress)
    year_sources = [
        _inspect(
            *by_year[year],
            known.get(year, YearLabels()),
            settings.grid,
            headers,
            masks,
            unreadable,
            progress,
        )
        for year in in_time_order(years)
    ]
    nodata = settings.grid.nodata
    layouts = [image.layout for source in year_sources for image in source.images]
    if nodata is not None and not any(views.can_hold(of.dtype, nodata) for of in layouts):
        raise UsageError(
            f"--nodata {nodata:g}: no image can contain it, they are {layouts[0].dtype}",
            "Give the value that their invalid pixels have: gdalinfo -stats FILE",
        )
    return year_sources


def reading(settings: config.GridConfig) -> Reading:
    """How imagery is read where its files leave it open."""
    return Reading(settings.bands, settings.nodata, settings.collar)


def _inspect(
    source: config.SourceConfig,
    paths: list[str],
    known: YearLabels,
    grid: config.GridConfig,
    headers: Headers,
    masks: Path,
    unreadable: Unreadable,
    progress: ProgressCallback,
) -> YearSource:
    how = reading(grid)

    def done(count: int) -> None:
        progress(f"reading headers of {source.year}", count, len(paths))

    images = usable(paths, lambda path: headers.read(path, how), unreadable, done)
    headers.remember(images, how)
    images = tuple(replace(image, collar=rasters.collar_of(image, masks)) for image in images)
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
                measured = measure_stretch(images, grid.stretch)
            except BadFileError as error:
                images = tuple(image for image in images if image.path != error.path)
                if unreadable is None or not images:
                    raise
                unreadable[error.path] = error.reason
    return YearSource(
        source.year,
        tuple(images),
        known,
        measured,
        source.placement,
        _masks(source, headers, unreadable),
        unreadable or {},
        grid.overlap,
    )


def _masks(
    source: config.SourceConfig, headers: Headers, unreadable: Unreadable
) -> tuple[Raster, ...]:
    if not source.changed:
        return ()
    paths = imagery.others(source, rasters.find(source.changed, f"changed {source.year}"))
    found = usable(paths, headers.read, unreadable)
    headers.remember(found)
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
                "Choose bands that all years have: --bands 1,2,3",
            )
    found = [source.labels for source in year_sources]
    label_bands = {raster.bands for known in found for raster in known.rasters}
    label_bands |= {1 for known in found if known.layers}
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
    return [[path, labels.stamp(path)] for path in files]


def area_files(names: Sequence[str]) -> list[str]:
    """The polygon files that paths or globs of a split match.

    Raises:
        GeomatchError: one matches no file.
    """
    return [path for name in names for path in labels.find(name, "split")]


def identity(source: YearSource) -> Any:
    """What tiles of a year depend on: paths, sizes and times of its files, how they are read."""
    known = source.labels
    return [
        [_identity(raster) for raster in (*source.images, *known.rasters, *source.changed)],
        [known.classes, *map(_drawn, known.layers)] if known.layers else None,
        source.stretch and asdict(source.stretch),
        source.year,
        source.placement,
        *(["nearest-centre"] if source.by_centre else []),
    ]


def _drawn(layer: Layer) -> Any:
    """What the pixels of a label layer depend on."""
    if isinstance(layer, RasterLayer):
        return [_identity(raster) for raster in layer.rasters], asdict(layer.classes)
    return {key: value for key, value in asdict(layer).items() if key != "opened"}


def _identity(raster: Raster) -> tuple[Any, ...]:
    how = () if raster.layout.as_stored else (asdict(raster.layout),)
    return raster.path, raster.stamp, *how

"""`tile` for images without georeference: class folders, array files, pairs of folders.

In class folders and array files the class is the place, and images have no year. Each folder of a
pair is a year, and images of the same name show the same place.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomatch import config
from geomatch.data.store import shard_rows
from geomatch.data.tiles import SPLITS, TileTable, in_time_order
from geomatch.errors import GeomatchError, UsageError, listed
from geomatch.geo import rasters
from geomatch.geo.stretch import Stretch, measure_stretch
from geomatch.geo.views import Reading
from geomatch.manifests import Channels, TileRequest, YearOfTiles
from geomatch.progress import ProgressCallback
from geomatch.project import Project, fingerprint, replace_folder
from geomatch.tiling import image_files, shards

NAMES_SHOWN = 5
"""How many names a message about images left out lists."""

DRAWN_SPLITS = ("validation", "test")
"""Splits drawn at random unless they are given."""


@dataclass(frozen=True)
class SourceImage:
    """An image that was found, not yet read.

    Attributes:
        name: its path within the data set.
        label: its class.
        path: its file, or the array file that it is in.
        stamp: size and modification time of the file; None for a broken link.
        year: label of its year, "" without one.
        split: index into `SPLITS`; None where it is drawn.
        index: its position in an array file.
    """

    name: str
    label: str
    path: Path
    stamp: tuple[int, int] | None
    year: str = ""
    split: int | None = None
    index: int | None = None


ImagesByClass = dict[str, list[SourceImage]]


@dataclass(frozen=True)
class ImageShard(shards.Shard):
    """A shard made of `images`.

    Attributes:
        files: the array files, already read.
        stretches: by year, where images are not uint8.
    """

    images: Sequence[SourceImage]
    size: int
    channels: int
    files: Mapping[Path, image_files.ArrayFile]
    reading: Reading
    stretches: Mapping[str, Stretch]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def key(self) -> str:
        images = [[p.name, p.stamp] for p in self.images]
        stretches = [[year, asdict(stretch)] for year, stretch in self.stretches.items()]
        how = [*self.reading.bands, *stretches]  # empty where files are read as they are
        return fingerprint([images, self.size, self.channels, *how])

    def read(self, image: SourceImage) -> image_files.Pixels | str:
        """The pixels (size, size, channels), or the reason why the image cannot be read."""
        if image.index is not None:
            pixels = self.files[image.path].images[image.index]
            return image_files.centre_square(pixels, self.size, self.channels)
        try:
            stretch = self.stretches.get(image.year)
            return image_files.read(image.path, self.size, self.channels, self.reading, stretch)
        except image_files.BrokenImageError as error:
            return error.reason


def tile(
    project: Project,
    settings: config.Config,
    overrides: Sequence[str],
    workers: int | None,
    force: bool,
    progress: ProgressCallback,
) -> TileTable:
    """Make the tiles of `settings.images`; see `geomatch.tile.tile`.

    Raises:
        GeomatchError: there are no images, or none can be read.
        UsageError: a setting is invalid.
    """
    images = settings.images
    if settings.source or (images.folders and images.pairs):
        raise UsageError(
            "more than one kind of source is given",
            "Use one of: YEAR=PATH or [[source]]; images.folders; images.pairs.",
        )
    if settings.grid.collar or settings.grid.nodata is not None:
        raise UsageError(
            "--collar and --nodata are for georeferenced imagery",
            "Images without georeference are taken whole: leave both out.",
        )
    partial = project.root / "tiles.partial"
    with project.lock("tiles"), ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        files: dict[Path, image_files.ArrayFile] = {}
        if images.pairs:
            classes = _pairs(_existing_paths(images.pairs, project), progress)
        else:
            classes = _class_folders(images.folders, project, files)
        found = _drop_ignored(classes, images.ignore, progress)
        size = settings.grid.size
        chosen = [images.least, images.validation, images.test, settings.split.seed, size]
        items = [[p.name, p.label, p.year, p.split, p.stamp] for p in found]
        grid = settings.grid
        reading = Reading(grid.bands)
        request_fingerprint = fingerprint(
            [items, chosen, *filter(None, (grid.bands, grid.stretch))]
        )
        if not force and shards.are_made(project, request_fingerprint):
            progress("tiles are up to date")
        else:
            shapes, unreadable = _inspect(found, files, reading, pool, progress)
            readable = [p for p in found if p.name not in unreadable]
            if not images.pairs:
                readable = _drop_small_classes(readable, images.least, progress)
            if size is None:
                size = _common_size(shapes[p.name] for p in readable) or config.TILE_SIZE
            channels = 1 if all(shapes[p.name].grey for p in readable) else 3
            stretches = _stretches(readable, shapes, channels, grid.stretch)
            split = _draw_splits(readable, images, settings.split.seed)
            request = TileRequest(source=(), set=tuple(overrides))
            shards.prepare(partial, [len(readable), size, channels], request, force)
            rows = shard_rows(size, channels)
            work = [
                ImageShard(
                    number,
                    start,
                    partial,
                    readable[start : start + rows],
                    size,
                    channels,
                    files,
                    reading,
                    stretches,
                )
                for number, start in enumerate(range(0, len(readable), rows))
            ]
            records = shards.cut(
                work, lambda missing: _read_shards(missing, pool), "reading images", progress
            )
            for record in records:
                unreadable |= record["unreadable"]
            years = tuple(dict.fromkeys(p.year for p in found))
            table = _catalogue(readable, years, split, records, unreadable)
            _announce_left_out(progress, "unreadable", unreadable)
            recorded = {year: asdict(stretch) for year, stretch in stretches.items()}
            described = {
                "grid": f"{size}px",
                "crs": None,
                "size": size,
                "gsd": None,
                "stride": None,
                "channels": Channels(channels, 0),
                "placement": "none",
                "years": {
                    year: YearOfTiles(int((table.year == i).sum()), 0, recorded.get(year))
                    for i, year in enumerate(years)
                    if year
                },
                "stretch": recorded.get(""),
                "reading": asdict(reading) if reading.bands else None,
                "unreadable": unreadable,
            }
            shards.finish(
                partial / "tiles",
                table,
                records,
                request=request,
                request_fingerprint=request_fingerprint,
                **described,
            )
            replace_folder(partial / "tiles", project.tiles)
        shutil.rmtree(partial, ignore_errors=True)
        return TileTable.load(project.catalogue)


def _existing_paths(paths: Sequence[str], project: Project) -> list[Path]:
    """Absolute paths, relative ones taken from the project's folder.

    Raises:
        GeomatchError: one does not exist.
    """
    found = [project.root.absolute() / Path(path).expanduser() for path in paths]
    for path in found:
        if not path.exists():
            raise GeomatchError(f"{path} does not exist", "Give the images again: geomatch tile.")
    return found


# Finding images


def _class_folders(
    named: Sequence[str], project: Project, files: dict[Path, image_files.ArrayFile]
) -> ImagesByClass:
    """Images of class folders and of array files.

    Args:
        named: "PATH", or "SPLIT=PATH" of train and any other splits. Splits that are not named are
            drawn from train.
        files: array files are read into it.

    Raises:
        GeomatchError: a path does not exist, or is neither class folders nor an array file.
        UsageError: a split is named twice, or train is not named.
    """
    given: dict[str, str] = {}
    for text in named:
        start, _, rest = text.partition("=")
        split, location = (start, rest) if start in SPLITS else ("train", text)
        if split in given:
            raise UsageError(
                f"{text}: {split} is given twice",
                "Give one folder or file per split: train=DIR test=DIR",
            )
        given[split] = location
    if "train" not in given:
        raise UsageError("no training images are given", "Add train=PATH.")
    found: ImagesByClass = {}
    for split, path in zip(given, _existing_paths(list(given.values()), project), strict=True):
        code = None if split == "train" else SPLITS.index(split)
        prefix = f"{split}/" if len(given) > 1 else ""
        images = _of_folder(path) if path.is_dir() else _of_file(path, files)
        for label, members in images.items():
            renamed = [replace(p, name=prefix + p.name, split=code) for p in members]
            found.setdefault(label, []).extend(renamed)
    return found


def _of_folder(root: Path) -> ImagesByClass:
    folders = [f for f in sorted(root.iterdir()) if f.is_dir() and not f.name.startswith(".")]
    if not folders:
        raise GeomatchError(
            f"{root} has no class folders",
            "Images are expected in DIR/CLASS/, one folder per class.",
        )
    return {
        _printable(folder.name): [
            _source_image(path, root, folder.name) for path in image_files.list_images(folder)
        ]
        for folder in folders
    }


def _of_file(path: Path, files: dict[Path, image_files.ArrayFile]) -> ImagesByClass:
    files[path] = image_files.read_array_file(path)
    stamp = _stamp(path)
    found: ImagesByClass = {}
    for i, label in enumerate(files[path].classes):
        image = SourceImage(f"{label}/{i:05d}", label, path, stamp, index=i)
        found.setdefault(label, []).append(image)
    return found


def _pairs(folders: Sequence[Path], progress: ProgressCallback) -> ImagesByClass:
    """Images whose names exist in both folders, by name.

    Raises:
        GeomatchError: a folder has no images, or no name is in both.
        UsageError: not two folders of different names are given.
    """
    if len(folders) != 2 or folders[0].resolve() == folders[1].resolve():
        raise UsageError(
            "images.pairs needs two folders that differ", "geomatch tile --pairs DIR_A DIR_B"
        )
    names = [folder.name for folder in folders]
    if names[0] == names[1]:
        names = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    if names[0] == names[1]:
        raise UsageError(
            f"both folders are named {names[0]}", "Their names become the years: rename one."
        )
    by_year = {year: _by_stem(folder, year) for folder, year in zip(folders, names, strict=True)}
    first, second = (set(by_year[year]) for year in names)
    if not first & second:
        raise GeomatchError(
            f"no image of {folders[0]} has the same name as one of {folders[1]}",
            "The images of a pair have the same path within their folders, whatever the suffix.",
        )
    for year, unpaired in zip(names, (first - second, second - first), strict=True):
        _announce_left_out(progress, f"only in {year}", sorted(unpaired))
    years = in_time_order(names)
    return {stem: [by_year[year][stem] for year in years] for stem in sorted(first & second)}


def _by_stem(folder: Path, year: str) -> dict[str, SourceImage]:
    if not folder.is_dir():
        raise GeomatchError(f"{folder} is not a folder", "geomatch tile --pairs DIR_A DIR_B")
    found: dict[str, SourceImage] = {}
    for path in image_files.list_images(folder):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise GeomatchError(
                f"{folder} holds {found[stem].path.name} and {path.name}",
                "Names must be unique, whatever the suffix: move one of them away.",
            )
        image = _source_image(path, folder, stem)
        found[stem] = replace(image, name=f"{year}/{image.name}", year=year)
    if not found:
        raise GeomatchError(f"{folder} holds no images", "geomatch tile --pairs DIR_A DIR_B")
    return found


def _source_image(path: Path, root: Path, label: str) -> SourceImage:
    name = path.relative_to(root).as_posix()
    return SourceImage(_printable(name), _printable(label), path, _stamp(path))


def _printable(name: str) -> str:
    """A name of a file as text, with what is not UTF-8 in it spelled out, such as "for\\xeat"."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _stamp(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(FileNotFoundError):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    return None


def _drop_ignored(
    classes: ImagesByClass, ignored: Sequence[str], progress: ProgressCallback
) -> list[SourceImage]:
    """The images of all classes but the ignored ones.

    Raises:
        UsageError: an ignored class does not exist.
        GeomatchError: a class that is not ignored has no images.
    """
    for name in ignored:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]}?" if near else f"There are {len(classes)} classes."
            raise UsageError(f"there is no class {name} to ignore", hint)
    _announce_left_out(progress, "ignored", ignored)
    kept = {name: images for name, images in classes.items() if name not in ignored}
    for name, images in kept.items():
        if not images:
            raise GeomatchError(
                f"the folder of class {name} holds no images",
                f"Remove it, or add: --ignore {name}",
            )
    return [image for images in kept.values() for image in images]


def _drop_small_classes(
    found: list[SourceImage], least: int, progress: ProgressCallback
) -> list[SourceImage]:
    """The images of classes that have at least `least` images."""
    counts = Counter(p.label for p in found)
    small = {name: str(n) for name, n in sorted(counts.items()) if n < least}
    _announce_left_out(progress, f"classes with fewer than {least} images", small)
    if len(small) == len(counts):
        raise GeomatchError(
            f"no class has {least} images (the largest has {max(counts.values(), default=0)})",
            "Lower --least.",
        )
    return [p for p in found if p.label not in small]


def _announce_left_out(
    progress: ProgressCallback, reason: str, names: Sequence[str] | Mapping[str, str]
) -> None:
    """Announce what is left out and why: how many, and the first few names."""
    if names:
        details = names if isinstance(names, Mapping) else {}
        shown = [f"{n} ({details[n]})" if n in details else n for n in list(names)[:NAMES_SHOWN]]
        more = ", ..." if len(names) > NAMES_SHOWN else ""
        progress(f"left out, {reason} ({len(names)}): {', '.join(shown)}{more}")


# Reading headers


def _inspect(
    found: list[SourceImage],
    files: Mapping[Path, image_files.ArrayFile],
    reading: Reading,
    pool: ThreadPoolExecutor,
    progress: ProgressCallback,
) -> tuple[dict[str, image_files.ImageShape], dict[str, str]]:
    """The shape of each image, and the reason why others cannot be read, by name."""

    def inspect(image: SourceImage) -> image_files.ImageShape | str:
        if image.index is not None:
            return files[image.path].image_shape
        try:
            return image_files.inspect(image.path, reading)
        except image_files.BrokenImageError as error:
            return error.reason

    shapes, unreadable = {}, {}
    for done, (image, shape) in enumerate(zip(found, pool.map(inspect, found), strict=True), 1):
        if isinstance(shape, str):
            unreadable[image.name] = shape
        else:
            shapes[image.name] = shape
        if done % 1000 == 0 or done == len(found):
            progress("reading image headers", done, len(found))
    if not shapes:
        raise _none_readable(unreadable)
    return shapes, unreadable


def _none_readable(unreadable: Mapping[str, str]) -> GeomatchError:
    name, reason = next(iter(unreadable.items()), ("", "there are none"))
    return GeomatchError(
        f"none of the images can be read; {name}: {reason}",
        "Check the files, or copy them again.",
    )


def _stretches(
    found: Sequence[SourceImage],
    shapes: Mapping[str, image_files.ImageShape],
    channels: int,
    text: str,
) -> dict[str, Stretch]:
    """The stretch to uint8 of each year whose images have another dtype; "" without years.

    Raises:
        GeomatchError: images of a year differ in dtype.
        UsageError: no stretch is given, or it has no valid form.
    """
    by_year: dict[str, list[SourceImage]] = {}
    for image in found:
        by_year.setdefault(image.year, []).append(image)
    stretches = {}
    for year, images in by_year.items():
        names: dict[str, list[str]] = {}
        for image in images:
            names.setdefault(shapes[image.name].dtype, []).append(image.name)
        if len(names) > 1:
            (some, first), (other, second) = list(names.items())[:2]
            raise GeomatchError(
                f"images have values of {some} ({listed(first, NAMES_SHOWN)}), "
                f"but others of {other} ({listed(second, NAMES_SHOWN)})",
                "Convert them alike with gdal_translate -ot, or move some away.",
            )
        (dtype,) = names
        if dtype == "uint8":
            continue
        if not text:
            raise UsageError(
                f"{images[0].path} has values of {dtype}, tiles are uint8",
                "Give a stretch: --stretch 2%,98% or --stretch MIN,MAX",
            )
        of_year = [raster for p in images if (raster := shapes[p.name].raster)]
        rasters.common_format(of_year, f"year {year}" if year else "images")
        measured = measure_stretch(of_year, text)
        each = channels // len(measured.low)  # grey images among colour ones of another year
        stretches[year] = Stretch(measured.low * each, measured.high * each)
    return stretches


def _common_size(shapes: Iterator[image_files.ImageShape]) -> int | None:
    """The side of the images if all are squares of one size."""
    sides = {(shape.width, shape.height) for shape in shapes}
    width, height = next(iter(sides))
    return width if len(sides) == 1 and width == height else None


def _draw_splits(
    found: list[SourceImage], images: config.ImagesConfig, seed: int
) -> NDArray[np.int64]:
    """(n,) split of each image: as given, or drawn within its class, or among all pairs.

    Raises:
        UsageError: validation and test leave no training images.
    """
    split = np.asarray([p.split or 0 for p in found], np.int64)
    drawn = [name for name in DRAWN_SPLITS if SPLITS.index(name) not in split]
    groups: dict[str, dict[str, list[int]]] = {}
    for i, image in enumerate(found):
        if image.split is None:
            group = "" if image.year else image.label
            member = image.label if image.year else image.name
            groups.setdefault(group, {}).setdefault(member, []).append(i)
    for group, members in groups.items():
        shares = {name: getattr(images, name) for name in drawn}
        counts = {k: int(v if v >= 1 else round(v * len(members))) for k, v in shares.items()}
        if sum(counts.values()) >= len(members) > 1:
            raise UsageError(
                f"validation and test take all {len(members)} of {group or 'the pairs'}",
                "Lower images.validation and images.test, or raise --least.",
            )
        # Each class has its own seed, so that its split does not depend on other classes.
        rng = np.random.default_rng([seed, *group.encode()])
        order = rng.permutation(len(members))
        rows = list(members.values())
        start = 0
        for name, count in counts.items():
            for member in order[start : start + count]:
                split[rows[member]] = SPLITS.index(name)
            start += count
    return split


# Reading images


def _read_shards(
    missing: list[ImageShard], pool: ThreadPoolExecutor
) -> Iterator[tuple[ImageShard, shards.ShardRecord]]:
    for shard in missing:
        pixels = np.zeros((len(shard), shard.size, shard.size, shard.channels), np.uint8)
        unreadable = {}
        for i, values in enumerate(pool.map(shard.read, shard.images)):
            if isinstance(values, str):
                unreadable[shard.images[i].name] = values
            else:
                pixels[i] = values
        valid = [float(p.name not in unreadable) for p in shard.images]
        yield shard, shard.write(pixels, valid=valid, unreadable=unreadable)


def _catalogue(
    found: list[SourceImage],
    years: tuple[str, ...],
    split: NDArray[np.int64],
    records: Sequence[shards.ShardRecord],
    unreadable: Mapping[str, str],
) -> TileTable:
    valid = np.concatenate([np.asarray(r["valid"], np.float32) for r in records])
    if not valid.any():
        raise _none_readable(unreadable)
    n = len(found)
    names = [p.name for p in found]
    classes, label = np.unique([p.label for p in found], return_inverse=True)
    no_cell = np.zeros(n, np.int64)
    return TileTable(
        grid=None,
        years=years,
        sources=tuple(names),
        classes=tuple(str(name) for name in classes),
        label=label.astype(np.int64),
        epsg=no_cell,
        col=no_cell,
        row=no_cell,
        year=np.asarray([years.index(p.year) for p in found], np.int64),
        split=split,
        source=np.arange(n, dtype=np.int64),
        valid=valid,
        store_row=np.arange(n, dtype=np.int64),
    ).select(np.flatnonzero(valid))

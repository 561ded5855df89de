"""What `tile` does for images without a ground: class folders, MNIST files, pairs of folders.

The name of a class folder is the place of its images, which have no year. Each folder of a pair is
a year, and the images of one name show one place.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import shutil
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomatch import config
from geomatch.data.store import shard_rows
from geomatch.data.tiles import SPLITS, TileTable, in_time_order
from geomatch.errors import GeomatchError, UsageError
from geomatch.manifests import Channels, TileRequest, YearOfTiles
from geomatch.progress import ProgressCallback
from geomatch.project import Project, fingerprint, replace_folder
from geomatch.tiling import image_files, shards

NAMED = 5
"""How many of what is left out are named."""

DRAWN = ("validation", "test")


@dataclass(frozen=True)
class Picture:
    """An image of the set.

    Attributes:
        name: its path within the set.
        label: its class.
        year: label of its year, "" without one.
        split: code into `SPLITS`; None where it is to be drawn.
        stamp: size and time of its file; None where there is none.
        index: within a file of many.
    """

    name: str
    label: str
    path: Path
    stamp: tuple[int, int] | None
    year: str = ""
    split: int | None = None
    index: int | None = None


Classes = dict[str, list[Picture]]
"""The images of each class."""


@dataclass(frozen=True)
class Album(shards.Shard):
    """The images of a shard; `files` are the opened ones that hold many images."""

    images: Sequence[Picture]
    size: int
    channels: int
    files: Mapping[Path, image_files.Arrays]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def key(self) -> str:
        images = [[p.name, p.stamp] for p in self.images]
        return fingerprint([images, self.size, self.channels])

    def read(self, picture: Picture) -> image_files.Pixels | str:
        """(size, size, channels), or why the image cannot be read."""
        if picture.index is not None:
            pixels = self.files[picture.path].images[picture.index]
            return image_files.square(pixels, self.size, self.channels)
        try:
            return image_files.read(picture.path, self.size, self.channels)
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
        GeomatchError: there are no images, or none that can be read.
        UsageError: a setting makes no sense.
    """
    images = settings.images
    if settings.source or (images.folders and images.pairs):
        raise UsageError(
            "images of more than one kind are named",
            "Use one of: YEAR=PATH or [[source]]; images.folders; images.pairs.",
        )
    partial = project.root / "tiles.partial"
    with project.lock("tiles"), ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        files: dict[Path, image_files.Arrays] = {}
        if images.pairs:
            classes = _pairs(_located(images.pairs, project), progress)
        else:
            classes = _class_folders(images.folders, project, files)
        found = _without(classes, images.ignore, progress)
        size = settings.grid.size if _size_is_asked(project, overrides) else None
        chosen = [images.least, images.validation, images.test, settings.split.seed, size]
        items = [[p.name, p.label, p.year, p.split, p.stamp] for p in found]
        request = fingerprint([items, chosen])
        if not force and shards.are_made(project, request):
            progress("tiles are up to date")
        else:
            forms, unreadable = _inspect(found, files, pool, progress)
            whole = [p for p in found if p.name not in unreadable]
            if not images.pairs:
                whole = _large(whole, images.least, progress)
            if size is None:
                size = _common_size(forms[p.name] for p in whole) or settings.grid.size
            channels = 1 if all(forms[p.name].grey for p in whole) else 3
            split = _splits(whole, images, settings.split.seed)
            asked = TileRequest(source=(), set=tuple(overrides))
            shards.prepare(partial, [len(whole), size, channels], asked, force)
            rows = shard_rows(size, channels)
            work = [
                Album(number, start, partial, whole[start : start + rows], size, channels, files)
                for number, start in enumerate(range(0, len(whole), rows))
            ]
            records = shards.cut(
                work, lambda missing: _cut(missing, pool), "reading images", progress
            )
            for record in records:
                unreadable |= record["unreadable"]
            years = tuple(dict.fromkeys(p.year for p in found))
            table = _catalogue(whole, years, split, records, unreadable)
            _tell(progress, "not to be read", unreadable)
            described = {
                "grid": f"{size}px",
                "crs": None,
                "size": size,
                "gsd": None,
                "stride": None,
                "channels": Channels(channels, 0),
                "placement": "none",
                "years": {
                    year: YearOfTiles(int((table.year == i).sum()), labels=0, stretch=None)
                    for i, year in enumerate(years)
                    if year
                },
                "unreadable": unreadable,
            }
            shards.finish(
                partial / "tiles", table, records, request=request, asked=asked, **described
            )
            replace_folder(partial / "tiles", project.tiles)
        shutil.rmtree(partial, ignore_errors=True)
        return TileTable.load(project.catalogue)


def _size_is_asked(project: Project, overrides: Sequence[str]) -> bool:
    """Whether the tile side is named, rather than left to the images."""
    in_file = tomllib.loads(project.config.read_text(encoding="utf-8")).get("grid", {})
    return "size" in in_file or any(o.split("=")[0].strip() == "grid.size" for o in overrides)


def _located(paths: Sequence[str], project: Project) -> list[Path]:
    """Paths from the project's folder.

    Raises:
        GeomatchError: one is not there.
    """
    found = [project.root.absolute() / Path(path).expanduser() for path in paths]
    for path in found:
        if not path.exists():
            raise GeomatchError(f"{path} is not there", "Name the images again: geomatch tile.")
    return found


# Which images there are


def _class_folders(
    named: Sequence[str], project: Project, files: dict[Path, image_files.Arrays]
) -> Classes:
    """Images of folders and of files of many, which are put into `files`.

    Args:
        named: "PATH", or "SPLIT=PATH" of one or more splits, train among them. Splits that are
            not named are drawn from train.
    """
    given: dict[str, str] = {}
    for text in named:
        start, _, rest = text.partition("=")
        split, where = (start, rest) if start in SPLITS else ("train", text)
        if split in given:
            raise UsageError(
                f"{text}: {split} is named twice", "One folder or file of each: train=DIR test=DIR"
            )
        given[split] = where
    if "train" not in given:
        raise UsageError("no training images are named", "Add train=PATH.")
    found: Classes = {}
    for split, path in zip(given, _located(list(given.values()), project), strict=True):
        code = None if split == "train" else SPLITS.index(split)
        prefix = f"{split}/" if len(given) > 1 else ""
        images = _of_folder(path) if path.is_dir() else _of_file(path, files)
        for label, members in images.items():
            mine = [replace(p, name=prefix + p.name, split=code) for p in members]
            found.setdefault(label, []).extend(mine)
    return found


def _of_folder(root: Path) -> Classes:
    folders = [f for f in sorted(root.iterdir()) if f.is_dir() and not f.name.startswith(".")]
    if not folders:
        raise GeomatchError(
            f"{root} has no class folders", "Images are expected in DIR/CLASS/, a folder a class."
        )
    return {
        folder.name: [_picture(path, root, folder.name) for path in image_files.listed(folder)]
        for folder in folders
    }


def _of_file(path: Path, files: dict[Path, image_files.Arrays]) -> Classes:
    files[path] = image_files.arrays(path)
    stamp = _stamp(path)
    found: Classes = {}
    for i, label in enumerate(files[path].classes):
        picture = Picture(f"{label}/{i:05d}", label, path, stamp, index=i)
        found.setdefault(label, []).append(picture)
    return found


def _pairs(folders: Sequence[Path], progress: ProgressCallback) -> Classes:
    """Images of the names that both folders hold."""
    if len(folders) != 2 or folders[0].resolve() == folders[1].resolve():
        raise UsageError("images.pairs names two folders", "geomatch tile --pairs DIR_A DIR_B")
    names = [folder.name for folder in folders]
    if names[0] == names[1]:
        names = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    if names[0] == names[1]:
        raise UsageError(
            f"both folders are named {names[0]}", "Their names are the years: rename one."
        )
    by_year = {year: _by_stem(folder, year) for folder, year in zip(folders, names, strict=True)}
    first, second = (set(by_year[year]) for year in names)
    if not first & second:
        raise GeomatchError(
            f"no image of {folders[0]} has the name of one of {folders[1]}",
            "A pair is two images with one path within their folders, whatever the suffix.",
        )
    for year, lonely in zip(names, (first - second, second - first), strict=True):
        _tell(progress, f"in {year} alone", sorted(lonely))
    years = in_time_order(names)
    return {stem: [by_year[year][stem] for year in years] for stem in sorted(first & second)}


def _by_stem(folder: Path, year: str) -> dict[str, Picture]:
    if not folder.is_dir():
        raise GeomatchError(f"{folder} is no folder", "geomatch tile --pairs DIR_A DIR_B")
    found: dict[str, Picture] = {}
    for path in image_files.listed(folder):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise GeomatchError(
                f"{folder} holds {found[stem].path.name} and {path.name}",
                "One image of a name is expected: move the other away.",
            )
        picture = _picture(path, folder, stem)
        found[stem] = replace(picture, name=f"{year}/{picture.name}", year=year)
    if not found:
        raise GeomatchError(f"{folder} holds no images", "geomatch tile --pairs DIR_A DIR_B")
    return found


def _picture(path: Path, root: Path, label: str) -> Picture:
    return Picture(path.relative_to(root).as_posix(), label, path, _stamp(path))


def _stamp(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(FileNotFoundError):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    return None


def _without(classes: Classes, ignored: Sequence[str], progress: ProgressCallback) -> list[Picture]:
    """The images of classes that are not ignored.

    Raises:
        UsageError: there is no such class.
        GeomatchError: another class is empty.
    """
    for name in ignored:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]}?" if near else f"There are {len(classes)} classes."
            raise UsageError(f"there is no class {name} to ignore", hint)
    _tell(progress, "ignored", ignored)
    kept = {name: images for name, images in classes.items() if name not in ignored}
    for name, images in kept.items():
        if not images:
            raise GeomatchError(
                f"the folder of class {name} holds no images",
                f"Remove it, or add: --ignore {name}",
            )
    return [picture for images in kept.values() for picture in images]


def _large(found: list[Picture], least: int, progress: ProgressCallback) -> list[Picture]:
    """The images of classes of at least so many."""
    counts = Counter(p.label for p in found)
    small = {name: str(n) for name, n in sorted(counts.items()) if n < least}
    _tell(progress, f"classes of fewer than {least} images", small)
    if len(small) == len(counts):
        raise GeomatchError(
            f"no class has {least} images (the largest has {max(counts.values(), default=0)})",
            "Lower --least.",
        )
    return [p for p in found if p.label not in small]


def _tell(progress: ProgressCallback, what: str, names: Sequence[str] | Mapping[str, str]) -> None:
    """Say what is left out, and why: how many, and the first few."""
    if names:
        reasons = names if isinstance(names, Mapping) else {}
        told = [f"{n} ({reasons[n]})" if n in reasons else n for n in list(names)[:NAMED]]
        more = ", ..." if len(names) > NAMED else ""
        progress(f"left out, {what} ({len(names)}): {', '.join(told)}{more}")


# What they are like


def _inspect(
    found: list[Picture],
    files: Mapping[Path, image_files.Arrays],
    pool: ThreadPoolExecutor,
    progress: ProgressCallback,
) -> tuple[dict[str, image_files.Form], dict[str, str]]:
    """The form of each image, and why others cannot be read, by name."""

    def look(picture: Picture) -> image_files.Form | str:
        if picture.index is not None:
            return files[picture.path].form
        try:
            return image_files.inspect(picture.path)
        except image_files.BrokenImageError as error:
            return error.reason

    forms, unreadable = {}, {}
    for done, (picture, form) in enumerate(zip(found, pool.map(look, found), strict=True), 1):
        if isinstance(form, str):
            unreadable[picture.name] = form
        else:
            forms[picture.name] = form
        if done % 1000 == 0 or done == len(found):
            progress("looking at images", done, len(found))
    if not forms:
        raise _nothing(unreadable)
    return forms, unreadable


def _nothing(unreadable: Mapping[str, str]) -> GeomatchError:
    name, reason = next(iter(unreadable.items()), ("", "there is none"))
    return GeomatchError(
        f"none of the images can be read; {name}: {reason}",
        "Look at the files, or copy them again.",
    )


def _common_size(forms: Iterator[image_files.Form]) -> int | None:
    """The side of images that are all square and alike."""
    sides = {(form.width, form.height) for form in forms}
    width, height = next(iter(sides))
    return width if len(sides) == 1 and width == height else None


def _splits(found: list[Picture], images: config.ImagesConfig, seed: int) -> NDArray[np.int64]:
    """(n,) split of each image: as given, or drawn within its class; of pairs, among all names.

    Raises:
        UsageError: validation and test leave nothing to train on.
    """
    split = np.asarray([p.split or 0 for p in found], np.int64)
    drawn = [name for name in DRAWN if SPLITS.index(name) not in split]
    groups: dict[str, dict[str, list[int]]] = {}
    for i, picture in enumerate(found):
        if picture.split is None:
            group = "" if picture.year else picture.label
            member = picture.label if picture.year else picture.name
            groups.setdefault(group, {}).setdefault(member, []).append(i)
    for group, members in groups.items():
        shares = {name: getattr(images, name) for name in drawn}
        counts = {k: int(v if v >= 1 else round(v * len(members))) for k, v in shares.items()}
        if sum(counts.values()) >= len(members) > 1:
            raise UsageError(
                f"validation and test take all {len(members)} of {group or 'the pairs'}",
                "Lower images.validation and images.test, or raise --least.",
            )
        # Of its own seed, so that other classes change nothing.
        rng = np.random.default_rng([seed, *group.encode()])
        order = rng.permutation(len(members))
        rows = list(members.values())
        start = 0
        for name, count in counts.items():
            for member in order[start : start + count]:
                split[rows[member]] = SPLITS.index(name)
            start += count
    return split


# Reading


def _cut(missing: list[Album], pool: ThreadPoolExecutor) -> Iterator[tuple[Album, shards.Record]]:
    for album in missing:
        pixels = np.zeros((len(album), album.size, album.size, album.channels), np.uint8)
        unreadable = {}
        for i, values in enumerate(pool.map(album.read, album.images)):
            if isinstance(values, str):
                unreadable[album.images[i].name] = values
            else:
                pixels[i] = values
        valid = [float(p.name not in unreadable) for p in album.images]
        yield album, album.write(pixels, valid=valid, unreadable=unreadable)


def _catalogue(
    found: list[Picture],
    years: tuple[str, ...],
    split: NDArray[np.int64],
    records: Sequence[shards.Record],
    unreadable: Mapping[str, str],
) -> TileTable:
    valid = np.concatenate([np.asarray(r["valid"], np.float32) for r in records])
    if not valid.any():
        raise _nothing(unreadable)
    n = len(found)
    names = [p.name for p in found]
    classes, label = np.unique([p.label for p in found], return_inverse=True)
    nothing = np.zeros(n, np.int64)
    return TileTable(
        grid=None,
        years=years,
        sources=tuple(names),
        classes=tuple(str(name) for name in classes),
        label=label.astype(np.int64),
        epsg=nothing,
        col=nothing,
        row=nothing,
        year=np.asarray([years.index(p.year) for p in found], np.int64),
        split=split,
        source=np.arange(n, dtype=np.int64),
        valid=valid,
        store_row=np.arange(n, dtype=np.int64),
    ).select(np.flatnonzero(valid))

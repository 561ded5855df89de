"""The arguments of `tile`: `geomatch.toml`, combined with what a caller names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from geomatch import config
from geomatch.errors import UsageError
from geomatch.manifests import TileRequest
from geomatch.project import Project, read_json

STAC_YEAR = r"\d{4}"
"""What tells the year in the datetime of a STAC item."""


@dataclass(frozen=True)
class TileArguments:
    """The arguments of `geomatch.tile.tile`.

    Attributes:
        settings: the whole configuration, with the sources.
        overrides: the "table.key=value" strings within `settings` that `geomatch.toml` does not
            hold.
    """

    settings: config.Config
    overrides: tuple[str, ...]


def tile_arguments(
    project: Project,
    sources: Sequence[str] = (),
    *,
    folders: str | None = None,
    pairs: tuple[str, str] | None = None,
    validation: Sequence[str] = (),
    test: Sequence[str] = (),
    fictitious: bool = False,
    year_from: str = "",
    asset: str = "",
    overrides: Sequence[str] = (),
) -> TileArguments:
    """Combine the imagery and settings named here with `geomatch.toml`.

    What is named replaces the imagery in `geomatch.toml`. If neither names any, the request of the
    last `tile` is repeated, with `overrides` applied. Paths are relative to the current folder.

    Args:
        sources: "YEAR=PATH", "YEAR:labels=PATH" and "YEAR:changed=PATH"; "stac=PATH"; with
            `year_from`, "PATH", ":labels=PATH" and ":changed=PATH"; with `folders`, "SPLIT=PATH".
        folders: images without georeference: a folder of class folders, an MNIST file, or
            "train=PATH".
        pairs: two folders of images with the same names.
        validation, test: globs of file names (split rule "source") or polygon files ("file").
        fictitious: the placement of `sources` is made up.
        year_from: a regular expression that finds the year in file names, or in the datetime of
            STAC items.
        asset: key of the asset of STAC items that is the imagery.
        overrides: "table.key=value" strings, which override `geomatch.toml`.

    Raises:
        UsageError: what is named is not understood or contradicts itself.
    """
    if pairs and (folders or sources):
        raise UsageError("--pairs takes two folders and nothing else")
    if (year_from or asset) and (folders or pairs or not sources):
        raise UsageError(
            "--year-from and --asset need georeferenced imagery",
            "For example: geomatch tile stac=items.json",
        )
    in_file = config.load(project.config)
    wanted = list(overrides)
    named = in_file.source
    if folders or pairs:
        named = ()
        given = [] if pairs else [_absolute(text) for text in (folders, *sources) if text]
        wanted.append(f"images.folders={config.toml(given)}")
        wanted.append(f"images.pairs={config.toml([_path(path) for path in pairs or ()])}")
    elif sources:
        placement = "fictitious" if fictitious else "real"
        named = _parse_sources(sources, placement, year_from, asset)
    elif not named and not _names_images(config.with_overrides(in_file, wanted)):
        before = last_request(project)
        named = config.from_dict({"source": before.source}, str(project.tiles)).source
        wanted = [*before.set, *wanted]
    rule = config.with_overrides(in_file, wanted).split.by
    for split, areas in (("validation", validation), ("test", test)):
        if areas:
            wanted.append(f"split.{split}={config.toml(_areas(rule, areas))}")
    settings = config.with_sources(config.with_overrides(in_file, wanted), named)
    if sources and named:
        settings = config.with_overrides(settings, ["images.folders=[]", "images.pairs=[]"])
    return TileArguments(settings, tuple(wanted))


def last_request(project: Project) -> TileRequest:
    """The request of the last `tile`, finished or not."""
    for path in (project.root / "tiles.partial" / "plan.json", project.tiles_manifest):
        if path.exists():
            return TileRequest.from_json(read_json(path, "geomatch tile YEAR=PATH")["asked"])
    return TileRequest(source=(), set=())


def _names_images(settings: config.Config) -> bool:
    return bool(settings.images.folders or settings.images.pairs)


def _areas(rule: config.SplitRule, given: Iterable[str]) -> list[str]:
    """Areas of a split: globs as they are, polygon files as absolute paths.

    Raises:
        UsageError: the split is by blocks, which are drawn at random.
    """
    if rule == "blocks":
        raise UsageError(
            "--validation and --test name files, but the split is by blocks",
            "Add --split source (globs of imagery) or --split file (polygons).",
        )
    return list(given) if rule == "source" else [_path(path) for path in given]


def _absolute(text: str) -> str:
    """PATH or SPLIT=PATH, with an absolute path."""
    split, equals, path = text.partition("=")
    if split in ("train", "validation", "test"):
        return f"{split}{equals}{_path(path)}"
    return _path(text)


def _path(path: str) -> str:
    return config.placed(path, Path.cwd())


def _parse_sources(
    texts: Iterable[str], placement: str, year_from: str, asset: str
) -> tuple[config.SourceConfig, ...]:
    """Sources from YEAR=PATH, YEAR:labels=PATH and YEAR:changed=PATH, in the order given.

    A path more of a year that has one is a source of its own.

    With `year_from`, the path of the images stands alone, and YEAR is left out before labels and
    masks.
    """
    found: dict[str, dict[str, str]] = {}  # the first source of each year
    more: list[dict[str, str]] = []
    for text in texts:
        if year_from and not text.startswith((":", "stac=")):
            name, path = "", text
        else:
            name, _, path = text.partition("=")
        year, _, kind = name.partition(":")
        kinds = ("",) if year == "stac" else ("", "labels", "changed")
        if not (path and (year or year_from)) or kind not in kinds:
            raise UsageError(
                f"{text} does not have the form YEAR=PATH, YEAR:labels=PATH or YEAR:changed=PATH",
                "For example: geomatch tile 2010=ortho/2010 2010:labels=landcover.tif",
            )
        told = {"year": year} if year else {"year_from": year_from}
        if name == "stac":
            year, told = "", {"year_from": year_from or STAC_YEAR, "asset": asset}
        entry = found.setdefault(year, {**told, "placement": placement})
        key = kind or "images"
        if key not in entry:
            entry[key] = _path(path)
        elif key == "images":
            more.append({**told, "placement": placement, key: _path(path)})
        else:
            raise UsageError(f"{text}: {name} is named twice", "Use one folder or quoted glob.")
    if asset and not any("asset" in entry for entry in found.values()):
        raise UsageError("--asset is for STAC items", "Name them as stac=PATH.")
    return config.from_dict({"source": [*found.values(), *more]}, "command line").source

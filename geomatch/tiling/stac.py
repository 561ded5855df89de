"""Imagery named by a STAC item collection: the assets of its items, and when they were taken."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from geomatch.errors import GeomatchError

SUFFIXES = (".json", ".geojson")
NOT_IMAGERY = {"thumbnail", "overview", "metadata", "labels"}
"""Roles of assets that are not the imagery itself."""


def read_items(path: Path) -> list[dict[str, Any]] | None:
    """The items of an item collection, or a single item; None where `path` is not STAC.

    Raises:
        GeomatchError: it has no items, or is a STAC catalog or collection, which only link to them.
    """
    if not path.name.lower().endswith(SUFFIXES):
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict):
        return None
    kind = document.get("type")
    if kind in ("Catalog", "Collection"):
        raise GeomatchError(
            f"{path} is a STAC {kind.lower()}, which does not hold its items",
            "Save the items as one item collection: stac-client search ... --save items.json",
        )
    items = [document] if kind == "Feature" else document.get("features")
    if not isinstance(items, list):
        return None
    if not items:
        raise GeomatchError(f"{path} has no items", "Check the search that wrote it.")
    return items if all(map(_is_item, items)) else None


def _is_item(item: Any) -> bool:
    if not (isinstance(item, dict) and isinstance(item.get("assets"), dict)):
        return False
    parts = [item.get("properties"), *item["assets"].values()]
    return all(isinstance(part, dict) for part in parts)


def dated_assets(path: Path, items: list[dict[str, Any]], asset: str) -> Iterator[tuple[str, str]]:
    """The file of each item, and the item's date and time.

    Args:
        path: of the collection; relative links are taken from its folder.
        asset: key of the asset of each item; "" for the only one that is imagery.

    Raises:
        GeomatchError: an item has no such asset or no date, or its file is not local.
    """
    for item in items:
        name = f"{path}: item {item.get('id')}"
        file = _local(name, _asset(name, item["assets"], asset), path.parent)
        values = item["properties"]
        date = values.get("datetime") or values.get("start_datetime")
        if not date:
            raise GeomatchError(f"{name} has no datetime", "Add it, or leave out the item.")
        yield str(file), str(date)


def _asset(name: str, assets: Mapping[str, Any], key: str) -> str:
    imagery = {
        each: asset
        for each, asset in assets.items()
        if str(asset.get("type", "image/")).startswith("image/")
        and not NOT_IMAGERY & set(asset.get("roles") or ())
    }
    found = assets.get(key) if key else None
    if not key and len(imagery) == 1:
        (found,) = imagery.values()
    if found is None:
        wrong = f"no asset {key!r}" if key else f"{len(imagery)} assets that may be the imagery"
        raise GeomatchError(
            f"{name} has {wrong}", f"Give --asset KEY, one of: {', '.join(assets) or 'none'}."
        )
    if not found.get("href"):
        raise GeomatchError(f"{name} has no href of its imagery", "Add it, or leave out the item.")
    return str(found["href"])


def _local(name: str, href: str, folder: Path) -> Path:
    link = urlsplit(href)
    if link.scheme not in ("", "file"):
        raise GeomatchError(f"{name} is at {href}", "Download it, and link the item to the file.")
    return folder / (unquote(link.path) if link.scheme else href)

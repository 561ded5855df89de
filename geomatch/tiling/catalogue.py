"""What was cut: catalogue, manifest and rows of the store, from the records of shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from geomatch import config
from geomatch.data.store_rows import StoreRows
from geomatch.data.tiles import TileTable
from geomatch.errors import GeomatchError
from geomatch.geo.grid import Grid
from geomatch.geo.views import Reading
from geomatch.manifests import Channels, YearOfTiles
from geomatch.tiling import shards, sources
from geomatch.tiling.cells import Broken, CellShard, take_up
from geomatch.tiling.plan import TilePlan
from geomatch.tiling.sources import YearSource


def catalogue(
    plan: TilePlan,
    year_sources: Sequence[YearSource],
    records: Sequence[shards.ShardRecord],
    min_valid: float,
) -> TileTable:
    """The catalogue of the tiles that have enough valid pixels.

    Raises:
        GeomatchError: there are none.
    """
    valid = np.concatenate([np.asarray(r["valid"], np.float32) for r in records])
    names = [name for record in records for name in record["source"]]
    changed = np.concatenate([np.asarray(r["changed"], np.float32) for r in records])
    files, source = np.unique(names, return_inverse=True)
    kept = np.flatnonzero(valid >= np.float32(min_valid))
    if not len(kept):
        raise GeomatchError(
            f"no tile has {min_valid:.0%} valid pixels (the best has {valid.max(initial=0):.0%})",
            "Lower grid.min_valid, or check the nodata value of the sources with gdalinfo.",
        )
    return TileTable(
        grid=plan.grid,
        years=tuple(c.year for c in year_sources),
        sources=tuple(str(name) for name in files),
        classes=(),
        label=np.full(len(plan.col), -1, np.int64),
        epsg=plan.epsg,
        col=plan.col,
        row=plan.row,
        year=plan.year,
        split=plan.split,
        source=source.reshape(-1).astype(np.int64),
        valid=valid,
        store_row=np.arange(len(plan.col), dtype=np.int64),
        changed=changed if any(c.changed for c in year_sources) else None,
    ).select(kept)


def description(
    grid: Grid,
    year_sources: Sequence[YearSource],
    channels: tuple[int, int],
    settings: config.GridConfig,
    table: TileTable,
    records: Sequence[shards.ShardRecord],
) -> dict[str, Any]:
    """What the manifest says of tiles, beside what `shards.finish` adds."""
    reading = sources.reading(settings)
    sheets = np.concatenate([record["sheets"] for record in records])[table.store_row]
    fictitious = any(c.placement == "fictitious" for c in year_sources)
    broken: Broken = {}
    for record in records:
        take_up(broken, record["broken"])
    shares: dict[str, float] = {}
    if classes := year_sources[0].labels.classes:
        pixels = np.sum([record["classes"] for record in records], axis=0)
        counted = zip(classes, pixels[1 : len(classes) + 1], strict=True)
        shares = {name: float(f"{count / pixels.sum():.3g}") for name, count in counted}
    return {
        "grid": grid.id,
        "crs": grid.crs,
        "size": grid.size,
        "gsd": grid.gsd,
        "stride": grid.stride,
        "channels": Channels(*channels),
        "placement": "fictitious" if fictitious else "real",
        "reading": asdict(reading) if reading != Reading() else None,
        "years": {
            c.year: YearOfTiles(
                files=len(c.images),
                labels=len(c.labels.rasters) + len(c.labels.layers),
                stretch=asdict(c.stretch) if c.stretch else None,
                overlap=c.overlap,
                seams=int(((sheets > 1) & (table.year == i)).sum()),
            )
            for i, c in enumerate(year_sources)
        },
        "label_classes": shares or None,
        "broken": {layer: len(ids) for layer, ids in broken.items()} or None,
    }


def store_rows(
    plan: TilePlan,
    year_sources: Sequence[YearSource],
    work: Sequence[CellShard],
    records: Sequence[shards.ShardRecord],
    first: str,
) -> StoreRows:
    """What every planned row of the store was cut from.

    Args:
        work, records: all shards, with their records.
        first: see `StoreRows`.
    """
    names = [name for record in records for name in record["source"]]
    files, source = np.unique(names, return_inverse=True)
    notes = ("digest", "classes", "broken", "unreadable")

    def joined(name: str, kind: type) -> Any:
        return np.concatenate([np.asarray(record[name], kind) for record in records])

    return StoreRows(
        grid=plan.grid,
        years=tuple(each.year for each in year_sources),
        sources=tuple(str(name) for name in files),
        epsg=plan.epsg,
        col=plan.col,
        row=plan.row,
        year=plan.year,
        split=plan.split,
        key=np.concatenate([shard.keys for shard in work]),
        valid=joined("valid", np.float32),
        source=source.reshape(-1).astype(np.int64),
        sheets=joined("sheets", np.int64),
        changed=joined("changed", np.float32),
        shards=tuple({name: r[name] for name in notes if name in r} for r in records),
        rule=plan.rule,
        block=plan.block,
        first=first,
    )

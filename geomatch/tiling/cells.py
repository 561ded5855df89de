"""Cutting cells: what a worker process does. It imports little, since each worker does so."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomatch.data.store import TileStore, link_shard, shard_rows
from geomatch.data.store_rows import StoreRows
from geomatch.geo import labels, placement
from geomatch.geo.grid import Grid, Ints
from geomatch.geo.rasters import Pixels
from geomatch.geo.windows import GridReader
from geomatch.project import fingerprint
from geomatch.tiling import shards
from geomatch.tiling.sources import YearSource
from geomatch.tiling.usable import Unreadable

RECORD = 3
"""Version of the records of shards; shards with records of another one are cut again."""
RUN_BYTES = 16 * 2**20
"""Neighbouring cells that are read at once have at most so many pixels, or are one cell."""

Broken = dict[str, list[int]]
"""Ids of features that could not be drawn, by layer."""


@dataclass(frozen=True)
class Kept:
    """What a shard keeps of tiles that are there.

    Attributes:
        store: their pixels.
        rows: (n,) the row of each tile of the shard in that store, -1 where it is to be cut.
        valid, source, sheets, changed: of the record, (n,).
        shards: JSON values of the shards of that store in which the rows are.
        is_whole: whether the shard has all rows of one of these, in their order.
    """

    store: Path
    rows: Ints
    valid: list[float]
    source: list[str]
    sheets: list[int]
    changed: list[float | None]
    shards: list[dict[str, Any]]
    is_whole: bool

    @classmethod
    def of(cls, before: StoreRows, store: Path, rows: Ints, size: int) -> Kept:
        """What rows of a store hold, `size` of which are a shard."""
        numbers = np.unique(rows[rows >= 0] // size).tolist()
        whole = np.arange(numbers[0] * size, min((numbers[0] + 1) * size, len(before)))
        names = np.asarray(before.sources, object)[before.source[rows]]
        return cls(
            store,
            rows,
            before.valid[rows].tolist(),
            names.tolist(),
            before.sheets[rows].tolist(),
            [None if np.isnan(share) else share for share in before.changed[rows].tolist()],
            [before.shards[number] for number in numbers],
            # The pixels of tiles in object storage cannot be linked.
            np.array_equal(rows, whole) and store.exists(),
        )


@dataclass(frozen=True)
class CellShard(shards.Shard):
    """A shard of cells, which is cut in one go.

    Attributes:
        keys: (n,) of what each tile depends on; see `StoreRows.key`.
        kept: tiles that need not be cut.
    """

    grid: Grid
    channels: tuple[int, int]
    epsg: Ints
    col: Ints
    row: Ints
    year: Ints
    keys: NDArray[np.uint64]
    year_sources: dict[int, YearSource]
    skip_bad: bool
    kept: Kept | None = None

    def __len__(self) -> int:
        return len(self.col)

    @property
    def key(self) -> str:
        cells = [a.tolist() for a in (self.epsg, self.col, self.row, self.year, self.keys)]
        return fingerprint(cells)

    def take(self) -> shards.ShardRecord:
        """Take a shard that is kept as a whole."""
        assert self.kept is not None
        size = shard_rows(self.grid.size, sum(self.channels))
        numbers = int(self.kept.rows[0]) // size, self.start // size
        link_shard(self.kept.store, numbers[0], self.pixels, numbers[1])
        return self.save_record(**_columns(self), **self.kept.shards[0])


@dataclass(frozen=True)
class Batch:
    """Shards that one worker cuts, of cells near each other: what it opened and decoded is kept.

    Attributes:
        year_sources: with all that the shards' own have.
    """

    shards: tuple[CellShard, ...]
    year_sources: dict[int, YearSource]


def cut(batch: Batch) -> list[shards.ShardRecord]:
    """Cut shards; while one is read, the one before it is compressed and written.

    Raises:
        GeomatchError: a raster is damaged, or a shard cannot be written.
    """
    records: list[Future[shards.ShardRecord]] = []
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(ThreadPoolExecutor(1))
        cutter = stack.enter_context(_Cutter(batch))
        for shard in batch.shards:
            if shard.kept and shard.kept.is_whole:
                records.append(writer.submit(shard.take))
                continue
            pixels, columns = cutter.read(shard)
            if records:
                records[-1].result()  # so that no more than two shards are in memory
            records.append(writer.submit(shard.write, pixels, **columns))
            del pixels
        return [record.result() for record in records]


class _Cutter:
    """Reads shards of a batch; its rasters stay open from one to the next."""

    def __init__(self, batch: Batch) -> None:
        first = batch.shards[0]
        self._grid, self._channels = first.grid, first.channels
        self._sources = batch.year_sources
        self._unreadable: Unreadable = {} if first.skip_bad else None
        self._has_classes = any(each.labels.classes for each in self._sources.values())
        self._place: tuple[int, str] = -1, ""
        self._readers: dict[str, GridReader] = {}  # of that year and CRS

    def __enter__(self) -> _Cutter:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def read(self, shard: CellShard) -> tuple[Pixels, dict[str, Any]]:
        """The pixels of a shard (n, size, size, channels), and the columns of its record."""
        size, (bands, drawn) = self._grid.size, self._channels
        pixels = np.zeros((len(shard), size, size, bands + drawn), np.uint8)
        columns = _columns(shard)
        valid, names = columns["valid"], columns["source"]
        sheets, changed = columns["sheets"], columns["changed"]
        broken: Broken = {}
        if shard.kept:
            there = np.flatnonzero(shard.kept.rows >= 0)
            pixels[there] = TileStore.open(shard.kept.store).read(shard.kept.rows[there])
            for each in shard.kept.shards:
                take_up(broken, each["broken"])
        for (code, epsg), rows in _groups(shard):
            crs, known = f"EPSG:{epsg}", self._sources[code].labels
            if self._place != (code, crs):  # many years would have too many files open
                self._close()
                self._place = code, crs
            images = self._reader("images")
            with contextlib.ExitStack() as stack:
                layers: labels.LayerReader | None = None
                if drawn_layers := shard.year_sources[code].labels.layers:
                    layers = stack.enter_context(self._layers(drawn_layers, shard, rows, crs))
                    take_up(broken, layers.broken)
                share = self._share()
                for run in _runs(shard, rows):
                    col, row = int(shard.col[run[0]]), int(shard.row[run[0]])
                    for i, (values, mask, seen) in zip(
                        run, images.read_run(col, row, len(run)), strict=True
                    ):
                        names[i] = seen[0].name if seen else ""
                        sheets[i] = len({raster.path for raster in seen})
                        pixels[i, ..., :bands] = values
                        valid[i] = float(np.float32(np.count_nonzero(mask) / mask.size))
                    if layers is not None:
                        for i in run:
                            pixels[i, ..., bands:] = layers.read(int(shard.col[i]), row)
                    elif known.rasters:
                        read = self._reader("labels").read_run(col, row, len(run))
                        for i, (values, _, _) in zip(run, read, strict=True):
                            pixels[i, ..., bands:] = values
                    for i in run:
                        changed[i] = share(int(shard.col[i]), row)
        columns |= {"broken": broken, "classes": []}
        if self._has_classes:  # how many pixels have each
            columns["classes"] = np.bincount(pixels[..., -1].reshape(-1), minlength=256).tolist()
        if self._unreadable is not None:
            columns["unreadable"] = dict(self._unreadable)
            self._unreadable.clear()
        return pixels, columns

    def _reader(self, what: str) -> GridReader:
        """The reader of the images, labels or masks of changed ground."""
        if what not in self._readers:
            code, crs = self._place
            source, unreadable = self._sources[code], self._unreadable
            if what == "images":
                self._readers[what] = GridReader(
                    source.images,
                    self._grid,
                    crs,
                    stretch=source.stretch,
                    unreadable=unreadable,
                    by_centre=source.by_centre,
                )
            else:
                files = source.labels.rasters if what == "labels" else source.changed
                self._readers[what] = GridReader(
                    files, self._grid, crs, nearest=True, unreadable=unreadable
                )
        return self._readers[what]

    def _layers(
        self, layers: Sequence[labels.Layer], shard: CellShard, rows: Ints, crs: str
    ) -> labels.LayerReader:
        bounds = self._grid.bounds(shard.col[rows], shard.row[rows])
        low, high = bounds[:, :2].min(axis=0), bounds[:, 2:].max(axis=0)
        box = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
        return labels.LayerReader(layers, self._grid, crs, box, self._unreadable)

    def _share(self) -> Callable[[int, int], float | None]:
        """A function of column and row: the share of changed ground in a cell, None if unknown."""
        code, crs = self._place
        masks = self._sources[code].changed
        if not masks:
            return lambda col, row: None
        reader = self._reader("changed")
        boxes = np.asarray([placement.bounds_in(mask, crs) for mask in masks])

        def share(col: int, row: int) -> float | None:
            cell = self._grid.bounds(np.asarray(col), np.asarray(row))
            covered = ((boxes[:, :2] < cell[2:]) & (boxes[:, 2:] > cell[:2])).all(axis=1)
            if not covered.any():
                return None
            # If the nodata value of a mask is 0, unchanged ground is not valid.
            found = float((reader.read(col, row)[0] > 0).mean())
            readable = np.asarray([mask.path not in (self._unreadable or {}) for mask in masks])
            return found if (covered & readable).any() else None

        return share


def _columns(shard: CellShard) -> dict[str, Any]:
    """The columns of a shard's record as far as its tiles are kept."""
    n, kept = len(shard), shard.kept
    if kept is None:
        empty = {"valid": [0.0] * n, "source": [""] * n, "sheets": [0] * n, "changed": [None] * n}
        return {**empty, "kept": 0}
    known = {name: getattr(kept, name) for name in ("valid", "source", "sheets", "changed")}
    return {**known, "kept": int((kept.rows >= 0).sum())}


def _groups(shard: CellShard) -> Iterator[tuple[tuple[int, int], Ints]]:
    """The tiles of a shard that are to be cut, by year and CRS."""
    missing = np.ones(len(shard), bool) if shard.kept is None else shard.kept.rows < 0
    keys = np.stack([shard.year, shard.epsg], axis=1)
    for year, epsg in np.unique(keys[missing], axis=0).tolist():
        mine = missing & (shard.year == year) & (shard.epsg == epsg)
        yield (year, epsg), np.flatnonzero(mine)


def _runs(shard: CellShard, rows: Ints) -> Iterator[list[int]]:
    """`rows` of a shard in parts, each of neighbouring cells from west to east."""
    col, row = shard.col[rows], shard.row[rows]
    most = max(1, RUN_BYTES // (shard.grid.size**2 * sum(shard.channels)))
    for part in np.split(rows, np.flatnonzero((np.diff(col) != 1) | (np.diff(row) != 0)) + 1):
        for start in range(0, len(part), most):
            yield part[start : start + most].tolist()


def take_up(broken: Broken, found: Broken) -> None:
    """Add ids of features that could not be drawn."""
    for layer, ids in found.items():
        broken[layer] = sorted({*broken.get(layer, ()), *ids})

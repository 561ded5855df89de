"""Tables of tiles and descriptors written by hand: no imagery, no network."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from geomatch.data.embeddings import Embeddings
from geomatch.data.eval_report import SplitMetrics
from geomatch.data.tiles import TileTable
from geomatch.geo import footprints
from geomatch.geo.grid import Grid
from geomatch.manifests import Channels, EmbeddingManifest, TileManifest, TileRequest
from geomatch.project import Project, write_record

CRS = "EPSG:32630"


def hand_made_tiles(
    col: list[int], row: list[int], year: list[int], split: list[int] | None = None, stride: int = 8
) -> TileTable:
    """Tiles of 8 px at 1 m in EPSG:32630, every `stride` px, of as many years as are named."""
    n = len(col)
    return TileTable(
        grid=Grid(CRS, 8, 1.0, stride),
        years=("2000", "2010", "2020")[: max(year) + 1],
        sources=("sheet.tif",),
        classes=(),
        label=np.full(n, -1),
        epsg=np.full(n, 32630),
        col=np.array(col),
        row=np.array(row),
        year=np.array(year),
        split=np.array(split if split is not None else [0] * n),
        source=np.zeros(n, np.int64),
        valid=np.ones(n, np.float32),
        store_row=np.arange(n),
    )


def hand_made_tile_manifest(grid: Grid, tiles: int, **changes: Any) -> TileManifest:
    """The manifest of tiles in three colours, with `changes` of its fields."""
    manifest = TileManifest(
        geomatch="0",
        fingerprint="tiles",
        tiles=tiles,
        planned=tiles,
        classes=0,
        splits={},
        request_fingerprint="request",
        request=TileRequest(source=(), set=()),
        grid=grid.id,
        crs=grid.crs,
        size=grid.size,
        gsd=grid.gsd,
        stride=grid.stride,
        channels=Channels(3, 0),
        placement="real",
        years={},
    )
    return dataclasses.replace(manifest, **changes)


def hand_made_embedding_manifest(dimension: int, **changes: Any) -> EmbeddingManifest:
    """The manifest of descriptors that no encoder made, with `changes` of its fields."""
    manifest = EmbeddingManifest(
        geomatch="0",
        name="hand@1",
        tiles="tiles",
        model="none",
        run="hand",
        run_id="none",
        step=1,
        metric="cosine",
        centres=None,
        dimension=dimension,
        normalise=False,
        engine="none",
        dtype="float32",
        fingerprint="by hand",
    )
    return dataclasses.replace(manifest, **changes)


def hand_made_split_metrics(queries: int, database: int, **changes: Any) -> SplitMetrics:
    """Metrics of 0.5 throughout, without groups of queries, with `changes` of its fields."""
    metrics = SplitMetrics(
        queries=queries,
        database=database,
        map5=0.5,
        recall1=0.5,
        recall5=0.5,
        recall10=0.5,
        median_rank=0.5,
        median_error_m=0.5,
        mean_rank=0.5,
        mrr=0.5,
        within_1_tiles=0.5,
        within_2_tiles=0.5,
        within_5_tiles=0.5,
        intervals={},
        content=(),
        pairs=(),
        roc=None,
    )
    return dataclasses.replace(metrics, **changes)


def hand_made_classes(label: list[int], split: list[int] | None = None) -> TileTable:
    """Images without georeference or years, of classes "a", "b" and so on."""
    n = len(label)
    return dataclasses.replace(
        hand_made_tiles([0] * n, [0] * n, [0] * n, split),
        grid=None,
        years=("",),
        sources=tuple(f"{'abcdefgh'[code]}/{i}.png" for i, code in enumerate(label)),
        source=np.arange(n),
        classes=tuple("abcdefgh"[: max(label) + 1]),
        label=np.array(label),
        epsg=np.zeros(n, np.int64),
    )


def describe_by_hand(project: Project, vectors: np.ndarray, metric: str = "cosine") -> TileTable:
    """Save (n, d) descriptors as the project's embeddings `hand@1`; returns its tiles."""
    manifest = hand_made_embedding_manifest(
        vectors.shape[1], metric=metric, tiles=project.tile_manifest().fingerprint
    )
    project.embeddings.mkdir(exist_ok=True)
    tiles = TileTable.load(project.catalogue)

    def footprint(epsg: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        return footprints.rings(epsg, bounds, "OGC:CRS84")

    Embeddings(vectors.astype(np.float32), manifest).save(
        project.embeddings / "hand@1.parquet", tiles, footprint if tiles.grid else None, None
    )
    return tiles


def hand_made_project(
    root: Path,
    tiles: TileTable,
    vectors: np.ndarray,
    metric: str = "cosine",
    fingerprint: str = "tiles",
) -> Project:
    """A project without imagery, whose tiles have the descriptors (n, d) `hand@1`."""
    project = Project(root)
    project.tiles.mkdir(parents=True)
    project.config.write_text("")
    tiles.save(project.catalogue, *footprints.file_geometry(tiles.grid))
    assert tiles.grid is not None
    manifest = hand_made_tile_manifest(tiles.grid, len(tiles), fingerprint=fingerprint)
    write_record(project.tiles_manifest, manifest)
    describe_by_hand(project, vectors, metric)
    return project

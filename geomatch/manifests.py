"""Manifests: each artefact's record of its contents and of what it was made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from geomatch.records import OPTIONAL, Record, named


@dataclass(frozen=True)
class Channels(Record):
    """Numbers of image and label channels of a tile; image channels come first."""

    image: int
    label: int


@dataclass(frozen=True)
class YearOfTiles(Record):
    """The sources of one year.

    Attributes:
        files: number of images.
        labels: number of label rasters and layers, or path of a vector file.
        stretch: fields of `geo.stretch.Stretch` to uint8; None for imagery that is uint8.
        overlap: `grid.overlap`, which sheet is seen where several overlap; None without
            georeference.
        seams: number of tiles that are filled from several sheets; None without georeference.
    """

    files: int
    labels: int | str
    stretch: dict[str, Any] | None
    overlap: str | None = field(default=None, metadata=OPTIONAL)
    seams: int | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class TileRequest(Record):
    """The request of `tile`, which is repeated when `tile` is called without sources.

    Attributes:
        source: tables of `[[source]]`.
        set: "table.key=value" overrides of `geomatch.toml`.
    """

    source: tuple[dict[str, Any], ...]
    set: tuple[str, ...]


@dataclass(frozen=True)
class TileManifest(Record):
    """The tiles of a project.

    Attributes:
        grid: id such as "EPSG:2154/128m/256px".
        crs: "EPSG:..." or "utm"; None without georeference.
        size: tile side in pixels.
        gsd: metres per pixel; None without georeference.
        stride: pixels between neighbouring tiles; None without georeference.
        placement: "none" for images without georeference; "fictitious" if metres mean nothing.
        years: by label, in order; empty for images without years.
        tiles: number of tiles.
        planned: number of tiles including those left out as invalid.
        classes: number of classes; 0 on the ground.
        splits: number of tiles of each split.
        request_fingerprint: of the request and of the source files.
        request: the sources and overrides that were requested.
        fingerprint: of the tiles.
        unreadable: images that were left out, with the reason.
        label_classes: share of the pixels of all planned tiles of each class of the labels, whose
            pixels are 1, 2, ... in this order; None if labels have no classes.
        broken: number of label shapes that were left out, by layer.
        stretch: that of images without years, as in `YearOfTiles`.
        reading: fields of `geo.views.Reading`; None if all were read as their files say.
        geomatch: version that wrote the tiles.
    """

    geomatch: str
    fingerprint: str
    tiles: int
    planned: int
    classes: int
    splits: dict[str, int]
    request_fingerprint: str = field(metadata=named("request"))
    request: TileRequest = field(metadata=named("asked"))
    grid: str
    crs: str | None
    size: int
    gsd: float | None
    stride: int | None
    channels: Channels
    placement: Literal["real", "fictitious", "none"]
    years: dict[str, YearOfTiles]
    unreadable: dict[str, str] | None = field(default=None, metadata=OPTIONAL)
    label_classes: dict[str, float] | None = field(default=None, metadata=OPTIONAL)
    broken: dict[str, int] | None = field(default=None, metadata=OPTIONAL)
    stretch: dict[str, Any] | None = field(default=None, metadata=OPTIONAL)
    reading: dict[str, Any] | None = field(default=None, metadata=OPTIONAL)

    @property
    def on_ground(self) -> bool:
        """Whether tiles have a real or fictitious place on the ground."""
        return self.placement != "none"

    @property
    def in_metres(self) -> bool:
        """Whether distances between tiles are distances on the ground."""
        return self.placement == "real"


@dataclass(frozen=True)
class GitState(Record):
    """The state of a folder in a git repository.

    Attributes:
        branch: its name; "HEAD" if there is none.
        changed: whether a file of the folder that git knows differs from the commit.
    """

    commit: str
    branch: str
    changed: bool


@dataclass(frozen=True)
class Session(Record):
    """One start of `train` on a run.

    Attributes:
        started: time in UTC, ISO 8601.
        command: command line.
        platform: operating system and machine.
        devices: their kind, one for each.
        versions: of geomatch and of the packages that it computes with.
        git: of the project's folder; None if it is in no repository.
    """

    started: str
    command: str
    python: str
    platform: str
    devices: tuple[str, ...]
    versions: dict[str, str]
    git: GitState | None


@dataclass(frozen=True)
class RunManifest(Record):
    """A run of training.

    Attributes:
        geomatch, jax: versions that started it.
        settings: tables of its configuration.
        form: fields of `nn.encoder.TileForm`.
        id: random; differs between runs of the same name.
        gsd: metres per pixel of its tiles; None without georeference.
        tiles: fingerprint of the tiles.
        label_classes: names of the classes of their labels; None if these have none.
        sessions: every start of `train` on it, the first one first.
    """

    geomatch: str
    jax: str
    settings: dict[str, Any]
    form: dict[str, int]
    id: str
    gsd: float | None
    tiles: str
    label_classes: tuple[str, ...] | None = field(default=None, metadata=OPTIONAL)
    sessions: tuple[Session, ...] = field(default=(), metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class DescriptorManifest(Record):
    """The origin of descriptors.

    Attributes:
        name: "RUN@STEP".
        tiles: fingerprint of the tiles.
        model: fingerprint of the encoder.
        run: folder of the run, relative to the project's root if it is inside.
        run_id: see `RunManifest.id`.
        step: of the checkpoint.
        metric: by which they are compared.
        centres: (years, d) vectors subtracted from the descriptors of each year, or None.
    """

    name: str
    tiles: str
    model: str
    run: str
    run_id: str
    step: int
    metric: Literal["cosine", "euclidean"]
    centres: list[list[float]] | None


@dataclass(frozen=True, kw_only=True)
class EmbeddingManifest(DescriptorManifest):
    """Embeddings: one descriptor per tile.

    Attributes:
        geomatch: version that wrote them.
        dimension: of the descriptors.
        normalise: whether the network scales them to unit length.
        engine, dtype: inference engine and precision that computed them.
        fingerprint: of the descriptors.
    """

    geomatch: str
    dimension: int
    normalise: bool
    engine: str
    dtype: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class IndexEngine(Record):
    """How the descriptors of an index are searched.

    Attributes:
        kind: "exact", or an approximate search whose answers are ranked again by the vectors.
        dtype: of the vectors.
        segments: position of the first vector of each of their files.
        parts: position of the first vector of each file of an approximate search.
        effort: of an approximate search; see `search.approximate`.
        recall: recall@5 against exact search in float32 on `queries` descriptors of the index.
    """

    kind: Literal["exact", "ivfpq", "hnsw", "pgvector"]
    dtype: Literal["float32", "float16", "int8"]
    segments: tuple[int, ...]
    parts: tuple[int, ...]
    effort: int
    recall: float = field(metadata=named("recall@5"))
    queries: int


@dataclass(frozen=True, kw_only=True)
class IndexManifest(DescriptorManifest):
    """An index.

    Attributes:
        years: labels, `("",)` without years.
        counts: number of tiles of each year.
        embeddings: fingerprint of the embeddings.
        whitened: whether descriptors are whitened; see `search.whitening`.
        engine: how it is searched.
    """

    years: tuple[str, ...]
    counts: tuple[int, ...]
    embeddings: str
    engine: IndexEngine
    whitened: bool | None = field(default=None, metadata=OPTIONAL)

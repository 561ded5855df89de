"""What each artefact records of itself: its contents, and what it was made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from geomatch.records import OPTIONAL, Record


@dataclass(frozen=True)
class Channels(Record):
    """How the channels of a tile divide, image first."""

    image: int
    label: int


@dataclass(frozen=True)
class YearOfTiles(Record):
    """The sources of one year.

    Attributes:
        files: how many images.
        labels: how many label rasters, or the path of a vector file.
        stretch: to uint8, as `geo.rasters.Stretch` has it; None for uint8 as it is.
    """

    files: int
    labels: int | str
    stretch: dict[str, Any] | None


@dataclass(frozen=True)
class TileRequest(Record):
    """What `tile` was asked for, so that it can be asked for again.

    Attributes:
        source: tables of `[[source]]`.
        set: "table.key=value" strings laid over `geomatch.toml`.
    """

    source: tuple[dict[str, Any], ...]
    set: tuple[str, ...]


@dataclass(frozen=True)
class TileManifest(Record):
    """The tiles of a project.

    Attributes:
        grid: id such as "EPSG:2154/128m/256px".
        crs: EPSG code, or "utm"; None, as `gsd` and `stride`, without a ground.
        size: tile side in pixels.
        gsd: metres per pixel.
        stride: pixels between tiles.
        placement: "none" for images without a ground; "fictitious" where metres mean nothing.
        years: by label, in order; empty for images without years.
        tiles, planned: how many there are, and how many there would be were all valid.
        classes: how many, without a ground.
        splits: tiles of each split.
        request: fingerprint of what was asked for and of the files it came from.
        fingerprint: of the tiles.
        unreadable: reasons by image that was left out.
        geomatch: version that wrote them.
    """

    geomatch: str
    fingerprint: str
    tiles: int
    planned: int
    classes: int
    splits: dict[str, int]
    request: str
    asked: TileRequest
    grid: str
    crs: str | None
    size: int
    gsd: float | None
    stride: int | None
    channels: Channels
    placement: Literal["real", "fictitious", "none"]
    years: dict[str, YearOfTiles]
    unreadable: dict[str, str] | None = field(default=None, metadata=OPTIONAL)

    @property
    def on_ground(self) -> bool:
        """Whether tiles have a place on the ground, real or fictitious."""
        return self.placement != "none"

    @property
    def in_metres(self) -> bool:
        """Whether distances between tiles are distances on the ground."""
        return self.placement == "real"


@dataclass(frozen=True)
class RunManifest(Record):
    """A run.

    Attributes:
        geomatch, jax: versions that began it.
        settings: tables of its configuration.
        form: fields of `nn.encoder.TileForm`.
        id: drawn when the run began; another run of the same name has another one.
        gsd: metres per pixel of its tiles; None without a ground.
        tiles: fingerprint of the tiles.
    """

    geomatch: str
    jax: str
    settings: dict[str, Any]
    form: dict[str, int]
    id: str
    gsd: float | None
    tiles: str


@dataclass(frozen=True, kw_only=True)
class DescriptorManifest(Record):
    """Where descriptors come from.

    Attributes:
        name: "RUN@STEP".
        tiles: fingerprint of the tiles described.
        model: fingerprint of the encoder.
        run: folder of the run, from the project's root where it is inside.
        run_id: see `RunManifest.id`.
        step: of the checkpoint.
        metric: how they compare.
        centres: (years, d) what was subtracted from the descriptors of each year; None: nothing.
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
    """Embeddings: a descriptor for each tile.

    Attributes:
        geomatch: version that wrote them.
        dimension: values of a descriptor.
        normalise: whether the network gives them unit length.
        engine, dtype: what computed them, and in which precision.
        fingerprint: of the descriptors.
    """

    geomatch: str
    dimension: int
    normalise: bool
    engine: str
    dtype: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class IndexManifest(DescriptorManifest):
    """An index.

    Attributes:
        years: labels, `("",)` without years; `counts` has the tiles of each.
        embeddings: fingerprint of the embeddings it was made from.
    """

    years: tuple[str, ...]
    counts: tuple[int, ...]
    embeddings: str

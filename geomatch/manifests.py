"""What each artefact records of itself: its contents, and what it was made from."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self


@dataclass(frozen=True)
class Manifest:
    """A record that is kept as JSON.

    A field with a default is left out of the JSON while it has that value.
    """

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values, nested records included."""
        values = {item.name: (item, getattr(self, item.name)) for item in dataclasses.fields(self)}
        return {
            name: _as_json(value)
            for name, (item, value) in values.items()
            if item.default is dataclasses.MISSING or value != item.default
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `as_json`; unknown keys are left out.

        Raises:
            KeyError: a field is missing.
        """
        hints = typing.get_type_hints(cls)
        return cls(
            **{
                item.name: _from_json(values[item.name], hints[item.name])
                for item in dataclasses.fields(cls)
                if item.name in values or item.default is dataclasses.MISSING
            }
        )


def _as_json(value: Any) -> Any:
    if isinstance(value, Manifest):
        return value.as_json()
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return value


def _from_json(value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return None
    if origin is types.UnionType:
        return _from_json(value, arguments[0])
    if origin is tuple:
        return tuple(_from_json(item, arguments[0]) for item in value)
    if origin is dict:
        return {key: _from_json(item, arguments[1]) for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Manifest):
        return hint.from_json(value)
    return value


@dataclass(frozen=True)
class Channels(Manifest):
    """How the channels of a tile divide, image first."""

    image: int
    label: int


@dataclass(frozen=True)
class YearOfTiles(Manifest):
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
class TileRequest(Manifest):
    """What `tile` was asked for, so that it can be asked for again.

    Attributes:
        source: tables of `[[source]]`.
        set: "table.key=value" strings laid over `geomatch.toml`.
    """

    source: tuple[dict[str, Any], ...]
    set: tuple[str, ...]


@dataclass(frozen=True)
class TileManifest(Manifest):
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
    unreadable: dict[str, str] | None = None

    @property
    def on_ground(self) -> bool:
        """Whether tiles have a place on the ground, real or fictitious."""
        return self.placement != "none"

    @property
    def in_metres(self) -> bool:
        """Whether distances between tiles are distances on the ground."""
        return self.placement == "real"


@dataclass(frozen=True)
class RunManifest(Manifest):
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
class DescriptorManifest(Manifest):
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

"""The configuration: frozen dataclasses, read from `geomatch.toml` and `--set`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from geomatch.errors import UsageError

TILE_SIZE = 256
"""Tile side in pixels where nothing says otherwise."""

# Choices that are also options of commands, or arguments of stages.
Split = Literal["train", "validation", "test"]
SplitRule = Literal["blocks", "source", "file"]
Trunk = Literal[
    "resnet50",
    "resnet101",
    "resnet34",
    "resnet18",
    "resnet10",
    "vgg16",
    "efficientnet_lite0",
    "convnet",
]
Overlap = Literal["first", "newest", "nearest-centre"]
Engine = Literal["auto", "jax", "openvino", "onnxruntime"]
EmbedDtype = Literal["auto", "float32", "bfloat16", "int8"]
IndexKind = Literal["exact", "ivfpq", "hnsw"]
LocalFeatures = Literal["sift", "xfeat"]
IndexDtype = Literal["auto", "float32", "float16", "int8"]
Database = Literal["split", "all", "train"]
ProjectionMethod = Literal["pca", "tsne"]


BDTOPO = "bdtopo:"
"""Marks labels as a delivery of BD TOPO, whose layers have classes of their own."""
GDAL_NAME = re.compile(r"/vsi|[A-Za-z][\w+]*:")
"""The beginning of what GDAL opens and no folder holds: archives, subdatasets, databases, URLs."""


def _key(default: Any, doc: str, least: float | None = None) -> Any:
    return field(default=default, metadata={"doc": doc, "least": least})


@dataclass(frozen=True)
class GridConfig:
    size: int | None = _key(
        None, "tile side in pixels; unset: 256, or the side of images that are square and alike"
    )
    gsd: float | None = _key(None, "ground sample distance in metres; unset: the first source's")
    crs: str = _key("auto", 'EPSG code; "auto": the first source\'s; "utm": a zone per place')
    stride: int | None = _key(None, "pixels between tiles; unset: the tile side, no overlap")
    min_valid: float = _key(0.99, "least share of valid pixels of a tile", least=0)
    stretch: str = _key("", 'to uint8, for other dtypes: "MIN,MAX" or "2%,98%"')
    skip_bad: bool = _key(False, "leave out rasters that cannot be used, and list them")
    bands: tuple[int, ...] = _key((), "numbers of the image bands, from 1; empty: all but alpha")
    nodata: float | None = _key(None, "value of invalid pixels, for files that declare none")
    collar: bool = _key(False, "black or white connected to the border of a file is invalid")
    overlap: Overlap = _key(
        "first", 'sheet seen where several overlap: "newest" by the dates in their names'
    )


@dataclass(frozen=True)
class SourceConfig:
    year: str = ""
    images: str = ""
    labels: str = ""
    changed: str = ""
    placement: Literal["real", "fictitious"] = "real"
    year_from: str = ""
    asset: str = ""


@dataclass(frozen=True)
class LabelsConfig:
    file: str = ""
    class_: str = ""  # in TOML "class", a word that Python keeps for itself
    year: str = ""
    layer: str = ""
    where: str = ""
    attribute: str = ""
    buffer: float = _key(0.0, "metres around lines and points", least=0)
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImagesConfig:
    folders: tuple[str, ...] = _key(
        (), 'images in class folders, an MNIST file, or ["train=PATH", "test=PATH"]'
    )
    pairs: tuple[str, ...] = _key((), "two folders of images with the same names")
    least: int = _key(
        2, "smallest number of images of a class; smaller classes are left out", least=1
    )
    ignore: tuple[str, ...] = _key((), "classes left out")
    validation: float = _key(0.2, "share of each class, or a count from 1 on", least=0)
    test: float = _key(0.1, "share of each class, or a count from 1 on", least=0)


@dataclass(frozen=True)
class SplitConfig:
    by: SplitRule = _key("blocks", "how the regions of the splits are chosen")
    validation: tuple[str, ...] = _key((), "source: globs of file names; file: polygon files")
    test: tuple[str, ...] = _key((), "the same for the test split")
    block: float | None = _key(None, "side of a spatial block in metres; unset: about 24 blocks")
    buffer: float | None = _key(
        None, "metres kept free between splits; unset: one tile side for blocks, else 0"
    )
    years: tuple[str, ...] = _key((), "train on these years only; empty: on all")
    seed: int = _key(0, "decides which blocks are validation and test (15 % each)")


@dataclass(frozen=True)
class ModelConfig:
    trunk: Trunk = _key(
        "resnet50", "convolutional trunk; resnet10 is a narrow one for demos and tests"
    )
    stage: int = _key(0, "last stage of the trunk; 0: all of them", least=0)
    stride_in: Literal["auto", "3x3", "1x1"] = _key(
        "auto", 'which convolution of a bottleneck strides; "auto": as in the weights, or 3x3'
    )
    epsilon: float = _key(
        0.0, "epsilon of BatchNorm; 0: that of the weights, or the trunk's own", least=0
    )
    preprocessing: Literal["auto", "torch", "caffe", "lite", "none"] = _key(
        "auto", 'how colours are normalised; "auto": as for the weights, or the trunk\'s own'
    )
    pooling: Literal["max", "mean", "sum", "gem", "rmac", "flatten", "grid"] = _key(
        "max", 'of the trunk\'s feature map, before every head but "conv"'
    )
    bins: int = _key(8, 'side of the grid of "grid" pooling', least=1)
    instance_norm: bool = _key(
        False, '"grid" pooling: normalise each tile\'s feature map, against season and sensor'
    )
    head: Literal["conv", "pool", "dense", "mlp", "pca"] = _key(
        "conv", '"conv": two 3x3 convolutions, Dense; "pool": none; "mlp"; "pca": whitening'
    )
    hidden: tuple[int, ...] = _key((512,), 'widths of the blocks of the "mlp" head')
    dropout: float = _key(0.2, 'share dropped in the blocks of the "mlp" head', least=0)
    descriptor: int = _key(128, 'descriptor size; with head "pool" the pooling decides it', least=1)
    normalise: bool = _key(False, "L2-normalise descriptors inside the network")
    centre: bool = _key(False, "embed subtracts each year's mean training descriptor")
    label_classes: int = _key(
        0,
        "number of classes of a one-band label; 0: as many as the tiles name, else labels as an "
        "image",
        least=0,
    )
    labels: Literal["one-hot", "grey", "colour"] = _key(
        "one-hot", "how the classes of labels enter: a plane, a grey or a colour for each"
    )


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = _key(120, "in an epoch every training place is the anchor once", least=0)
    batch: int = _key(6, "anchors per global batch, divisible by the number of devices", least=1)
    accumulate: int = _key(
        1, "micro-batches in which a batch's gradient is computed, to save memory", least=1
    )
    remat: bool = _key(
        False, "compute the trunk's activations again in the backward pass, to save memory"
    )
    views: int = _key(2, "tiles per place in a batch that is compared as a whole", least=2)
    lr: float = _key(1e-4, "learning rate", least=0)
    schedule: Literal["constant", "cosine", "exponential"] = _key(
        "constant",
        '"cosine": falls to 0 by the last epoch; "exponential": times `decay` each epoch',
    )
    warmup: float = _key(0.0, "epochs over which the learning rate rises from 0", least=0)
    decay: float = _key(0.95, '"exponential" schedule: factor per epoch', least=0)
    lr_scale: tuple[str, ...] = _key(
        (), 'learning rate factors of parameter groups: ["trunk=0.1", "head=10"]'
    )
    freeze: tuple[str, ...] = _key(
        (), 'frozen parameter groups: "trunk", "trunk/stage1", "head", "batch_norm" (statistics)'
    )
    freeze_epochs: int = _key(0, "epochs that `freeze` lasts; 0: all", least=0)
    loss: Literal[
        "bce", "focal", "contrastive", "cosine", "triplet", "infonce", "multi-similarity"
    ] = _key("bce", "bce and focal use the pair head; infonce compares a whole batch")
    distil: float = _key(
        0.0,
        '"infonce": weight of keeping the similarities that the features had at the start',
        least=0,
    )
    margin: float | None = _key(
        None, "margin of distances; unset: 1 contrastive, 0 cosine, 0.1 triplet"
    )
    squared: bool = _key(True, '"triplet": squared distances')
    gamma: float = _key(2.0, '"focal": how strongly easy pairs are down-weighted', least=0)
    alpha: float = _key(
        0.25, '"focal": weight of matching pairs; the others get 1 - alpha', least=0
    )
    optimizer: Literal["adam", "adamw", "sgd", "ranger"] = _key(
        "adam", '"sgd": Nesterov momentum; "ranger": RAdam with Lookahead'
    )
    momentum: float = _key(0.9, '"sgd": momentum', least=0)
    weight_decay: float = _key(0.0, "weight decay of kernels, not of BatchNorm and biases", least=0)
    clip: float = _key(0.0, "largest global norm of the gradients; 0: no clipping", least=0)
    ema: float = _key(
        0.0, "decay of averaged weights, which are then the ones saved; 0: off", least=0
    )
    patience: int = _key(
        0, "stop after so many validation rounds without improvement; 0: never", least=0
    )
    seed: int = _key(0, "seed of weights, batches and augmentation")
    init: str = _key("", 'trunk weights: "imagenet" or a file; "": random')
    dtype: Literal["auto", "float32", "bfloat16"] = _key("auto", "precision of the computation")
    save_minutes: float = _key(5.0, "minutes between checkpoints at the most", least=0)
    mlflow: str = _key(
        "", 'track the run in MLflow: a folder, relative to the project, or "https://SERVER"'
    )
    frames: Literal["", "validation", "test"] = _key(
        "", "split whose descriptors are drawn in two dimensions at every round"
    )


@dataclass(frozen=True)
class MiningConfig:
    rule: Literal["knn", "ranked", "in-batch", "neighbours", "none"] = _key(
        "knn", '"knn": hard pairs; "ranked": hardest triplets; "neighbours": batches of like tiles'
    )
    every: int = _key(5, "epochs between mining (and validation) rounds", least=1)
    k: int = _key(5, "nearest neighbours considered per query", least=1)
    truth_within: int = _key(
        2, "a query is hard if its match is not among this many neighbours", least=0
    )
    pick: Literal["semi-hard", "batch-hard"] = _key("semi-hard", '"in-batch": which triplets')
    hardest: int = _key(1600, '"ranked": triplets per epoch', least=1)
    candidates: int = _key(100, '"ranked": triplets that are ranked per place', least=1)
    ramp: float = _key(0.0, "epochs over which the share of hard samples rises to 1", least=0)
    exact_up_to: int = _key(
        200_000, "largest number of tiles whose neighbours are searched exactly", least=0
    )

    @property
    def by_rounds(self) -> bool:
        """Whether training tiles are described and mined at rounds."""
        return self.rule in ("knn", "ranked", "neighbours")


@dataclass(frozen=True)
class AugmentConfig:
    flips: bool = _key(True, "mirror tiles at random")
    turns: bool = _key(True, "quarter turns at random")
    rotation: float = _key(0.0, "largest rotation in degrees, either way", least=0)
    zoom: float = _key(0.0, "largest relative change of scale", least=0)
    shift: float = _key(0.0, "largest translation, as a share of the tile's side", least=0)
    independent: bool = _key(
        False, "draw flips, turns and warps separately for each year of a place"
    )
    brightness: float = _key(0.2, "largest change, as a share of full scale", least=0)
    contrast: float = _key(0.2, "largest relative change", least=0)
    saturation: float = _key(0.0, "largest relative change", least=0)
    hue: float = _key(0.0, "largest change, as a share of the colour circle", least=0)
    blur: float = _key(0.0, "largest standard deviation in pixels", least=0)
    jpeg: float = _key(0.0, "strongest block compression, 0 to 1", least=0)
    per_year: bool = _key(False, "draw the light per year of a batch rather than per tile")
    label_dropout: float = _key(0.1, "share of tiles whose labels are dropped", least=0)


@dataclass(frozen=True)
class EmbedConfig:
    engine: Engine = _key("auto", 'what computes; "auto": the fastest that is installed')
    dtype: EmbedDtype = _key("auto", 'precision; "auto": bfloat16 if the processor supports it')


@dataclass(frozen=True)
class IndexConfig:
    metric: Literal["auto", "cosine", "euclidean"] = _key(
        "auto", 'how descriptors are compared; "auto": as in the loss of the run'
    )
    whiten: bool = _key(
        False, "PCA-whiten descriptors first, as fitted on those of the training tiles"
    )
    engine: IndexKind = _key(
        "exact", 'how they are searched; "ivfpq" and "hnsw" are approximate, for millions of tiles'
    )
    dtype: IndexDtype = _key(
        "auto", 'precision they are stored in; "auto": float32 if exact, otherwise int8'
    )
    memory: float = _key(2.0, "GB that an approximate index may take while it is built", least=0.01)
    recall: float = _key(
        0.95, "recall@5 against exact search that an approximate search is set to reach", least=0
    )


@dataclass(frozen=True)
class EvalConfig:
    database: Database = _key(
        "split", "tiles searched: the split's own, all, or the training split's"
    )
    during: tuple[Split, ...] = _key(
        (), "splits measured at every round of training, beside validation"
    )
    queries: int = _key(
        20_000, "queries of a split at most, drawn at random; 0 for all of them", least=0
    )


@dataclass(frozen=True)
class TuneConfig:
    space: tuple[str, ...] = _key(
        (), 'values to try: ["train.lr = 1e-5 .. 1e-3 log", "model.descriptor = 64 | 128"]'
    )
    trials: int = _key(20, "number of runs", least=1)


@dataclass(frozen=True)
class ProjectConfig:
    remote: str = _key(
        "", "s3://BUCKET/PREFIX or gs://BUCKET/PREFIX that tiles, embeddings and indexes are in"
    )


@dataclass(frozen=True)
class Config:
    """A project's whole configuration; each field is a table of `geomatch.toml`."""

    grid: GridConfig = GridConfig()
    source: tuple[SourceConfig, ...] = ()
    labels: tuple[LabelsConfig, ...] = ()
    images: ImagesConfig = ImagesConfig()
    split: SplitConfig = SplitConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    mining: MiningConfig = MiningConfig()
    augment: AugmentConfig = AugmentConfig()
    embed: EmbedConfig = EmbedConfig()
    index: IndexConfig = IndexConfig()
    eval: EvalConfig = EvalConfig()
    tune: TuneConfig = TuneConfig()
    project: ProjectConfig = ProjectConfig()

    @property
    def metric(self) -> Literal["cosine", "euclidean"]:
        """How descriptors are compared: by the measure that the loss trained."""
        by_distance = self.train.loss in ("contrastive", "triplet")
        return "euclidean" if by_distance and not self.model.normalise else "cosine"


def load(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read `path` (the defaults if it does not exist) and apply `overrides` ("table.key=value").

    Raises:
        UsageError: the TOML does not parse, a key is unknown, or a value has the wrong type.
    """
    values: dict[str, Any] = {}
    if path.exists():
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: {error}", "Correct the TOML at that place.") from error
    config = _build(Config, values, str(path))
    found = with_overrides(config, overrides)
    if found.project != config.project:
        raise UsageError("project.remote is for all commands", f"Write it into {path}.")
    return found


def with_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """`config` with "table.key=value" strings applied.

    Values are TOML, or bare strings.

    Raises:
        UsageError: as for `load`.
    """
    values = as_dict(config)
    for override in overrides:
        name, equals, text = override.partition("=")
        parts = name.strip().split(".")
        if parts[0] == "source":
            raise UsageError(f"--set {override}: sources are not set", "Name imagery as YEAR=PATH.")
        if parts[0] == "labels":
            raise UsageError(
                f"--set {override}: labels are not set",
                "Write [[labels]] tables in geomatch.toml, or name labels as YEAR:labels=PATH.",
            )
        if not equals or len(parts) != 2:
            raise UsageError(f"--set {override}: not of the form table.key=value")
        table, key = parts
        if table not in values:
            raise _unknown(table, values, "--set")
        if key not in values[table]:
            raise _unknown(f"{table}.{key}", [f"{table}.{k}" for k in values[table]], "--set")
        values[table][key] = literal(text.strip())
    return _build(Config, values, "--set")


def as_dict(config: Any) -> dict[str, Any]:
    """A dataclass as values for JSON (tuples as lists)."""

    def named(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {_key_of(name): value for name, value in items}

    values = dataclasses.asdict(config, dict_factory=named)
    result: dict[str, Any] = json.loads(json.dumps(values))
    return result


def from_dict(values: Mapping[str, Any], where: str) -> Config:
    """The inverse of `as_dict`; `where` names the file in errors."""
    return _build(Config, values, where)


def with_sources(config: Config, sources: Iterable[SourceConfig]) -> Config:
    """`config` with other sources."""
    return dataclasses.replace(config, source=tuple(sources))


def located(config: Config, root: Path) -> Config:
    """`config` with the relative paths of sources, labels and split areas against `root`."""
    base = root.absolute()
    sources = tuple(
        dataclasses.replace(
            source,
            images=_image_path(source.images, base),
            labels=placed(source.labels, base) if source.labels else "",
            changed=str(base / source.changed) if source.changed else "",
        )
        for source in config.source
    )
    labels = tuple(
        dataclasses.replace(table, file=placed(table.file, base) if table.file else "")
        for table in config.labels
    )
    split = config.split
    if split.by == "file":
        split = dataclasses.replace(
            split,
            validation=tuple(placed(path, base) for path in split.validation),
            test=tuple(placed(path, base) for path in split.test),
        )
    return dataclasses.replace(config, source=sources, labels=labels, split=split)


def _image_path(path: str, base: Path) -> str:
    """`path` against the folder `base`; a file in an archive (/vsizip/...) keeps its slashes."""
    return path if not path or path.startswith("/vsi") else str(base / path)


def placed(path: str, base: Path) -> str:
    """`path` against the folder `base`, unless it is a name that only GDAL understands."""
    path = os.path.expanduser(path)
    if path.startswith(BDTOPO):
        return BDTOPO + placed(path.removeprefix(BDTOPO), base)
    if GDAL_NAME.match(path) and not os.path.exists(base / path):
        return path
    return str(base / path)


def differences(old: Config, new: Config, tables: Iterable[str]) -> list[str]:
    """The "table.key" names, within `tables`, on which two configurations differ."""
    a, b = as_dict(old), as_dict(new)
    return [f"{t}.{k}" for t in tables for k in a[t] if a[t][k] != b[t][k]]


def template(overrides: Iterable[str] = ()) -> str:
    """The `geomatch.toml` that `init` writes: every key with its meaning.

    Keys are commented out, with their defaults, but for those that `overrides` ("table.key=value")
    name.

    Raises:
        UsageError: as for `load`.
    """
    given = list(overrides)
    return "\n".join(_template_lines(with_overrides(Config(), given), _names(given))) + "\n"


def _template_lines(config: Config, given: Iterable[str]) -> Iterator[str]:
    yield "# A geomatch project. Commented keys are defaults; --set table.key=value beats all."
    yield ""
    yield "# One table per year, in order; or on the command line: geomatch tile YEAR=PATH ..."
    yield "# [[source]]"
    yield '# year = "2015"'
    yield '# images = "ortho/2015/*.tif"'
    yield '# labels = "landcover/2015.tif"   # a raster, or a vector file'
    yield '# changed = "changed/2015.tif"      # a mask of changed ground, for evaluation'
    yield '# placement = "real"              # "fictitious": no errors in metres are reported'
    yield ""
    yield "# Labels by class; a later table covers an earlier one."
    yield "# [[labels]]"
    yield '# file = "roads.gpkg"             # a vector file or a class raster'
    yield '# class = "road"'
    yield '# year = "2015"                   # unset: every year'
    yield '# layer = "motorways"             # unset: all layers'
    yield "# where = \"kind = 'main'\"        # a condition on attributes"
    yield "# buffer = 4                      # metres, for lines and points"
    yield '# classes = ["1=water", "2..4=forest", "#ff0000=road"]   # of a raster, instead of class'
    yield '# attribute = "landuse"           # whose values are classes, or have those of classes'
    yield "# year_from = '_(\\d{4})_'          # in place of year: many years, told by file names"
    yield '# asset = "image"                 # of a STAC item collection, whose dates tell the year'
    for table in dataclasses.fields(Config):
        if isinstance(table.default, tuple):
            continue
        yield ""
        yield f"[{table.name}]"
        values = getattr(config, table.name)
        for key in dataclasses.fields(values):
            value = getattr(values, key.name)
            line = f"{key.name} = {'...' if value is None else toml(value)}"
            mark = "" if f"{table.name}.{key.name}" in given else "# "
            yield f"{mark}{line}".ljust(31) + f" # {key.metadata['doc']}"


def edited(text: str, overrides: Iterable[str]) -> str:
    """TOML with "table.key=value" strings written into it.

    A key replaces the line of the same key, whose comment is dropped; other keys are added at the
    start of their table, and new tables at the end.

    Raises:
        UsageError: as for `load`, or the text is laid out so that a key cannot be written into it.
    """
    given = list(overrides)
    wanted = with_overrides(from_dict(tomllib.loads(text), "geomatch.toml"), given)
    lines = text.splitlines()
    for name in _names(given):
        table, _, key = name.partition(".")
        start, stop = _place(lines, table, key)
        lines[start:stop] = [f"{key} = {toml(getattr(getattr(wanted, table), key))}"]
    result = "\n".join(lines) + "\n"
    try:
        written = from_dict(tomllib.loads(result), "geomatch.toml")
    except tomllib.TOMLDecodeError:
        written = None
    if written != wanted:
        raise UsageError(
            "geomatch.toml: --set cannot be written into it", "Edit the file, without --set."
        )
    return result


def _names(overrides: Iterable[str]) -> list[str]:
    """The "table.key" of each override."""
    return [override.partition("=")[0].strip() for override in overrides]


def _place(lines: list[str], table: str, key: str) -> tuple[int, int]:
    """The lines that hold a key of a table, which is added if it is not there; else none of them.

    An array may go over several lines.
    """
    if f"[{table}]" not in lines:
        lines += ["", f"[{table}]"]
    first = lines.index(f"[{table}]") + 1
    for start in range(first, len(lines)):
        if lines[start].startswith("["):
            break
        if lines[start].partition("=")[0].strip() == key:
            for stop in range(start + 1, len(lines) + 1):
                with contextlib.suppress(tomllib.TOMLDecodeError):
                    tomllib.loads("\n".join(lines[start:stop]))
                    return start, stop
    return first, first


def toml(value: Any) -> str:
    """A configuration value as TOML: JSON, but for infinity, NaN and the character DEL."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")


def literal(text: str) -> Any:
    """A value typed on a command line: parsed as TOML if possible, else the string itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _build(cls: type, values: Mapping[str, Any], where: str, table: str = "") -> Any:
    if not isinstance(values, Mapping):
        raise UsageError(f"{where}: [{table}] is not a table")
    types_of = typing.get_type_hints(cls)
    fields = {_key_of(name): name for name in types_of}
    hints = {key: types_of[name] for key, name in fields.items()}
    for key in values:
        if key not in hints:
            prefix = f"{table}." if table else ""
            raise _unknown(prefix + key, [prefix + known for known in hints], where)
    built = cls(
        **{
            fields[key]: _convert(value, hints[key], where, f"{table}.{key}" if table else key)
            for key, value in values.items()
        }
    )
    for item in dataclasses.fields(cls):
        value, least = getattr(built, item.name), item.metadata.get("least")
        if least is not None and not value >= least:
            raise UsageError(f"{where}: {table}.{item.name} = {value}", f"At least {least}.")
    return built


def _convert(value: Any, hint: Any, where: str, name: str) -> Any:
    """`value` as the type `hint`, or a UsageError that says what was expected."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where, name)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args:
            return value
        raise UsageError(f"{where}: {name} = {value!r}", f"One of: {', '.join(map(str, args))}.")
    if origin is types.UnionType:  # T | None; TOML has no null, JSON has
        return None if value is None else _convert(value, args[0], where, name)
    if origin is tuple:
        items = [value] if isinstance(value, (str, Mapping)) else value
        if not isinstance(items, (list, tuple)):
            raise UsageError(f"{where}: {name} = {value!r}", "Expected a list.")
        return tuple(_convert(item, args[0], where, name) for item in items)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # years and EPSG codes are typed bare
    if type(value) is not hint:
        raise UsageError(
            f"{where}: {name} = {value!r}", f"Expected a value of type {hint.__name__}."
        )
    return value


def _key_of(field: str) -> str:
    """The key of a field, "class" of `class_`."""
    return field.rstrip("_")


def _unknown(name: str, known: Iterable[str], where: str) -> UsageError:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
    return UsageError(f"{where}: unknown key {name}", hint)

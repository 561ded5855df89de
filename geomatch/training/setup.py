"""Setup: the settings and weights that a run starts from."""

from __future__ import annotations

import secrets
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from geomatch import __version__, config
from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import GeomatchError, UsageError
from geomatch.manifests import RunManifest, TileManifest
from geomatch.nn.augment import flip_and_turn
from geomatch.nn.checkpoint import Checkpoints
from geomatch.nn.describe import describe
from geomatch.nn.encoder import Siamese, TileForm, build, resolve
from geomatch.nn.pretrained.conversion import Weights, packaged_weights, read_weights
from geomatch.nn.step import State, initial_state, with_params
from geomatch.progress import ProgressCallback
from geomatch.project import Project, read_record, replace_folder, write_record
from geomatch.search.exact import unit
from geomatch.search.whitening import whitening

TABLES = ("model", "train", "mining", "augment")
"""Tables that make up a run's configuration, with the years of its split."""

AUTO: dict[str, dict[str, Any]] = {
    "model": {"stage": 0, "stride_in": "auto", "epsilon": 0.0, "preprocessing": "auto"},
    "train": {"dtype": "auto"},
}
"""Values that leave a setting to the initial weights, the trunk or the machine."""

IMAGENET = "imagenet"

WHITENING_VIEWS = 8192
"""Maximum number of training tiles, counting flips and turns, that the PCA is fitted on."""

BATCH = 32


def resolve_settings(
    settings: config.Config, root: Path, before: config.Config | None = None
) -> config.Config:
    """`settings` with every automatic value resolved.

    Args:
        root: folder that `train.init` is relative to.
        before: settings of the run to be resumed, whose values are kept.

    Raises:
        UsageError: the trunk has no such stage.
        GeomatchError: the weights cannot be read.
    """
    if before is not None:
        return _adopt_values(settings, before)
    model, training = settings.model, settings.train
    if training.init:
        weights = initial_weights(settings, root)
        chosen = {key: getattr(weights, key) for key in ("stride_in", "epsilon", "preprocessing")}
        of_weights = replace(settings, model=replace(model, **chosen))
        model = _adopt_values(settings, of_weights).model
    dtype = "float32" if training.dtype == "auto" else training.dtype
    return replace(settings, model=resolve(model), train=replace(training, dtype=dtype))


def of_tiles(settings: config.Config, tiles: TileManifest) -> config.Config:
    """`settings` with what the tiles decide: label classes, and whether there are neighbours.

    Batches of images without years are drawn at random, for `mining.rule = "neighbours"` too.

    Raises:
        UsageError: the settings have fewer classes, so that the last ones would be lost.
    """
    known, wanted = len(tiles.label_classes or ()), settings.model.label_classes
    if 0 < wanted < known:
        raise UsageError(
            f"model.label_classes = {wanted}, but the labels of the tiles have {known} classes",
            "Remove model.label_classes: the tiles say how many there are.",
        )
    mining = settings.mining
    if mining.rule == "neighbours" and not tiles.years:
        mining = replace(mining, rule="none")
    model = replace(settings.model, label_classes=wanted or known)
    return replace(settings, model=model, mining=mining)


def _adopt_values(settings: config.Config, other: config.Config) -> config.Config:
    """`settings` with the values of `other` in place of automatic ones."""
    for table, defaults in AUTO.items():
        own, given = getattr(settings, table), getattr(other, table)
        automatic = [key for key, value in defaults.items() if getattr(own, key) == value]
        changed = replace(own, **{key: getattr(given, key) for key in automatic})
        settings = replace(settings, **{table: changed})
    return settings


def initial_weights(settings: config.Config, root: Path) -> Weights:
    """The weights that `train.init` names.

    Raises:
        GeomatchError: there are none for this trunk, or they do not fit.
    """
    if settings.train.init == IMAGENET:
        return packaged_weights(settings.model.trunk)
    return read_weights(root / settings.train.init, settings.model.trunk)


def manifest(settings: config.Config, form: TileForm, tiles: TileManifest) -> RunManifest:
    """The manifest of a new run."""
    recorded = replace(config.Config(), **{t: getattr(settings, t) for t in TABLES})
    recorded = replace(recorded, split=config.SplitConfig(years=settings.split.years))
    return RunManifest(
        geomatch=__version__,
        jax=jax.__version__,
        settings={t: config.as_dict(recorded)[t] for t in (*TABLES, "split")},
        form=asdict(form),
        id=secrets.token_hex(8),
        gsd=tiles.gsd,
        tiles=tiles.fingerprint,
        label_classes=None if tiles.label_classes is None else tuple(tiles.label_classes),
    )


def form_of(tiles: TileManifest) -> TileForm:
    """The form of tiles."""
    return TileForm(tiles.size, tiles.channels.image, tiles.channels.label)


def initial(
    model: Siamese,
    settings: config.Config,
    form: TileForm,
    root: Path,
    training: TileTable,
    store: TileStore,
    progress: ProgressCallback,
) -> State:
    """The state at step 0: random weights, the trunk of `train.init`, and a fitted PCA head.

    Args:
        settings: resolved.
        training: training tiles only.

    Raises:
        GeomatchError: the weights do not fit, or there are too few tiles for the PCA.
    """
    state = initial_state(model, settings, form)
    if settings.train.init:
        state = _with_trunk(state, initial_weights(settings, root), settings)
    if settings.model.head == "pca":
        state = _whitened(model, state, settings, training, store, progress)
    return state


def _with_trunk(state: State, weights: Weights, settings: config.Config) -> State:
    """`state` with the trunk's `weights`; those beyond its last stage are left out."""

    def replaced(initial: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        encoder = initial.get("encoder", {})
        trunk = {name: given[name] for name in encoder.get("trunk", {})}
        return {**initial, "encoder": {**encoder, "trunk": trunk}} if trunk else initial

    return with_params(
        state,
        settings,
        replaced(state.params, weights.params),
        replaced(state.batch_stats, weights.batch_stats),
    )


@dataclass(frozen=True)
class _Features:
    """Stands in for the network in `describe`: the features before the head."""

    model: Siamese

    def apply(self, variables: Any, tiles: jax.Array) -> Any:
        return self.model.apply(variables, tiles, method=Siamese.features)


def _whitened(
    model: Siamese,
    state: State,
    settings: config.Config,
    training: TileTable,
    store: TileStore,
    progress: ProgressCallback,
) -> State:
    """`state` with the PCA head fitted on training tiles."""
    # With few tiles, flips and turns make a covariance that generalises.
    rng = np.random.default_rng(settings.train.seed)
    flips, turns = 1 + settings.augment.flips, 1 + 3 * settings.augment.turns
    drawn = np.sort(rng.permutation(turns * flips * len(training))[:WHITENING_VIEWS])
    rows, turn, flip = np.unravel_index(drawn, (len(training), turns, flips))
    change = jax.jit(jax.vmap(flip_and_turn))
    batches = (
        np.asarray(change(store.read(training.store_row[rows[part]]), flip[part], turn[part]))
        for part in (slice(start, start + BATCH) for start in range(0, len(rows), BATCH))
    )
    parts: list[NDArray[np.float32]] = []
    for part in describe(_Features(model), state.variables, batches, BATCH):
        parts.append(part)
        progress("fitting the PCA", sum(map(len, parts)), len(rows))
    whiten = state.params["encoder"]["head"]["whiten"]
    vectors = unit(np.concatenate(parts).reshape(-1, len(whiten["kernel"])))
    years = np.repeat(training.year[rows], len(vectors) // len(rows))
    kernel, bias = whitening(vectors, years, settings.model.descriptor)
    params = {**state.params, "encoder": {**state.params["encoder"]}}
    params["encoder"]["head"] = {"whiten": {"kernel": kernel, "bias": bias}}
    return with_params(state, settings, params, state.batch_stats)


def pretrained(
    project: Project,
    settings: config.Config,
    tiles: TileTable,
    progress: ProgressCallback,
) -> Path:
    """The folder of an encoder that needs no training, created if absent or stale.

    Features of a middle stage of an ImageNet trunk, normalised within each tile, pooled on a coarse
    grid and whitened on the training tiles: spatial layout distinguishes places.

    Raises:
        GeomatchError: the weights are not installed, or there are too few training tiles.
    """
    described = project.tile_manifest()
    model = config.ModelConfig(
        trunk="efficientnet_lite0",
        stage=5,
        pooling="grid",
        bins=settings.model.bins,
        instance_norm=True,
        head="pca",
        descriptor=settings.model.descriptor,
        centre=True,
        label_classes=settings.model.label_classes,
        labels=settings.model.labels,
    )
    encoder_settings = replace(
        settings, model=model, train=config.TrainConfig(epochs=0, init=IMAGENET, dtype="float32")
    )
    encoder_settings = resolve_settings(of_tiles(encoder_settings, described), project.root)
    form = form_of(described)
    about = manifest(encoder_settings, form, described)
    folder = project.pretrained / IMAGENET
    if _is_of(folder / "config.json", about):
        return folder
    partial = folder.with_name(f"{IMAGENET}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    network = build(encoder_settings, form)
    training = tiles.select(tiles.split == SPLITS.index("train"))
    if not len(training):
        raise GeomatchError(
            "there are no training tiles to fit the whitening on", "See: geomatch info"
        )
    store = TileStore.open(project.pixels)
    state = initial(network, encoder_settings, form, project.root, training, store, progress)
    with Checkpoints(partial / "checkpoints") as checkpoints:
        checkpoints.save(0, state, None)
    write_record(partial / "config.json", about)
    replace_folder(partial, folder)
    return folder


def _is_of(path: Path, about: RunManifest) -> bool:
    """Whether the manifest in `path` is the same as `about`, except for the random id."""
    if not path.exists():
        return False
    before = read_record(path, RunManifest, "geomatch embed --model imagenet")
    return replace(before, id=about.id) == about

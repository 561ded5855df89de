"""The training step: pmap over devices, gradients averaged, BatchNorm of the global batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from geomatch.config import Config
from geomatch.errors import UsageError
from geomatch.nn import parts
from geomatch.nn.augment import augment
from geomatch.nn.encoder import Encoder, Siamese, resolved
from geomatch.nn.layers import Shared, unit
from geomatch.nn.losses import binary_cross_entropy, head_penalty, info_nce

AXIS = "devices"


class State(NamedTuple):
    """All that a step changes."""

    params: Any
    batch_stats: Any
    optimizer: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is applied with."""
        return {"params": self.params, "batch_stats": self.batch_stats}


@dataclass(frozen=True)
class TileForm:
    """What a network asks of tiles."""

    size: int
    image_channels: int
    label_channels: int

    @property
    def channels(self) -> int:
        return self.image_channels + self.label_channels


def build(settings: Config, form: TileForm, frozen: bool = True) -> Siamese:
    """The network of a configuration.

    Args:
        frozen: hold the parts of `train.freeze`, as in the first `train.freeze_epochs`.
    """
    model = resolved(settings.model)
    if model.label_classes and form.label_channels != 1:
        raise UsageError(
            f"model.label_classes = {model.label_classes}, and the tiles have "
            f"{form.label_channels} label channels",
            "Classes are read from labels of one band.",
        )
    shared = Shared(
        dtype=jnp.dtype(settings.train.dtype),
        axis_name=AXIS,
        epsilon=model.epsilon,
        frozen=settings.train.freeze if frozen else (),
    )
    return Siamese(Encoder(model, form.image_channels, form.label_channels, shared))


def initial_state(model: Siamese, settings: Config, form: TileForm) -> State:
    """Seeded weights and a fresh optimizer, as host arrays."""
    tiles = jnp.zeros((1, form.size, form.size, form.channels), jnp.uint8)
    init = jax.jit(lambda key: model.init(key, tiles, method=Siamese.both))
    variables = init(jax.random.key(settings.train.seed))
    state = State(
        variables["params"],
        variables.get("batch_stats", {}),
        _optimizer(settings).init(variables["params"]),
    )
    return jax.tree.map(np.asarray, state)


def with_params(state: State, settings: Config, params: Any, batch_stats: Any) -> State:
    """`state` with other weights, its optimizer begun anew."""
    like = jax.tree.map(np.shape, (state.params, state.batch_stats))
    found = jax.tree.map(np.shape, (params, batch_stats))
    assert found == like
    optimizer = jax.tree.map(np.asarray, _optimizer(settings).init(params))
    return State(params, batch_stats, optimizer)


def abstract_state(model: Siamese, settings: Config, form: TileForm) -> State:
    """Shapes and dtypes of `initial_state`, without computing it."""
    shape = (1, form.size, form.size, form.channels)
    variables = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros(shape, jnp.uint8), method=Siamese.both),
        jax.random.key(0),
    )
    params = variables["params"]
    optimizer = jax.eval_shape(_optimizer(settings).init, params)
    return State(params, variables.get("batch_stats", {}), optimizer)


def _optimizer(settings: Config) -> optax.GradientTransformation:
    return optax.adam(settings.train.lr)


def learning_scales(model: Siamese, settings: Config, params: Any) -> Any:
    """What each parameter's learning rate is multiplied by; 0 where it is frozen.

    Raises:
        UsageError: a part of `train.freeze` or `train.lr_scale` is none of the network's, or a
            scale is no number from 0 on.
    """
    scaled = dict(_scale(text) for text in settings.train.lr_scale)
    frozen = model.encoder.shared.frozen
    parts.check(scaled, params, "train.lr_scale")
    parts.check([part for part in frozen if part != parts.BATCH_NORM], params, "train.freeze")

    def scale(keys: Any, _: Any) -> float:
        path = parts.path_of(keys)
        if any(parts.within(path, part) for part in frozen):
            return 0.0
        # The narrowest part decides.
        matching = [part for part in scaled if parts.within(path, part)]
        return scaled[max(matching, key=len)] if matching else 1.0

    return jax.tree_util.tree_map_with_path(scale, params)


def _scale(text: str) -> tuple[str, float]:
    part, _, factor = text.partition("=")
    try:
        scale = float(factor)
    except ValueError:
        scale = math.nan
    if not 0 <= scale < math.inf:
        raise UsageError(f"train.lr_scale: {text!r}", 'For example "trunk=0.1".')
    return part.strip(), scale


def on_devices(state: State) -> State:
    """`state` on every device, as a step gives it: a host's would be another program's."""
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), (AXIS,))
    return jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


class Roles(NamedTuple):
    """Which rows of a batch are what; see `Sampler.draw`."""

    anchors: tuple[int, ...]
    positives: tuple[int, ...]
    negatives: tuple[int, ...]

    @classmethod
    def of(cls, loss: str, count: int) -> Roles:
        """The roles of a batch of `count` rows."""
        if loss == "bce":
            return cls(*(tuple(range(first, count, 3)) for first in range(3)))
        return cls((0, 2)[: count // 2], (1, 3)[: count // 2], (4,) if count == 5 else ())


def make_step(
    model: Siamese, settings: Config, form: TileForm, reach: int
) -> Callable[[State, Any, Any, np.uint32], tuple[State, jax.Array]]:
    """A function (state, tiles, cells, step number) to (new state, loss of each device).

    Tiles are (devices, roles, b, h, w, c) uint8, cells (devices, roles, b, 3) int32: zone, column
    and row, of which two on common ground differ by at most `reach`. Randomness is a function of
    the seed and the step number alone.
    """
    optimizer, changes, loss_name = _optimizer(settings), settings.augment, settings.train.loss
    scales = learning_scales(model, settings, abstract_state(model, settings, form).params)

    def step(
        state: State, tiles: jax.Array, cells: jax.Array, number: jax.Array
    ) -> tuple[State, jax.Array]:
        roles = Roles.of(loss_name, len(tiles))
        key = jax.random.fold_in(jax.random.key(settings.train.seed), number)
        key = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
        pairs = list(zip(roles.anchors, roles.positives, strict=True))
        dropout_key, key = jax.random.split(key)
        tiles = augment(key, tiles, form.image_channels, changes, pairs)

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            # What is frozen needs no gradient.
            params = jax.tree.map(lambda p, s: p if s else jax.lax.stop_gradient(p), params, scales)
            # Both branches of the siamese are one stacked batch through one encoder.
            descriptors, changed = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                tiles.reshape(-1, *tiles.shape[2:]),
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
            )
            rows = descriptors.reshape(*tiles.shape[:2], -1)
            if loss_name == "bce":
                loss = _pair_loss(model, params, rows, roles)
            else:
                loss = _batch_loss(model, params, rows, cells, roles, reach)
            return loss + head_penalty(params, form.size), changed.get("batch_stats", {})

        (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        gradients = jax.lax.pmean(gradients, AXIS)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        updates = jax.tree.map(jnp.multiply, updates, scales)
        params = optax.apply_updates(state.params, updates)
        return State(params, stats, optimizer_state), jax.lax.pmean(loss, AXIS)

    return jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(None, 0, 0, None),
        out_axes=(None, 0),
        donate_argnums=0,
    )


def _rows(values: jax.Array, roles: tuple[int, ...]) -> jax.Array:
    """The rows of some roles of (roles, b, ...), stacked."""
    return values[jnp.array(roles, int)].reshape(-1, *values.shape[2:])


def _pair_loss(model: Siamese, params: Any, rows: jax.Array, roles: Roles) -> jax.Array:
    """Binary cross-entropy of a matching and a non-matching pair for each anchor."""
    anchor, positive, negative = (_rows(rows, part) for part in roles)
    logits: Any = model.apply(
        {"params": params},
        jnp.concatenate([anchor, anchor]),
        jnp.concatenate([positive, negative]),
        method=Siamese.pair,
    )
    matching = jnp.repeat(jnp.array([1.0, 0.0]), len(anchor))
    return binary_cross_entropy(logits, matching)


def _batch_loss(
    model: Siamese, params: Any, rows: jax.Array, cells: jax.Array, roles: Roles, reach: int
) -> jax.Array:
    """InfoNCE both ways, the candidates gathered from all devices."""
    temperature: Any = model.apply({"params": params}, method=Siamese.temperature)
    rows = unit(rows)

    def one_way(asking: tuple[int, ...], answers: tuple[int, ...]) -> jax.Array:
        # Matches come first among a device's candidates, in the order of the queries.
        queries, own = _rows(rows, asking), _rows(rows, answers)
        places, their_places = _rows(cells, asking), _rows(cells, answers)
        candidates, their_places = (
            jax.lax.all_gather(values, AXIS, tiled=True) for values in (own, their_places)
        )
        apart = jnp.abs(places[:, None] - their_places[None])
        neutral = (apart[..., 0] == 0) & (apart[..., 1:] <= reach).all(-1)
        match = jax.lax.axis_index(AXIS) * len(own) + jnp.arange(len(queries))
        return info_nce(queries, candidates, match, neutral, temperature)

    forward = one_way(roles.anchors, roles.positives + roles.negatives)
    return (forward + one_way(roles.positives, roles.anchors)) / 2

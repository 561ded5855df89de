"""The training step: pmap over devices, gradients averaged, BatchNorm of the global batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from geomatch.config import Config
from geomatch.nn.augment import augment
from geomatch.nn.encoder import Encoder, Siamese
from geomatch.nn.losses import binary_cross_entropy, head_penalty

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


def build(settings: Config, form: TileForm) -> Siamese:
    """The network of a configuration."""
    model = settings.model
    encoder = Encoder(
        trunk=model.trunk,
        head=model.head,
        pooling=model.pooling,
        descriptor=model.descriptor,
        normalise=model.normalise,
        image_channels=form.image_channels,
        label_channels=form.label_channels,
        dtype=jnp.dtype(settings.train.dtype),
        axis_name=AXIS,
    )
    return Siamese(encoder)


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


def make_step(
    model: Siamese, settings: Config, form: TileForm
) -> Callable[[State, Any, np.uint32], tuple[State, jax.Array]]:
    """A function (state, tiles, step number) to (new state, loss of each device).

    Tiles are (devices, roles, b, h, w, c) uint8; roles are threes of anchor, positive and
    negative, of which each gives a matching and a non-matching pair. Randomness is a function
    of the seed and the step number alone.
    """
    optimizer, changes = _optimizer(settings), settings.augment

    def step(state: State, tiles: jax.Array, number: jax.Array) -> tuple[State, jax.Array]:
        key = jax.random.fold_in(jax.random.key(settings.train.seed), number)
        key = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
        tiles = augment(key, tiles, form.image_channels, changes)

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            return _loss(model, params, state.batch_stats, tiles, form.size)

        (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        gradients = jax.lax.pmean(gradients, AXIS)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, stats, optimizer_state), jax.lax.pmean(loss, AXIS)

    return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0, None), out_axes=(None, 0))


def _loss(
    model: Siamese, params: Any, batch_stats: Any, tiles: jax.Array, size: int
) -> tuple[jax.Array, Any]:
    """Loss of a batch (roles, b, h, w, c) and the BatchNorm statistics after it."""
    roles, batch = tiles.shape[:2]
    # Both branches of the siamese are one stacked batch through one encoder.
    descriptors, changed = model.apply(
        {"params": params, "batch_stats": batch_stats},
        tiles.reshape(-1, *tiles.shape[2:]),
        train=True,
        mutable=["batch_stats"],
    )
    anchor, positive, negative = (
        descriptors.reshape(roles, batch, -1)[i::3].reshape(roles // 3 * batch, -1)
        for i in range(3)
    )
    logits: Any = model.apply(
        {"params": params},
        jnp.concatenate([anchor, anchor]),
        jnp.concatenate([positive, negative]),
        method=Siamese.pair,
    )
    matching = jnp.repeat(jnp.array([1.0, 0.0]), len(anchor))
    loss = binary_cross_entropy(logits, matching) + head_penalty(params, size)
    return loss, changed.get("batch_stats", {})

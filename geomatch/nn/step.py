"""The training step: pmap over devices, averaged gradients, BatchNorm over the global batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from geomatch.config import Config
from geomatch.errors import UsageError
from geomatch.nn import layers, optimizers, param_groups
from geomatch.nn.augment import augment
from geomatch.nn.encoder import AXIS, Siamese, TileForm
from geomatch.nn.losses import head_penalty
from geomatch.nn.objective import Batch, MatchRule, objective

MIN_KEPT_BYTES = 2**18
"""Size from which an activation's memory is reused."""


class State(NamedTuple):
    """All that a step changes, and the teacher.

    Attributes:
        average: averaged weights and statistics, or empty.
        teacher: initial weights and statistics with `train.distil`, or empty.
    """

    params: Any
    batch_stats: Any
    optimizer: Any
    average: dict[str, Any]
    teacher: dict[str, Any] = {}  # noqa: RUF012

    @property
    def variables(self) -> dict[str, Any]:
        """Variables that compute descriptors: the averaged ones if kept, else the current ones."""
        return self.average or {"params": self.params, "batch_stats": self.batch_stats}


@dataclass(frozen=True)
class RunLength:
    """The length of a run, on which learning rate schedules depend."""

    steps: int
    steps_per_epoch: int


def initial_state(model: Siamese, settings: Config, form: TileForm) -> State:
    """Weights drawn from the seed and a new optimizer state, as host arrays."""
    tiles = jnp.zeros((1, form.size, form.size, form.channels), jnp.uint8)
    init = jax.jit(lambda key: model.init(key, tiles, method=Siamese.encode_and_pair))
    variables = init(jax.random.key(settings.train.seed))
    return _host_state(settings, variables["params"], variables.get("batch_stats", {}))


def with_params(state: State, settings: Config, params: Any, batch_stats: Any) -> State:
    """`state` with other weights and a new optimizer state."""
    expected = jax.tree.map(np.shape, (state.params, state.batch_stats))
    assert jax.tree.map(np.shape, (params, batch_stats)) == expected
    return _host_state(settings, params, batch_stats)


def _host_state(settings: Config, params: Any, batch_stats: Any) -> State:
    return jax.tree.map(np.asarray, _state(settings, params, batch_stats))


def _state(settings: Config, params: Any, batch_stats: Any) -> State:
    variables = {"params": params, "batch_stats": batch_stats}
    average = variables if settings.train.ema else {}
    teacher = variables if settings.train.distil else {}
    return State(params, batch_stats, _optimizer(settings).init(params), average, teacher)


def abstract_state(model: Siamese, settings: Config, form: TileForm) -> State:
    """Shapes and dtypes of `initial_state`."""
    shape = (1, form.size, form.size, form.channels)

    def state(key: jax.Array) -> State:
        variables = model.init(key, jnp.zeros(shape, jnp.uint8), method=Siamese.encode_and_pair)
        return _state(settings, variables["params"], variables.get("batch_stats", {}))

    return jax.eval_shape(state, jax.random.key(0))


def _optimizer(
    settings: Config, length: RunLength = RunLength(1, 1), scales: Any = None
) -> optax.GradientTransformation:
    return optimizers.optimizer(settings.train, length.steps, length.steps_per_epoch, scales)


def learning_rate_scales(model: Siamese, settings: Config, params: Any) -> Any:
    """The factor of each parameter's learning rate; 0 if it is frozen.

    Raises:
        UsageError: the network lacks a parameter group of `train.freeze` or `train.lr_scale`, or a
            scale is not a number >= 0.
    """
    scaled = dict(_scale(text) for text in settings.train.lr_scale)
    frozen = model.encoder.shared.frozen
    param_groups.check(scaled, params, "train.lr_scale")
    param_groups.check(
        [group for group in frozen if group != param_groups.BATCH_NORM], params, "train.freeze"
    )

    def scale(keys: Any, _: Any) -> float:
        path = param_groups.path_of(keys)
        if any(param_groups.within(path, group) for group in frozen):
            return 0.0
        # The most specific group decides.
        matching = [group for group in scaled if param_groups.within(path, group)]
        return scaled[max(matching, key=len)] if matching else 1.0

    return jax.tree_util.tree_map_with_path(scale, params)


def _scale(text: str) -> tuple[str, float]:
    group, _, factor = text.partition("=")
    try:
        scale = float(factor)
    except ValueError:
        scale = math.nan
    if not 0 <= scale < math.inf:
        raise UsageError(
            f"train.lr_scale: {text!r} is not GROUP=FACTOR with a factor of 0 or more",
            'For example "trunk=0.1".',
        )
    return group.strip(), scale


def replicate(state: State) -> State:
    """`state` on every device, as a step returns it; host arrays would need another program."""
    return jax.device_put(state, _sharding(jax.local_device_count(), jax.sharding.PartitionSpec()))


def _sharding(devices: int, spec: jax.sharding.PartitionSpec) -> jax.sharding.NamedSharding:
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()[:devices]), (AXIS,))
    return jax.sharding.NamedSharding(mesh, spec)


def _zeros(like: list[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    """Zeros (devices, ...), sharded over devices."""
    if not like:
        return []
    sharding = _sharding(like[0].shape[0], jax.sharding.PartitionSpec(AXIS))
    return jax.jit(lambda: [jnp.zeros(x.shape, x.dtype) for x in like], out_shardings=sharding)()


def augment_batch(
    settings: Config,
    form: TileForm,
    match_rule: MatchRule,
    views: int,
    tiles: jax.Array,
    places: jax.Array,
    number: Any,
    device: Any,
    devices: int,
) -> tuple[jax.Array, jax.Array]:
    """A device's augmented tiles at step `number`, and the dropout key of all devices.

    Args:
        views, tiles, places: see `make_step`; without the device axis.
        number: of the step.
        device: index of the device.
        devices: number of devices that share the batch.
    """
    key = jax.random.fold_in(jax.random.key(settings.train.seed), number)
    dropout_key, key = jax.random.split(key)
    pairs = _same_place(len(tiles), views) if match_rule.dated else []
    years = places[..., 3] if match_rule.dated else jnp.zeros_like(places[..., 3])
    part = device * tiles.shape[1], devices * tiles.shape[1]
    tiles = augment(key, tiles, years, form.image_channels, settings.augment, pairs, *part)
    return tiles, dropout_key


def make_step(
    model: Siamese,
    settings: Config,
    form: TileForm,
    match_rule: MatchRule,
    length: RunLength,
    views: int = 0,
    compiled: Callable[[jax.stages.Compiled], None] = lambda program: None,
) -> Callable[[State, Any, Any, np.uint32], tuple[State, jax.Array]]:
    """The training step: (state, tiles, places, step number) to (new state, metrics per device).

    Tiles are (devices, roles, b, h, w, c) uint8, places (devices, roles, b, 4) int32 (see
    `MatchRule.relations`). Metrics are (devices, 2): the loss, and the share of triplets that are
    hard. Randomness depends only on the seed, the step number and a tile's place in the batch. With
    several processes, the first axis is that of a process's own devices.

    With `train.accumulate` the gradient is that of the whole batch, computed in micro-batches, so
    that only one's activations are in memory. BatchNorm then normalises each micro-batch by its own
    statistics, and keeps their mean.

    Args:
        views: rows per place in a batch that is compared as a whole; 0 for batches of anchors,
            positives and negatives.
        compiled: called with each program before it runs.
    """
    scales = learning_rate_scales(model, settings, abstract_state(model, settings, form).params)
    optimizer, training = _optimizer(settings, length, scales), settings.train
    loss_of_batch = objective(settings, match_rule, AXIS, views)

    def step(
        state: State,
        tiles: jax.Array,
        places: jax.Array,
        number: jax.Array,
        memory: list[jax.Array],
    ) -> tuple[State, jax.Array, list[jax.Array]]:
        # JAX would drop an unused argument, and with it the donated memory.
        number, _ = jax.lax.optimization_barrier((number, memory))
        device, devices = jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS)
        tiles, dropout_key = augment_batch(
            settings, form, match_rule, views, tiles, places, number, device, devices
        )

        def teach(tiles: jax.Array) -> jax.Array | None:
            """Features of the initial network, for `train.distil`."""
            if not state.teacher:
                return None
            # Frozen parts are the student's own, so that XLA computes them once for both.
            initial = jax.tree.map(
                lambda ours, theirs, s: theirs if s else ours,
                state.params,
                state.teacher["params"],
                scales,
            )
            flat: Any = model.apply(
                {**state.teacher, "params": initial}, _stacked(tiles), method=Siamese.features
            )
            return _by_role(flat, len(tiles))

        def learning(params: Any) -> Any:
            # Frozen parameters need no gradient.
            return jax.tree.map(lambda p, s: p if s else jax.lax.stop_gradient(p), params, scales)

        def encode(params: Any, tiles: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
            """Descriptors of tiles (roles, b, h, w, c), and BatchNorm statistics."""
            # All branches of the siamese network are one stacked batch through one encoder.
            descriptors, changed = model.apply(
                {"params": learning(params), "batch_stats": state.batch_stats},
                _stacked(tiles),
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            return _by_role(descriptors, len(tiles)), changed.get("batch_stats", {})

        def compare(
            params: Any, rows: jax.Array, places: jax.Array, features: jax.Array | None
        ) -> tuple[jax.Array, jax.Array]:
            """The loss of descriptors, and the share of hard triplets."""
            params = learning(params)
            loss, hard = loss_of_batch(Batch(model, params, rows, places, features))
            return loss + head_penalty(params, form.size), hard

        def loss_of(
            params: Any, tiles: jax.Array, places: jax.Array, key: jax.Array
        ) -> tuple[jax.Array, Any]:
            rows, stats = encode(params, tiles, key)
            loss, hard = compare(params, rows, places, teach(tiles))
            return loss, (stats, hard)

        kept: list[jax.Array] = []
        if training.accumulate > 1:
            parts = (
                _split(training.accumulate, tiles),
                _split(training.accumulate, places),
                jax.random.split(dropout_key, training.accumulate),
            )
            if views:
                loss, hard, stats, gradients = _cached_gradients(
                    encode, compare, teach, state.params, *parts
                )
            else:
                loss, hard, stats, gradients = _mean_gradients(loss_of, state.params, *parts)
        else:
            loss, pull, (stats, hard) = jax.vjp(
                partial(loss_of, tiles=tiles, places=places, key=dropout_key),
                state.params,
                has_aux=True,
            )
            (gradients,) = pull(jnp.ones_like(loss))
            if layers.use_cpu_ops() and jax.process_count() == 1:
                kept = _activations(pull, tiles.shape[0] * tiles.shape[1])
        if devices > 1:  # the mean over a single device would still copy
            gradients = jax.lax.pmean(gradients, AXIS)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average:
            # Faster at first, so that the initial random weights do not stay in it for long.
            decay = jnp.minimum(training.ema, (1.0 + number) / (10.0 + number))
            new = {"params": params, "batch_stats": stats}
            average = optax.incremental_update(new, average, 1 - decay)
        metrics = jax.lax.pmean(jnp.stack([loss, hard]), AXIS)
        after = State(params, stats, optimizer_state, average, state.teacher)
        return after, metrics, kept

    mapped = jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(None, 0, 0, None, 0),
        out_axes=(None, 0, 0),
        donate_argnums=(0, 4),
    )
    programs: dict[tuple[int, ...], tuple[Any, list[jax.ShapeDtypeStruct]]] = {}
    memory: dict[tuple[int, ...], list[jax.Array]] = {}

    def run(state: State, tiles: Any, places: Any, number: np.uint32) -> tuple[State, jax.Array]:
        if jax.process_count() > 1:
            # A program that was compiled ahead takes no arrays of one process among several.
            state, metrics, _ = mapped(state, tiles, places, number, [])
            return state, metrics
        shape = tiles.shape
        if shape not in programs:
            kept = []
            if layers.use_cpu_ops():  # elsewhere nothing is kept, and this traces the whole step
                *_, kept = jax.eval_shape(mapped, state, tiles, places, number, [])
            program = mapped.lower(state, tiles, places, number, kept).compile()
            compiled(program)
            programs[shape] = program, kept
        program, kept = programs[shape]
        if shape not in memory:
            # For one shape at a time, and after compiling, which needs memory too.
            memory.clear()
            memory[shape] = _zeros(kept)
        state, metrics, memory[shape] = program(state, tiles, places, number, memory[shape])
        return state, metrics

    return run


def _stacked(tiles: jax.Array) -> jax.Array:
    """(roles, b, ...) as (b roles, ...): devices have consecutive parts of the whole batch."""
    return tiles.swapaxes(0, 1).reshape(-1, *tiles.shape[2:])


def _by_role(rows: jax.Array, roles: int) -> jax.Array:
    """(b roles, ...) as (roles, b, ...), the inverse of `_stacked`; further axes become one."""
    return rows.reshape(len(rows) // roles, roles, -1).swapaxes(0, 1)


def _split(count: int, values: jax.Array) -> jax.Array:
    """(roles, b, ...) as (count, roles, b / count, ...)."""
    roles, batch = values.shape[:2]
    return jnp.moveaxis(values.reshape(roles, count, batch // count, *values.shape[2:]), 1, 0)


def _joined(parts: jax.Array) -> jax.Array:
    """The inverse of `_split`."""
    values = jnp.moveaxis(parts, 0, 1)
    return values.reshape(len(values), -1, *values.shape[3:])


def _mean(function: Callable[..., Any], *parts: Any) -> Any:
    """The mean of a function's results over parts, trees of (n, ...), computed one after another.

    A running mean, which leaves what all have in common, such as frozen statistics, as it is.
    """

    def add(mean: Any, numbered: Any) -> tuple[Any, None]:
        number, part = numbered
        return jax.tree.map(lambda m, new: m + (new - m) / number, mean, function(*part)), None

    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    count = len(jax.tree.leaves(parts)[0])
    return jax.lax.scan(add, zeros, (jnp.arange(1.0, count + 1), parts))[0]


def _mean_gradients(
    loss_of: Callable[..., tuple[jax.Array, Any]], params: Any, *parts: jax.Array
) -> tuple[jax.Array, jax.Array, Any, Any]:
    """Loss, hard share, statistics and gradient of a loss that is a mean over micro-batches.

    Args:
        loss_of: (params, *part) to the loss, and the statistics and the hard share.
        parts: (n, ...) inputs of n micro-batches.
    """

    def one(*part: jax.Array) -> tuple[jax.Array, jax.Array, Any, Any]:
        (loss, (stats, hard)), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, *part)
        return loss, hard, stats, gradient

    mean: tuple[jax.Array, jax.Array, Any, Any] = _mean(one, *parts)
    return mean


def _cached_gradients(
    encode: Callable[..., tuple[jax.Array, Any]],
    compare: Callable[..., tuple[jax.Array, jax.Array]],
    teach: Callable[[jax.Array], jax.Array | None],
    params: Any,
    tiles: jax.Array,
    places: jax.Array,
    keys: jax.Array,
) -> tuple[jax.Array, jax.Array, Any, Any]:
    """Loss, hard share, statistics and gradient of a loss that compares the whole batch.

    Descriptors of all micro-batches come first, without a gradient; then the loss's gradient with
    respect to them; then each micro-batch again, for that of the weights. After Gao et al. 2021
    (arXiv 2101.06983).

    Args:
        encode: (params, tiles, key) to descriptors and statistics.
        compare: (params, descriptors, places, features) to the loss and the hard share.
        teach: tiles to features.
        tiles, places, keys: (n, ...) of n micro-batches.
    """

    def look(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
        return encode(params, *part)[0], teach(part[0])

    rows, features = jax.tree.map(_joined, jax.lax.map(look, (tiles, keys)))
    everywhere = _joined(places)
    loss, pull, hard = jax.vjp(
        lambda params, rows: compare(params, rows, everywhere, features), params, rows, has_aux=True
    )
    direct, slopes = pull(jnp.ones_like(loss))

    def again(tiles: jax.Array, key: jax.Array, slopes: jax.Array) -> tuple[Any, Any]:
        _, pull, stats = jax.vjp(lambda params: encode(params, tiles, key), params, has_aux=True)
        return stats, pull(slopes)[0]

    stats, mean = _mean(again, tiles, keys, _split(len(tiles), slopes))
    return loss, hard, stats, jax.tree.map(lambda a, b: a + len(tiles) * b, direct, mean)


def _activations(pull: Any, images: int) -> list[jax.Array]:
    """The forward pass's activations that the backward pass needs, except for small arrays.

    A step returns them, and they are donated to the next step, which writes to the same memory.
    XLA's CPU backend allocates a program's memory again at each run, and faulting in a gigabyte of
    fresh pages takes a seventh of a step.

    Args:
        pull: from `jax.vjp`.
        images: number of images in the batch.
    """
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(pull)}.values()
    return [x for x in leaves if x.shape[:1] == (images,) and x.nbytes >= MIN_KEPT_BYTES]


def _same_place(count: int, views: int) -> list[tuple[int, int]]:
    """Pairs of roles of the same place, which share their augmentation (see `augment`)."""
    first = [(0, view) for view in range(1, views or 2)]
    return first + ([(count - 3, count - 2)] if count > (views or 3) else [])

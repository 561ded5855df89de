"""Optimizers and learning rate schedules, from the settings of training."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from geomatch.config import TrainConfig

SYNC_PERIOD, SLOW_STEP = 6, 0.5
"""Lookahead: steps between synchronisations, and the slow weights' step size."""


class LookaheadState(NamedTuple):
    """The slow weights, and the state of optax's own lookahead."""

    slow: Any
    inner: Any


def optimizer(
    train: TrainConfig, steps: int, steps_per_epoch: int, scales: Any = None
) -> optax.GradientTransformation:
    """The optimizer of a run.

    Gradients are clipped to a global norm of `train.clip`. Weight decay applies to kernels only: as
    an L2 penalty for adam and sgd, decoupled (Loshchilov and Hutter 2019, arXiv 1711.05101) for
    adamw and ranger.

    Args:
        train: settings of the run.
        steps: in the whole run.
        steps_per_epoch: in one epoch.
        scales: factors of the parameters' updates, a tree like `params`; None for 1. The structure
            of the state does not depend on it.
    """
    clip = optax.clip_by_global_norm(train.clip) if train.clip else optax.identity()
    decay = optax.add_decayed_weights(train.weight_decay, mask=_kernels)
    rule = {
        "adam": (decay, optax.scale_by_adam()),
        "adamw": (optax.scale_by_adam(), decay),
        "sgd": (decay, optax.trace(train.momentum, nesterov=True)),
        "ranger": (optax.scale_by_radam(), decay),
    }[train.optimizer]
    rate = optax.scale_by_learning_rate(schedule(train, steps, steps_per_epoch))
    fast = optax.chain(clip, *rule, rate, _scale_updates(scales))
    return lookahead(fast) if train.optimizer == "ranger" else fast


def schedule(train: TrainConfig, steps: int, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate as a function of the step.

    It rises linearly from 0 to `train.lr` over `train.warmup` epochs. Then it stays ("constant"),
    falls to 0 over the remaining `steps` ("cosine"), or falls continuously by the factor
    `train.decay` per epoch ("exponential").
    """
    warmup = round(train.warmup * steps_per_epoch)
    after: optax.Schedule
    if train.schedule == "cosine":
        after = optax.cosine_decay_schedule(train.lr, max(steps - warmup, 1))
    elif train.schedule == "exponential":

        def after(count: Any) -> Any:
            return train.lr * train.decay ** (count / steps_per_epoch)

    else:
        after = optax.constant_schedule(train.lr)
    if not warmup:
        return after
    rise = optax.linear_schedule(0.0, train.lr, warmup)
    return optax.join_schedules([rise, after], [warmup])


def lookahead(fast: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lookahead (Zhang et al. 2019, arXiv 1907.08610) around `fast`, for a plain parameter tree.

    optax's own version expects pairs of fast and slow weights as parameters; here the slow weights
    are part of the state. The updates must be applied unscaled.
    """
    inner = optax.lookahead(fast, SYNC_PERIOD, SLOW_STEP)

    def init(params: Any) -> LookaheadState:
        # A copy, since the parameters' buffers may be donated to a step.
        slow = jax.tree.map(jnp.copy, params)
        return LookaheadState(slow, inner.init(optax.LookaheadParams(params, slow)))

    def update(
        gradients: Any, state: LookaheadState, params: Any = None
    ) -> tuple[Any, LookaheadState]:
        both = optax.LookaheadParams(params, state.slow)
        updates, inner_state = inner.update(gradients, state.inner, both)
        slow = optax.apply_updates(state.slow, updates.slow)
        return updates.fast, LookaheadState(slow, inner_state)

    return optax.GradientTransformation(init, update)


def _kernels(params: Any) -> Any:
    """Whether each parameter is a kernel, not a bias, a scalar or a parameter of BatchNorm."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def _scale_updates(scales: Any) -> optax.GradientTransformation:
    """Multiplies updates by `scales`."""
    if scales is None:
        return optax.identity()
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scales))

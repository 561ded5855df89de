"""Overfit a few places: a network that cannot tell them apart will learn nothing from many."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from geomatch import config
from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.errors import UsageError
from geomatch.nn.encoder import TileForm, build
from geomatch.nn.step import State, replicate
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project
from geomatch.records import Record, named
from geomatch.training import setup
from geomatch.training.feed import BatchFeed
from geomatch.training.rounds import Validator
from geomatch.training.sampler import Sampler
from geomatch.training.suspects import Problem, suspects

STEPS, EVERY = 300, 20
"""Largest number of steps, and steps between measurements."""
OTHER_RATES = (10.0, 0.1)
"""Factors of the learning rate that are tried where it does not succeed."""
SHOWN = 5
"""Steps that the first and the last loss are averaged over."""
EACH = 4
"""Tiles of a class that are learnt where tiles have no years."""
NOTHING_VARIED = config.AugmentConfig(
    flips=False, turns=False, brightness=0.0, contrast=0.0, label_dropout=0.0
)

StepOf = Callable[[config.Config, Sampler, int], Any]
"""Makes the training step of settings, a sampler and a number of steps."""


@dataclass(frozen=True)
class Attempt(Record):
    """Training on a few places at one learning rate.

    Attributes:
        steps: after which it ended.
        map5: mAP@5 on the places themselves at the end.
        loss: mean of the first and of the last few steps; None if it diverged.
    """

    lr: float
    steps: int
    map5: float = field(metadata=named("map@5"))
    loss: tuple[float | None, ...]


@dataclass(frozen=True)
class Overfit(Record):
    """What training on a few places showed.

    Attributes:
        places: number of places, or of classes without years.
        tiles: number of their tiles.
        untrained: mAP@5 before the first step.
        attempt: with the learning rate of the settings.
        others: with other learning rates, if that did not succeed.
        problems: what is wrong; what is likely to matter comes first.
    """

    places: int
    tiles: int
    untrained: float
    attempt: Attempt
    others: tuple[Attempt, ...]
    problems: tuple[Problem, ...]

    @property
    def succeeded(self) -> bool:
        """Whether every place is told from the others."""
        return self.attempt.map5 == 1.0


def overfit(
    project: Project,
    settings: config.Config,
    training: TileTable,
    form: TileForm,
    places: int,
    step_of: StepOf,
    progress: ProgressCallback,
) -> Overfit:
    """Train on a few places until each is found at once, and look for what is wrong.

    Without augmentation, mining and a schedule of the learning rate, and nothing is kept.

    Args:
        settings: resolved.
        training: training tiles.
        places: how many places, or classes without years.

    Raises:
        UsageError: fewer than two places are asked for.
        GeomatchError: the initial weights do not fit.
    """
    if places < 2:
        raise UsageError(f"--overfit {places}: a place is told from others", "For example: 8.")
    tiles = _few(Sampler(training, settings.train, settings.mining), places)
    sampler = Sampler(tiles, settings.train, settings.mining)
    parts = jax.local_device_count() * settings.train.accumulate
    batch = max(1, min(settings.train.batch, sampler.anchors) // parts) * parts
    rule = settings.mining.rule
    settings = replace(
        settings,
        train=replace(settings.train, batch=batch, schedule="constant", warmup=0.0),
        mining=replace(settings.mining, rule=rule if rule == "in-batch" else "none"),
        augment=NOTHING_VARIED,
    )
    store, model = TileStore.open(project.pixels), build(settings, form)
    # The whitening of a PCA head is fitted on more than a few tiles.
    initial = setup.initial(model, settings, form, project.root, training, store, progress)

    def measure(state: State) -> float:
        with tempfile.TemporaryDirectory() as folder:
            validator = Validator(model, settings, store, {"train": tiles}, Path(folder))
            return validator.round(state.variables, 0, 0, silent).map5("train") or 0.0

    def attempt(lr: float) -> Attempt:
        wanted = replace(settings, train=replace(settings.train, lr=lr))
        chosen = Sampler(tiles, wanted.train, wanted.mining)
        step_fn, state = step_of(wanted, chosen, STEPS), replicate(initial)
        losses, map5 = list[float](), 0.0
        with BatchFeed(chosen, store, jax.local_device_count()) as feed:
            for step in range(STEPS):
                state, metrics = step_fn(state, *feed.batch(step, None), np.uint32(step))
                losses.append(float(np.asarray(metrics)[0, 0]))
                if not math.isfinite(losses[-1]):
                    return Attempt(lr, step + 1, 0.0, (losses[0], None))
                done = step + 1
                if done % EVERY == 0:
                    map5 = measure(state)
                detail = f"loss {losses[-1]:.4f}, mAP@5 {map5:.3f}"
                progress(f"learning at {lr:.3g}", done, STEPS, detail)
                if map5 == 1.0:
                    break
        first, last = (float(np.mean(part)) for part in (losses[:SHOWN], losses[-SHOWN:]))
        return Attempt(lr, done, map5, (first, last))

    problems, untrained = suspects(tiles, training, store, form), measure(replicate(initial))
    begun, others = attempt(settings.train.lr), list[Attempt]()
    if begun.map5 < 1:
        for factor in OTHER_RATES:
            others.append(attempt(settings.train.lr * factor))
            if others[-1].map5 == 1.0:
                break
        best = max(others, key=lambda other: other.map5)
        problems = [*_of_rate(begun, best), *problems, *_frozen(settings)]
    anchors = sampler.anchors
    return Overfit(anchors, len(tiles), untrained, begun, tuple(others), tuple(problems))


def _few(sampler: Sampler, places: int) -> TileTable:
    """The tiles of some places of a sampler, drawn with its seed."""
    rng = np.random.default_rng([sampler.train.seed, places])
    tiles = sampler.tiles
    if tiles.dated:
        rows = rng.permutation(sampler.places)[:places].reshape(-1)
        return tiles.select(np.sort(rows[rows >= 0]))
    chosen = rng.permutation(len(sampler.classes))[:places]
    return tiles.select(np.sort(np.concatenate([sampler.classes[i][:EACH] for i in chosen])))


def _of_rate(attempt: Attempt, best: Attempt) -> list[Problem]:
    """The learning rate, if another one does better."""
    if best.map5 <= attempt.map5:
        return []
    word = "low" if best.lr > attempt.lr else "high"
    reached = f"mAP@5 {best.map5:.3f} after {best.steps} steps"
    return [
        Problem(
            f"train.lr = {attempt.lr:.3g} is too {word}: with {best.lr:.3g} it is {reached}",
            f"--set train.lr={best.lr:.3g}",
        )
    ]


def _frozen(settings: config.Config) -> list[Problem]:
    if not settings.train.freeze:
        return []
    return [
        Problem(
            f"train.freeze keeps {', '.join(settings.train.freeze)} as they are: the rest may be "
            "too little to learn with",
            "Freeze less.",
        )
    ]

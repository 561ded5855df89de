"""Loss, speed and time left of a run, measured and shown as it goes."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from geomatch import config
from geomatch.data.tiles import TileTable
from geomatch.errors import DivergedError, listed
from geomatch.nn.checkpoint import Checkpoints
from geomatch.nn.optimizers import schedule
from geomatch.nn.step import State
from geomatch.progress import ProgressCallback, duration
from geomatch.training.mining import Mined
from geomatch.training.sampler import Sampler

SHOW_SECONDS = 0.2
"""Time between progress values."""
SHOWN_STEPS = 20
"""Steps that the loss shown as progress is averaged over."""
NAMED = 3
"""Tiles that are named of a batch that diverged."""


class Monitor:
    """Measures a run and shows its progress.

    Args:
        total: steps of the run.
        splits: tiles by name of split, all described in every round.
        scores: mAP@5 on validation of every round, as they are appended.
        checkpoints: of the run; None in a process that keeps none.
        since_log: loss and share of hard samples of the steps since losses were last logged.
    """

    def __init__(
        self,
        total: int,
        settings: config.Config,
        splits: dict[str, TileTable],
        sampler: Sampler,
        scores: list[float],
        progress: ProgressCallback,
        checkpoints: Checkpoints | None,
        since_log: Iterable[Sequence[float]] = (),
    ) -> None:
        self._total, self._per_epoch = total, sampler.steps_per_epoch
        self._settings, self._splits, self._sampler = settings, splits, sampler
        self._learning_rate = schedule(settings.train, total, self._per_epoch)
        self._scores, self._progress, self._checkpoints = scores, progress, checkpoints
        self._since_log = [np.asarray(values, np.float32) for values in since_log]
        self._unread: tuple[Any, int, Mined | None] | None = None
        self._recent: deque[NDArray[np.float32]] = deque(maxlen=SHOWN_STEPS)
        self._images = self._timed_steps = 0
        self._timed_from = self._shown_at = 0.0
        self._images_per_s = self._described_per_s = self._waited = 0.0

    def validated(
        self, step: int, described_per_s: float, score: float | None, mined: Mined | None
    ) -> None:
        """Note that a validation round ended; `score` is its mAP@5."""
        self._described_per_s = described_per_s
        self._timed_from = 0.0
        if score is not None:
            text = f"{score:.3f} (best {max(self._scores):.3f})"
            self._progress(f"epoch {-(-step // self._per_epoch)}: validation mAP@5 {text}")
        if self._total:
            self._show(step, mined)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Measure how long the device waits for the batch that is read in this block."""
        started = time.monotonic()
        yield
        # It does not wait while the step before is under way.
        if self._unread is None or self._unread[0].is_ready():
            self._waited += time.monotonic() - started

    def stepped(self, step: int, metrics: jax.Array, images: int, mined: Mined | None) -> None:
        """Note that a step was dispatched to the device; its `metrics` may still be computed.

        Raises:
            DivergedError: the loss of the step before became NaN or infinite.
        """
        # Waiting for the previous step keeps the device busy with this one.
        self._read()
        self._unread = metrics, step, mined
        now = time.monotonic()
        if self._timed_from:
            self._images += images
            self._timed_steps += 1
            self._images_per_s = self._images / (now - self._timed_from)
        else:
            # The first step after the start or a round compiles or waits: it is not timed.
            self._timed_from, self._images, self._waited = now, 0, 0.0
        if now - self._shown_at > SHOW_SECONDS and step < self._total:
            self._shown_at = now
            self._show(step, mined)

    def _read(self) -> None:
        """Wait for the last step, and read its metrics."""
        if self._unread is None:
            return
        metrics, step, mined = self._unread
        values = np.asarray(metrics)[0]
        self._unread = None
        self._since_log.append(values)
        self._recent.append(values)
        if not np.isfinite(values[0]):
            raise self._diverged(f"the loss became {values[0]}", step, mined)

    def check(self, state: State, step: int, mined: Mined | None) -> None:
        """Check the state after `step` before it is saved or described with.

        Raises:
            DivergedError: the loss or the weights became NaN or infinite.
        """
        self._read()
        # A finite loss can have a gradient that is not.
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)):
            raise self._diverged("weights became NaN or infinite", step, mined)

    def _diverged(self, what: str, step: int, mined: Mined | None) -> DivergedError:
        """The error that `what` happened in the batch that led to `step`."""
        rows = self._sampler.draw(max(0, step - 1), mined)
        ids = self._sampler.tiles.select(np.unique(rows)).ids()
        if self._checkpoints is None:
            good = "the first process says which checkpoint is good"
        elif (last := self._checkpoints.last) is None:
            good = "no checkpoint is good"
        else:
            good = f"the last good checkpoint is {last}"
        return DivergedError(
            f"{what} at step {step}, with the tiles {listed(ids, NAMED)}; {good}",
            "Lower train.lr in a new run (--run NAME); float32 is more stable than bfloat16.",
        )

    def since_log(self) -> list[list[float]]:
        """Loss and share of hard samples of each step since the last call of `metrics`."""
        self._read()
        return [values.tolist() for values in self._since_log]

    def _show(self, step: int, mined: Mined | None) -> None:
        loss, hard = np.mean(self._recent, axis=0) if self._recent else (np.nan, np.nan)
        if not np.isfinite(hard) and mined is not None and mined.share is not None:
            hard = mined.share
        timed, scores = self._timed_steps >= 3, self._scores
        values = {
            "epoch": f"{-(-step // self._per_epoch)} of {self._settings.train.epochs}",
            "time left": duration(self._seconds_left(step)) if timed else "-",
            "images/s": f"{self._images_per_s:.1f}" if timed else "-",
            "waits for input": f"{self._input_wait(time.monotonic()):.1%}" if timed else "-",
            "loss": f"{loss:.4f}" if np.isfinite(loss) else "-",
            "learning rate": f"{float(self._learning_rate(max(0, step - 1))):.2e}",
            "hard samples": f"{100 * hard:.1f} %" if np.isfinite(hard) else "-",
            "validation mAP@5": f"{scores[-1]:.3f}" if scores else "-",
            "best mAP@5": f"{max(scores):.3f}" if scores else "-",
        }
        self._progress("training", step, self._total, values=values)

    def _input_wait(self, now: float) -> float:
        """Share of the time since the last round in which the device waited for a batch."""
        return self._waited / (now - self._timed_from) if self._timed_from else 0.0

    def _seconds_left(self, step: int) -> float:
        return seconds_left(
            step,
            self._total,
            self._settings,
            self._splits,
            self._sampler,
            self._images_per_s,
            self._described_per_s,
        )

    def metrics(self, step: int) -> dict[str, float | None]:
        """Metrics averaged over the steps since the last call.

        Raises:
            DivergedError: the loss became NaN or infinite.
        """
        self._read()
        loss, hard = np.mean(self._since_log, axis=0).tolist()
        self._since_log.clear()
        now = time.monotonic()
        elapsed = now - self._timed_from
        metrics: dict[str, float | None] = {
            "epoch": step / self._per_epoch,
            "train/loss": loss,
            "train/lr": float(self._learning_rate(step - 1)),
            "train/images_per_s": self._images / elapsed if self._images else None,
            "train/input_wait": self._input_wait(now) if self._images else None,
        }
        if np.isfinite(hard):
            metrics["train/hard_share"] = hard
        return metrics


def seconds_left(
    step: int,
    total: int,
    settings: config.Config,
    splits: Mapping[str, TileTable],
    sampler: Sampler,
    images_per_s: float,
    described_per_s: float,
) -> float:
    """Seconds from `step` to the end of a run, including rounds of validation and mining.

    Args:
        splits: tiles by name of split, all described in every round.
        images_per_s: tiles trained on per second.
        described_per_s: tiles described per second; 0 if that is unknown.
    """
    mining, per_epoch = settings.mining, sampler.steps_per_epoch
    before, after = sampler.roles(hard=False), sampler.roles(hard=True)
    first_mining = min(total, mining.every * per_epoch)
    plain = max(0, first_mining - step) if mining.rule == "knn" else total - step
    images = (plain * before + (total - step - plain) * after) * settings.train.batch
    seconds = images / images_per_s
    if described_per_s:
        described = {*splits} - ({"train"} if not mining.by_rounds else set())
        tiles = sum(len(splits[split]) for split in described)
        rounds = -(-(total - step) // (per_epoch * mining.every))
        seconds += rounds * tiles / described_per_s
    return seconds

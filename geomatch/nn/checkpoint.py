"""Checkpoints of a run, through Orbax: the last two, and the best on validation.

Orbax 0.12 has its v1 API only under `experimental`, "subject to change without notice", and that
API's `Checkpointer` has no read-only mode (opening makes the folder); so this is the older API.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from geomatch.errors import StaleError
from geomatch.nn.step import State

METRIC = "map@5"

_ALL = ocp.options.MultiprocessingOptions()
_FIRST_ALONE = ocp.options.MultiprocessingOptions(active_processes={0})


class Restored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        step: of the checkpoint.
        value: what was asked for.
        remark: which checkpoints were passed over as damaged, for the user; empty if none was.
    """

    step: int
    value: Any
    remark: str


class _LatestTrained:
    """Keeps the last two checkpoints: one to go on from if the other is damaged.

    The untrained one of step 0 is none of them, since a run draws it again from its seed.
    """

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = [step for step in steps if step > 0][-2:] or steps[-1:]
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints of one run; a context manager, since saving goes on in the background.

    The model and the optimizer are items of their own, so that descriptors need the model alone.

    Raises:
        StaleError: the folder is damaged.
    """

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        for name in ("absl", "asyncio"):  # what they log as an error, Orbax raises as well
            logging.getLogger(name).setLevel(logging.CRITICAL)
        policies = [
            _LatestTrained(),
            checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: metrics[METRIC],
                n=1,
                keep_checkpoints_without_metrics=False,
            ),
        ]
        _check_metrics(folder)
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=lambda metrics: metrics[METRIC],
                # Of several processes, the first alone keeps checkpoints.
                multiprocessing_options=_FIRST_ALONE if jax.process_count() > 1 else _ALL,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                create=False,
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.close()

    @property
    def last(self) -> int | None:
        """Step of the newest checkpoint."""
        step: int | None = self._manager.latest_step()
        return step

    @property
    def best(self) -> int | None:
        """Step of the best on validation; of the newest where none was validated."""
        steps = self._manager.all_steps()
        scored = [(m[METRIC], s) for s in steps if (m := self._manager.metrics(s))]
        return max(scored)[1] if scored else self.last

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint."""
        return sorted(self._manager.all_steps())

    def metric(self, step: int) -> float | None:
        """mAP@5 on validation at `step`, where it was measured."""
        metrics = self._manager.metrics(step)
        return metrics[METRIC] if metrics else None

    def notes(self, step: int) -> dict[str, Any]:
        """What was noted with the state of `step`."""
        return dict(self._manager.metadata(step).custom_metadata or {})

    def save(
        self,
        step: int,
        state: State,
        metric: float | None,
        notes: dict[str, Any] | None = None,
    ) -> None:
        """Keep `state` as of `step`, in place of an earlier one of that step.

        Args:
            metric: its mAP@5 on validation, if measured.
            notes: values for JSON, kept beside it.
        """
        # Copies, since it is written in the background and a step takes the state's memory.
        host = jax.tree.map(np.array, _items(state))
        if step in self._manager.all_steps():
            self._manager.delete(step)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardSave(tree) for name, tree in host.items()}
            ),
            metrics=None if metric is None else {METRIC: metric},
            custom_metadata=notes,
        )

    def restore(self, step: int, like: State) -> State:
        """The state of `step`; `like` gives shapes and structure."""
        found = self._restore(step, _items(like))
        teacher = found.teacher if like.teacher else {}
        if not like.average:
            return State(**found.model, optimizer=found.optimizer, average={}, teacher=teacher)
        params, batch_stats, optimizer = found.optimizer
        return State(params, batch_stats, optimizer, found.model, teacher)

    def restore_last(self, like: State) -> Restored:
        """The state of the newest checkpoint that can be restored; newer ones are removed.

        Raises:
            StaleError: none can be restored.
        """
        found = _first(self.steps[::-1], lambda step: self.restore(step, like))
        for step in self.steps:
            if step > found.step:  # else Orbax would not save that step again
                self._manager.delete(step)
        return found

    def restore_best(self, like: State) -> Restored:
        """The model of the best checkpoint, or of the newest one that can be restored.

        The untrained model of step 0 does not stand in for another.

        Raises:
            StaleError: none can be restored.
        """
        best = self.best
        others = (step for step in self.steps[::-1] if step not in (best, 0))
        steps = [*([] if best is None else [best]), *others]
        return _first(steps, lambda step: self.restore_model(step, like))

    def restore_model(self, step: int, like: State) -> dict[str, Any]:
        """Parameters and BatchNorm statistics of `step`, without the optimizer."""
        model: dict[str, Any] = self._restore(step, {"model": like.variables}).model
        return model

    def _restore(self, step: int, like: dict[str, Any]) -> Any:
        # Host arrays, so that a checkpoint of two devices restores on one.
        targets = {
            name: jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)
            for name, tree in like.items()
        }
        _ignore_closed_loops()
        try:
            return self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
                ),
            )
        except (ValueError, KeyError, OSError) as error:
            raise StaleError(
                f"checkpoint {step} of {self._manager.directory} cannot be restored: "
                f"{str(error).splitlines()[0]}",
                "Use another --run, or train again with --run NEW.",
            ) from error


def _first(steps: Iterable[int], restore: Callable[[int], Any]) -> Restored:
    """The first of some checkpoints that can be restored."""
    failures: list[StaleError] = []
    for step in steps:
        try:
            value = restore(step)
        except StaleError as error:
            failures.append(error)
        else:
            passed = "".join(f"{failure}. " for failure in failures)
            return Restored(step, value, f"{passed}Checkpoint {step} is used." if passed else "")
    raise failures[0]


def _check_metrics(folder: Path) -> None:
    """Check the files that Orbax reads first, and whose damage it does not explain.

    Raises:
        StaleError: one is damaged.
    """
    for path in sorted(folder.glob("*/metrics/metrics")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StaleError(
                f"{path} is damaged: {error}",
                f"Remove it, and the checkpoint counts as not validated: rm -r {path.parent}",
            ) from error


@functools.cache
def _ignore_closed_loops() -> None:
    """Do not print what Orbax's reads say after one of them has failed.

    Orbax closes its event loop at the first failure. Each read that is still under way then reports
    a RuntimeError to Python's hook, from a thread of tensorstore.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _items(state: State) -> dict[str, Any]:
    """What is kept apart: the weights that describe tiles, and what training alone needs."""
    learning = state.params, state.batch_stats, state.optimizer
    items = {
        "model": state.variables,
        "optimizer": learning if state.average else state.optimizer,
    }
    return items | ({"teacher": state.teacher} if state.teacher else {})

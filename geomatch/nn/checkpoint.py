"""Checkpoints of a run, through Orbax: the last one, and the best on validation.

Orbax 0.12 has its v1 API only under `experimental`, "subject to change without notice", and that
API's `Checkpointer` has no read-only mode (opening makes the folder); so this is the older API.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from geomatch.errors import StaleError
from geomatch.nn.step import State

METRIC = "map@5"


class Checkpoints:
    """The checkpoints of one run; a context manager, since saving goes on in the background.

    The model and the optimizer are items of their own, so that descriptors need the model alone.
    """

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        logging.getLogger("absl").setLevel(logging.ERROR)
        policies = [
            checkpoint_managers.LatestN(1),
            checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: metrics[METRIC],
                n=1,
                keep_checkpoints_without_metrics=False,
            ),
        ]
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=lambda metrics: metrics[METRIC],
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                create=not read_only,
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


def _items(state: State) -> dict[str, Any]:
    """What is kept apart: the weights that describe tiles, and what training alone needs."""
    learning = state.params, state.batch_stats, state.optimizer
    items = {
        "model": state.variables,
        "optimizer": learning if state.average else state.optimizer,
    }
    return items | ({"teacher": state.teacher} if state.teacher else {})

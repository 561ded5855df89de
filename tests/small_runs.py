"""Runs of a small network: broken off, scripted and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import pytest
from small_project import metrics

from geomatch import train as module
from geomatch.nn.checkpoint import Checkpoints
from geomatch.nn.encoder import build
from geomatch.nn.step import State, abstract_state
from geomatch.project import Project
from geomatch.runs import read_run
from geomatch.training import rounds

SMALL_NETWORK = (
    "model.trunk=convnet",
    "model.stage=2",
    "model.head=mlp",
    "model.hidden=[8]",
    "model.descriptor=8",
)
"""A network that compiles in a moment, with statistics and dropout."""


class BrokenOffError(Exception):
    """What ends a run from within."""


class Notes(list[str]):
    """A progress callback that keeps the names of tasks."""

    def __call__(self, task: str, *progress: Any, **values: Any) -> None:
        self.append(task)


def last_state(project: Project, run: str = "run1") -> tuple[int, State]:
    """Step and whole state of a run's newest checkpoint."""
    wanted, form, _ = read_run(project.run(run))
    with Checkpoints(project.run(run) / "checkpoints", read_only=True) as checkpoints:
        like = abstract_state(build(wanted, form), wanted, form)
        return checkpoints.last, checkpoints.restore(checkpoints.last, like)


def assert_same_run(project: Project, run: str, other_project: Project, other: str) -> None:
    """Two runs have the same state, metrics, mined tables and figures, bit for bit."""
    assert metrics(project, run) == metrics(other_project, other)
    (step, state), (other_step, other_state) = (
        last_state(project, run),
        last_state(other_project, other),
    )
    assert step == other_step
    for a, b in zip(*map(jax.tree.leaves, (state, other_state)), strict=True):
        np.testing.assert_array_equal(a, b)
    for kind in ("mining", "figures"):
        files = [
            sorted((p.run(r) / kind).glob("*")) for p, r in ((project, run), (other_project, other))
        ]
        assert [f.name for f in files[0]] == [f.name for f in files[1]]
        for a, b in zip(*files, strict=True):
            assert a.read_bytes() == b.read_bytes()


def break_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Make training raise when it comes to `step`."""
    real = module.make_step

    def broken(*arguments: Any) -> Callable[..., Any]:
        function = real(*arguments)

        def step_or_raise(*inputs: Any) -> Any:
            if inputs[-1] == step:
                raise BrokenOffError
            return function(*inputs)

        return step_or_raise

    patch.setattr(module, "make_step", broken)


def script_validation(patch: pytest.MonkeyPatch, scores: Iterable[float]) -> None:
    """Make validation measure these mAP@5, one after another."""
    left = iter(scores)
    patch.setattr(rounds.Round, "map5", lambda self, split: next(left))

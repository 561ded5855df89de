"""What `train --dry-run` and `train --overfit` found, in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from geomatch.cli import console
from geomatch.errors import GeomatchError
from geomatch.progress import duration, size_text
from geomatch.training.dry_run import DryRun
from geomatch.training.overfit import Overfit

NOTHING_FOUND = "Try another train.loss, a larger model.descriptor or another trunk."


def show_dry_run(found: DryRun, as_json: bool) -> None:
    """Print what a run would be."""
    if as_json:
        console.data(found.as_json())
        return
    devices, roles, anchors, *tile = found.shapes["batch"]
    parts = ", ".join(f"{name} {count:,}" for name, count in found.parameters.items())
    total = sum(found.parameters.values())
    frozen = "" if found.learning == total else f", {total - found.learning:,} frozen"
    steps = ", ".join(f"{seconds:.2f}" for seconds in found.step_s)
    planned = "unknown" if found.step_bytes is None else f"{size_text(found.step_bytes)} in a step"
    free = "" if found.free_bytes is None else f"; {size_text(found.free_bytes)} were free"
    console.key_values(
        {
            "devices": f"{len(found.devices)} ({found.devices[0]}), {found.dtype}",
            "tiles": ", ".join(f"{split} {count}" for split, count in found.tiles.items()),
            "steps": f"{found.steps} in {found.epochs} epochs of {found.anchors} anchors",
            "batch": f"{devices * anchors} anchors of {roles} tiles, each {_sides(tile)}",
            "network": f"features {_sides(found.shapes['features'])}, "
            f"descriptor {_sides(found.shapes['descriptor'])}",
            "parameters": f"{total:,} ({parts}){frozen}",
            "memory": f"{planned} per device, with {size_text(found.state_bytes)} of parameters "
            f"and optimizer{free}",
            "first step": f"{duration(found.first_step_s)}, with compiling",
            "further steps": f"{steps} s",
            "speed": f"{found.images_per_s:.1f} images/s trained, {found.described_per_s:.1f} "
            "described",
            "whole run": f"about {duration(found.seconds)}, with validation and mining",
            "picture": found.picture,
        }
    )


def show_overfit(found: Overfit, as_json: bool) -> None:
    """Print what training on a few places showed.

    Raises:
        GeomatchError: it did not succeed.
    """
    attempt, problems = found.attempt, found.problems
    if as_json:
        console.data(found.as_json())
    else:
        first, last = ("-" if loss is None else f"{loss:.4f}" for loss in attempt.loss)
        values = {
            "places": f"{found.places} ({found.tiles} tiles)",
            "steps": attempt.steps,
            "mAP@5": f"{attempt.map5:.3f} (untrained {found.untrained:.3f})",
            "loss": f"{first} to {last}",
        }
        for other in found.others:
            reached = f"mAP@5 {other.map5:.3f} after {other.steps} steps"
            values[f"train.lr = {other.lr:.3g}"] = reached
        console.key_values(values)
        for problem in problems[not found.succeeded :]:
            console.note(f"warning: {problem.what}\n  {problem.remedy}")
    if not found.succeeded:
        what = f"{found.places} places are not learnt by heart: mAP@5 is {attempt.map5:.3f}"
        if problems:
            raise GeomatchError(f"{what}; {problems[0].what}", problems[0].remedy)
        raise GeomatchError(what, NOTHING_FOUND)


def _sides(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))

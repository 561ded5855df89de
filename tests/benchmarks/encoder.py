"""Images a second of a training step and of embedding: our formulations against plain ones.

    python tests/benchmarks/encoder.py --trunk resnet50 --size 128 --batch 24

The two are built in one process and run in turn; figures are medians, the ratio that of medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from geomatch import config
from geomatch.nn import layers
from geomatch.nn.describe import describe
from geomatch.nn.step import State, TileForm, build, initial_state, make_step


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trunk", default="resnet50")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=24, help="images, a multiple of three")
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    settings = config.with_overrides(config.Config(), [f"model.trunk={asked.trunk}"])
    form = TileForm(asked.size, 3, 0)
    runs = {name: prepare(settings, form, asked.batch, name) for name in ("ours", "plain")}
    table = Table(
        title=f"{asked.trunk}, {asked.size} px, {asked.batch} images, jax {jax.__version__}"
    )
    for column in ("", "ours (images/s)", "plain (images/s)", "ratio"):
        table.add_column(column, justify="right")
    for i, what in enumerate(("training", "embedding")):
        times: dict[str, list[float]] = {"ours": [], "plain": []}
        for _ in range(asked.repeats):
            for name, works in runs.items():
                begun = time.perf_counter()
                works[i]()
                times[name].append(time.perf_counter() - begun)
        ours, plain = (asked.batch / statistics.median(times[n]) for n in ("ours", "plain"))
        table.add_row(what, f"{ours:.1f}", f"{plain:.1f}", f"{ours / plain:.2f}")
    Console().print(table)


def prepare(
    settings: config.Config, form: TileForm, batch: int, name: str
) -> tuple[Callable[[], object], Callable[[], object]]:
    """A training step and an embedding of one batch, compiled."""
    # Another name is another model, so that the two do not share a compiled program.
    model = build(settings, form) if name == "ours" else build(settings, form).copy(name="plain")
    state: State = initial_state(model, settings, form)
    step = make_step(model, settings, form, reach=0)
    tiles = np.random.default_rng(0).integers(0, 256, (batch, form.size, form.size, 3), np.uint8)
    shaped = tiles.reshape(1, 3, batch // 3, *tiles.shape[1:])
    cells = np.zeros((1, 3, batch // 3, 3), np.int32)

    def train() -> object:
        return jax.block_until_ready(step(state, shaped, cells, np.uint32(0)))

    def embed() -> object:
        return list(describe(model, state.variables, [tiles], batch))

    with mock.patch.object(layers, "_on_cpu", return_value=name == "ours"):
        train()
        embed()
    return train, embed


if __name__ == "__main__":
    main()

"""Networks of random weights that tell tiles apart, for tests."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from geomatch import config
from geomatch.nn.encoder import Siamese, TileForm, build
from geomatch.nn.step import abstract_state


def network(form: TileForm, seed: int = 0, **model: Any) -> tuple[Siamese, dict[str, Any]]:
    """A network in float32 and its variables, neither of them trained.

    Unlike initial weights, BatchNorm's statistics are those of no layer's input, and no residual
    branch is silent.
    """
    settings = config.Config(
        model=config.ModelConfig(**model), train=config.TrainConfig(dtype="float32")
    )
    siamese = build(settings, form)
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name, shape = path[-1].key, leaf.shape
        if name == "kernel":
            drawn = rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape)
        elif name in ("scale", "var"):
            drawn = rng.uniform(0.5, 1.5, shape)
        elif name == "power":
            drawn = np.full(shape, 3.0)
        else:
            drawn = rng.normal(0, 0.1, shape)
        return np.asarray(drawn, np.float32)

    shapes = abstract_state(siamese, settings, form).variables
    return siamese, jax.tree_util.tree_map_with_path(draw, shapes)


def tiles(form: TileForm, count: int, seed: int = 0) -> np.ndarray:
    """(count, size, size, channels) uint8, each of its own coarse pattern."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 200, (count, 4, 4, form.channels), np.uint8)
    side = form.size // 4
    coarse = cells.repeat(side, axis=1).repeat(side, axis=2)
    return coarse + rng.integers(0, 56, coarse.shape, np.uint8)

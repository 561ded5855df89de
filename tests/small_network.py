"""Networks of random weights that tell tiles apart, for tests."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from geomatch import config
from geomatch.nn.encoder import Siamese, TileForm, build
from geomatch.nn.step import abstract_state
from geomatch.nn.trunks import TRUNKS, BasicBlock, ResNet, Trunk


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


def add_trunk(
    patch: pytest.MonkeyPatch, width: int, name: str = "tiny", blocks: tuple[int, ...] = (1,)
) -> None:
    """Let a configuration name one more trunk: a ResNet that compiles in a moment.

    Args:
        patch: takes the trunk out again.
        width: channels of the first stage.
        name: of the trunk.
        blocks: basic blocks in each stage.
    """
    trunk = partial(ResNet, block=BasicBlock, blocks=blocks, width=width)
    patch.setitem(TRUNKS, name, Trunk(trunk, len(blocks)))


def tiles(form: TileForm, count: int, seed: int = 0) -> np.ndarray:
    """(count, size, size, channels) uint8, each of its own coarse pattern."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 200, (count, 4, 4, form.channels), np.uint8)
    side = form.size // 4
    coarse = cells.repeat(side, axis=1).repeat(side, axis=2)
    return coarse + rng.integers(0, 56, coarse.shape, np.uint8)


def assert_near(found: Any, wanted: Any, tolerance: float = 1e-4) -> None:
    """See that arrays agree, relative to the largest value that is wanted."""
    wanted = np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found / scale, wanted / scale, rtol=0, atol=tolerance)

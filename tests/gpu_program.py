"""What `test_gpu` runs in a process of its own, on the device that JAX finds there."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np

from geomatch import config
from geomatch.nn import layers
from geomatch.nn.describe import describe
from geomatch.nn.encoder import TileForm, build
from geomatch.nn.objective import MatchRule
from geomatch.nn.step import RunLength, initial_state, make_step, replicate

FORM = TileForm(32, 3, 0)
STEPS = 3


def main(dtype: str) -> None:
    """Print descriptors of an untrained network and the losses of its first steps."""
    # Products in TF32, the default on a GPU, would differ in the third digit.
    jax.config.update("jax_default_matmul_precision", "highest")
    overrides = ("model.trunk=resnet10", "model.head=pool", "train.loss=infonce")
    settings = config.with_overrides(config.Config(), (*overrides, f"train.dtype={dtype}"))
    model = build(settings, FORM)
    state = initial_state(model, settings, FORM)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 2, 8, 32, 32, 3), np.uint8)
    places = np.zeros((1, 2, 8, 4), np.int32)
    places[..., 1] = 10 * np.arange(8)
    places[:, 1, :, 3] = 1
    (vectors,) = describe(model, state.variables, [pixels[0, 0]], 8)
    step_fn = make_step(model, settings, FORM, MatchRule(True, 0), RunLength(STEPS, STEPS), 2)
    losses, state = [], replicate(state)
    for number in range(STEPS):
        state, metrics = step_fn(state, pixels, places, np.uint32(number))
        losses.append(float(metrics[0, 0]))
    found = {
        "platform": jax.default_backend(),
        "cpu_ops": layers.use_cpu_ops(),
        "descriptors": vectors.tolist(),
        "losses": losses,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

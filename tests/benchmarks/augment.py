"""Images per second of each augmentation, and of all together.

    python tests/benchmarks/augment.py --size 128 --batch 96
    python tests/benchmarks/augment.py --size 256 --batch 48 --channels 6

All are compiled in one process and take turns, so that drifting machine speed affects all equally.
Values are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from geomatch.config import AugmentConfig
from geomatch.nn import backend
from geomatch.nn.augment import augment

NOTHING = {"flips": False, "turns": False, "brightness": 0.0, "contrast": 0.0, "label_dropout": 0.0}
WARP = {"rotation": 30.0, "zoom": 0.3, "shift": 0.2}
COLOUR = {"saturation": 0.5, "hue": 0.1}

SETTINGS = {
    "default": AugmentConfig(),
    "nothing": AugmentConfig(**NOTHING),
    "flips, turns": AugmentConfig(**NOTHING | {"flips": True, "turns": True}),
    "rotation, zoom, shift": AugmentConfig(**NOTHING | WARP),
    "brightness, contrast": AugmentConfig(**NOTHING | {"brightness": 0.2, "contrast": 0.2}),
    "saturation, hue": AugmentConfig(**NOTHING | COLOUR),
    "blur": AugmentConfig(**NOTHING | {"blur": 2.0}),
    "jpeg": AugmentConfig(**NOTHING | {"jpeg": 1.0}),
    "all": AugmentConfig(**WARP | COLOUR | {"blur": 2.0, "jpeg": 1.0}),
}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--channels", type=int, default=3, help="3, or more with labels")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    backend.prepare()
    shape = (args.batch, args.size, args.size, args.channels)
    tiles = jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    works = {name: change(tiles, settings) for name, settings in SETTINGS.items()}
    for work in works.values():
        jax.block_until_ready(work())
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(args.repeats):
        for name, work in works.items():
            start = time.perf_counter()
            jax.block_until_ready(work())
            times[name].append(time.perf_counter() - start)
    title = f"{args.size} px, {args.channels} channels, batch {args.batch}, jax {jax.__version__}"
    table = Table(title=title)
    for column in ("", "images/s", "slowest", "fastest"):
        table.add_column(column, justify="right" if column else "left")
    for name, seconds in times.items():
        columns = (statistics.median(seconds), max(seconds), min(seconds))
        table.add_row(name, *(f"{args.batch / value:.0f}" for value in columns))
    Console().print(table)


def change(tiles: jax.Array, settings: AugmentConfig) -> Callable[[], jax.Array]:
    """A call of `augment` with these settings."""
    years = jnp.zeros((1, len(tiles)), jnp.int32)
    run = jax.jit(lambda key, tiles: augment(key, tiles[None], years, 3, settings, []))
    return lambda: run(jax.random.key(0), tiles)


if __name__ == "__main__":
    main()

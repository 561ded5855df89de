"""A dry run: what a run would be, told by its first steps, of which nothing is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from geomatch import config
from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.nn import param_groups
from geomatch.nn.describe import describe
from geomatch.nn.encoder import Siamese, TileForm, build
from geomatch.nn.step import State, learning_rate_scales, replicate
from geomatch.progress import ProgressCallback, size_text
from geomatch.project import Project, replacing
from geomatch.records import Record
from geomatch.report.contact_sheet import sheet
from geomatch.training import setup
from geomatch.training.feed import BatchFeed
from geomatch.training.mining import Mined, candidate_triplets
from geomatch.training.monitor import seconds_left
from geomatch.training.rounds import BATCH, Examples
from geomatch.training.sampler import Sampler

MEASURED = 3
"""Steps that are timed, and batches that are described, each after a first one that compiles."""

Compiled = Callable[[jax.stages.Compiled], None]


@dataclass(frozen=True)
class DryRun(Record):
    """What a run would be.

    Attributes:
        devices: their kind, one for each.
        dtype: precision of the computation.
        tiles: number of tiles of each split that the run reads.
        anchors: training places, or classes without years.
        epochs, steps: length of the run.
        shapes: of a "batch" (devices, tiles per anchor, anchors per device, height, width,
            channels), and of a tile's "features" (height, width, channels of the trunk's feature
            map) and "descriptor".
        parameters: number of them in each part of the network.
        learning: number of those that are not frozen.
        state_bytes: memory of the parameters and of what the optimizer keeps of them, per device.
        step_bytes: memory of a step in all, per device, as the compiler plans it; None if it does
            not say.
        free_bytes: memory that is free on a device, or in the machine for CPU devices, before the
            first step; None if that is unknown.
        first_step_s: seconds of the first step, with compiling it or reading it from the cache.
        step_s: seconds of further steps.
        images_per_s: tiles trained on per second, by these.
        described_per_s: tiles described per second.
        seconds: estimate for the whole run, with its rounds of validation and mining.
        picture: of the first batch, as the network sees it.
    """

    devices: tuple[str, ...]
    dtype: str
    tiles: dict[str, int]
    anchors: int
    epochs: int
    steps: int
    shapes: dict[str, list[int]]
    parameters: dict[str, int]
    learning: int
    state_bytes: int
    step_bytes: int | None
    free_bytes: int | None
    first_step_s: float
    step_s: tuple[float, ...]
    images_per_s: float
    described_per_s: float
    seconds: float
    picture: str


def dry_run(
    project: Project,
    settings: config.Config,
    splits: Mapping[str, TileTable],
    sampler: Sampler,
    form: TileForm,
    step_of: Callable[[Compiled], Any],
    progress: ProgressCallback,
) -> DryRun:
    """Take the first steps of a run, and draw its first batch; no run is begun.

    Batches have as many tiles as after the first mining, when they are largest.

    Args:
        settings: resolved.
        splits: tiles by name of split.
        step_of: makes the training step, which calls its argument with each compiled program.

    Raises:
        GeomatchError: the initial weights do not fit.
    """
    total = sampler.steps_per_epoch * settings.train.epochs
    devices, model = jax.local_devices(), build(settings, form, not settings.train.freeze_epochs)
    store, training = TileStore.open(project.pixels), sampler.tiles
    state = setup.initial(model, settings, form, project.root, training, store, progress)
    scales = jax.tree.leaves(learning_rate_scales(model, settings, state.params))
    sizes = [leaf.size for leaf in jax.tree.leaves(state.params)]
    free, planned = _free_bytes(), list[int]()

    def compiled(program: jax.stages.Compiled) -> None:
        if (memory := _bytes(program)) is not None:
            planned.append(memory)
            beside = "" if free is None else f", {size_text(free)} are free"
            progress(f"a step needs about {size_text(memory)} of memory{beside}")

    with BatchFeed(sampler, store, len(devices)) as feed:
        first = feed.peek(0, None)
        pixels, places = (part[0] for part in first)
        rows = Examples(sampler, settings, form).rows(0, None, pixels, places)
        with replacing(project.dry_run_picture) as temporary:
            sheet(rows, temporary)
        mined = _stand_in(sampler) if settings.mining.rule == "knn" else None
        shape = feed.peek(0, mined)[0].shape
        state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        seconds, state = _timed(step_of(compiled), replicate(state), feed, mined, progress)
    images_per_s = math.prod(shape[:3]) * MEASURED / sum(seconds[1:])
    described_per_s = _described_per_s(model, state, training, store)
    return DryRun(
        devices=tuple(device.device_kind for device in devices),
        dtype=settings.train.dtype,
        tiles={split: len(tiles) for split, tiles in splits.items()},
        anchors=sampler.anchors,
        epochs=settings.train.epochs,
        steps=total,
        shapes={"batch": [*shape], **_shapes(model, state.variables, form)},
        parameters=_parts(state.params),
        learning=sum(size for size, scale in zip(sizes, scales, strict=True) if scale),
        state_bytes=state_bytes,
        step_bytes=max(planned, default=None),
        free_bytes=free,
        first_step_s=seconds[0],
        step_s=tuple(seconds[1:]),
        images_per_s=images_per_s,
        described_per_s=described_per_s,
        seconds=seconds[0]
        + seconds_left(0, total, settings, splits, sampler, images_per_s, described_per_s),
        picture=str(project.dry_run_picture),
    )


def _timed(
    step_fn: Any, state: State, feed: BatchFeed, mined: Mined | None, progress: ProgressCallback
) -> tuple[list[float], State]:
    """Seconds of the first step and of `MEASURED` more, and the state after them."""
    seconds = []
    for step in range(1 + MEASURED):
        started = time.monotonic()
        tiles, places = feed.batch(step, mined)
        state, metrics = step_fn(state, tiles, places, np.uint32(step))
        jax.block_until_ready(metrics)
        seconds.append(time.monotonic() - started)
        progress("measuring steps", step + 1, 1 + MEASURED)
    return seconds, state


def _stand_in(sampler: Sampler) -> Mined | None:
    """Triplets in the place of mined ones, for batches of the same shape."""
    for triplets in candidate_triplets(sampler.tiles, sampler.mining.k, (sampler.train.seed,)):
        query, match, negative = triplets
        if len(query):
            hardness = np.zeros(len(query), np.float32)
            return Mined(query, match, negative[:, None], hardness, 0, 0)
    return None


def _described_per_s(model: Siamese, state: State, tiles: TileTable, store: TileStore) -> float:
    """Tiles described per second, when the program is compiled."""
    rows = np.resize(tiles.store_row, (1 + MEASURED, BATCH))
    batches: Iterator[NDArray[np.uint8]] = (store.read(part) for part in rows)
    described = describe(model, state.variables, batches, BATCH)
    next(described)
    started = time.monotonic()
    return sum(len(part) for part in described) / (time.monotonic() - started)


def _shapes(model: Siamese, variables: Any, form: TileForm) -> dict[str, list[int]]:
    tile = jax.ShapeDtypeStruct((1, form.size, form.size, form.channels), np.uint8)

    def feature_map(siamese: Siamese, tiles: jax.Array) -> jax.Array:
        return siamese.encoder.feature_map(tiles)

    features = jax.eval_shape(partial(model.apply, method=feature_map), variables, tile)
    return {
        "features": [*features.shape[1:]],
        "descriptor": [*jax.eval_shape(model.apply, variables, tile).shape[1:]],
    }


def _parts(params: Any) -> dict[str, int]:
    """The number of parameters by the first name of their group."""
    found: dict[str, int] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        part = next(name for name in param_groups.path_of(keys) if name != "encoder")
        found[part] = found.get(part, 0) + leaf.size
    return found


def _bytes(program: jax.stages.Compiled) -> int | None:
    """Memory of a program on a device: arguments, results that are not among them, and the rest."""
    found = program.memory_analysis()
    if found is None:
        return None
    kept = found.output_size_in_bytes - found.alias_size_in_bytes
    return int(found.argument_size_in_bytes + kept + found.temp_size_in_bytes)


def _free_bytes() -> int | None:
    """Memory that is free: of a device, or of the machine and this process's control group."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable")]
        group = Path("/sys/fs/cgroup")
        limit, used = (group / f"memory.{name}" for name in ("max", "current"))
        found.append(int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):
        pass  # another system, or no limit: "max"
    return min(found, default=None)

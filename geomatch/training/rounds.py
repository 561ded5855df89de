"""Rounds between epochs: validation, mining, and pictures of descriptors and batches."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from geomatch import config
from geomatch.data.ground_truth import Task, tasks
from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.nn import param_groups
from geomatch.nn.describe import describe
from geomatch.nn.encoder import Siamese, TileForm
from geomatch.nn.objective import MatchRule, margin
from geomatch.nn.step import augment_batch
from geomatch.progress import ProgressCallback
from geomatch.report.contact_sheet import Thumbnail
from geomatch.search import exact
from geomatch.search.protocol import map5, retrieve
from geomatch.training import hosts, mining
from geomatch.training.mining import Mined
from geomatch.training.sampler import Sampler, compares_whole_batch, ramp

BATCH = 32
PAUSED_PARTS = 16
"""Parts of a split that are described between two calls of `Validator.pause`."""
SAMPLE = 2000
"""Maximum number of queries per year for mAP@5, and of tiles in a picture of descriptors."""
SHOWN = 4
"""Anchors per batch in the pictures."""
TRIPLET: list[tuple[str, bool | None]] = [("anchor", None), ("positive", True), ("negative", False)]
"""Roles of tiles in a batch, and whether they are of the anchor's place."""
WEIGHTS = 100_000
"""Maximum number of weights per histogram."""

Float32Array = NDArray[np.float32]


@dataclass(frozen=True)
class Validator:
    """What all rounds of a run share.

    Attributes:
        splits: tiles by name of split: "train", "validation", and others to be measured or
            pictured. Only "train" is mined.
        folder: of the run.
        pause: called now and then while tiles are described; may raise.
    """

    model: Siamese
    settings: config.Config
    store: TileStore
    splits: Mapping[str, TileTable]
    folder: Path
    pause: Callable[[], None] = lambda: None

    def mines(self, step: int, total: int) -> bool:
        """Whether a round at `step` of `total` mines."""
        mining = self.settings.mining
        return mining.by_rounds and step < total and (step > 0 or mining.rule != "knn")

    def round(self, variables: Any, step: int, epoch: int, progress: ProgressCallback) -> Round:
        """The round at `step`, with the network's `variables`."""
        return Round(self, variables, step, epoch, progress)


class Round:
    """One round; the descriptors of a split are computed once, when first needed."""

    def __init__(
        self,
        validator: Validator,
        variables: Any,
        step: int,
        epoch: int,
        progress: ProgressCallback,
    ) -> None:
        self._validator, self._variables, self._progress = validator, variables, progress
        self._settings, self._metric = validator.settings, validator.settings.metric
        self._step, self._epoch = step, epoch
        self._seconds = self._count = 0.0
        self._described: dict[str, Float32Array] = {}

    @property
    def rate(self) -> float:
        """Tiles described per second."""
        return self._count / self._seconds if self._seconds else 0.0

    def map5(self, split: str) -> float | None:
        """mAP@5 of a split, None where it has no queries.

        Queries are at most `SAMPLE` tiles of each year; the database is the whole split.
        """
        tiles = self._validator.splits[split]
        is_query = np.zeros(len(tiles), bool)
        for year in range(len(tiles.years)):
            of_year = np.flatnonzero(tiles.year == year)
            is_query[np.random.default_rng(year).permutation(of_year)[:SAMPLE]] = True
        retrievals = tasks(tiles, is_query, np.ones(len(tiles), bool))
        if not retrievals:
            return None
        vectors = self._vectors(split)
        return hosts.of_first(lambda: map5(retrieve(vectors, retrievals, self._metric)))

    def draw(self) -> None:
        """Save a picture of the descriptors in two dimensions, if `train.frames` names a split."""
        split = self._settings.train.frames
        if split:
            vectors = self._vectors(split)
            if not hosts.is_first():
                return
            from geomatch.report.projection import frame

            tiles = self._validator.splits[split]
            chosen = np.random.default_rng(0).permutation(len(tiles))[:SAMPLE]
            groups = tiles.label if tiles.classes else tiles.year
            path = self._validator.folder / "figures" / f"{self._step:08d}.png"
            title = f"{split}, epoch {self._epoch}"
            names = tiles.classes or tiles.years
            frame(vectors[chosen], groups[chosen], title, path, names=names)

    def mine(self) -> Mined:
        """The samples that the run's rule finds among the training tiles."""
        tiles, rule = self._validator.splits["train"], self._settings.mining
        if rule.rule == "ranked":
            vectors = self._vectors("train")
            return hosts.of_first(lambda: self._ranked(tiles, vectors))
        if rule.rule == "neighbours" and not self._step and tiles.grid is not None:
            return mining.nearest_on_ground(tiles, rule.k)
        vectors, seed = self._vectors("train"), (self._settings.train.seed, self._step)
        everything = np.ones(len(tiles), bool)
        # Without years the query is in the database, too, and comes first.
        k = rule.k if tiles.dated else rule.k + 1
        parts = []
        for task in tasks(tiles, everything, everything):
            if task.years[0] < task.years[1]:
                continue  # Khokhlova et al. 2020 (ICIP) search the newer year in the older
            near, scores = self._neighbours(vectors, task, k)
            match = mining.matches(task, seed)
            own = hosts.share(len(match))
            match_scores = hosts.gather(
                exact.products(vectors, task.queries[own], task.database[match[own]], self._metric),
                len(match),
            )
            if rule.rule == "knn":
                within = rule.truth_within
                parts.append(mining.hard_queries(task, match, near, scores, match_scores, within))
            else:
                parts.append(mining.wrong_neighbours(task, match, near, scores, match_scores))
        return mining.join(parts, rule.k)

    def _neighbours(
        self, vectors: Float32Array, task: Task, k: int
    ) -> tuple[NDArray[np.int64], Float32Array]:
        """Positions and inner products (q, k) of the neighbours of a task's queries."""
        own = task.queries[hosts.share(len(task.queries))]
        exact_up_to = self._settings.mining.exact_up_to
        found = exact.search(vectors, own, task.database, k, self._metric, exact_up_to)
        nothing = np.empty((0, min(k, len(task.database))))
        scores, positions = [nothing.astype(np.float32)], [nothing.astype(np.int64)]
        for _, products, near in found:
            scores.append(products)
            positions.append(near)
        count = len(task.queries)
        return (
            hosts.gather(np.concatenate(positions), count),
            hosts.gather(np.concatenate(scores), count),
        )

    def _ranked(self, tiles: TileTable, vectors: Float32Array) -> Mined:
        settings = self._settings
        rule, seed = settings.mining, (settings.train.seed, self._step)
        share = ramp(rule, float(self._epoch))
        hardest = mining.HardestTriplets(rule.hardest, share, margin(settings), (*seed, 1))
        for triplets in mining.candidate_triplets(tiles, rule.candidates, seed):
            anchor, positive, negative = (vectors[rows] for rows in triplets)
            near, far = (np.square(anchor - other).sum(axis=1) for other in (positive, negative))
            if not settings.train.squared:
                near, far = np.sqrt(near), np.sqrt(far)
            hardest.add(triplets, near - far)
        return hardest.result()

    def _vectors(self, split: str) -> Float32Array:
        if split not in self._described:
            self._described[split] = self._describe(split)
        return self._described[split]

    def _describe(self, split: str) -> Float32Array:
        """(n, d) descriptors of a split.

        They are in an unnamed file, since those of a whole territory do not fit in memory.
        """
        tiles, validator = self._validator.splits[split], self._validator
        starts = range(0, len(tiles), BATCH)[hosts.turns()]
        batches = (validator.store.read(tiles.store_row[start : start + BATCH]) for start in starts)
        started, done = time.monotonic(), 0
        vectors = np.empty((0, 1), np.float32)
        described = describe(validator.model, self._variables, batches, BATCH)
        for i, part in enumerate(hosts.in_turn(described, BATCH)):
            if not i % PAUSED_PARTS:
                validator.pause()
            if not done:
                with tempfile.TemporaryFile(dir=validator.folder) as file:
                    shape = (len(tiles), part.shape[1])
                    vectors = np.memmap(file, np.float32, "w+", shape=shape)
            vectors[done : done + len(part)] = part
            done += len(part)
            rate = done / (time.monotonic() - started)
            self._progress(f"describing {split}", done, len(tiles), f"{rate:.0f} tiles/s")
        self._count += done
        self._seconds += time.monotonic() - started
        return vectors


class Examples:
    """Pictures of what a run trains on: some anchors of a batch, augmented as in its step."""

    def __init__(self, sampler: Sampler, settings: config.Config, form: TileForm) -> None:
        self._sampler, self._form = sampler, form
        views = settings.train.views if compares_whole_batch(settings.train, settings.mining) else 0
        match_rule = MatchRule(sampler.tiles.dated, 0)
        augmented = partial(
            augment_batch, settings, form, match_rule, views, devices=jax.device_count()
        )
        self._augmented = jax.jit(augmented)
        anchor, positive, _ = TRIPLET
        self._roles = [anchor, *[positive] * (views - 1)] if views else [*TRIPLET]
        self._roles += [(f"hard {name}", right) for name, right in TRIPLET]
        # Class indices would look black.
        self._label_scale = np.uint8(255 // (settings.model.label_classes or 255))

    def rows(
        self,
        step: int,
        mined: Mined | None,
        tiles: NDArray[np.uint8],
        places: NDArray[np.int32],
    ) -> list[list[Thumbnail]]:
        """A row of images per anchor and, with label channels, a row of labels.

        Args:
            tiles, places: the first device's part of the batch at `step`; see `make_step`.
        """
        augmented_tiles, _ = self._augmented(tiles, places, np.uint32(step), 0)
        shown = np.asarray(augmented_tiles[:, :SHOWN])
        drawn = self._sampler.draw(step, mined)[:, : shown.shape[1]]
        rows, split = [], self._form.image_channels
        for pixels, tile in zip(shown.swapaxes(0, 1), drawn.T, strict=True):
            names = self._sampler.tiles.select(tile).ids()
            # Before the first mining, the last roles are missing.
            columns = list(zip(pixels, names, self._roles, strict=False))
            rows.append(
                [
                    Thumbnail(x[..., :split], (role, name), right)
                    for x, name, (role, right) in columns
                ]
            )
            if self._form.label_channels:
                rows.append(
                    [
                        Thumbnail(x[..., split:] * self._label_scale, ("labels",), right)
                        for x, _, (_, right) in columns
                    ]
                )
        return rows


def weights(params: Any) -> dict[str, Float32Array]:
    """Samples of at most `WEIGHTS` weights per part and kind, such as "weights/trunk/kernel"."""
    kinds: dict[str, list[Float32Array]] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = [name for name in param_groups.path_of(keys) if name != "encoder"]
        name = "/".join(["weights", *dict.fromkeys((path[0], path[-1]))])
        kinds.setdefault(name, []).append(np.asarray(leaf).reshape(-1))
    rng = np.random.default_rng(0)
    found = {}
    for name, leaves in kinds.items():
        share = min(1.0, WEIGHTS / sum(map(len, leaves)))
        if share < 1:
            leaves = [x[rng.integers(len(x), size=math.ceil(share * len(x)))] for x in leaves]
        found[name] = np.concatenate(leaves)
    return found

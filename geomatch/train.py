"""Train: tiles to checkpoints, with scheduled hard mining.

A run reads top to bottom in `_loop`: per step, validate and mine if due, save, draw, step. A
batch is a function of the seed, the step and the mined pairs alone, so that a resumed run is
the same run.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from tensorboardX import SummaryWriter

from geomatch import begin, config
from geomatch.data import mining
from geomatch.data.batches import Sampler
from geomatch.data.mining import HardPairs
from geomatch.data.pairs import tasks
from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import GeomatchError, UsageError
from geomatch.nn import backend
from geomatch.nn.checkpoint import Checkpoints
from geomatch.nn.describe import describe
from geomatch.nn.encoder import Siamese
from geomatch.nn.step import (
    State,
    TileForm,
    abstract_state,
    build,
    make_step,
    on_devices,
)
from geomatch.progress import Reporter, silent
from geomatch.project import FORMAT, Project, replacing, write_json
from geomatch.runs import read_run
from geomatch.search.exact import neighbours, unit
from geomatch.search.metrics import map_at
from geomatch.search.protocol import all_ranks, retrieve

LOG_STEPS = 20
READ_AHEAD = 4
DESCRIBE_BATCH = 32
SAMPLE = 2000
"""Queries of each year that a round's mAP@5 is measured on at the most."""

Batch = tuple[NDArray[np.uint8], NDArray[np.int32]]


@dataclass(frozen=True)
class Trained:
    """Where a run stands.

    Attributes:
        best: step of the best checkpoint on validation; `map5` is its mAP@5 there.
    """

    run: str
    best: int
    map5: float | None


def train(
    project: Project,
    settings: config.Config,
    *,
    run: str | None = None,
    report: Reporter = silent,
) -> Trained:
    """Train a run, or go on with it.

    Args:
        run: its name; by default the latest, or "run1".

    Raises:
        UsageError: the run was begun with another configuration.
        GeomatchError: there are no tiles, or none to train on.
    """
    names = project.run_names()
    name = run or (names[-1] if names else "run1")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(f"{name!r} is no name for a run", "Use letters, digits, '.', '_' and '-'.")
    backend.prepare()
    with project.lock("tiles", shared=True), project.lock(f"runs/{name}"):
        facts = project.tile_facts()
        tiles = _training_view(TileTable.load(project.catalogue), settings.split.years)
        form = begin.form_of(facts)
        sampler = _sampler(settings, tiles)
        settings = _open_run(project, name, settings, facts, form)
        return _loop(project, name, settings, tiles, sampler, form, report)


def _training_view(tiles: TileTable, years: tuple[str, ...]) -> TileTable:
    """Training and validation tiles: no test tile comes near a run."""
    if unknown := [year for year in years if year not in tiles.years]:
        raise UsageError(
            f"split.years: no tiles of {', '.join(unknown)}",
            f"There are: {', '.join(tiles.years)}.",
        )
    keep = tiles.split != SPLITS.index("test")
    if years:
        keep &= np.isin(tiles.year, [tiles.years.index(year) for year in years])
    return tiles.select(keep)


def _open_run(
    project: Project, name: str, settings: config.Config, facts: dict[str, Any], form: TileForm
) -> config.Config:
    """Begin a run's folder, or check that it was begun like this; its settings, settled."""
    path = project.run(name) / "config.json"
    before, old = None, None
    if path.exists():
        before, _, old = read_run(project.run(name))
    settings = begin.settle(settings, project.root, before)
    manifest = begin.manifest(settings, form, facts)
    if before is not None and old is not None:
        mine = config.from_dict(manifest["settings"], str(path))
        changed = config.differences(before, mine, (*begin.TABLES, "split"))
        if "train.epochs" in changed and mine.train.epochs > before.train.epochs:
            changed.remove("train.epochs")
        if old["tiles"] != manifest["tiles"]:
            changed.append("the tiles")
        manifest["id"] = old["id"]
        if changed:
            raise UsageError(
                f"run {name} was begun with other settings: {', '.join(changed)}",
                f"Start a new one: geomatch train --run {_next_name(project)}",
            )
    write_json(path, manifest)
    return settings


def _sampler(settings: config.Config, tiles: TileTable) -> Sampler:
    """What batches are drawn from, once the settings are seen to fit."""
    devices, batch = jax.local_device_count(), settings.train.batch
    if batch < 1 or batch % devices:
        raise UsageError(
            f"train.batch = {batch} is not divisible by {devices} devices",
            f"--set train.batch={max(1, -(-batch // devices)) * devices}",
        )
    training = tiles.select(tiles.split == SPLITS.index("train"))
    sampler = Sampler(training, batch, settings.train.seed, settings.train.loss == "bce")
    if len(sampler.places) < 2:
        raise GeomatchError(
            "fewer than two training places are seen in two years",
            "See geomatch info: more imagery, another split, or a lower grid.min_valid.",
        )
    return sampler


def _next_name(project: Project) -> str:
    taken = project.run_names()
    return next(f"run{i}" for i in range(1, len(taken) + 2) if f"run{i}" not in taken)


def _loop(
    project: Project,
    name: str,
    settings: config.Config,
    tiles: TileTable,
    sampler: Sampler,
    form: TileForm,
    report: Reporter,
) -> Trained:
    folder = project.run(name)
    devices, training = jax.local_device_count(), sampler.tiles
    dropout = settings.augment.label_dropout
    if form.label_channels and dropout:
        report(f"{dropout:.0%} of tiles learn without labels, so that queries without them work")
    per_epoch = sampler.steps_per_epoch
    total = per_epoch * settings.train.epochs
    model = build(settings, form)
    store = TileStore.open(project.pixels)
    judge = _Judge(model, store, training, tiles.select(tiles.split == SPLITS.index("validation")))
    reach = tiles.grid.reach
    step_fn = thawed = make_step(model, settings, form, reach)
    if settings.train.freeze_epochs:
        thawed = make_step(build(settings, form, frozen=False), settings, form, reach)

    with Checkpoints(folder / "checkpoints") as checkpoints, contextlib.ExitStack() as stack:
        last = checkpoints.last
        if last is None:
            step = 0
            state = begin.initial(model, settings, form, project.root, training, store, report)
        else:
            step = last
            if step >= total:
                report(f"run {name} is finished: {total} steps ({settings.train.epochs} epochs)")
                return _finish(folder, name, checkpoints)
            state = checkpoints.restore(step, abstract_state(model, settings, form))
            (folder / "finished.json").unlink(missing_ok=True)
            report(f"run {name}: going on from step {step} of {total}")
        state = on_devices(state)
        log = stack.enter_context(_Log(folder, step if last is not None else -1))
        feed = stack.enter_context(_Feed(sampler, store, devices))
        hard = _mined(folder)
        pace = _Pace(total, settings, len(tiles), sampler, report)
        saved_at = time.monotonic()

        while True:
            epoch, into_epoch = divmod(step, per_epoch)
            scheduled = into_epoch == 0 and epoch % settings.mining.every == 0
            # A checkpoint at a round holds the state after it, so a resumed run goes past it.
            metric, judged = None, False
            if (scheduled or step == total) and step != last:
                metric, judged = judge.validate(state, report), True
                log.write(step, {"validation/map@5": metric})
                pace.judged(judge.rate, metric)
            mined = _mining_file(folder, step)
            mines = settings.mining.rule != "none" and 0 < step < total
            if scheduled and mines and not mined.exists():
                hard, figures = judge.mine(state, settings, report)
                with replacing(mined) as temporary:
                    hard.save(temporary)
                log.write(step, figures)
            overdue = time.monotonic() - saved_at > 60 * settings.train.save_minutes
            if judged or (overdue and _logs(step, per_epoch) and step != last):
                checkpoints.save(step, state, metric)
                saved_at = time.monotonic()
            if step == total:
                break

            if epoch >= settings.train.freeze_epochs:
                step_fn = thawed
            state, loss = step_fn(state, *feed.batch(step, hard), np.uint32(step))
            step += 1
            pace.stepped(step, loss, settings.train.batch * feed.roles)
            if _logs(step, per_epoch):
                log.write(step, pace.window(step))
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        return _finish(folder, name, checkpoints)


def _logs(step: int, per_epoch: int) -> bool:
    """Where losses are averaged and written; a run is saved nowhere else, to resume exactly."""
    return step % per_epoch % LOG_STEPS == 0


def _finish(folder: Path, name: str, checkpoints: Checkpoints) -> Trained:
    """Mark a run as finished."""
    best = checkpoints.best
    assert best is not None
    result = Trained(name, best, checkpoints.metric(best))
    write_json(folder / "finished.json", {"format": FORMAT, **asdict(result)})
    return result


def _mining_file(folder: Path, step: int) -> Path:
    return folder / "mining" / f"{step:08d}.parquet"


def _mined(folder: Path) -> HardPairs | None:
    """The latest mined pairs of a run."""
    files = sorted((folder / "mining").glob("*.parquet"))
    return HardPairs.load(files[-1]) if files else None


class _Feed:
    """Reads the batches to come while the device works."""

    def __init__(self, sampler: Sampler, store: TileStore, devices: int) -> None:
        self._sampler, self._store, self._devices = sampler, store, devices
        self._pool = ThreadPoolExecutor(2)
        self._hard: HardPairs | None = None
        self._ahead: dict[int, Future[Batch]] = {}
        self.roles = 3

    def __enter__(self) -> _Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def batch(self, step: int, hard: HardPairs | None) -> Batch:
        """Tiles (devices, roles, b, h, w, c) of a step, and their cells (..., 3) int32."""
        if hard is not self._hard:
            self._ahead.clear()
            self._hard = hard
        for soon in range(step, step + READ_AHEAD):
            if soon not in self._ahead:
                self._ahead[soon] = self._pool.submit(self._read, soon, hard)
        batch = self._ahead.pop(step).result()
        self.roles = batch[0].shape[1]
        return batch

    def _read(self, step: int, hard: HardPairs | None) -> Batch:
        drawn = self._sampler.draw(step, hard)
        roles, batch = drawn.shape
        table, rows = self._sampler.tiles, drawn.reshape(-1)
        cells = np.stack([table.epsg[rows], table.col[rows], table.row[rows]], axis=1)
        shape = (roles, self._devices, batch // self._devices)

        def shared(values: NDArray[Any]) -> NDArray[Any]:
            return np.moveaxis(values.reshape(*shape, *values.shape[1:]), 0, 1)

        return shared(self._store.read(table.store_row[rows])), shared(cells.astype(np.int32))


class _Judge:
    """Describes tiles with the current weights, to validate and to mine."""

    def __init__(
        self, model: Siamese, store: TileStore, training: TileTable, validation: TileTable
    ) -> None:
        self._model, self._store = model, store
        self._training, self._validation = training, validation
        self.rate = 0.0
        """Tiles a second, of the last round."""

    def validate(self, state: State, report: Reporter) -> float | None:
        """mAP@5 of the validation split, None where it has no queries."""
        return self._map5(
            self._validation, self._describe(state, self._validation, "validating", report)
        )

    def mine(
        self, state: State, settings: config.Config, report: Reporter
    ) -> tuple[HardPairs, dict[str, float | None]]:
        """Hard pairs among the training tiles, and figures of the round."""
        tiles, rule = self._training, settings.mining
        vectors = unit(self._describe(state, tiles, "mining", report))
        everything = np.ones(len(tiles), bool)
        parts = []
        for task in tasks(tiles, everything, everything):
            if task.years[0] < task.years[1]:
                continue  # S1 asks for the newer year in the older
            _, near = neighbours(vectors[task.queries], vectors[task.database], rule.k)
            parts.append(
                mining.hard_queries(
                    task.queries,
                    task.database,
                    task.truth,
                    near,
                    task.neutral,
                    rule.truth_within,
                )
            )
        hard = mining.join(parts, rule.k)
        return hard, {"train/map@5": self._map5(tiles, vectors), "train/hard_share": hard.share}

    def _map5(self, tiles: TileTable, vectors: NDArray[np.float32]) -> float | None:
        """mAP@5 of at most `SAMPLE` queries of each year against all of the tiles."""
        asking = np.zeros(len(tiles), bool)
        for year in range(len(tiles.years)):
            own = np.flatnonzero(tiles.year == year)
            asking[np.random.default_rng(year).permutation(own)[:SAMPLE]] = True
        everything = np.ones(len(tiles), bool)
        return map_at(all_ranks(retrieve(vectors, tasks(tiles, asking, everything))), 5)

    def _describe(
        self, state: State, tiles: TileTable, task: str, report: Reporter
    ) -> NDArray[np.float32]:
        if not len(tiles):
            return np.empty((0, 1), np.float32)
        starts = range(0, len(tiles), DESCRIBE_BATCH)
        batches = (self._store.read(tiles.store_row[s : s + DESCRIBE_BATCH]) for s in starts)
        begun, done, parts = time.monotonic(), 0, []
        for part in describe(self._model, state.variables, batches, DESCRIBE_BATCH):
            parts.append(part)
            done += len(part)
            self.rate = done / (time.monotonic() - begun)
            report(task, done, len(tiles), f"{self.rate:.0f} tiles/s")
        return np.concatenate(parts)


class _Log:
    """Figures of a run, as `metrics.jsonl` and as TensorBoard events.

    Args:
        upto: what earlier attempts left beyond this step is cut.
    """

    def __init__(self, folder: Path, upto: int) -> None:
        self._path = folder / "metrics.jsonl"
        if self._path.exists():
            with replacing(self._path) as temporary, temporary.open("w") as kept:
                for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True):
                    # A line cut short by a kill is later than any checkpoint.
                    if not line.endswith("\n") or json.loads(line)["step"] > upto:
                        break
                    kept.write(line)
        for file in (folder / "mining").glob("*.parquet"):
            if int(file.stem) > upto:
                file.unlink()
        self._events = SummaryWriter(str(folder / "events"), purge_step=upto + 1)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._events.close()

    def write(self, step: int, figures: dict[str, float | None]) -> None:
        """Append figures as of `step`."""
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, **figures}) + "\n")
        for name, value in figures.items():
            if value is not None:
                self._events.add_scalar(name, value, step)


class _Pace:
    """Speed, losses and time left, told as training goes."""

    def __init__(
        self,
        total: int,
        settings: config.Config,
        tiles: int,
        sampler: Sampler,
        report: Reporter,
    ) -> None:
        self._total, self._per_epoch = total, sampler.steps_per_epoch
        self._settings, self._tiles, self._sampler = settings, tiles, sampler
        self._report = report
        self._losses: list[jax.Array] = []
        self._images = 0
        self._since = self._started = 0.0
        self._timed_images = 0
        self._judging_rate = 0.0
        self._scores: list[float] = []
        self._told = False

    def judged(self, rate: float, metric: float | None) -> None:
        """A validation round ended, at so many tiles a second."""
        self._judging_rate = rate
        self._since = 0.0
        if metric is not None:
            self._scores.append(metric)
            self._report(f"validation mAP@5 {metric:.3f} (best {max(self._scores):.3f})")

    def stepped(self, step: int, loss: jax.Array, images: int) -> None:
        """A step was sent to the device; `loss` need not be there yet."""
        self._losses.append(loss)
        if len(self._losses) > 1:
            jax.block_until_ready(self._losses[-2])
        now = time.monotonic()
        if not self._since:
            # The first step of a stretch compiles or waits for a round: not counted.
            self._since, self._images = now, 0
            self._started = self._started or now
            return
        self._images += images
        rate = self._images / (now - self._since)
        score = f", mAP@5 {self._scores[-1]:.3f}" if self._scores else ""
        self._report("training", step, self._total, f"{rate:.1f} images/s{score}")
        self._timed_images += 1
        if not self._told and now - self._started > 15 and self._timed_images >= 3:
            self._tell(step, rate)

    def _tell(self, step: int, rate: float) -> None:
        """An estimate of the whole time, rounds of validation and mining included."""
        self._told = True
        mining, train = self._settings.mining, self._settings.train
        mines = mining.rule != "none"
        plain = (
            max(0, min(self._total, mining.every * self._per_epoch) - step)
            if mines
            else (self._total - step)
        )
        before, after = self._sampler.roles(hard=False), self._sampler.roles(hard=True)
        images = (plain * before + (self._total - step - plain) * after) * train.batch
        seconds = images / rate
        if self._judging_rate:
            training = len(self._sampler.tiles)
            rounds = (self._total - step) // (self._per_epoch * mining.every) + 1
            seconds += rounds * (self._tiles - training + mines * training) / self._judging_rate
        self._report(f"{rate:.1f} images/s: about {max(1, round(seconds / 60))} min left in all")

    def window(self, step: int) -> dict[str, float | None]:
        """Figures since the last call."""
        losses = [float(np.mean(loss)) for loss in self._losses]
        self._losses.clear()
        loss = float(np.mean(losses))
        if not np.isfinite(loss):
            raise GeomatchError(
                f"the loss became {loss} near step {step}",
                "Lower train.lr; float32 is steadier than bfloat16.",
            )
        elapsed = time.monotonic() - self._since
        figures: dict[str, float | None] = {
            "epoch": step / self._per_epoch,
            "train/loss": loss,
            "train/lr": self._settings.train.lr,
            "train/images_per_s": self._images / elapsed if self._images else None,
        }
        return figures

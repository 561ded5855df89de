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
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from geomatch import config
from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import DivergedError, GeomatchError, UsageError
from geomatch.manifests import TileManifest
from geomatch.nn import backend
from geomatch.nn.checkpoint import Checkpoints
from geomatch.nn.encoder import Siamese, TileForm, build
from geomatch.nn.module_graph import trace
from geomatch.nn.objective import MatchRule
from geomatch.nn.optimizers import schedule
from geomatch.nn.step import Course, abstract_state, make_step, on_devices
from geomatch.progress import ProgressCallback, duration, silent
from geomatch.project import Project, replacing, write_json, write_record
from geomatch.report.tensorboard import Board
from geomatch.runs import read_run
from geomatch.training import setup
from geomatch.training.mining import Mined
from geomatch.training.rounds import Examples, Validator, weights
from geomatch.training.sampler import Sampler, whole

LOG_STEPS = 20
SHOW_SECONDS = 0.2
"""Between figures that are shown."""
READ_AHEAD = 4
VALIDATION = "validation/map@5"

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


ShouldStop = Callable[[int, float | None], bool]
"""(epoch, mAP@5 on validation) to whether to stop."""


def never(epoch: int, metric: float | None) -> bool:
    """A `ShouldStop` that lets a run go on."""
    del epoch, metric
    return False


def check_name(name: str) -> None:
    """See that runs can be named so.

    Raises:
        UsageError: it is no plain name.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(f"{name!r} is no name for a run", "Use letters, digits, '.', '_' and '-'.")


def train(
    project: Project,
    settings: config.Config,
    *,
    run: str | None = None,
    should_stop: ShouldStop = never,
    progress: ProgressCallback = silent,
) -> Trained:
    """Train a run, or go on with it.

    Args:
        run: its name; by default the latest, or "run1".
        should_stop: called at every round; where it returns True the run stops, unfinished.

    Raises:
        UsageError: the run was begun with another configuration.
        GeomatchError: there are no tiles, or none to train on.
        DivergedError: the loss became no number.
    """
    names = project.run_names()
    name = run or (names[-1] if names else "run1")
    check_name(name)
    backend.prepare(settings.train.dtype)
    with project.lock("tiles", shared=True), project.lock(f"runs/{name}"):
        manifest = project.tile_manifest()
        splits = _splits(TileTable.load(project.catalogue), settings)
        form = setup.form_of(manifest)
        sampler = _sampler(settings, splits["train"])
        settings = _open_run(project, name, settings, manifest, form)
        return _loop(project, name, settings, splits, sampler, form, should_stop, progress)


def _splits(tiles: TileTable, settings: config.Config) -> dict[str, TileTable]:
    """Training and validation tiles; test tiles only where they are to be measured or drawn."""
    years = settings.split.years
    if unknown := [year for year in years if year not in tiles.years]:
        raise UsageError(
            f"split.years: no tiles of {', '.join(unknown)}",
            f"There are: {', '.join(tiles.years)}.",
        )
    if years:
        tiles = tiles.select(np.isin(tiles.year, [tiles.years.index(year) for year in years]))
    wanted = {"train", "validation", *settings.eval.during, settings.train.frames}
    return {
        split: tiles.select(tiles.split == code)
        for code, split in enumerate(SPLITS)
        if split in wanted
    }


def _open_run(
    project: Project, name: str, settings: config.Config, tiles: TileManifest, form: TileForm
) -> config.Config:
    """Begin a run's folder, or check that it was begun like this; its settings, settled."""
    path = project.run(name) / "config.json"
    before, old = None, None
    if path.exists():
        before, _, old = read_run(project.run(name))
    settings = setup.settle(settings, project.root, before)
    manifest = setup.manifest(settings, form, tiles)
    if before is not None and old is not None:
        mine = config.from_dict(manifest.settings, str(path))
        changed = config.differences(before, mine, (*setup.TABLES, "split"))
        if "train.epochs" in changed and mine.train.epochs > before.train.epochs:
            changed.remove("train.epochs")
        if old.tiles != manifest.tiles:
            changed.append("the tiles")
        manifest = replace(manifest, id=old.id)
        if changed:
            raise UsageError(
                f"run {name} was begun with other settings: {', '.join(changed)}",
                f"Start a new one: geomatch train --run {_next_name(project)}",
            )
    write_record(path, manifest)
    return settings


def _sampler(settings: config.Config, training: TileTable) -> Sampler:
    """What batches are drawn from, once the settings are seen to fit."""
    train, rule = settings.train, settings.mining.rule
    devices, batch = jax.local_device_count(), train.batch
    if batch < 1 or batch % devices:
        raise UsageError(
            f"train.batch = {batch} is not divisible by {devices} devices",
            f"--set train.batch={max(1, -(-batch // devices)) * devices}",
        )
    if rule == "in-batch" and train.loss != "triplet":
        raise UsageError(
            f'mining.rule = "in-batch" finds triplets, and train.loss = "{train.loss}"',
            "--set train.loss=triplet, or --set mining.rule=none.",
        )
    if rule == "ranked" and train.loss not in ("triplet", "contrastive"):
        raise UsageError(
            f'mining.rule = "ranked" ranks triplets by distance, and train.loss = "{train.loss}" '
            "knows none",
            "--set train.loss=triplet, or --set mining.rule=knn.",
        )
    if rule == "neighbours" and not training.dated:
        raise UsageError(
            'mining.rule = "neighbours" is of places seen in several years',
            "For class folders: --set mining.rule=knn, ranked or in-batch.",
        )
    sampler = Sampler(training, train, settings.mining)
    if sampler.anchors < 2:
        if training.dated:
            raise GeomatchError(
                "fewer than two training places are seen in two years",
                "See geomatch info: more imagery, another split, or a lower grid.min_valid.",
            )
        raise GeomatchError(
            "fewer than two classes have two training images each",
            "See geomatch info: more images, or other shares of images.validation and images.test.",
        )
    return sampler


def _next_name(project: Project) -> str:
    taken = project.run_names()
    return next(f"run{i}" for i in range(1, len(taken) + 2) if f"run{i}" not in taken)


def _loop(
    project: Project,
    name: str,
    settings: config.Config,
    splits: dict[str, TileTable],
    sampler: Sampler,
    form: TileForm,
    should_stop: ShouldStop,
    progress: ProgressCallback,
) -> Trained:
    folder = project.run(name)
    devices, training = jax.local_device_count(), sampler.tiles
    dropout = settings.augment.label_dropout
    if form.label_channels and dropout:
        progress(f"{dropout:.0%} of tiles learn without labels, so that queries without them work")
    per_epoch = sampler.steps_per_epoch
    total = per_epoch * settings.train.epochs
    model = build(settings, form)
    store = TileStore.open(project.pixels)
    validator = Validator(model, settings, store, splits, folder)
    examples = Examples(sampler, settings, form)
    measured = dict.fromkeys(("validation", *settings.eval.during))
    step_fn = thawed = _step(settings, form, sampler, total, frozen=True)
    if settings.train.freeze_epochs:
        thawed = _step(settings, form, sampler, total, frozen=False)

    with Checkpoints(folder / "checkpoints") as checkpoints, contextlib.ExitStack() as stack:
        last = checkpoints.last
        log = _Log(folder, -1 if last is None else last)
        if last is not None and (last >= total or _stops(log.scores, settings)):
            progress(f"run {name} is finished: {last} steps ({last // per_epoch} epochs)")
            return _finish(folder, name, checkpoints)
        if last is None:
            step = 0
            state = setup.initial(model, settings, form, project.root, training, store, progress)
        else:
            step = last
            state = checkpoints.restore(step, abstract_state(model, settings, form))
            (folder / "finished.json").unlink(missing_ok=True)
            progress(f"run {name}: going on from step {step} of {total}")
        stack.enter_context(log)
        if last is None:
            shape = form.size, form.size, form.channels
            log.board.graph(
                trace(partial(model.apply, method=Siamese.both), state.variables, shape)
            )
        state = on_devices(state)
        feed = stack.enter_context(_Feed(sampler, store, devices))
        mined = _mined(folder)
        pace = _Pace(total, settings, splits, sampler, log.scores, progress)
        saved_at, broken_off = time.monotonic(), False

        while True:
            epoch, into_epoch = divmod(step, per_epoch)
            scheduled = into_epoch == 0 and epoch % settings.mining.every == 0
            # A checkpoint at a round holds the state after it, so a resumed run goes past it; only
            # one that had ended there has yet to mine.
            metric, stop = None, step == total
            validates, mining_file = (
                (scheduled or stop) and step != last,
                _mining_file(folder, step),
            )
            mines = scheduled and validator.mines(step, total) and not mining_file.exists()
            if validates or mines:
                now = validator.round(state, step, epoch, progress)
            if validates:
                scores = {f"{split}/map@5": now.map5(split) for split in measured}
                metric = scores[VALIDATION]
                log.write(step, scores)
                now.draw()
            if mines:
                mined = now.mine()
                with replacing(mining_file) as temporary:
                    mined.save(temporary)
                unmeasured = {"train"} - {*measured}
                scores = {f"{split}/map@5": now.map5(split) for split in unmeasured}
                log.write(step, {**scores, "train/hard_share": mined.share})
            if validates:
                pace.validated(step, now.rate, metric, mined)
                stop |= _stops(log.scores, settings)
                log.board.histograms(step, weights(state.params))
                if not stop:
                    first = (part[0] for part in feed.look(step, mined))
                    log.board.pictures(step, "batch", examples.rows(step, mined, *first))
                checkpoints.save(step, state, metric)
                saved_at = time.monotonic()
                broken_off = not stop and should_stop(epoch, metric)
                if broken_off:
                    break
            overdue = time.monotonic() - saved_at > 60 * settings.train.save_minutes
            if overdue and _logs(step, per_epoch) and step != last:
                checkpoints.save(step, state, metric)
                saved_at = time.monotonic()
            if stop:
                break

            if epoch >= settings.train.freeze_epochs:
                step_fn = thawed
            state, step_metrics = step_fn(state, *feed.batch(step, mined), np.uint32(step))
            step += 1
            pace.stepped(step, step_metrics, settings.train.batch * feed.roles, mined)
            if _logs(step, per_epoch):
                log.write(step, pace.window(step))
    if settings.train.frames:
        from geomatch.report.projection import animate

        animate(folder / "figures")
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        return _standing(name, checkpoints) if broken_off else _finish(folder, name, checkpoints)


def _step(
    settings: config.Config, form: TileForm, sampler: Sampler, total: int, frozen: bool
) -> Any:
    tiles = sampler.tiles
    return make_step(
        build(settings, form, frozen),
        settings,
        form,
        MatchRule(tiles.dated, tiles.grid.reach if tiles.grid else 0),
        Course(total, sampler.steps_per_epoch),
        settings.train.views if whole(settings.train, settings.mining) else 0,
    )


def _stops(scores: list[float], settings: config.Config) -> bool:
    """Whether the last `train.patience` rounds brought nothing better than one before."""
    patience = settings.train.patience
    if not patience or len(scores) <= patience:
        return False
    return max(scores[-patience:]) <= max(scores[:-patience])


def _logs(step: int, per_epoch: int) -> bool:
    """Where losses are averaged and written; a run is saved nowhere else, to resume exactly."""
    return step % per_epoch % LOG_STEPS == 0


def _standing(name: str, checkpoints: Checkpoints) -> Trained:
    best = checkpoints.best
    assert best is not None
    return Trained(name, best, checkpoints.metric(best))


def _finish(folder: Path, name: str, checkpoints: Checkpoints) -> Trained:
    """Mark a run as finished."""
    result = _standing(name, checkpoints)
    write_json(folder / "finished.json", asdict(result))
    return result


def _mining_file(folder: Path, step: int) -> Path:
    return folder / "mining" / f"{step:08d}.parquet"


def _mined(folder: Path) -> Mined | None:
    """What a run mined last."""
    files = sorted((folder / "mining").glob("*.parquet"))
    return Mined.load(files[-1]) if files else None


class _Feed:
    """Reads the batches to come while the device works."""

    def __init__(self, sampler: Sampler, store: TileStore, devices: int) -> None:
        self._sampler, self._store, self._devices = sampler, store, devices
        self._pool = ThreadPoolExecutor(2)
        self._mined: Mined | None = None
        self._ahead: dict[int, Future[Batch]] = {}
        self.roles = 3

    def __enter__(self) -> _Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def batch(self, step: int, mined: Mined | None) -> Batch:
        """Tiles (devices, roles, b, h, w, c) of a step, and their places (..., 4) int32."""
        batch = self.look(step, mined)
        del self._ahead[step]
        self.roles = batch[0].shape[1]
        return batch

    def look(self, step: int, mined: Mined | None) -> Batch:
        """What `batch` gives next."""
        if mined is not self._mined:
            self._ahead.clear()
            self._mined = mined
        for soon in range(step, step + READ_AHEAD):
            if soon not in self._ahead:
                self._ahead[soon] = self._pool.submit(self._read, soon, mined)
        return self._ahead[step].result()

    def _read(self, step: int, mined: Mined | None) -> Batch:
        drawn = self._sampler.draw(step, mined)
        roles, batch = drawn.shape
        table, rows = self._sampler.tiles, drawn.reshape(-1)
        if table.grid is not None:
            place = table.epsg[rows], table.col[rows], table.row[rows], table.year[rows]
        else:
            none = np.zeros(len(rows), np.int64)
            place = none, table.label[rows], none, table.year[rows] if table.dated else rows
        shape = (roles, self._devices, batch // self._devices)

        def shared(values: NDArray[Any]) -> NDArray[Any]:
            return np.moveaxis(values.reshape(*shape, *values.shape[1:]), 0, 1)

        return shared(self._store.read(table.store_row[rows])), shared(
            np.stack(place, axis=1).astype(np.int32)
        )


class _Log:
    """Figures of a run, as `metrics.jsonl` and as TensorBoard events.

    Args:
        upto: what earlier attempts left beyond this step is cut.
    """

    def __init__(self, folder: Path, upto: int) -> None:
        self._path = folder / "metrics.jsonl"
        self.scores: list[float] = []
        """mAP@5 on validation of every round so far."""
        if self._path.exists():
            with replacing(self._path) as temporary, temporary.open("w") as kept:
                for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True):
                    # A line cut short by a kill is later than any checkpoint.
                    if not line.endswith("\n") or json.loads(line)["step"] > upto:
                        break
                    kept.write(line)
                    self._count(json.loads(line))
        for file in (*folder.glob("mining/*.parquet"), *folder.glob("figures/*.png")):
            if int(file.stem) > upto:
                file.unlink()
        self._folder, self._upto = folder / "events", upto

    def __enter__(self) -> _Log:
        self.board = Board(self._folder, self._upto + 1)
        return self

    def __exit__(self, *_: object) -> None:
        self.board.close()

    def _count(self, metrics: dict[str, float | None]) -> None:
        if (score := metrics.get(VALIDATION)) is not None:
            self.scores.append(score)

    def write(self, step: int, metrics: dict[str, float | None]) -> None:
        """Append figures as of `step`."""
        self._count(metrics)
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, **metrics}) + "\n")
        self.board.scalars(step, metrics)


class _Pace:
    """Speed, losses and time left, told as training goes.

    Args:
        scores: mAP@5 on validation of every round, as they come.
    """

    def __init__(
        self,
        total: int,
        settings: config.Config,
        splits: dict[str, TileTable],
        sampler: Sampler,
        scores: list[float],
        progress: ProgressCallback,
    ) -> None:
        self._total, self._per_epoch = total, sampler.steps_per_epoch
        self._settings, self._splits, self._sampler = settings, splits, sampler
        self._rate = schedule(settings.train, total, self._per_epoch)
        self._scores, self._progress = scores, progress
        self._losses: list[jax.Array] = []
        self._before: jax.Array | None = None
        self._recent: deque[NDArray[np.float32]] = deque(maxlen=LOG_STEPS)
        self._images = self._timed_steps = 0
        self._since = self._shown = 0.0
        self._speed = self._describing_rate = 0.0

    def validated(self, step: int, rate: float, metric: float | None, mined: Mined | None) -> None:
        """A validation round ended, at so many tiles a second."""
        self._describing_rate = rate
        self._since = 0.0
        if metric is not None:
            score = f"{metric:.3f} (best {max(self._scores):.3f})"
            self._progress(f"epoch {-(-step // self._per_epoch)}: validation mAP@5 {score}")
        if self._total:
            self._show(step, mined)

    def stepped(self, step: int, metrics: jax.Array, images: int, mined: Mined | None) -> None:
        """A step was sent to the device; its figures need not be there yet."""
        self._losses.append(metrics)
        if self._before is not None:
            self._recent.append(np.asarray(self._before)[0])
        self._before = metrics
        now = time.monotonic()
        if self._since:
            self._images += images
            self._timed_steps += 1
            self._speed = self._images / (now - self._since)
        else:
            # The first step of a stretch compiles or waits for a round: not counted.
            self._since, self._images = now, 0
        if now - self._shown > SHOW_SECONDS and step < self._total:
            self._shown = now
            self._show(step, mined)

    def _show(self, step: int, mined: Mined | None) -> None:
        loss, hard = np.mean(self._recent, axis=0) if self._recent else (np.nan, np.nan)
        if not np.isfinite(hard) and mined is not None and mined.share is not None:
            hard = mined.share
        timed, scores = self._timed_steps >= 3, self._scores
        values = {
            "epoch": f"{-(-step // self._per_epoch)} of {self._settings.train.epochs}",
            "time left": duration(self._left(step)) if timed else "-",
            "images/s": f"{self._speed:.1f}" if timed else "-",
            "loss": f"{loss:.4f}" if np.isfinite(loss) else "-",
            "learning rate": f"{float(self._rate(max(0, step - 1))):.2e}",
            "hard samples": f"{100 * hard:.1f} %" if np.isfinite(hard) else "-",
            "validation mAP@5": f"{scores[-1]:.3f}" if scores else "-",
            "best mAP@5": f"{max(scores):.3f}" if scores else "-",
        }
        self._progress("training", step, self._total, values=values)

    def _left(self, step: int) -> float:
        """Seconds to the end, rounds of validation and mining included."""
        mining, train = self._settings.mining, self._settings.train
        before, after = self._sampler.roles(hard=False), self._sampler.roles(hard=True)
        first = min(self._total, mining.every * self._per_epoch)
        plain = max(0, first - step) if mining.rule == "knn" else self._total - step
        images = (plain * before + (self._total - step - plain) * after) * train.batch
        seconds = images / self._speed
        if self._describing_rate:
            described = {*self._splits} - ({"train"} if not mining.by_rounds else set())
            tiles = sum(len(self._splits[split]) for split in described)
            rounds = -(-(self._total - step) // (self._per_epoch * mining.every))
            seconds += rounds * tiles / self._describing_rate
        return seconds

    def window(self, step: int) -> dict[str, float | None]:
        """Figures since the last call."""
        loss, hard = np.mean([np.asarray(f)[0] for f in self._losses], axis=0).tolist()
        self._losses.clear()
        if not np.isfinite(loss):
            raise DivergedError(
                f"the loss became {loss} near step {step}",
                "Lower train.lr; float32 is steadier than bfloat16.",
            )
        elapsed = time.monotonic() - self._since
        metrics: dict[str, float | None] = {
            "epoch": step / self._per_epoch,
            "train/loss": loss,
            "train/lr": float(self._rate(step - 1)),
            "train/images_per_s": self._images / elapsed if self._images else None,
        }
        if np.isfinite(hard):
            metrics["train/hard_share"] = hard
        return metrics

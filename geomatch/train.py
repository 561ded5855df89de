"""Train: tiles to checkpoints, with scheduled hard mining.

`_loop` is the run: restore, then per step validate if due, mine if due, save, draw, step. A batch
depends only on the seed, the step and the mined samples, so that a resumed run is the same run.
Ctrl-C and SIGTERM save the current step, too.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from geomatch import config
from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.errors import GeomatchError, UsageError
from geomatch.manifests import TileManifest
from geomatch.nn import backend
from geomatch.nn.checkpoint import Checkpoints
from geomatch.nn.encoder import Siamese, TileForm, build
from geomatch.nn.module_graph import trace
from geomatch.nn.objective import MatchRule
from geomatch.nn.step import RunLength, State, abstract_state, make_step, replicate
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, check_name, replacing, write_json
from geomatch.report.mlflow_run import MlflowRun
from geomatch.runs import read_run
from geomatch.training import hosts, opening, setup
from geomatch.training.dry_run import Compiled, DryRun
from geomatch.training.dry_run import dry_run as measure
from geomatch.training.feed import BatchFeed
from geomatch.training.hosts import Processes as Processes
from geomatch.training.interrupts import Interrupts
from geomatch.training.metrics_log import VALIDATION, MetricsLog, Scores
from geomatch.training.mining import Mined
from geomatch.training.monitor import Monitor
from geomatch.training.overfit import Overfit
from geomatch.training.overfit import overfit as fit
from geomatch.training.reference import imagenet_map5
from geomatch.training.rounds import Examples, Validator, weights
from geomatch.training.sampler import Sampler, compares_whole_batch

LOG_STEPS = 20
"""Steps between logged losses."""


@dataclass(frozen=True)
class Trained:
    """The best checkpoint of a run.

    Attributes:
        run: name of the run.
        best: step of the checkpoint with the best mAP@5 on validation.
        map5: that mAP@5; None without validation queries.
        untrained: mAP@5 on validation before the first step; None without validation queries.
        imagenet: mAP@5 on validation of `geomatch embed --model imagenet`; None where training
            began with its weights, and see `imagenet_map5`.
    """

    run: str
    best: int
    map5: float | None
    untrained: float | None = None
    imagenet: float | None = None


ShouldStop = Callable[[int, float | None], bool]
"""Called with (epoch, mAP@5 on validation); returns whether to stop."""


def never(epoch: int, metric: float | None) -> bool:
    """A `ShouldStop` that never stops a run."""
    del epoch, metric
    return False


def train(
    project: Project,
    settings: config.Config,
    *,
    run: str | None = None,
    hours: float | None = None,
    processes: Processes | None = None,
    should_stop: ShouldStop = never,
    reference: bool = True,
    progress: ProgressCallback = silent,
) -> Trained:
    """Train a run, or resume it.

    Args:
        run: its name; by default the latest, or "run1".
        hours: how long a new run may take, by its first steps; the number of epochs follows. A run
            that was begun keeps its own.
        processes: that train it together, each of which calls this; by default those that SLURM
            or Open MPI started, or this one alone. All read the project's tiles, and the first
            alone reads and writes its runs.
        should_stop: called after every validation; if it returns True, the run stops unfinished.
        reference: in the end, also measure what ImageNet features reach without training.

    Raises:
        UsageError: the run was begun with another configuration.
        GeomatchError: there are no tiles, or none to train on.
        DivergedError: the loss or the weights became NaN or infinite.
        KeyboardInterrupt: by Ctrl-C or SIGTERM, after the run was saved as it was.
    """
    if run:
        check_name(run)
    backend.prepare(settings.train.dtype)
    with hosts.joined(processes or Processes()), contextlib.ExitStack() as locks:
        locks.enter_context(project.lock("tiles", shared=True))
        manifest = project.tile_manifest()
        settings, tiles = hosts.of_first(lambda: (settings, manifest.fingerprint))
        if tiles != manifest.fingerprint:
            raise GeomatchError(
                f"process {jax.process_index()} has other tiles than the first one",
                "Give all processes the same project folder.",
            )
        if not hosts.is_first():
            progress = silent
        settings, splits, sampler = opening.prepare(project, settings, manifest, progress)
        form = setup.form_of(manifest)

        def begin_run() -> tuple[str, config.Config]:
            names = project.run_names()
            name = run or (names[-1] if names else "run1")
            locks.enter_context(project.lock(f"runs/{name}"))
            wanted = settings
            if hours is not None:
                epochs = _epochs_within(
                    hours, project, name, settings, manifest, splits, sampler, progress
                )
                wanted = replace(settings, train=replace(settings.train, epochs=epochs))
            return name, opening.open_run(project, name, wanted, manifest, form)

        if hours is not None and jax.process_count() > 1:
            raise UsageError("--hours is measured on one host alone", "Set train.epochs.")
        name, settings = hosts.of_first(begin_run)
        trained = _loop(project, name, settings, splits, sampler, form, should_stop, progress)
        if reference and not settings.train.init:
            reach = partial(imagenet_map5, project, settings, splits, progress)
            trained = replace(trained, imagenet=hosts.of_first(reach))
        _say_if_lost(trained, settings, progress)
        return trained


def _say_if_lost(trained: Trained, settings: config.Config, progress: ProgressCallback) -> None:
    """Say so if no training does better, and what to try."""
    if trained.best == 0 < settings.train.epochs:
        progress(
            "training did not beat the untrained network, which later stages will use; "
            "try a lower train.lr, or `geomatch init DIR --preset pretrained`"
        )
    if (
        trained.map5 is not None
        and trained.imagenet is not None
        and trained.map5 < trained.imagenet
    ):
        progress(
            "ImageNet features do better without training: `geomatch embed --model imagenet`, "
            "or train from them: `geomatch init DIR --preset pretrained`"
        )


def dry_run(
    project: Project,
    settings: config.Config,
    *,
    run: str | None = None,
    progress: ProgressCallback = silent,
) -> DryRun:
    """Tell what `train` would do, from its first steps; only a picture of a batch is written.

    Args:
        run: its name; by default a new one.

    Raises:
        UsageError, GeomatchError: as for `train`.
    """
    name = run or opening.next_name(project)
    check_name(name)
    backend.prepare(settings.train.dtype)
    with project.lock("tiles", shared=True):
        manifest = project.tile_manifest()
        settings, splits, sampler = opening.prepare(project, settings, manifest, progress)
        settings, _ = opening.resolve(project, name, settings, manifest, setup.form_of(manifest))
        return _measured(project, settings, manifest, splits, sampler, progress)


def _measured(
    project: Project,
    settings: config.Config,
    manifest: TileManifest,
    splits: dict[str, TileTable],
    sampler: Sampler,
    progress: ProgressCallback,
) -> DryRun:
    """What a run with resolved settings would be."""
    form, total = setup.form_of(manifest), sampler.steps_per_epoch * settings.train.epochs
    frozen = not settings.train.freeze_epochs
    step_of = partial(_step, settings, form, sampler, total, frozen)
    return measure(project, settings, splits, sampler, form, step_of, progress)


def _epochs_within(
    hours: float,
    project: Project,
    name: str,
    settings: config.Config,
    manifest: TileManifest,
    splits: dict[str, TileTable],
    sampler: Sampler,
    progress: ProgressCallback,
) -> int:
    """The number of epochs that takes so many hours, or that of the run if it was begun.

    Raises:
        UsageError: `hours` is not positive.
    """
    if not hours > 0:
        raise UsageError(f"--hours {hours}: must be more than 0")
    if (project.run(name) / "config.json").exists():
        return read_run(project.run(name))[0].train.epochs
    settings = replace(
        settings, train=replace(settings.train, epochs=max(1, settings.train.epochs))
    )
    settings, _ = opening.resolve(project, name, settings, manifest, setup.form_of(manifest))
    planned = _measured(project, settings, manifest, splits, sampler, progress)
    per_epoch = (planned.seconds - planned.first_step_s) / planned.epochs
    epochs = max(1, int((3600 * hours - planned.first_step_s) / per_epoch))
    progress(f"{hours:g} hours are enough for {epochs} epochs of about {per_epoch:.0f} s")
    return epochs


def overfit(
    project: Project,
    settings: config.Config,
    places: int,
    *,
    progress: ProgressCallback = silent,
) -> Overfit:
    """Train on a few places until each is found at once, and tell what is wrong if that fails.

    No run is begun, and nothing is written.

    Args:
        places: how many places, or classes without years.

    Raises:
        UsageError, GeomatchError: as for `train`.
    """
    backend.prepare(settings.train.dtype)
    with project.lock("tiles", shared=True):
        manifest = project.tile_manifest()
        settings, splits, _ = opening.prepare(project, settings, manifest, progress)
        form = setup.form_of(manifest)
        settings, _ = opening.resolve(project, opening.next_name(project), settings, manifest, form)

        def step_of(settings: config.Config, sampler: Sampler, steps: int) -> Any:
            return _step(settings, form, sampler, steps, frozen=True)

        return fit(project, settings, splits["train"], form, places, step_of, progress)


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
    folder, first = project.run(name), hosts.is_first()
    training = sampler.tiles
    dropout = settings.augment.label_dropout
    if form.label_channels and dropout:
        progress(f"training drops the labels of {dropout:.0%} of tiles, for queries without labels")
    per_epoch = sampler.steps_per_epoch
    total = per_epoch * settings.train.epochs
    model = build(settings, form)
    store = TileStore.open(project.pixels)
    examples = Examples(sampler, settings, form)
    measured = dict.fromkeys(("validation", *settings.eval.during))
    step_fn = unfrozen_step_fn = _step(settings, form, sampler, total, frozen=True)
    if settings.train.freeze_epochs:
        unfrozen_step_fn = _step(settings, form, sampler, total, frozen=False)

    with Interrupts() as interrupts, contextlib.ExitStack() as stack:
        validator = Validator(model, settings, store, splits, folder, interrupts.agree)
        checkpoints = None
        if first:
            checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints"))

        # Restore, or begin.
        def begin() -> _Beginning | Trained:
            assert checkpoints is not None
            last, restored = checkpoints.last, None
            notes = {} if last is None else checkpoints.notes(last)
            if last is not None and (last < total or notes.get("round_due")):
                restored = checkpoints.restore_last(abstract_state(model, settings, form))
                last, notes = restored.step, checkpoints.notes(restored.step)
                if restored.remark:
                    progress(restored.remark)
            round_due = notes.get("round_due", False)
            log = MetricsLog(folder, -1 if last is None else last, round_due)
            if (
                last is not None
                and not round_due
                and (last >= total or _patience_is_over(log.scores, settings))
            ):
                progress(f"run {name} is finished: {last} steps ({last // per_epoch} epochs)")
                return _finish(folder, name, checkpoints, log.scores)
            if restored is not None:
                (folder / "finished.json").unlink(missing_ok=True)
                progress(f"run {name}: resuming from step {restored.step} of {total}")
                state = restored.value
            else:
                if not settings.train.init and training.dated:
                    progress(
                        "training begins with random weights; `geomatch init DIR --preset "
                        "pretrained` begins with ImageNet's"
                    )
                state = setup.initial(
                    model, settings, form, project.root, training, store, progress
                )
            since_log = notes.get("since_log", ())
            return _Beginning(last, state, round_due, _last_mined(folder), since_log, log)

        beginning = hosts.of_first(begin)
        if isinstance(beginning, Trained):
            return beginning
        last, state, round_due, mined, since_log, metrics_log = beginning
        step = last or 0
        log, board = Scores(metrics_log.scores), None
        if first:
            log = stack.enter_context(metrics_log)
            board = metrics_log.board
            if address := settings.train.mlflow:
                metrics_log.tracker = stack.enter_context(
                    MlflowRun(project, name, address, progress)
                )
        if last is None and board is not None:
            shape = form.size, form.size, form.channels
            board.graph(
                trace(partial(model.apply, method=Siamese.encode_and_pair), state.variables, shape)
            )
        state = replicate(state)
        feed = stack.enter_context(BatchFeed(sampler, store, *hosts.devices()))
        monitor = Monitor(
            total, settings, splits, sampler, log.scores, progress, checkpoints, since_log
        )
        saved_at, pruned = time.monotonic(), False

        def save_if_interrupted(kind: type[BaseException] | None, *_: object) -> None:
            if checkpoints is None or kind is None or not issubclass(kind, KeyboardInterrupt):
                return
            if interrupts.holding:
                return  # a step that is broken off has taken the state
            if step not in checkpoints.steps:
                monitor.check(state, step, mined)
                due = step == total or step % (per_epoch * settings.mining.every) == 0
                notes = {"since_log": monitor.since_log(), "round_due": due}
                checkpoints.save(step, state, None, notes)
            progress(f"run {name}: saved at step {step} of {total}")

        stack.push(save_if_interrupted)

        def save(score: float | None) -> None:
            nonlocal saved_at
            if checkpoints is not None:
                with interrupts.held():
                    checkpoints.save(step, state, score)
            saved_at = time.monotonic()

        while True:
            epoch, into_epoch = divmod(step, per_epoch)
            scheduled = into_epoch == 0 and epoch % settings.mining.every == 0
            score, finished = None, step == total
            # The checkpoint of a round is saved after it, so a resumed run skips the validation,
            # unless it was interrupted in it; it mines only if the run had ended at that round.
            validate = (scheduled or finished) and (step != last or round_due)
            mining_file = _mining_file(folder, step)
            mine = (
                scheduled
                and validator.mines(step, total)
                and not hosts.of_first(mining_file.exists)
            )
            if validate or mine:
                monitor.check(state, step, mined)
                round_ = validator.round(state.variables, step, epoch, progress)

            # Validate if due.
            if validate:
                scores = {f"{split}/map@5": round_.map5(split) for split in measured}
                score = scores[VALIDATION]
                log.write(step, scores)
                round_.draw()

            # Mine if due. Training tiles are described by now: measure them, too.
            if mine:
                mined = round_.mine()
                unmeasured = {"train"} - {*measured}
                scores = {f"{split}/map@5": round_.map5(split) for split in unmeasured}
                with interrupts.held():
                    if first:
                        with replacing(mining_file) as temporary:
                            mined.save(temporary)
                    log.write(step, {**scores, "train/hard_share": mined.share})

            # Save: after every validation, and when `train.save_minutes` have passed.
            if validate:
                monitor.validated(step, round_.rate, score, mined)
                finished |= _patience_is_over(log.scores, settings)
                if board is not None:
                    board.histograms(step, weights(state.params))
                    if not finished:
                        one_device = (part[0] for part in feed.peek(step, mined))
                        board.pictures(step, "batch", examples.rows(step, mined, *one_device))
                save(score)
                stops = partial(should_stop, epoch, score)
                pruned = not finished and hosts.of_first(stops)
                if pruned:
                    break
            overdue = time.monotonic() - saved_at > 60 * settings.train.save_minutes
            if (
                checkpoints is not None
                and overdue
                and _is_logged(step, per_epoch)
                and step not in checkpoints.steps
            ):
                monitor.check(state, step, mined)
                save(score)
            if finished:
                break

            # Draw, step.
            with monitor.reading():
                tiles, places = feed.batch(step, mined)
            if epoch >= settings.train.freeze_epochs:
                step_fn = unfrozen_step_fn
            images = math.prod(tiles.shape[:3]) * jax.process_count()
            with interrupts.held():
                state, step_metrics = step_fn(state, tiles, places, np.uint32(step))
                step += 1
                monitor.stepped(step, step_metrics, images, mined)
                if _is_logged(step, per_epoch):
                    log.write(step, monitor.metrics(step))
            interrupts.agree()

    def end() -> Trained:
        if settings.train.frames:
            from geomatch.report.projection import animate

            animate(folder / "figures")
        with Checkpoints(folder / "checkpoints", read_only=True) as kept:
            if pruned:
                return _best(name, kept, log.scores)
            return _finish(folder, name, kept, log.scores)

    return hosts.of_first(end)


class _Beginning(NamedTuple):
    """Where a run begins or goes on, as the first process finds it.

    Attributes:
        last: step of the checkpoint it goes on from; None if it begins.
        state: host arrays.
        round_due: the round at `last` is still to be done.
        mined: the samples that were mined last.
        since_log: see `Monitor`.
    """

    last: int | None
    state: State
    round_due: bool
    mined: Mined | None
    since_log: Sequence[Sequence[float]]
    log: MetricsLog


def _step(
    settings: config.Config,
    form: TileForm,
    sampler: Sampler,
    total: int,
    frozen: bool,
    compiled: Compiled = lambda program: None,
) -> Any:
    tiles = sampler.tiles
    return make_step(
        build(settings, form, frozen),
        settings,
        form,
        MatchRule(tiles.dated, tiles.grid.reach if tiles.grid else 0),
        RunLength(total, sampler.steps_per_epoch),
        settings.train.views if compares_whole_batch(settings.train, settings.mining) else 0,
        compiled,
    )


def _patience_is_over(scores: list[float], settings: config.Config) -> bool:
    """Whether none of the last `train.patience` rounds beat the best one before them."""
    patience = settings.train.patience
    if not patience or len(scores) <= patience:
        return False
    return max(scores[-patience:]) <= max(scores[:-patience])


def _is_logged(step: int, per_epoch: int) -> bool:
    """Whether losses are averaged and written at `step`.

    Unless it is interrupted, a run is saved only at such steps, where no loss waits to be logged.
    """
    return step % per_epoch % LOG_STEPS == 0


def _best(name: str, checkpoints: Checkpoints, scores: list[float]) -> Trained:
    best = checkpoints.best
    assert best is not None
    return Trained(name, best, checkpoints.metric(best), scores[0] if scores else None)


def _finish(folder: Path, name: str, checkpoints: Checkpoints, scores: list[float]) -> Trained:
    """Mark a run as finished."""
    result = _best(name, checkpoints, scores)
    write_json(folder / "finished.json", asdict(result))
    return result


def _mining_file(folder: Path, step: int) -> Path:
    return folder / "mining" / f"{step:08d}.parquet"


def _last_mined(folder: Path) -> Mined | None:
    """The samples that a run mined last."""
    files = sorted((folder / "mining").glob("*.parquet"))
    return Mined.load(files[-1]) if files else None

"""Tune: a search for settings by mAP@5 on validation, each trial a run.

Optuna keeps the study in SQLite and suggests settings; runs that fall behind or diverge are stopped
early. A killed trial continues from the last checkpoint of its run.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import jax

from geomatch import config
from geomatch.errors import DivergedError, GeomatchError, UsageError
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, check_name, fingerprint
from geomatch.train import train
from geomatch.training import setup

RANGE = re.compile(r"(\S+)\s*\.\.\s*(\S+?)(\s+log)?")


@dataclass(frozen=True)
class Parameter:
    """A setting to search: one of `values`, which are TOML, or a number from `low` to `high`."""

    key: str
    values: tuple[str, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False

    def suggest(self, trial: Any) -> Any:
        """The value for a trial."""
        if self.values:
            return self.value(trial.suggest_categorical(self.key, self.values))
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.key, self.low, self.high, log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, log=self.log)

    def value(self, stored: Any) -> Any:
        """The value that Optuna stores as `stored`."""
        return config.literal(stored) if self.values else stored


@dataclass(frozen=True)
class Trial:
    """One trial: its settings, and how it ended ("complete" or "pruned")."""

    run: str
    state: str
    map5: float | None
    settings: dict[str, Any]


@dataclass(frozen=True)
class Tuned:
    """The result of `tune`: all trials in order, and the run of the best one."""

    study: str
    best: str
    trials: tuple[Trial, ...]

    @property
    def map5(self) -> float:
        """mAP@5 of the best run on validation."""
        scores = {trial.run: trial.map5 for trial in self.trials}
        score = scores[self.best]
        assert score is not None
        return score

    def as_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return asdict(self)


def tune(
    project: Project,
    settings: config.Config,
    *,
    study: str = "tune",
    progress: ProgressCallback = silent,
) -> Tuned:
    """Search `settings.tune.space`, or continue a study.

    Trials are runs named after the study. Only the best one keeps its checkpoints, and later stages
    take it by default.

    Raises:
        UsageError: the space is empty or wrong, or the study was started with other settings.
        GeomatchError: Optuna is not installed, or no trial was completed.
    """
    space = _space(settings)
    check_name(study)
    try:
        import optuna
    except ImportError as error:
        raise GeomatchError("the search needs Optuna", "pip install 'geomatch[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with project.lock(f"tune/{study}"), _open(optuna, project, settings, study) as found:
        states = optuna.trial.TrialState
        for stale in found.get_trials(states=[states.RUNNING]):
            # Its process died: try the same settings again, in the same run.
            found.tell(stale.number, state=states.FAIL)
            found.enqueue_trial(stale.params, user_attrs=stale.user_attrs)
        ended = (states.COMPLETE, states.PRUNED)
        while (done := len(found.get_trials(states=ended))) < settings.tune.trials:
            trial = found.ask()
            run = trial.user_attrs.get("run", f"{study}-{trial.number:03d}")
            trial.set_user_attr("run", run)
            chosen = {parameter.key: parameter.suggest(trial) for parameter in space}
            chosen_text = ", ".join(f"{key} = {short(value)}" for key, value in chosen.items())
            progress(f"trial {done + 1} of {settings.tune.trials}, run {run}: {chosen_text}")
            wanted = config.with_overrides(
                settings, [f"{key}={config.toml(value)}" for key, value in chosen.items()]
            )
            try:
                value = _train(project, wanted, run, trial, progress)
            except UsageError:
                # The settings would be refused again, so this trial must not be continued.
                found.tell(trial, state=states.FAIL)
                raise
            found.tell(trial, value, states.PRUNED if value is None else states.COMPLETE)
            _keep_the_best(project, found)
        best = _best(found)
        if best is None:
            raise GeomatchError(
                f"no trial of study {study} was completed",
                "Change tune.space and start another study: --study NAME",
            )
        # Later stages take the latest run.
        (project.run(best) / "config.json").touch()
        trials = tuple(
            Trial(
                t.user_attrs["run"],
                t.state.name.lower(),
                t.value,
                {parameter.key: parameter.value(t.params[parameter.key]) for parameter in space},
            )
            for t in found.get_trials(states=ended)
        )
        return Tuned(study, best, trials)


@contextmanager
def _open(optuna: Any, project: Project, settings: config.Config, name: str) -> Iterator[Any]:
    """The study of that name, while its file is open."""
    folder = project.root / "tune"
    folder.mkdir(exist_ok=True)
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder.absolute() / name}.db")
    try:
        yield _study(optuna, storage, settings, name)
    finally:
        # Optuna itself never closes its pool of connections.
        storage.engine.dispose()


def _study(optuna: Any, storage: Any, settings: config.Config, name: str) -> Any:
    """The study of that name in `storage`, which is created with these settings or was before.

    Raises:
        UsageError: the study was started with other settings.
    """
    found = optuna.create_study(
        storage=storage,
        study_name=name,
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
        load_if_exists=True,
    )
    # With the same seed, a continued study would suggest the same settings again.
    seed = settings.train.seed + len(found.get_trials())
    found.sampler = optuna.samplers.TPESampler(seed=seed)
    values = config.as_dict(settings)
    of = fingerprint(
        [{table: values[table] for table in (*setup.TABLES, "split")}, values["tune"]["space"]]
    )
    if found.user_attrs.setdefault("settings", of) != of:
        raise UsageError(
            f"study {name} was started with other settings", "Start another one: --study NAME"
        )
    found.set_user_attr("settings", of)
    return found


def _train(
    project: Project, settings: config.Config, run: str, trial: Any, progress: ProgressCallback
) -> float | None:
    """Train the run of a trial; its best mAP@5, or None if it was stopped early or diverged."""
    pruned = False

    def should_stop(epoch: int, metric: float | None) -> bool:
        nonlocal pruned
        if metric is None:
            raise GeomatchError(
                "a search needs validation tiles, but there are none", "See: geomatch info"
            )
        trial.report(metric, epoch)
        pruned = trial.should_prune()
        return pruned

    try:
        trained = train(
            project, settings, run=run, should_stop=should_stop, reference=False, progress=progress
        )
    except DivergedError as error:
        progress(f"run {run}: {error.message}")
        return None
    finally:
        # Compiled programs have hundreds of memory maps each; a process on Linux has 65,530.
        jax.clear_caches()
    return None if pruned else trained.map5


def short(value: Any) -> str:
    """A value of a trial as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _best(study: Any) -> str | None:
    """The run of the best completed trial; None if there is none."""
    if all(trial.state.name != "COMPLETE" for trial in study.get_trials()):
        return None
    run: str = study.best_trial.user_attrs["run"]
    return run


def _keep_the_best(project: Project, study: Any) -> None:
    """Remove the checkpoints, which are large, of all trials but the best."""
    best = _best(study)
    for trial in study.get_trials():
        run = trial.user_attrs.get("run", best)
        if run != best and trial.state.is_finished():
            shutil.rmtree(project.run(run) / "checkpoints", ignore_errors=True)


def _space(settings: config.Config) -> list[Parameter]:
    """The parameters in `tune.space`.

    Raises:
        UsageError: there are none, or one is not understood.
    """
    example = 'For example: "train.lr = 1e-5 .. 1e-3 log" or "model.descriptor = 64 | 128".'
    found: list[Parameter] = []
    for text in settings.tune.space:
        key, equals, rest = (part.strip() for part in text.partition("="))
        named = {parameter.key for parameter in found}
        if not equals or key.split(".")[0] not in setup.TABLES or key in named:
            raise UsageError(f"tune.space: {text!r}", example)
        ends = RANGE.fullmatch(rest)
        texts = ends.groups()[:2] if ends else [text.strip() for text in rest.split("|")]
        understood = [_understood(settings, key, text) for text in texts]
        if ends is None:
            found.append(Parameter(key, tuple(texts)))
            continue
        low, high, log = *understood, bool(ends[3])
        numbers = type(low) in (int, float)
        if not numbers or low >= high or (log and low <= 0):
            raise UsageError(f"tune.space: {text!r} is not a range", example)
        found.append(Parameter(key, (), low, high, log))
    if not found:
        raise UsageError("tune.space is empty", example)
    return found


def _understood(settings: config.Config, key: str, text: str) -> Any:
    """A value with the type that the configuration gives it: 1 may mean 1.0.

    Raises:
        UsageError: the key is unknown, or does not take this value.
    """
    changed = config.with_overrides(settings, [f"{key}={text}"])
    table, _, name = key.partition(".")
    return getattr(getattr(changed, table), name)

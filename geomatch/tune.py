"""Tune: a search over settings, each trial a run, by mAP@5 on validation.

Optuna keeps the study in SQLite and says what to try; runs that fall behind or diverge are broken
off. A trial that was killed goes on from its run's last checkpoint.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass
from typing import Any

from geomatch import config
from geomatch.errors import DivergedError, GeomatchError, UsageError
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project, fingerprint
from geomatch.train import check_name, train
from geomatch.training import setup

RANGE = re.compile(r"(\S+)\s*\.\.\s*(\S+?)(\s+log)?")


@dataclass(frozen=True)
class Parameter:
    """A setting that is searched: one of `values`, which are TOML, or from `low` to `high`."""

    key: str
    values: tuple[str, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False

    def suggest(self, trial: Any) -> Any:
        """The value that a trial is to take."""
        if self.values:
            return self.value(trial.suggest_categorical(self.key, self.values))
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.key, self.low, self.high, log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, log=self.log)

    def value(self, kept: Any) -> Any:
        """The value that Optuna keeps as `kept`."""
        return config.literal(kept) if self.values else kept


@dataclass(frozen=True)
class Trial:
    """One trial: what it was given, and how far it came ("complete", or "pruned")."""

    run: str
    state: str
    map5: float | None
    settings: dict[str, Any]


@dataclass(frozen=True)
class Tuned:
    """A study: its trials in order, and the run of the best one."""

    study: str
    best: str
    trials: tuple[Trial, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def tune(
    project: Project,
    settings: config.Config,
    *,
    study: str = "tune",
    progress: ProgressCallback = silent,
) -> Tuned:
    """Search `settings.tune.space`, or go on with a study.

    Trials are runs named after the study; only the best keeps its checkpoints, and is what later
    stages take by default.

    Raises:
        UsageError: the space is empty or wrong, or the study was begun with other settings.
        GeomatchError: Optuna is not installed, or no trial came to an end.
    """
    space = _space(settings)
    check_name(study)
    try:
        import optuna
    except ImportError as error:
        raise GeomatchError("the search needs Optuna", "pip install 'geomatch[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with project.lock(f"tune/{study}"):
        found = _open(optuna, project, settings, study)
        states = optuna.trial.TrialState
        for stale in found.get_trials(states=[states.RUNNING]):
            # Its process died: the same settings again, in the same run.
            found.tell(stale.number, state=states.FAIL)
            found.enqueue_trial(stale.params, user_attrs=stale.user_attrs)
        ended = (states.COMPLETE, states.PRUNED)
        while (done := len(found.get_trials(states=ended))) < settings.tune.trials:
            trial = found.ask()
            run = trial.user_attrs.get("run", f"{study}-{trial.number:03d}")
            trial.set_user_attr("run", run)
            chosen = {parameter.key: parameter.suggest(trial) for parameter in space}
            told = ", ".join(f"{key} = {short(value)}" for key, value in chosen.items())
            progress(f"trial {done + 1} of {settings.tune.trials}, run {run}: {told}")
            wanted = config.with_overrides(
                settings, [f"{key}={config.toml(value)}" for key, value in chosen.items()]
            )
            try:
                value = _train(project, wanted, run, trial, progress)
            except UsageError:
                # It would be refused again: no trial to go on with.
                found.tell(trial, state=states.FAIL)
                raise
            found.tell(trial, value, states.PRUNED if value is None else states.COMPLETE)
            _keep_the_best(project, found)
        best = _best(found)
        if best is None:
            raise GeomatchError(
                f"no trial of study {study} came to its end",
                "Search other values in tune.space, as another study: --study NAME",
            )
        # What was found last is what later stages take.
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


def _open(optuna: Any, project: Project, settings: config.Config, name: str) -> Any:
    """The study, begun with these settings."""
    folder = project.root / "tune"
    folder.mkdir(exist_ok=True)
    found = optuna.create_study(
        storage=f"sqlite:///{folder.absolute() / name}.db",
        study_name=name,
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
        load_if_exists=True,
    )
    # Not the same seed again, or a study that goes on would draw the same again.
    seed = settings.train.seed + len(found.get_trials())
    found.sampler = optuna.samplers.TPESampler(seed=seed)
    values = config.as_dict(settings)
    of = fingerprint(
        [{table: values[table] for table in (*setup.TABLES, "split")}, values["tune"]["space"]]
    )
    if found.user_attrs.setdefault("settings", of) != of:
        raise UsageError(
            f"study {name} was begun with other settings", "Start a new one: --study NAME"
        )
    found.set_user_attr("settings", of)
    return found


def _train(
    project: Project, settings: config.Config, run: str, trial: Any, progress: ProgressCallback
) -> float | None:
    """Train a trial's run; its best mAP@5, None where it was broken off or diverged."""
    pruned = False

    def should_stop(epoch: int, metric: float | None) -> bool:
        nonlocal pruned
        if metric is None:
            raise GeomatchError(
                "a search needs validation tiles, and there are none", "See: geomatch info"
            )
        trial.report(metric, epoch)
        pruned = trial.should_prune()
        return pruned

    try:
        trained = train(project, settings, run=run, should_stop=should_stop, progress=progress)
    except DivergedError as error:
        progress(f"run {run}: {error.message}")
        return None
    return None if pruned else trained.map5


def short(value: Any) -> str:
    """A value that is tried, as it is shown."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _best(study: Any) -> str | None:
    """The run of the best trial that came to its end."""
    if all(trial.state.name != "COMPLETE" for trial in study.get_trials()):
        return None
    run: str = study.best_trial.user_attrs["run"]
    return run


def _keep_the_best(project: Project, study: Any) -> None:
    """Drop the checkpoints of trials that others beat: they are large."""
    best = _best(study)
    for trial in study.get_trials():
        run = trial.user_attrs.get("run", best)
        if run != best and trial.state.is_finished():
            shutil.rmtree(project.run(run) / "checkpoints", ignore_errors=True)


def _space(settings: config.Config) -> list[Parameter]:
    """What is searched.

    Raises:
        UsageError: nothing is, or it is not understood.
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
            raise UsageError(f"tune.space: {text!r} is no range", example)
        found.append(Parameter(key, (), low, high, log))
    if not found:
        raise UsageError("tune.space is empty: there is nothing to search", example)
    return found


def _understood(settings: config.Config, key: str, text: str) -> Any:
    """A value as the configuration has it: 1 may be meant as 1.0.

    Raises:
        UsageError: there is no such key, or it takes no such value.
    """
    changed = config.with_overrides(settings, [f"{key}={text}"])
    table, _, name = key.partition(".")
    return getattr(getattr(changed, table), name)

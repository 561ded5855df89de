"""Searches over settings: what is tried, broken off, gone on with, kept and refused."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import optuna
import pytest
from command_line import run_command
from small_project import QUICK, SPLIT, make_project, settings
from small_runs import SMALL_NETWORK, BrokenOffError, Notes, break_at

from geomatch import config
from geomatch import train as training
from geomatch import tune as module
from geomatch.errors import DivergedError, GeomatchError, UsageError
from geomatch.project import Project
from geomatch.runs import load_encoder, read_run
from geomatch.train import Trained
from geomatch.tune import tune

SPACE = ("train.lr = 1e-4 .. 1e-2 log", "model.descriptor = 4 | 8")
FORM = (*SMALL_NETWORK, "train.epochs=2", "mining.rule=none")


def searching(*overrides, space=SPACE, trials=3):
    return settings(*FORM, f"tune.space={config.toml(space)}", f"tune.trials={trials}", *overrides)


def state_of(project, run):
    """What the folder of a run has: its metrics, its checkpoints, and whether it ended."""
    folder = project.run(run)
    names = ("metrics.jsonl", "checkpoints", "finished.json")
    return tuple((folder / name).exists() for name in names)


@pytest.fixture(scope="module")
def searched(tiled, tmp_path_factory):
    """A project with a search of three trials, and its result."""
    project = make_project(tmp_path_factory.mktemp("searched"), tiled.imagery)
    return project, tune(project, searching())


# What is tried


def choices(*space, **overrides):
    return module._space(searching(*overrides.values(), space=space))


def test_values_and_ranges_are_read():
    found = choices(
        "train.lr=1e-5..1e-3 log",
        "model.dropout = 0 .. 1",
        "model.descriptor = 8 .. 64",
        'train.optimizer = adam | "sgd"',
        "model.hidden = [8] | [16, 8]",
        "train.squared = true|false",
        "train.margin = 0.5",
    )
    ranges = [(c.low, c.high, type(c.low), c.log) for c in found[:3]]
    # What a number of ones can be is left to the setting: a share, or a count.
    assert ranges == [(1e-5, 1e-3, float, True), (0, 1, float, False), (8, 64, int, False)]
    assert [tuple(map(c.value, c.values)) for c in found[3:]] == [
        ("adam", "sgd"),
        ([8], [16, 8]),
        (True, False),
        (0.5,),
    ]
    assert [c.key for c in found] == [
        "train.lr",
        "model.dropout",
        "model.descriptor",
        "train.optimizer",
        "model.hidden",
        "train.squared",
        "train.margin",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.lr", "tune.space: 'train.lr'"),
        ("grid.size = 32 | 64", "tune.space: 'grid.size = 32 | 64'"),
        ("embed.dtype = int8", "tune.space"),
        ("train.lr = 1e-3 .. 1e-5 log", "is not a range"),
        ("train.lr = 0 .. 1 log", "is not a range"),
        ("train.loss = bce .. triplet", "is not a range"),
        ("train.squared = true .. false", "is not a range"),
        ("train.lr = low .. high", "train.lr = 'low'"),
        ("train.batch = 2 .. 4.5", "train.batch = 4.5"),
        ("model.descriptor = 64 | big", "model.descriptor = 'big'"),
        ("train.lr = -1 .. 1", "train.lr = -1"),
        ("train.rate = 1 .. 2", "train.rate"),
        ("train = 1 .. 2", "table.key"),
        ("mining.k = 2 | 5", "mining.k = 2 | 5"),  # it is there already
    ],
)
def test_what_cannot_be_tried_is_refused_before_anything_is(tiled, text, words):
    with pytest.raises(UsageError) as refused:
        tune(tiled.project, searching(space=("mining.k = 2 | 3", text)))
    assert words in refused.value.message
    assert not (tiled.root / "tune").exists()


def test_an_empty_space_is_reported_with_an_example(tiled):
    with pytest.raises(UsageError, match=r"tune\.space is empty") as refused:
        tune(tiled.project, searching(space=()))
    assert "1e-5 .. 1e-3 log" in refused.value.hint


def test_a_search_has_a_plain_name(tiled):
    with pytest.raises(UsageError, match="name"):
        tune(tiled.project, searching(), study="../elsewhere")
    assert not (tiled.root / "tune").exists()


def test_without_optuna_the_error_says_how_to_install_it(tiled, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(GeomatchError, match="Optuna") as failed:
        tune(tiled.project, searching())
    assert failed.value.hint == "pip install 'geomatch[tune]'"


# What comes of it


def test_every_trial_is_a_run_of_its_settings(searched):
    project, found = searched
    assert (found.study, len(found.trials)) == ("tune", 3)
    assert [trial.run for trial in found.trials] == ["tune-000", "tune-001", "tune-002"]
    for trial in found.trials:
        wanted, _, _ = read_run(project.run(trial.run))
        assert trial.settings.keys() == {"train.lr", "model.descriptor"}
        assert trial.settings["train.lr"] == wanted.train.lr
        assert 1e-4 <= wanted.train.lr <= 1e-2
        assert trial.settings["model.descriptor"] == wanted.model.descriptor
        assert wanted.model.descriptor in (4, 8)
        assert wanted.train.epochs == 2
        assert trial.state == "complete"
        lines = (project.run(trial.run) / "metrics.jsonl").read_text().splitlines()
        assert trial.map5 == max(json.loads(line).get("validation/map@5", 0) for line in lines)
    assert len({trial.settings["train.lr"] for trial in found.trials}) == 3


def test_the_best_alone_keeps_its_checkpoints_and_is_what_comes_next(searched):
    project, found = searched
    best = max(found.trials, key=lambda trial: trial.map5)
    assert next(t for t in found.trials if t.run == found.best).map5 == best.map5
    for trial in found.trials:
        assert state_of(project, trial.run) == (True, trial.run == found.best, True)
    assert project.run_names()[-1] == found.best
    assert load_encoder(project, None, None).name.startswith(f"{found.best}@")


def test_a_search_that_ended_is_not_repeated(searched, monkeypatch):
    project, found = searched
    monkeypatch.setattr(module, "train", None)
    assert tune(project, searching()) == found
    assert tune(project, searching(trials=2)) == found


@pytest.mark.parametrize(
    "changed",
    [
        searching("train.epochs=3"),
        searching("mining.k=3"),
        searching(space=SPACE[:1]),
        searching('split.years=["2010", "2020"]'),
    ],
)
def test_a_search_of_other_settings_is_refused(searched, changed):
    project, found = searched
    with pytest.raises(UsageError, match="study tune was started with other settings") as refused:
        tune(project, changed)
    assert "--study" in refused.value.hint
    assert tune(project, searching()) == found


@pytest.mark.slow
def test_a_search_that_was_broken_off_resumes_with_its_trial(tiled, copied, monkeypatch):
    project, wanted = copied(tiled), searching()
    real, runs = training.train, []

    def train(*arguments, **options):
        runs.append(options["run"])
        return real(*arguments, **options)

    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(training, "LOG_STEPS", 2)

    def breaks(*arguments, **options):
        runs.append(options["run"])
        if len(runs) < 2:
            return real(*arguments, **options)
        with monkeypatch.context() as patch:
            break_at(patch, 9)
            return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", breaks)
        with pytest.raises(BrokenOffError):
            tune(project, wanted)
    assert runs == ["tune-000", "tune-001"]
    before, _, manifest = read_run(project.run("tune-001"))
    assert state_of(project, "tune-001") == (True, True, False)
    notes = Notes()
    found = tune(project, wanted, progress=notes)
    # The same run, with the same settings, from where it was.
    assert runs[2] == "tune-001"
    assert "run tune-001: resuming from step 8 of 12" in notes
    after, _, same = read_run(project.run("tune-001"))
    assert (after, same.id) == (before, manifest.id)
    assert [trial.run for trial in found.trials] == runs[:2] + runs[3:]
    assert len(found.trials) == len(set(runs)) == 3
    assert [trial.state for trial in found.trials] == ["complete"] * 3
    rates = [trial.settings["train.lr"] for trial in found.trials]
    assert rates[1] == before.train.lr
    # What is drawn after the break is not what was drawn first.
    assert len(set(rates)) == 3
    kept = [trial.run for trial in found.trials if state_of(project, trial.run)[1]]
    assert kept == [found.best]


def test_a_search_continues_with_more_trials(searched, copied, tmp_path):
    project, found = searched
    names = project.run_names()
    more = tune(project, searching(trials=4))
    assert more.trials[:3] == found.trials
    assert len(more.trials) == 4
    assert set(project.run_names()) == {*names, "tune-003"}
    assert len({trial.settings["train.lr"] for trial in more.trials}) == 4
    kept = [trial.run for trial in more.trials if state_of(project, trial.run)[1]]
    assert kept == [more.best]


@pytest.mark.slow
def test_a_trial_that_falls_behind_is_stopped(tiled, copied, monkeypatch):
    project, real = copied(tiled), optuna.Trial.should_prune

    def should_prune(trial):
        return trial.number == 1 and trial.storage.get_trial(trial._trial_id).last_step == 1

    monkeypatch.setattr(optuna.Trial, "should_prune", should_prune)
    found = tune(project, searching())
    assert [trial.state for trial in found.trials] == ["complete", "pruned", "complete"]
    pruned = found.trials[1]
    lines = (project.run(pruned.run) / "metrics.jsonl").read_text().splitlines()
    scores = [json.loads(line) for line in lines]
    scores = [line["validation/map@5"] for line in scores if "validation/map@5" in line]
    # Its last round, after the first of two epochs.
    assert len(scores) == 2
    assert pruned.map5 == scores[1]
    assert state_of(project, pruned.run) == (True, False, False)
    assert found.best != pruned.run
    monkeypatch.setattr(optuna.Trial, "should_prune", real)
    assert tune(project, searching()) == found


# Searches whose training is made up


@pytest.fixture
def scripted(tiled, copied, monkeypatch):
    """A project, and a function that says which scores trials will have, round by round."""
    project, told = copied(tiled), []

    def script(*trials):
        left = iter(trials)

        def train(project, settings, *, run, should_stop, reference, progress):
            (project.run(run) / "checkpoints").mkdir(parents=True)
            (project.run(run) / "config.json").write_text("{}")
            scores, seen = next(left), []
            for epoch, score in enumerate(scores):
                if isinstance(score, Exception):
                    raise score
                seen.append(score)
                told.append((run, epoch))
                # The last round is the run's own end.
                if epoch + 1 < len(scores) and should_stop(epoch, score):
                    break
            return Trained(run, 0, max(seen))

        monkeypatch.setattr(module, "train", train)
        return told

    return project, script


def test_trials_worse_than_most_are_stopped(scripted):
    project, script = scripted
    good, bad = [0.1, 0.5, 0.6, 0.7], [0.1, 0.2, 0.9, 0.9]
    told = script(good, good, good, bad, bad, [0.05, 0.55, 0.62, 0.8])
    found = tune(project, searching(trials=6))
    # The first four are all seen to their end; nobody is judged before learning anything.
    assert [trial.state for trial in found.trials] == ["complete"] * 4 + ["pruned", "complete"]
    assert [epoch for run, epoch in told if run == "tune-004"] == [0, 1]
    assert found.trials[4].map5 == 0.2
    assert (found.best, found.trials[3].map5) == ("tune-003", 0.9)


def test_a_search_outlives_a_trial_that_diverges(scripted):
    project, script = scripted
    script([0.1, DivergedError("the loss became nan near step 4")], [0.1, 0.3], [0.1, 0.2])
    notes = Notes()
    found = tune(project, searching(), progress=notes)
    assert [trial.state for trial in found.trials] == ["pruned", "complete", "complete"]
    assert found.best == "tune-001"
    assert "run tune-000: the loss became nan near step 4" in notes
    kept = [trial.run for trial in found.trials if state_of(project, trial.run)[1]]
    assert kept == ["tune-001"]


def test_a_search_without_a_finished_trial_says_so(scripted):
    project, script = scripted
    diverged = DivergedError("the loss became inf near step 4")
    script([diverged], [diverged])
    for _ in range(2):
        with pytest.raises(GeomatchError, match="no trial of study tune was completed") as failed:
            tune(project, searching(trials=2))
        assert "tune.space" in failed.value.hint


@pytest.mark.slow
def test_a_run_of_far_too_high_a_rate_is_such_a_trial(tiled, copied):
    project = copied(tiled)
    with pytest.raises(GeomatchError, match="no trial"):
        tune(project, searching(space=("train.lr = 1e30 | 1e32",), trials=2))
    assert set(project.run_names()) == {"tune-000", "tune-001"}


def test_a_search_without_validation_tiles_is_refused(scripted):
    project, script = scripted
    script([None, None])
    with pytest.raises(GeomatchError, match="needs validation tiles"):
        tune(project, searching())


def test_another_failure_is_reported_and_its_trial_tried_again(scripted):
    project, script = scripted
    script([0.1, 0.3], [0.1, GeomatchError("the disk is full")])
    with pytest.raises(GeomatchError, match="disk"):
        tune(project, searching(trials=2))
    (project.run("tune-001") / "checkpoints").rmdir()
    script([0.1, 0.4])
    found = tune(project, searching(trials=2))
    assert [(trial.run, trial.map5) for trial in found.trials] == [
        ("tune-000", 0.3),
        ("tune-001", 0.4),
    ]
    assert found.best == "tune-001"


def test_a_search_goes_on_after_a_break_before_its_trial_had_a_run(scripted, monkeypatch):
    project, script = scripted
    script([0.1, 0.3], [0.1, 0.4])

    def fail(*arguments):
        raise BrokenOffError

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Trial, "set_user_attr", fail)
        with pytest.raises(BrokenOffError):
            tune(project, searching(trials=2))
    found = tune(project, searching(trials=2))
    assert [trial.map5 for trial in found.trials] == [0.3, 0.4]


@pytest.mark.filterwarnings("error")
def test_settings_of_several_values_are_tried(scripted):
    project, script = scripted
    script(*[[0.1, 0.2]] * 6)
    space = ("model.hidden = [8] | [16, 8]", "train.optimizer = adam | sgd", "model.dropout=0..1")
    found = tune(project, searching(space=space, trials=3))
    again = tune(project, searching(space=space, trials=6))
    assert again.trials[:3] == found.trials
    tried = [trial.settings for trial in again.trials]
    assert {tuple(chosen["model.hidden"]) for chosen in tried} == {(8,), (16, 8)}
    assert {chosen["train.optimizer"] for chosen in tried} == {"adam", "sgd"}
    assert all(0 < chosen["model.dropout"] < 1 for chosen in tried)


@pytest.mark.skipif(sys.platform != "linux", reason="of /proc")
def test_a_search_closes_its_file(scripted):
    project, script = scripted
    script([0.1, 0.2], [GeomatchError("the disk is full")])
    study = project.root / "tune" / "tune.db"
    opened = []

    def progress(text):
        opened.append(is_open(study))

    tune(project, searching(trials=1), progress=progress)
    assert opened == [True]
    assert not is_open(study)
    with pytest.raises(GeomatchError, match="disk"):
        tune(project, searching(trials=2))
    assert not is_open(study)


def is_open(path):
    """Whether this process has the file open."""
    files = (Path("/proc/self/fd") / number for number in os.listdir("/proc/self/fd"))
    return any(os.path.realpath(file) == str(path.resolve()) for file in files)


def test_two_searches_are_apart(scripted):
    project, script = scripted
    script(*[[0.1, 0.2]] * 4)
    tune(project, searching(trials=2))
    other = tune(project, searching("train.seed=5", trials=2), study="wide")
    assert [trial.run for trial in other.trials] == ["wide-000", "wide-001"]
    with project.lock("tune/wide"), pytest.raises(GeomatchError, match="another geomatch"):
        tune(project, searching("train.seed=5", trials=2), study="wide")


# The command line


def command(project, *arguments):
    chosen = [f"--set={text}" for text in (*QUICK, *SPLIT, *FORM)]
    chosen += [f"--set=tune.space={config.toml(SPACE)}", "--set=tune.trials=2"]
    done = run_command("tune", "-p", str(project.root), *chosen, *arguments)
    return done.exit_code, done.stdout, done.stderr


def test_the_command_shows_trials_and_names_the_best(searched):
    project, _ = searched
    found = tune(project, searching(trials=2))
    code, stdout, stderr = command(project, "-q")
    assert code == 0, stderr
    for trial in found.trials:
        line = next(line for line in stdout.splitlines() if trial.run in line)
        shown = (f"{trial.map5:.3f}", f"{trial.settings['train.lr']:.4g}", trial.state)
        assert all(text in line.split() for text in shown)
    assert all(key in stdout for key in ("train.lr", "model.descriptor", "mAP@5"))
    best = max(trial.map5 for trial in found.trials)
    assert stderr.splitlines() == [
        f"best: {found.best} (validation mAP@5 {best:.3f}). Next: geomatch embed --run {found.best}"
    ]
    code, stdout, _ = command(project, "-q", "--json")
    assert code == 0
    assert json.loads(stdout) == json.loads(json.dumps(found.as_json()))


def test_the_command_tells_what_it_tries_and_takes_another_name(scripted):
    project, script = scripted
    script([0.1, 0.2], [0.1, 0.3])
    code, stdout, stderr = command(project, "--study", "wide")
    assert code == 0, stderr
    assert "trial 1 of 2, run wide-000: train.lr = " in stderr
    assert "geomatch embed --run wide-001" in stderr
    assert "wide-001" in stdout


def test_the_command_without_a_space_is_wrong_use(tiled):
    done = run_command("tune", "-p", str(tiled.root))
    assert done.exit_code == 2
    assert done.stdout == ""
    error, hint = done.stderr.splitlines()
    assert "tune.space is empty" in error
    assert "train.lr" in hint
    assert Project(tiled.root).run_names() == []

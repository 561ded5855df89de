"""Training: runs that fall, stop, go on, and are refused."""

from __future__ import annotations

import itertools
import json
import math
import signal
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image
from processes import finish, python
from small_project import QUICK, make_project, metrics, retile, settings, write_imagery
from small_runs import (
    SMALL_NETWORK,
    BrokenOffError,
    Notes,
    assert_same_run,
    break_at,
    last_state,
    script_validation,
)

from geomatch import config
from geomatch import train as module
from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import DivergedError, GeomatchError, UsageError
from geomatch.manifests import Channels
from geomatch.nn.checkpoint import Checkpoints
from geomatch.project import Project
from geomatch.runs import load_encoder, read_run
from geomatch.tile import tile
from geomatch.train import train
from geomatch.training import rounds, setup
from geomatch.training.feed import BatchFeed
from geomatch.training.metrics_log import MetricsLog
from geomatch.training.mining import Mined
from geomatch.training.monitor import Monitor
from geomatch.training.sampler import Sampler
from geomatch.training.setup import resolve_settings

STEPS = 6
"""Steps of an epoch: 24 training places, 4 anchors a batch."""


# What a run is


def test_the_loss_falls_and_places_are_found(trained):
    losses = [line["train/loss"] for line in trained.metrics if "train/loss" in line]
    assert len(losses) == 3
    assert losses[-1] < 0.9 * losses[0]
    scores = [line["validation/map@5"] for line in trained.metrics if "validation/map@5" in line]
    assert len(scores) == 4
    assert scores[-1] > scores[0]
    assert trained.trained.map5 == max(scores)
    assert trained.trained.best in {line["step"] for line in trained.metrics}


def test_a_run_leaves_its_settings_metrics_and_hard_pairs(trained):
    folder = trained.project.run("run1")
    wanted, form, manifest = read_run(folder)
    begun = resolve_settings(settings(), trained.project.root)
    assert (wanted.model, wanted.train) == (begun.model, begun.train)
    assert (wanted.train.dtype, wanted.model.stage) == ("float32", 4)
    assert (form.size, form.image_channels, form.label_channels) == (32, 3, 0)
    assert manifest.tiles == trained.project.tile_manifest().fingerprint
    assert sorted(f.name for f in (folder / "mining").iterdir()) == [
        "00000006.parquet",
        "00000012.parquet",
    ]
    assert list((folder / "events").iterdir())
    lines = metrics(trained.project, timed=True)
    assert all(line["train/images_per_s"] > 0 for line in lines if "train/loss" in line)
    mined = [line for line in lines if "train/hard_share" in line]
    assert [line["step"] for line in mined] == [6, 12]
    for line in mined:
        hard = Mined.load(folder / "mining" / f"{line['step']:08d}.parquet")
        # The newer year is asked for in the older: 24 places.
        assert hard.examined == 24
        assert hard.share == line["train/hard_share"]


def test_hard_pairs_are_training_tiles_and_truly_wrong(trained):
    tiles = trained.tiles.select(trained.tiles.split == SPLITS.index("train"))
    files = sorted((trained.project.run("run1") / "mining").iterdir())
    found = Mined.load(files[0])
    assert len(found.query)
    for query, match, negatives in zip(found.query, found.match, found.negatives, strict=True):
        assert tiles.cells()[query] == tiles.cells()[match]
        assert (tiles.year[query], tiles.year[match]) == (1, 0)
        wrong = negatives[negatives >= 0]
        assert len(wrong)
        assert (tiles.year[wrong] == 0).all()
        assert match not in wrong


def test_no_test_tile_is_read_and_no_validation_tile_learnt_from(tiled, copied, monkeypatch):
    project, asked, real = copied(tiled), [], TileStore.read

    def read(store, rows):
        asked.append(np.asarray(rows))
        return real(store, rows)

    monkeypatch.setattr(TileStore, "read", read)
    train(project, settings("train.epochs=2"))
    split_of = np.empty(len(tiled.tiles), int)
    split_of[tiled.tiles.store_row] = tiled.tiles.split
    kinds = [set(split_of[rows].tolist()) for rows in asked]
    training, validation = ({SPLITS.index(name)} for name in ("train", "validation"))
    # Rounds at steps 0, 6 and 12 look at validation tiles alone, each of them once.
    assert all(kind in (training, validation) for kind in kinds)
    seen = np.concatenate([r for r, k in zip(asked, kinds, strict=True) if k == validation])
    count = np.unique(seen, return_counts=True)[1]
    assert count.tolist() == [3] * int((tiled.tiles.split == 1).sum())
    assert training in kinds


def test_test_tiles_are_measured_on_request_and_never_learnt_from(tmp_path, monkeypatch):
    """Other test imagery changes the metrics of the test split and nothing else."""
    wanted = settings(*SMALL_NETWORK, "train.epochs=2", 'eval.during=["test", "train"]')
    learnt, real = [], module.Sampler

    def sampler(tiles, *arguments):
        learnt.append(tiles)
        return real(tiles, *arguments)

    monkeypatch.setattr(module, "Sampler", sampler)
    projects = []
    for i in range(2):
        imagery = tmp_path / f"imagery{i}"
        write_imagery(imagery)
        if i:
            write_imagery(tmp_path / "other", seed=1)
            for year in (2010, 2020):
                (tmp_path / "other" / f"test_{year}.tif").replace(imagery / f"test_{year}.tif")
        projects.append(make_project(tmp_path / f"project{i}", imagery))
        train(projects[-1], wanted)
    assert all((tiles.split == SPLITS.index("train")).all() for tiles in learnt)
    lines = [metrics(project) for project in projects]
    scores = [[line.pop("test/map@5", None) for line in each] for each in lines]
    assert scores[0] != scores[1]
    assert lines[0] == lines[1]
    told = [line["step"] for line in metrics(projects[0]) if "test/map@5" in line]
    assert told == [0, 6, 12]
    # Training tiles are measured at every round, too, and told once.
    assert [line["step"] for line in lines[0] if "train/map@5" in line] == [0, 6, 12]
    states = [last_state(project)[1] for project in projects]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(a, b)
    files = [sorted((project.run("run1") / "mining").iterdir()) for project in projects]
    assert len(files[0]) == 1
    assert files[0][0].read_bytes() == files[1][0].read_bytes()


def test_the_rate_that_is_logged_follows_its_schedule(tiled, copied, monkeypatch):
    monkeypatch.setattr(module, "LOG_STEPS", 1)
    project = copied(tiled)
    form = ("train.schedule=cosine", "train.warmup=0.5", "train.lr=0.01", "mining.rule=none")
    train(project, settings(*SMALL_NETWORK, *form, "train.epochs=2"))
    rates = {line["step"]: line["train/lr"] for line in metrics(project) if "train/lr" in line}
    wanted = {}
    for done in range(12):
        if done < 3:
            wanted[done + 1] = 0.01 * done / 3
        else:
            wanted[done + 1] = 0.01 * (1 + math.cos(math.pi * (done - 3) / 9)) / 2
    assert rates == pytest.approx(wanted, rel=1e-4)


def test_the_averaged_weights_are_what_is_kept_and_described_with(tiled, copied):
    project = copied(tiled)
    # All 24 places are one batch, and a step an epoch.
    form = (
        *SMALL_NETWORK,
        "train.batch=24",
        "train.ema=0.8",
        "mining.rule=none",
        "augment.flips=false",
    )
    train(project, settings(*form, "train.epochs=0"), run="fresh")
    before = last_state(project, "fresh")[1]
    result = train(project, settings(*form, "train.epochs=1"), run="once")
    step, after = last_state(project, "once")
    assert step == 1
    learning = {"params": after.params, "batch_stats": after.batch_stats}
    first = {"params": before.params, "batch_stats": before.batch_stats}
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), learning, first)
    assert max(jax.tree.leaves(moved)) > 1e-3
    # The average forgets its random beginning: at the first step 0.1 of it stays, not 0.8.
    wanted = jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, first, learning)
    encoding = load_encoder(project, "once@1", None)
    for found in (after.average, encoding.variables):
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        for mine, theirs in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    assert result.map5 == max(line.get("validation/map@5", 0) for line in metrics(project, "once"))


def test_weights_that_are_not_averaged_are_kept_as_they_are(trained):
    _, state = last_state(trained.project)
    assert state.average == {}
    encoding = load_encoder(trained.project, "run1@18", None)
    learning = {"params": state.params, "batch_stats": state.batch_stats}
    for mine, theirs in zip(*map(jax.tree.leaves, (encoding.variables, learning)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_frames_of_a_run_are_drawn_and_put_together(tiled, copied):
    project = copied(tiled)
    form = ("train.epochs=2", "mining.rule=none", "train.frames=test")
    train(project, settings(*SMALL_NETWORK, *form))
    folder = project.run("run1") / "figures"
    names = [f"{step:08d}.png" for step in (0, 6, 12)]
    assert sorted(f.name for f in folder.iterdir()) == [*names, "embedding.gif"]
    pictures = [np.asarray(Image.open(folder / name)) for name in names]
    assert not np.array_equal(pictures[0], pictures[2])
    with Image.open(folder / "embedding.gif") as animation:
        assert animation.n_frames == 3


def test_a_run_without_frames_draws_none(trained):
    assert not (trained.project.run("run1") / "figures").exists()


# Against no training


def test_training_never_loses_silently(tiled, copied, monkeypatch):
    project, notes = copied(tiled), Notes()
    wanted = settings(*SMALL_NETWORK, "train.epochs=2", "mining.rule=none", "mining.every=1")
    with monkeypatch.context() as patch:
        script_validation(patch, [0.5, 0.3, 0.4])
        result = train(project, wanted, progress=notes)
    assert (result.best, result.map5, result.untrained) == (0, 0.5, 0.5)
    assert any("did not beat the untrained network" in note for note in notes)
    assert load_encoder(project, None, None).step == 0


@pytest.mark.parametrize("init", ["", "imagenet"])
def test_weights_are_recommended_where_none_are_given(tiled, copied, init):
    notes = Notes()
    form = ("model.trunk=efficientnet_lite0", "model.stage=1", "model.head=pool")
    train(copied(tiled), settings(*form, "train.epochs=0", f"train.init={init}"), progress=notes)
    assert any("--preset pretrained" in note for note in notes) == (not init)


def test_imagenet_features_are_measured_once_to_compare_with(tmp_path, monkeypatch):
    write_imagery(tmp_path / "imagery", size=64)
    project = make_project(tmp_path / "p", tmp_path / "imagery", "grid.size=64")
    wanted = settings(*SMALL_NETWORK, "train.epochs=1", "mining.rule=none")
    notes, again = Notes(), Notes()
    with monkeypatch.context() as patch:
        script_validation(patch, [0.1, 0.2, 0.9])
        result = train(project, wanted, progress=notes)
        # The third that was measured: after both rounds of the run.
        assert (result.map5, result.imagenet) == (0.2, 0.9)
        assert train(project, wanted, progress=again) == result
    assert any("geomatch embed --model imagenet" in note for note in notes)
    assert "fitting the PCA" in notes
    assert "fitting the PCA" not in again
    assert train(project, wanted, reference=False).imagenet is None


# By the clock


def test_hours_decide_on_the_epochs_of_a_new_run(tiled, copied, monkeypatch):
    project, notes = copied(tiled), Notes()
    wanted = settings(*SMALL_NETWORK, "mining.rule=none", "train.epochs=3")
    real = module.measure

    def ten_seconds_an_epoch(*arguments):
        return replace(real(*arguments), first_step_s=6.0, seconds=6.0 + 3 * 10.0)

    monkeypatch.setattr(module, "measure", ten_seconds_an_epoch)
    train(project, wanted, run="a", hours=29 / 3600, progress=notes)
    assert read_run(project.run("a"))[0].train.epochs == 2
    assert any("2 epochs of about 10 s" in note for note in notes)
    monkeypatch.setattr(module, "measure", None)
    # A run that was begun keeps its length; a new one has an epoch at least.
    assert train(project, wanted, run="a", hours=7.0).run == "a"
    assert read_run(project.run("a"))[0].train.epochs == 2
    with pytest.raises(UsageError, match="--hours 0"):
        train(project, wanted, run="b", hours=0.0)
    assert project.run_names() == ["a"]


# Stopping early


def test_a_run_that_no_longer_gains_stops_and_keeps_its_best(tiled, copied, monkeypatch):
    project, notes = copied(tiled), Notes()
    wanted = settings(*SMALL_NETWORK, "train.epochs=50", "train.patience=2", "mining.rule=none")
    with monkeypatch.context() as patch:
        script_validation(patch, [0.1, 0.3, 0.6, 0.5, 0.59, 0.9])
        result = train(project, wanted)
    # The second round after the best at step 12 is at step 24.
    assert (result.best, result.map5, result.untrained) == (12, 0.6, 0.1)
    assert not any("did not beat" in note for note in notes)
    assert last_state(project)[0] == 24
    assert (project.run("run1") / "finished.json").exists()
    with Checkpoints(project.run("run1") / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps == [12, 18, 24]
    assert load_encoder(project, None, None).step == 12
    before = (project.run("run1") / "metrics.jsonl").read_bytes()
    assert train(project, wanted, progress=notes) == result
    assert notes == ["run run1 is finished: 24 steps (4 epochs)"]
    assert (project.run("run1") / "metrics.jsonl").read_bytes() == before


def test_rounds_before_a_break_count_for_stopping(tiled, copied, monkeypatch):
    project = copied(tiled)
    wanted = settings(*SMALL_NETWORK, "train.epochs=50", "train.patience=2", "mining.rule=none")
    with monkeypatch.context() as patch:
        script_validation(patch, [0.6, 0.5])
        break_at(patch, 8)
        with pytest.raises(BrokenOffError):
            train(project, wanted)
    script_validation(monkeypatch, [0.4, 0.9])
    assert train(project, wanted).best == 0
    assert last_state(project)[0] == 12


def test_a_run_that_gains_now_and_then_goes_on(tiled, copied, monkeypatch):
    project = copied(tiled)
    script_validation(monkeypatch, [0.1, 0.05, 0.2, 0.15, 0.3])
    train(
        project, settings(*SMALL_NETWORK, "train.epochs=4", "train.patience=2", "mining.rule=none")
    )
    assert last_state(project)[0] == 24


def test_should_stop_is_called_each_round_and_may_end_the_run(tiled, copied):
    project, told = copied(tiled), []
    wanted = settings(*SMALL_NETWORK, "train.epochs=3", "mining.rule=none")

    def should_stop(epoch, metric):
        told.append((epoch, metric))
        return epoch == 1

    result = train(project, wanted, should_stop=should_stop)
    scores = [line["validation/map@5"] for line in metrics(project) if "validation/map@5" in line]
    assert told == [(0, scores[0]), (1, scores[1])]
    assert result.map5 == max(scores)
    assert not (project.run("run1") / "finished.json").exists()
    # Begun again it goes on from there; the last round is the run's own end.
    train(project, wanted, should_stop=should_stop)
    assert [epoch for epoch, _ in told] == [0, 1, 2]
    assert last_state(project)[0] == 18


def test_a_run_of_no_epochs_is_the_untrained_encoder(tiled, copied):
    project = copied(tiled)
    result = train(project, settings("train.epochs=0"))
    assert (result.run, result.best) == ("run1", 0)
    assert result.map5 == metrics(project)[0]["validation/map@5"]


def test_labels_are_trained_on(tmp_path, tiled):
    project = make_project(tmp_path / "labels", tiled.imagery, labels=True)
    assert project.tile_manifest().channels == Channels(3, 1)
    train(project, settings(*SMALL_NETWORK, "train.epochs=1", "mining.rule=none"))
    step, state = last_state(project)
    fusion = state.params["encoder"]["fusion"]["kernel"]
    assert fusion.shape == (4, 3)
    moved = np.abs(fusion - np.concatenate([np.eye(3), np.ones((1, 3))]) / 2)
    assert (moved[3] > 0).all()
    assert step == STEPS
    assert not (project.run("run1") / "mining").exists()


# Going on


@pytest.fixture(scope="module")
def often(tiled, tmp_path_factory):
    """A run that logs, and so may be saved, every second step; and the project it is in."""
    root = tmp_path_factory.mktemp("often")
    project = make_project(root, tiled.imagery)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LOG_STEPS", 2)
        train(project, settings(), run="whole")
    return project


@pytest.mark.parametrize("steps", [(3,), (6,), (5, 15)])
def test_a_broken_run_resumes_to_the_same_run(often, monkeypatch, steps):
    monkeypatch.setattr(module, "LOG_STEPS", 2)
    name = f"broken{steps[0]}"
    for step in steps:
        with monkeypatch.context() as patch:
            break_at(patch, step)
            with pytest.raises(BrokenOffError):
                train(often, settings(), run=name)
        assert not (often.run(name) / "finished.json").exists()
    saved = last_state(often, name)[0]
    assert saved == steps[-1] // 2 * 2
    notes = Notes()
    train(often, settings(), run=name, progress=notes)
    assert f"run {name}: resuming from step {saved} of 18" in notes
    assert (often.run(name) / "finished.json").exists()
    assert_same_run(often, name, often, "whole")


def test_a_run_broken_while_it_mines_resumes_to_the_same_run(often, monkeypatch):
    monkeypatch.setattr(module, "LOG_STEPS", 2)

    def fail(*arguments):
        raise BrokenOffError

    with monkeypatch.context() as patch:
        patch.setattr(rounds.mining, "hard_queries", fail)
        with pytest.raises(BrokenOffError):
            train(often, settings(), run="mining")
    # The round at step 6 was begun, and its validation told, but the round was not saved.
    assert metrics(often, "mining")[-1]["step"] == 6
    assert last_state(often, "mining")[0] == 4
    train(often, settings(), run="mining")
    assert_same_run(often, "mining", often, "whole")


def signal_at(patch, owner, name, call, number=signal.SIGTERM):
    """Send this process a signal at the given call of a function, counted from 1."""
    real, calls = getattr(owner, name), itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == call:
            signal.raise_signal(number)
        return real(*arguments)

    patch.setattr(owner, name, interrupted)


MOMENTS = {
    "the first validation": (rounds.Round, "map5", 1, 0),
    "a save": (Checkpoints, "save", 2, 2),
    "a step": (Monitor, "stepped", 3, 3),
    "reading": (BatchFeed, "batch", 4, 3),
    "mining": (rounds.mining, "hard_queries", 1, 6),
    "writing what was mined": (Mined, "save", 1, 6),
    "the last validation": (rounds.Round, "map5", 6, 18),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_run_is_saved_as_it_is_and_resumes_to_the_same_run(
    often, monkeypatch, moment
):
    """What was interrupted in a round does the round; losses that were not logged are not lost."""
    monkeypatch.setattr(module, "LOG_STEPS", 2)
    *where, step = MOMENTS[moment]
    name, notes = f"interrupted-{moment}".replace(" ", "-"), Notes()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        signal_at(patch, *where)
        with pytest.raises(KeyboardInterrupt):
            train(often, settings(), run=name, progress=notes)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert notes[-1] == f"run {name}: saved at step {step} of 18"
    assert last_state(often, name)[0] == step
    assert not (often.run(name) / "finished.json").exists()
    train(often, settings(), run=name, progress=notes)
    assert f"run {name}: resuming from step {step} of 18" in notes
    assert_same_run(often, name, often, "whole")


@pytest.fixture
def ctrl_c():
    """Ctrl-C works, also where the tests run in the background, whose processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c")
def test_a_run_may_be_interrupted_again_and_killed_in_the_same_round(often, monkeypatch):
    monkeypatch.setattr(module, "LOG_STEPS", 2)

    def fail(*arguments):
        raise BrokenOffError

    for _ in range(2):
        with monkeypatch.context() as patch:
            signal_at(patch, rounds.mining, "hard_queries", 1, signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                train(often, settings(), run="again")
        assert last_state(often, "again")[0] == 6
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", fail)
        with pytest.raises(BrokenOffError):
            train(often, settings(), run="again")
    train(often, settings(), run="again")
    assert_same_run(often, "again", often, "whole")


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_leaves_at_once_and_a_second_sigterm_does_not(often, monkeypatch, second):
    monkeypatch.setattr(module, "LOG_STEPS", 2)
    name = f"twice-{second.name}"
    with monkeypatch.context() as patch:
        signal_at(patch, Monitor, "stepped", 3, signal.SIGINT)
        signal_at(patch, Checkpoints, "save", 3, second)
        with pytest.raises(KeyboardInterrupt):
            train(often, settings(), run=name)
    assert last_state(often, name)[0] == (2 if second == signal.SIGINT else 3)
    train(often, settings(), run=name)
    assert_same_run(often, name, often, "whole")


RULES = {
    "ranked": (
        "train.loss=triplet",
        "train.schedule=cosine",
        "train.ema=0.9",
        "mining.rule=ranked",
        "mining.hardest=22",
        "mining.candidates=5",
        "mining.ramp=1.0",
    ),
    "neighbours": (
        "train.loss=infonce",
        "train.views=3",
        "train.optimizer=ranger",
        "train.warmup=0.5",
        "train.distil=0.5",
        "train.accumulate=2",
        "mining.rule=neighbours",
        "mining.k=3",
        "train.frames=validation",
    ),
    "in-batch": (
        "train.loss=triplet",
        "train.ema=0.5",
        "train.optimizer=sgd",
        "train.schedule=exponential",
        "mining.rule=in-batch",
        "mining.pick=batch-hard",
        "train.patience=9",
    ),
}


# The others are slow; "neighbours" is the default.
@pytest.mark.parametrize(
    "rule",
    [r if r == "neighbours" else pytest.param(r, marks=pytest.mark.slow) for r in RULES],
)
def test_a_broken_run_of_any_rule_resumes_to_the_same_run(tiled, copied, monkeypatch, rule):
    monkeypatch.setattr(module, "LOG_STEPS", 2)
    project, wanted = copied(tiled), settings(*SMALL_NETWORK, "train.epochs=2", *RULES[rule])
    train(project, wanted, run="whole")
    with monkeypatch.context() as patch:
        break_at(patch, 9)
        with pytest.raises(BrokenOffError):
            train(project, wanted, run="broken")
    assert last_state(project, "broken")[0] == 8
    train(project, wanted, run="broken")
    assert_same_run(project, "broken", project, "whole")
    mined = [int(file.stem) for file in sorted((project.run("whole") / "mining").glob("*"))]
    assert mined == ([] if rule == "in-batch" else [0, 6])
    shares = {
        line["step"]: line["train/hard_share"]
        for line in metrics(project, "whole")
        if "train/hard_share" in line
    }
    # In a batch triplets are hard or not at every step.
    assert list(shares) == (mined or [2, 4, 6, 8, 10, 12])
    # Before anything is learnt, neighbours on the ground are neither.
    assert [step for step, share in shares.items() if share is None] == (
        [0] if rule == "neighbours" else []
    )
    assert all(share is None or 0 <= share <= 1 for share in shares.values())
    assert len(list((project.run("whole") / "figures").glob("*.png"))) == (
        3 if rule == "neighbours" else 0
    )


ON_ONE_DEVICE = """
import sys
from pathlib import Path
import jax, pytest
from geomatch import train as module
from geomatch.project import Project
from small_project import settings
from small_runs import SMALL_NETWORK, BrokenOffError, break_at
assert jax.local_device_count() == 1
project = Project(Path(sys.argv[1]))
wanted = settings(*SMALL_NETWORK, "train.epochs=2", "train.lr=1e-4", "mining.rule=none")
module.LOG_STEPS = 2
module.train(project, wanted, run="whole")
with pytest.MonkeyPatch.context() as patch:
    break_at(patch, 9)
    with pytest.raises(BrokenOffError):
        module.train(project, wanted, run="broken")
module.train(project, wanted, run="broken")
module.train(project, wanted, run="on-two")
"""


def test_a_broken_run_resumes_on_one_device(tiled, copied, monkeypatch):
    """Bit for bit if it began there, and within rounding if it began on two."""
    project = copied(tiled)
    wanted = settings(*SMALL_NETWORK, "train.epochs=2", "train.lr=1e-4", "mining.rule=none")
    with monkeypatch.context() as patch:
        patch.setattr(module, "LOG_STEPS", 2)
        break_at(patch, 9)
        with pytest.raises(BrokenOffError):
            train(project, wanted, run="on-two")
    assert last_state(project, "on-two")[0] == 8
    finish(python("-c", ON_ONE_DEVICE, str(project.root), devices=1))
    assert last_state(project, "whole")[0] == 12
    assert_same_run(project, "broken", project, "whole")
    assert last_state(project, "on-two")[0] == 12
    losses = [
        [line["train/loss"] for line in metrics(project, run) if "train/loss" in line]
        for run in ("on-two", "whole")
    ]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(*losses, rtol=1e-4)


WAITING = """
import time
from geomatch.__main__ import main
from geomatch.training.feed import BatchFeed
real = BatchFeed.batch

def batch(self, step, mined):
    if step == 8:
        time.sleep(300)
    return real(self, step, mined)

BatchFeed.batch = batch
main()
"""
"""`geomatch`, waiting at step 8: on a busy machine, it would be done before a signal reaches it."""


def started(project, until):
    """A `geomatch train` that has logged what `until` says, which Ctrl-C reaches."""
    options = [f"--set={override}" for override in QUICK]
    process = python(
        *("-c", WAITING, "train", "-p", str(project.root), *options),
        # Where the tests run in the background, Ctrl-C is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    metrics = project.run("run1") / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and until in metrics.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


def test_a_killed_command_resumes_to_the_same_run(tiled, trained, copied):
    project = copied(tiled)
    process = started(project, '"step": 6')
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (project.run("run1") / "finished.json").exists()
    result = train(project, settings())
    assert result == trained.trained
    assert_same_run(project, "run1", trained.project, "run1")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_command_saves_says_so_and_resumes_to_the_same_run(
    tiled, trained, copied, number
):
    project = copied(tiled)
    process = started(project, '"step": 6')
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    saved = last_state(project)[0]
    assert err.splitlines()[-3:] == [
        f"run run1: saved at step {saved} of 18",
        "error: interrupted",
        "hint: Finished work is kept: run the same command again to continue.",
    ]
    assert 6 <= saved <= 8
    result = train(project, settings())
    assert result == trained.trained
    assert_same_run(project, "run1", trained.project, "run1")


def test_a_finished_run_says_so_and_changes_nothing(trained, copied):
    project, notes = copied(trained), Notes()
    before = (project.run("run1") / "metrics.jsonl").read_bytes()
    assert train(project, settings(), progress=notes) == trained.trained
    assert notes == ["run run1 is finished: 18 steps (3 epochs)"]
    assert (project.run("run1") / "metrics.jsonl").read_bytes() == before


def test_more_epochs_give_the_run_that_began_with_them(tiled, trained, copied):
    project, notes = copied(tiled), Notes()
    train(project, settings("train.epochs=2"))
    assert (project.run("run1") / "finished.json").exists()
    result = train(project, settings(), progress=notes)
    assert "run run1: resuming from step 12 of 18" in notes
    assert result == trained.trained
    assert_same_run(project, "run1", trained.project, "run1")
    assert read_run(project.run("run1"))[0].train.epochs == 3


def test_a_run_whose_last_checkpoint_is_damaged_resumes_from_the_one_before(tiled, trained, copied):
    project, notes = copied(tiled), Notes()
    train(project, settings("train.epochs=2"))
    folder = project.run("run1") / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"6", "12"}
    for path in (folder / "12" / "optimizer" / "d").iterdir():
        path.write_bytes(b"")
    assert train(project, settings(), progress=notes) == trained.trained
    assert "run run1: resuming from step 6 of 18" in notes
    assert any(note.startswith("checkpoint 12 of ") for note in notes)
    assert_same_run(project, "run1", trained.project, "run1")


# What is refused


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["train.lr=1e-3"], "train.lr"),
        (["train.epochs=2"], "train.epochs"),
        (["train.epochs=5", "mining.k=4", "model.trunk=resnet18"], "model.trunk, mining.k"),
        (["augment.flips=false", "train.seed=1"], "train.seed, augment.flips"),
        (["split.years=2010,2020"], "split.years"),
    ],
)
def test_another_configuration_is_refused_by_the_keys_that_changed(trained, overrides, keys):
    if overrides[0].startswith("split.years"):
        overrides = ['split.years=["2010", "2020"]']
    before = (trained.project.run("run1") / "config.json").read_bytes()
    with pytest.raises(UsageError) as refused:
        train(trained.project, settings(*overrides))
    assert refused.value.message == f"run run1 was begun with other settings: {keys}"
    assert refused.value.hint.endswith("geomatch train --run run2")
    assert (trained.project.run("run1") / "config.json").read_bytes() == before


def test_other_tiles_are_refused(trained, copied, tmp_path):
    project = copied(trained)
    write_imagery(tmp_path / "other", seed=1)
    retile(project, tmp_path / "other")
    with pytest.raises(UsageError, match="the tiles"):
        train(project, settings())


def test_a_second_writer_of_a_run_is_refused(trained):
    with trained.project.lock("runs/run1"), pytest.raises(GeomatchError, match="another geomatch"):
        train(trained.project, settings())
    train(trained.project, settings())


def test_a_writer_in_another_process_is_noticed_and_forgotten_when_killed(trained):
    script = (
        "import sys, time; from pathlib import Path; from geomatch.project import Project\n"
        "with Project(Path(sys.argv[1])).lock('runs/run1'):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    process = python("-c", script, str(trained.root))
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(GeomatchError, match="another geomatch is writing runs/run1"):
            train(trained.project, settings())
    finally:
        process.kill()
        process.communicate()
    train(trained.project, settings())


@pytest.mark.parametrize(("batch", "parts", "remedy"), [(3, 1, 4), (1, 1, 2), (8, 3, 12)])
def test_a_batch_that_devices_cannot_share_is_refused(tiled, copied, batch, parts, remedy):
    project = copied(tiled)
    with pytest.raises(UsageError, match="divisible by 2 devices") as refused:
        train(project, settings(f"train.batch={batch}", f"train.accumulate={parts}"))
    assert (f"train.accumulate = {parts}" in refused.value.message) == (parts > 1)
    assert refused.value.hint == f"--set train.batch={remedy}"


REFUSED = {
    "in-batch with bce": (
        ["mining.rule=in-batch", "train.loss=bce"],
        ("in-batch", "bce"),
        ("train.loss=triplet", "mining.rule=none"),
    ),
    "in-batch with infonce": (
        ["mining.rule=in-batch", "train.loss=infonce"],
        ("in-batch", "infonce"),
        ("train.loss=triplet",),
    ),
    "ranked with infonce": (
        ["mining.rule=ranked", "train.loss=infonce"],
        ("ranked", "infonce"),
        ("train.loss=triplet", "mining.rule=knn"),
    ),
    "ranked with multi-similarity": (
        ["mining.rule=ranked", "train.loss=multi-similarity"],
        ("ranked", "multi-similarity"),
        ("train.loss=triplet", "mining.rule=knn"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused_with_a_remedy(tiled, copied, case):
    overrides, words, remedies = REFUSED[case]
    project = copied(tiled)
    with pytest.raises(UsageError) as refused:
        train(project, settings(*overrides))
    assert all(f'"{word}"' in refused.value.message for word in words)
    assert all(f"--set {remedy}" in refused.value.hint for remedy in remedies)
    assert project.run_names() == []
    train(project, settings(*overrides, remedies[0], "train.epochs=0"))


def test_a_refused_new_run_can_be_started_again(tiled, copied):
    project = copied(tiled)
    with pytest.raises(UsageError, match="divisible"):
        train(project, settings("train.batch=3", "train.epochs=0"))
    assert train(project, settings("train.epochs=0")).best == 0


def test_a_nan_loss_ends_the_run_with_a_clear_error(tiled, copied, monkeypatch):
    project, real = copied(tiled), setup.initial_state

    def huge(*arguments):
        state = real(*arguments)
        state.params["pair_head"]["kernel"] = np.full_like(
            state.params["pair_head"]["kernel"], 1e38
        )
        return state

    monkeypatch.setattr(setup, "initial_state", huge)
    with pytest.raises(GeomatchError, match=r"the loss became (nan|inf)") as failed:
        train(project, settings())
    assert "train.lr" in failed.value.hint
    assert not (project.run("run1") / "finished.json").exists()
    assert all(np.isfinite(line.get("train/loss", 0)) for line in metrics(project))


def diverging(patch, step, values):
    """Make `values(state, metrics)` of one step what training gets of it."""
    real = module.make_step

    def make(*arguments):
        function = real(*arguments)

        def step_or_diverge(*inputs):
            result = function(*inputs)
            return values(*result) if inputs[-1] == step else result

        return step_or_diverge

    patch.setattr(module, "make_step", make)


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_what_diverged_is_named_with_its_step_tiles_and_last_good_checkpoint(
    often, monkeypatch, what
):
    """Step 9 is never logged or saved as such; the weights of step 10 would be."""
    monkeypatch.setattr(module, "LOG_STEPS", 2)
    number = 8 if what == "loss" else 9

    def values(state, metrics):
        if what == "loss":
            return state, metrics * np.nan
        return state._replace(params=jax.tree.map(lambda x: x * np.inf, state.params)), metrics

    run, drawn, real = f"diverged-{what}", {}, Sampler.draw

    def draw(self, step, mined):
        drawn[step] = real(self, step, mined)
        return drawn[step]

    with monkeypatch.context() as patch:
        diverging(patch, number, values)
        patch.setattr(Sampler, "draw", draw)
        with pytest.raises(DivergedError) as failed:
            train(often, settings(), run=run)
    tiles = TileTable.load(often.catalogue)
    ids = tiles.select(tiles.split == SPLITS.index("train")).ids()
    batch = [ids[row] for row in np.unique(drawn[number])]
    named = f"{batch[0]}, {batch[1]}, {batch[2]} and {len(batch) - 3} more"
    begin = {"loss": "the loss became nan", "weights": "weights became NaN or infinite"}[what]
    assert failed.value.message == (
        f"{begin} at step {number + 1}, with the tiles {named}; the last good checkpoint is 8"
    )
    assert last_state(often, run)[0] == 8
    assert metrics(often, run)[-1]["step"] == (8 if what == "loss" else 10)
    train(often, settings(), run=run)
    assert_same_run(often, run, often, "whole")


def test_weights_that_diverged_are_not_saved_when_interrupted(often, monkeypatch):
    monkeypatch.setattr(module, "LOG_STEPS", 2)
    with monkeypatch.context() as patch:
        diverging(patch, 2, lambda state, metrics: (state, metrics * np.nan))
        signal_at(patch, Monitor, "stepped", 3)
        with pytest.raises(DivergedError):
            train(often, settings(), run="diverged-interrupted")
    assert last_state(often, "diverged-interrupted")[0] == 2


def test_a_rate_far_too_high_is_never_taken_for_a_success(tiled, copied):
    project = copied(tiled)
    with pytest.raises(GeomatchError, match=r"the loss became (nan|inf)"):
        train(project, settings(*SMALL_NETWORK, "train.lr=1e30", "mining.rule=none"))
    text = (project.run("run1") / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


def test_train_before_tile_names_the_command(tmp_path):
    (tmp_path / "geomatch.toml").write_text("")
    with pytest.raises(GeomatchError) as failed:
        train(Project.open(tmp_path), settings())
    assert "geomatch tile" in failed.value.hint


@pytest.mark.parametrize(
    ("years", "error", "words"),
    [
        ('["2010"]', GeomatchError, "fewer than two training places"),
        ('["1999"]', UsageError, "no tiles of 1999"),
    ],
)
def test_years_that_cannot_be_trained_on_are_refused(tiled, copied, years, error, words):
    with pytest.raises(error, match=words):
        train(copied(tiled), settings(f"split.years={years}"))


# Class folders


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Six classes of a dozen images each, which are a pattern of their class and noise."""
    root, rng = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for name in "abcdef":
        pattern = rng.integers(60, 190, (4, 4, 3)).repeat(4, axis=0).repeat(4, axis=1)
        for i in range(12):
            pixels = np.clip(pattern + rng.normal(0, 45, pattern.shape), 0, 255).astype(np.uint8)
            path = root / "set" / name / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    (root / "geomatch.toml").write_text("")
    project, images = Project.open(root), config.ImagesConfig(folders=(str(root / "set"),))
    tile(project, config.Config(images=images), overrides=[], workers=1)
    return project


OF_CLASSES = {
    "knn": ("train.loss=bce", "mining.truth_within=3"),
    "ranked": ("train.loss=triplet", "mining.hardest=60", "mining.candidates=20"),
    "in-batch": ("train.loss=triplet", "train.views=3", "model.normalise=true"),
}


@pytest.mark.parametrize("rule", OF_CLASSES)
def test_class_folders_are_trained_on(classes, rule):
    form = (
        *SMALL_NETWORK,
        *OF_CLASSES[rule],
        f"mining.rule={rule}",
        "train.batch=6",
        "train.lr=5e-3",
    )
    result = train(classes, settings(*form, "train.epochs=3"), run=rule)
    lines = metrics(classes, rule)
    scores = [line["validation/map@5"] for line in lines if "validation/map@5" in line]
    assert len(scores) == 4
    assert result.map5 == max(scores) > scores[0]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert np.isfinite(losses).all()
    if rule != "ranked":
        # Of triplets that are ever the hardest, the loss need not fall; hard pairs join the batches
        # from the second epoch on.
        assert losses[-1] < losses[rule == "knn"]
    tiles = TileTable.load(classes.catalogue)
    tiles = tiles.select(tiles.split == SPLITS.index("train"))
    files = sorted((classes.run(rule) / "mining").glob("*"))
    per_epoch = 10 if rule == "ranked" else -(-len(tiles) // 6)
    steps = {"knn": [1, 2], "ranked": [0, 1, 2]}.get(rule, [])
    assert [int(file.stem) for file in files] == [step * per_epoch for step in steps]
    for file in files:
        found = Mined.load(file)
        assert len(found.query)
        label, negatives = tiles.label, found.negatives
        assert (found.query != found.match).all()
        np.testing.assert_array_equal(label[found.query], label[found.match])
        other = label[negatives] != label[found.query][:, None]
        assert (other | (negatives < 0)).all()
        assert (negatives[:, 0] >= 0).all()


def test_batches_of_class_folders_have_no_neighbours(classes):
    form, notes = ("train.loss=infonce", "train.epochs=1"), Notes()
    for run, rule in (("near", "neighbours"), ("any", "none")):
        wanted = settings(*SMALL_NETWORK, *form, f"mining.rule={rule}")
        train(classes, wanted, run=run, progress=notes)
    assert_same_run(classes, "near", classes, "any")
    assert sum("drawn at random" in note for note in notes) == 1


def test_classes_of_single_images_cannot_be_trained_on(tmp_path, classes):
    for name in "ab":
        path = tmp_path / "set" / name / "only.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(path)
    (tmp_path / "geomatch.toml").write_text("")
    project = Project.open(tmp_path)
    images = config.ImagesConfig(folders=(str(tmp_path / "set"),), least=1, validation=0, test=0)
    tile(project, config.Config(images=images), overrides=[], workers=1)
    with pytest.raises(GeomatchError, match="fewer than two classes") as refused:
        train(project, settings(*SMALL_NETWORK))
    assert "images.validation" in refused.value.hint


# The real network


@pytest.mark.slow
def test_the_real_network_trains(tmp_path):
    imagery = tmp_path / "imagery"
    write_imagery(imagery, size=64)
    project = make_project(tmp_path / "project", imagery, "grid.size=64")
    wanted = settings(
        "model.trunk=resnet50",
        "model.head=conv",
        "train.epochs=1",
        "train.batch=8",
        "train.lr=1e-4",
        "mining.every=5",
    )
    result = train(project, wanted)
    losses = [line["train/loss"] for line in metrics(project) if "train/loss" in line]
    assert len(losses) == 1
    assert np.isfinite(losses).all()
    step, state = last_state(project)
    assert (step, result.run) == (3, "run1")
    leaves = jax.tree.leaves(state.params)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert state.params["encoder"]["head"]["Dense_0"]["kernel"].shape == (2 * 2 * 512, 128)
    assert (project.run("run1") / "finished.json").exists()


def test_a_line_cut_short_by_a_kill_does_not_hinder_resuming(trained, copied):
    project = copied(trained)
    (name,) = project.run_names()
    path = project.run(name) / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 9')
    epochs = read_run(project.run(name))[0].train.epochs
    train(project, settings(f"train.epochs={epochs + 1}"))
    assert path.read_text().startswith(whole)
    assert all(json.loads(line)["step"] >= 0 for line in path.read_text().splitlines())

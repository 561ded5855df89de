"""Training: runs that fall, stop, go on, and are refused."""

from __future__ import annotations

import json
import signal
import time

import jax
import numpy as np
import pytest
from small_project import (
    QUICK,
    figures,
    finish,
    make_project,
    python,
    retile,
    settings,
    write_imagery,
)

from geomatch import begin
from geomatch import train as module
from geomatch.begin import settle
from geomatch.data.mining import HardPairs
from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS
from geomatch.errors import GeomatchError, UsageError
from geomatch.nn.checkpoint import Checkpoints
from geomatch.nn.step import abstract_state, build
from geomatch.project import Project
from geomatch.runs import read_run
from geomatch.train import train

pytest_plugins = ["small_fixtures"]

STEPS = 6
"""Steps of an epoch: 24 training places, 4 anchors a batch."""


class BrokenOffError(Exception):
    """What ends a run from within."""


class Notes(list):
    """A reporter that keeps what it is told."""

    def __call__(self, task, done=0, total=0, detail=""):
        self.append(task)


def last_state(project, run="run1"):
    """The whole state of a run's newest checkpoint, and its step."""
    wanted, form, _ = read_run(project.run(run))
    with Checkpoints(project.run(run) / "checkpoints", read_only=True) as checkpoints:
        like = abstract_state(build(wanted, form), wanted, form)
        return checkpoints.last, checkpoints.restore(checkpoints.last, like)


def assert_same_run(project, run, other_project, other):
    """Runs that ended alike, bit for bit, and tell of the same on the way."""
    assert figures(project, run) == figures(other_project, other)
    (step, state), (other_step, other_state) = (
        last_state(project, run),
        last_state(other_project, other),
    )
    assert step == other_step
    for a, b in zip(*map(jax.tree.leaves, (state, other_state)), strict=True):
        np.testing.assert_array_equal(a, b)
    mined = [
        sorted((p.run(r) / "mining").glob("*")) for p, r in ((project, run), (other_project, other))
    ]
    assert [f.name for f in mined[0]] == [f.name for f in mined[1]]
    for a, b in zip(*mined, strict=True):
        assert a.read_bytes() == b.read_bytes()


def break_at(patch, step):
    """Make training raise when it comes to `step`."""
    real = module.make_step

    def broken(*arguments):
        function = real(*arguments)

        def step_or_raise(*inputs):
            if inputs[-1] == step:
                raise BrokenOffError
            return function(*inputs)

        return step_or_raise

    patch.setattr(module, "make_step", broken)


# What a run is


def test_the_loss_falls_and_places_are_found(trained):
    losses = [line["train/loss"] for line in trained.figures if "train/loss" in line]
    assert len(losses) == 3
    assert losses[-1] < 0.9 * losses[0]
    scores = [line["validation/map@5"] for line in trained.figures if "validation/map@5" in line]
    assert len(scores) == 4
    assert scores[-1] > scores[0]
    assert trained.trained.map5 == max(scores)
    assert trained.trained.best in {line["step"] for line in trained.figures}


def test_a_run_leaves_its_settings_figures_and_hard_pairs(trained):
    folder = trained.project.run("run1")
    wanted, form, manifest = read_run(folder)
    begun = settle(settings(), trained.project.root)
    assert (wanted.model, wanted.train) == (begun.model, begun.train)
    assert (wanted.train.dtype, wanted.model.stage) == ("float32", 4)
    assert (form.size, form.image_channels, form.label_channels) == (32, 3, 0)
    assert manifest["tiles"] == trained.project.tile_facts()["fingerprint"]
    assert sorted(f.name for f in (folder / "mining").iterdir()) == [
        "00000006.parquet",
        "00000012.parquet",
    ]
    assert list((folder / "events").iterdir())
    lines = figures(trained.project, timed=True)
    assert all(line["train/images_per_s"] > 0 for line in lines if "train/loss" in line)
    mined = [line for line in lines if "train/hard_share" in line]
    assert [line["step"] for line in mined] == [6, 12]
    for line in mined:
        hard = HardPairs.load(folder / "mining" / f"{line['step']:08d}.parquet")
        # The newer year is asked for in the older: 24 places.
        assert hard.asked == 24
        assert hard.share == line["train/hard_share"]


def test_hard_pairs_are_training_tiles_and_truly_wrong(trained):
    tiles = trained.tiles.select(trained.tiles.split == SPLITS.index("train"))
    files = sorted((trained.project.run("run1") / "mining").iterdir())
    found = HardPairs.load(files[0])
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


def test_a_run_of_no_epochs_is_the_untrained_encoder(tiled, copied):
    project = copied(tiled)
    result = train(project, settings("train.epochs=0"))
    assert (result.run, result.best) == ("run1", 0)
    assert result.map5 == figures(project)[0]["validation/map@5"]


def test_labels_are_trained_on(tmp_path, tiled):
    project = make_project(tmp_path / "labels", tiled.imagery, labels=True)
    assert project.tile_facts()["channels"] == {"image": 3, "label": 1}
    train(project, settings("train.epochs=1", "mining.rule=none"))
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
def test_a_broken_run_goes_on_as_if_nothing_had_been(often, monkeypatch, steps):
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
    train(often, settings(), run=name, report=notes)
    assert f"run {name}: going on from step {saved} of 18" in notes
    assert (often.run(name) / "finished.json").exists()
    assert_same_run(often, name, often, "whole")


def test_a_run_broken_while_it_mines_goes_on_as_if_nothing_had_been(often, monkeypatch):
    monkeypatch.setattr(module, "LOG_STEPS", 2)

    def fail(*arguments):
        raise BrokenOffError

    with monkeypatch.context() as patch:
        patch.setattr(module.mining, "hard_queries", fail)
        with pytest.raises(BrokenOffError):
            train(often, settings(), run="mining")
    # The round at step 6 was begun, and its validation told, but the round was not saved.
    assert figures(often, "mining")[-1]["step"] == 6
    assert last_state(often, "mining")[0] == 4
    train(often, settings(), run="mining")
    assert_same_run(often, "mining", often, "whole")


ON_ONE_DEVICE = """
import sys
from pathlib import Path
import jax, pytest
from geomatch import begin
from geomatch import train as module
from geomatch.project import Project
from small_project import settings
from test_train import BrokenOffError, break_at
assert jax.local_device_count() == 1
project, wanted = Project(Path(sys.argv[1])), settings("train.epochs=2", "mining.rule=none")
module.LOG_STEPS = 2
module.train(project, wanted, run="whole")
with pytest.MonkeyPatch.context() as patch:
    break_at(patch, 9)
    with pytest.raises(BrokenOffError):
        module.train(project, wanted, run="broken")
module.train(project, wanted, run="broken")
"""


def test_a_broken_run_goes_on_on_one_device(tiled, copied):
    project = copied(tiled)
    finish(python("-c", ON_ONE_DEVICE, str(project.root), devices=1))
    assert last_state(project, "whole")[0] == 12
    assert_same_run(project, "broken", project, "whole")


def test_a_killed_command_goes_on_as_if_nothing_had_been(tiled, trained, copied):
    project = copied(tiled)
    options = [f"--set={override}" for override in QUICK]
    process = python("-m", "geomatch", "train", "-p", str(project.root), *options)
    metrics = project.run("run1") / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and '"step": 6' in metrics.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (project.run("run1") / "finished.json").exists()
    result = train(project, settings())
    assert result == trained.trained
    assert_same_run(project, "run1", trained.project, "run1")


def test_a_finished_run_says_so_and_changes_nothing(trained, copied):
    project, notes = copied(trained), Notes()
    before = (project.run("run1") / "metrics.jsonl").read_bytes()
    assert train(project, settings(), report=notes) == trained.trained
    assert notes == ["run run1 is finished: 18 steps (3 epochs)"]
    assert (project.run("run1") / "metrics.jsonl").read_bytes() == before


def test_more_epochs_give_the_run_that_it_would_have_been(tiled, trained, copied):
    project, notes = copied(tiled), Notes()
    train(project, settings("train.epochs=2"))
    assert (project.run("run1") / "finished.json").exists()
    result = train(project, settings(), report=notes)
    assert "run run1: going on from step 12 of 18" in notes
    assert result == trained.trained
    assert_same_run(project, "run1", trained.project, "run1")
    assert read_run(project.run("run1"))[0].train.epochs == 3


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


@pytest.mark.parametrize(("batch", "remedy"), [(3, 4), (1, 2)])
def test_a_batch_that_devices_cannot_share_is_refused(tiled, copied, batch, remedy):
    project = copied(tiled)
    with pytest.raises(UsageError, match="divisible by 2 devices") as refused:
        train(project, settings(f"train.batch={batch}"))
    assert refused.value.hint == f"--set train.batch={remedy}"


def test_a_refused_new_run_can_be_begun_anew(tiled, copied):
    project = copied(tiled)
    with pytest.raises(UsageError, match="divisible"):
        train(project, settings("train.batch=3", "train.epochs=0"))
    assert train(project, settings("train.epochs=0")).best == 0


def test_a_loss_that_is_no_number_ends_the_run_clearly(tiled, copied, monkeypatch):
    project, real = copied(tiled), begin.initial_state

    def huge(*arguments):
        state = real(*arguments)
        state.params["pair_head"]["kernel"] = np.full_like(
            state.params["pair_head"]["kernel"], 1e38
        )
        return state

    monkeypatch.setattr(begin, "initial_state", huge)
    with pytest.raises(GeomatchError, match=r"the loss became (nan|inf)") as failed:
        train(project, settings())
    assert "train.lr" in failed.value.hint
    assert not (project.run("run1") / "finished.json").exists()
    assert all(np.isfinite(line.get("train/loss", 0)) for line in figures(project))


def test_a_rate_far_too_high_is_never_taken_for_a_success(tiled, copied):
    project = copied(tiled)
    with pytest.raises(GeomatchError, match=r"the loss became (nan|inf)"):
        train(project, settings("train.lr=1e30", "mining.rule=none"))
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
    losses = [line["train/loss"] for line in figures(project) if "train/loss" in line]
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

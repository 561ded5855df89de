"""Learning a few places by heart, and what is told where that fails."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import run_command
from scipy import ndimage
from small_project import QUICK, SPLIT, settings
from small_runs import SMALL_NETWORK

from geomatch import train as module
from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.geo.grid import Grid
from geomatch.nn.encoder import TileForm
from geomatch.train import overfit
from geomatch.training import overfit as learning
from geomatch.training.overfit import Attempt, Overfit
from geomatch.training.suspects import Problem, suspects

WANTED = (*SMALL_NETWORK, "train.loss=infonce", "train.lr=3e-3", "model.dropout=0.0")


def test_a_few_places_are_learnt_by_heart_and_nothing_is_kept(tiled, copied):
    project = copied(tiled)
    before = sorted(project.root.rglob("*"))
    overrides = [f"--set={text}" for text in (*QUICK, *SPLIT, *WANTED)]
    done = run_command("train", "--overfit", 6, "-q", "--json", "-p", project.root, *overrides)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    attempt = found["attempt"]
    assert (found["places"], found["tiles"], found["others"]) == (6, 12, [])
    assert found["untrained"] < attempt["map@5"] == 1.0
    assert attempt["steps"] <= learning.STEPS
    assert attempt["loss"][1] < attempt["loss"][0]
    new = {path.name for path in {*project.root.rglob("*")} - {*before}}
    assert {name for name in new if name != ".locks" and not name.endswith(".lock")} == set()


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(learning, "STEPS", 40)
    monkeypatch.setattr(learning, "OTHER_RATES", (10.0,))


def test_a_learning_rate_that_is_too_low_is_told_with_a_better_one(tiled, copied, few_steps):
    """Nor does the better one suffice in 40 steps, but it is better."""
    found = overfit(copied(tiled), settings(*WANTED, "train.lr=1e-5"), 8)
    assert not found.succeeded
    assert found.problems[0].what.startswith("train.lr = 1e-05 is too low: with 0.0001 ")
    assert found.problems[0].remedy == "--set train.lr=0.0001"


@pytest.mark.slow
def test_a_rate_that_diverges_is_too_high(tiled, copied, few_steps):
    """With an infinite rate the second step already computes with NaN."""
    found = overfit(copied(tiled), settings(*WANTED, "train.lr=1e30", "train.optimizer=sgd"), 4)
    assert not found.succeeded
    assert found.attempt.loss[1] is None


FOUND = """
places             8 (16 tiles)
steps              300
mAP@5              0.625 (untrained 0.250)
loss               2.0000 to 1.5000
train.lr = 0.0001  mAP@5 1.000 after 40 steps
warning: tiles are flat
  Leave them out.
error: 8 places are not learnt by heart: mAP@5 is 0.625; train.lr = 1e-05 is too low: with 0.0001 \
it is mAP@5 1.000 after 40 steps
hint: --set train.lr=0.0001
"""


def test_the_command_ends_with_what_is_wrong(tiled, monkeypatch):
    attempts = Attempt(1e-5, 300, 0.625, (2.0, 1.5)), Attempt(1e-4, 40, 1.0, (2.0, 0.1))
    problems = (*learning._of_rate(*attempts), Problem("tiles are flat", "Leave them out."))
    found = Overfit(8, 16, 0.25, attempts[0], attempts[1:], problems)
    monkeypatch.setattr(module, "overfit", lambda *_, **__: found)
    done = run_command("train", "--overfit", "8", "-p", tiled.root)
    assert done.exit_code == 1
    assert done.output.strip() == FOUND.replace("\\\n", "").strip()


@pytest.mark.parametrize("arguments", [("--overfit", "1"), ("--overfit", "4", "--dry-run")])
def test_wrong_use(tiled, arguments):
    done = run_command("train", "-p", tiled.root, *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""


# What is wrong with tiles


def places(images, labels=None, years=("2010", "2020")):
    """Suspects of tiles: images (years, places, h, w) of grey levels, and labels of that shape."""
    count, side = images.shape[1], images.shape[2]
    code, place = (axis.reshape(-1) for axis in np.indices(images.shape[:2]))
    zeros = np.zeros(len(code), np.int64)
    table = TileTable(
        grid=Grid("EPSG:32630", side, 1.0, side),
        years=years,
        sources=("a.tif",),
        classes=(),
        label=zeros - 1,
        epsg=zeros + 32630,
        col=place,
        row=zeros,
        year=code,
        split=zeros,
        source=zeros,
        valid=np.ones(len(code), np.float32),
        store_row=np.arange(len(code)),
    )
    channels = [images] * 3 + ([] if labels is None else [labels])
    pixels = np.stack(channels, axis=-1).reshape(-1, side, side, len(channels)).astype(np.uint8)

    class Store(TileStore):
        def read(self, rows):
            return pixels[rows]

    assert count == place.max() + 1
    form = TileForm(side, 3, 0 if labels is None else 1)
    return [problem.what for problem in suspects(table, table, Store(None), form)]


def ground(count=6, side=128, seed=0):
    """(places, side, side) smooth patterns, each of its own."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(count, side, side))
    smooth = sum(ndimage.gaussian_filter(noise, (0, s, s)) * s for s in (1, 3, 9))
    return np.clip(120 + 60 * smooth, 0, 255)


def test_good_tiles_are_not_suspected():
    images = ground()
    labels = np.random.default_rng(1).integers(1, 5, (2, *images.shape))
    assert places(np.stack([images, images * 0.8 + 20]), labels) == []


def test_years_that_are_shifted_are_told():
    images = ground(side=140)
    (what,) = places(np.stack([images[:, 6:134, 6:134], images[:, 2:130, 3:131]]))
    assert what.startswith("the years 2010 and 2020 do not align: they are shifted by 5.0 px")


def test_years_of_other_ground_are_told():
    (what,) = places(np.stack([ground(), ground(seed=9)]))
    assert what.startswith("the years 2010 and 2020 may not align: of 6 places, only ")


def test_labels_of_one_year_given_for_both_are_told():
    images = np.stack([ground()] * 2)
    labels = np.random.default_rng(1).integers(1, 5, images.shape)
    labels[1] = labels[0]
    (what,) = places(images, labels)
    assert what.endswith("those of 2010 and 2020 are the same, pixel for pixel, in 6 of 6 places")
    labels[1, :2] = 1
    assert places(images, labels) == []


def test_labels_that_number_places_are_told():
    images = np.stack([ground()] * 2)
    labels = np.zeros(images.shape, int) + 10 + np.arange(6)[:, None, None]
    labels[:, :, :9] = 0
    labels[1, :, :, :9] = 0
    (what,) = places(images, labels)
    assert "6 of 6 places have label values that no other has" in what


def test_tiles_without_content_and_copies_are_told():
    images = np.stack([ground(), ground() * 0.9])
    images[0, 1] = 90
    images[1, 3] = images[1, 2]
    flat, twice = places(images)
    assert flat == "1 of 12 tiles are flat, as water, clouds or missing data are: 1_0@2010"
    assert twice == "tiles of different places have the same pixels: 2_0@2020, 3_0@2020"

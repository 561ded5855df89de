"""What a run says of where it comes from, and that the same origin gives the same weights."""

from __future__ import annotations

import subprocess
import sys

import jax
import numpy as np
import pytest
from small_project import settings
from small_runs import SMALL_NETWORK, assert_same_run, last_state

from geomatch import __version__
from geomatch.manifests import GitState
from geomatch.runs import read_run
from geomatch.train import train
from geomatch.training.origin import session

QUICK_RUN = (*SMALL_NETWORK, "train.epochs=1")


@pytest.fixture(scope="module")
def project(tiled, tmp_path_factory):
    """A project with two runs of one seed, and one of another."""
    made = tiled.copied(tmp_path_factory.mktemp("origin") / "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["/usr/bin/geomatch", "train", "--set", "train.lr=1 e-3"])
        for run, seed in (("a", 0), ("b", 0), ("other", 1)):
            train(made, settings(*QUICK_RUN, f"train.seed={seed}"), run=run)
    return made


def test_the_same_seed_data_and_version_give_the_same_weights(project):
    assert_same_run(project, "a", project, "b")
    ours, theirs = (jax.tree.leaves(last_state(project, run)[1].params) for run in ("a", "other"))
    assert any(not np.array_equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_a_run_records_its_origin(project):
    wanted, _, manifest = read_run(project.run("other"))
    assert wanted.train.seed == 1
    (begun,) = manifest.sessions
    assert begun.command == "geomatch train --set 'train.lr=1 e-3'"
    assert begun.versions["geomatch"] == __version__
    assert begun.versions["jax"] == jax.__version__
    assert begun.python == ".".join(map(str, sys.version_info[:3]))
    assert begun.devices == ("cpu", "cpu")
    assert begun.started.endswith("+00:00")


def test_every_start_is_recorded_but_those_that_change_nothing(project):
    train(project, settings(*QUICK_RUN), run="a")
    assert len(read_run(project.run("a"))[2].sessions) == 1
    train(project, settings(*QUICK_RUN, "train.epochs=2"), run="a")
    assert len(read_run(project.run("a"))[2].sessions) == 2


def test_the_state_of_the_project_in_git(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert session(tmp_path).git is None
    (tmp_path / "geomatch.toml").write_text("")
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (
        ("init", "-q", "-b", "trials"),
        ("add", "geomatch.toml"),
        (*identity, "commit", "-q", "-m", "begun"),
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "tiles").mkdir()
    (tmp_path / "tiles" / "new").write_text("")
    found = session(tmp_path).git
    assert isinstance(found, GitState)
    assert (len(found.commit), found.branch, found.changed) == (40, "trials", False)
    (tmp_path / "geomatch.toml").write_text("[train]")
    assert session(tmp_path).git == GitState(found.commit, "trials", True)
    monkeypatch.setenv("PATH", "")
    assert session(tmp_path).git is None

"""A dry run: what it tells agrees with the run, and it leaves nothing but a picture."""

from __future__ import annotations

import json

import jax
import pytest
from command_line import run_command
from PIL import Image
from small_project import QUICK, SPLIT, settings
from small_runs import SMALL_NETWORK, Notes

from geomatch.errors import UsageError
from geomatch.nn.encoder import TileForm, build
from geomatch.nn.step import abstract_state
from geomatch.progress import size_text
from geomatch.train import dry_run

WANTED = settings(*SMALL_NETWORK, "train.freeze=trunk/stage1", "train.dtype=float32")


def files(project):
    found = (path.relative_to(project.root) for path in project.root.rglob("*") if path.is_file())
    return {str(path) for path in found if path.parts[0] != ".locks"}


@pytest.fixture(scope="module")
def dry(tiled, tmp_path_factory):
    """A project after a dry run, what was told, the notes, and the files that it added."""
    project, notes = tiled.copied(tmp_path_factory.mktemp("dry") / "project"), Notes()
    before = files(project)
    found = dry_run(project, WANTED, progress=notes)
    return project, found, notes, files(project) - before


def test_nothing_but_the_picture_is_left(dry):
    project, found, _, added = dry
    assert added == {"reports/dry-run.png"}
    assert found.picture == str(project.root / "reports" / "dry-run.png")
    with Image.open(found.picture) as picture:
        # The anchors of the first device, each beside a positive and a negative.
        assert (picture.width // 140, picture.height // 180) == (3, 2)
    assert project.run_names() == []


def test_what_is_told_is_what_the_run_would_be(dry):
    _, found, _, _ = dry
    assert (found.epochs, found.steps, found.anchors) == (3, 18, 24)
    assert found.tiles == {"train": 48, "validation": 16}
    # Two devices, each with 2 of the 4 anchors, their positives and negatives and hard triplets.
    assert found.shapes["batch"] == [2, 6, 2, 32, 32, 3]
    assert found.shapes["descriptor"] == [8]
    form = TileForm(32, 3, 0)
    state = abstract_state(build(WANTED, form), WANTED, form)
    sizes = {
        path[0].key if path[0].key != "encoder" else path[1].key: 0
        for path, _ in jax.tree_util.tree_leaves_with_path(state.params)
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        sizes[path[0].key if path[0].key != "encoder" else path[1].key] += leaf.size
    assert found.parameters == sizes
    frozen = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
        if any(key.key.startswith("stage1") for key in path)
    )
    assert 0 < frozen == sum(sizes.values()) - found.learning
    assert found.state_bytes == sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )


def test_memory_and_time_are_measured(dry):
    _, found, notes, _ = dry
    assert len(found.step_s) == 3
    assert found.seconds > found.first_step_s > 0
    # The gradient alone takes a third of the state: the parameters and two moments of Adam.
    assert found.step_bytes > 1.3 * found.state_bytes
    assert any(f"needs about {size_text(found.step_bytes)}" in note for note in notes)


def test_the_estimate_counts_steps_and_rounds(dry):
    """18 steps of 4 anchors, 6 without hard triplets; 3 rounds, which describe all 64 tiles."""
    _, found, _, _ = dry
    images = 4 * (6 * 3 + 12 * 6)
    wanted = found.first_step_s + images / found.images_per_s + 3 * 64 / found.described_per_s
    assert found.seconds == pytest.approx(wanted)


def test_a_dry_run_of_a_run_that_exists_is_refused_as_the_run_would_be(trained):
    with pytest.raises(UsageError, match=r"other settings: train\.lr"):
        dry_run(trained.project, settings("train.lr=1"), run="run1")


def test_the_command_tells_it(dry):
    project, _, _, _ = dry
    overrides = [f"--set={text}" for text in (*QUICK, *SPLIT, *SMALL_NETWORK)]
    arguments = ("train", "--dry-run", "-q", "-p", project.root, *overrides)
    done = run_command(*arguments)
    assert done.exit_code == 0, done.stderr
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert lines["steps"].strip() == "18 in 3 epochs of 24 anchors"
    assert lines["batch"].strip() == "4 anchors of 6 tiles, each 32 x 32 x 3"
    told = json.loads(run_command(*arguments, "--json").stdout)
    assert (told["steps"], told["shapes"]["descriptor"]) == (18, [8])
    assert project.run_names() == []


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 kB"), (999_999, "1 MB"), (45_200_000, "45 MB"), (1.25e9, "1.2 GB")]
)
def test_sizes_as_text(size, text):
    assert size_text(size) == text

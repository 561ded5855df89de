"""Runs as a whole: what is told of them, and that nothing is lost unasked."""

from __future__ import annotations

import json
import shutil

import pytest
from command_line import run_command

from geomatch.errors import GeomatchError, UsageError
from geomatch.image_input import encoder_of
from geomatch.manage_runs import (
    compare_runs,
    list_runs,
    prunable,
    prune_runs,
    rename_run,
    tag_run,
)
from geomatch.progress import size_text


@pytest.fixture
def project(indexed, copied):
    """A project with the runs a, b, c and run1, the latest, which alone has embeddings."""
    made = copied(indexed)
    one = made.run("run1")
    for name, score in (("a", "0.1"), ("b", "0.2"), ("c", "0.3")):
        shutil.copytree(one, made.run(name))
        config = made.run(name) / "config.json"
        values = json.loads(config.read_text())
        values["id"] = name
        values["settings"]["train"]["lr"] = 1.0 if name == "a" else 0.5
        config.write_text(json.dumps(values))
        for path in made.run(name).glob("checkpoints/*/metrics/metrics"):
            path.write_text(f'{{"map@5": {score}}}')
    (one / "config.json").touch()
    return made


def command(project, *arguments, code=0):
    done = run_command("runs", *arguments, "-p", project.root)
    assert done.exit_code == code, done.output
    return done


def test_runs_are_listed_with_their_sizes_and_uses(project):
    found = {run.name: run for run in list_runs(project)}
    assert list(found)[-1] == "run1"
    one = found["run1"]
    files = (path for path in project.run("run1").rglob("*") if path.is_file())
    assert one.size == sum(path.stat().st_size for path in files)
    name = project.embedding_names()[0]
    assert one.used_by == (f"embeddings {name}", f"index {name}")
    assert (one.finished, one.other_tiles, one.trunk, one.epochs) == (True, False, "resnet10", 3)
    assert found["a"].used_by == ()


def test_list_is_the_default(project):
    shown = command(project).stdout
    assert shown == command(project, "list").stdout
    line = next(line for line in shown.splitlines() if line.split()[:1] == ["run1"])
    (one,) = (run for run in list_runs(project) if run.name == "run1")
    assert size_text(one.size) in line
    told = json.loads(command(project, "--json").stdout)
    assert [run["name"] for run in told] == [run.name for run in list_runs(project)]
    assert told[-1]["map@5"] == pytest.approx(one.map5)


def test_a_damaged_run_is_listed_and_can_be_deleted(project):
    (project.run("a") / "config.json").write_text("{")
    line = next(x for x in command(project).stdout.splitlines() if x.split()[:1] == ["a"])
    assert "damaged" in line
    prune_runs(project, ["a"])
    assert "a" not in project.run_names()


# Compare


def test_runs_differ_in_their_settings(project):
    found = compare_runs(project, ["run1", "a"])
    assert found.settings == {"train.lr": [2e-3, 1.0]}
    one = found.metrics[0]
    assert one.untrained < one.map5
    assert one.epochs == 3
    assert set(found.curves["train/loss"]) == {"run1", "a"}
    assert [x for x, _ in found.curves["validation/map@5"]["run1"]] == [0, 1, 2, 3]


def test_a_comparison_is_printed_and_drawn(project):
    done = command(project, "compare", "run1", "a")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["train.lr", "0.002", "1.0"] in rows
    page = project.reports / "runs" / "run1-a.html"
    assert str(page) in done.stderr.replace("\n", "")
    text = page.read_text()
    assert text.count("data:image/png") == 2
    assert "<td>0.002</td><td>1.0</td>" in text
    page.unlink()
    told = json.loads(command(project, "compare", "run1", "a", "--json", "--no-html").stdout)
    assert told["runs"] == ["run1", "a"]
    assert not page.exists()


def test_settings_that_an_older_run_lacks_had_their_defaults(project):
    config = project.run("b") / "config.json"
    values = json.loads(config.read_text())
    del values["settings"]["train"]["squared"]
    config.write_text(json.dumps(values))
    assert list(compare_runs(project, ["b", "c"]).settings) == []


def test_what_cannot_be_compared(project):
    for names in (["a"], ["a", "a"]):
        with pytest.raises(UsageError):
            compare_runs(project, names)
    with pytest.raises(GeomatchError, match="no run 'nothing'"):
        compare_runs(project, ["a", "nothing"])


# Rename and tag


def test_a_renamed_run_keeps_its_embeddings(project):
    manifest = project.index_manifest(project.index_names()[0])
    done = command(project, "rename", "run1", "best")
    assert f"embeddings {manifest.name}" in done.stderr
    assert project.run_names()[-1] == "best"
    project.check_fresh(manifest)
    encoding = encoder_of(project, manifest, project.tile_manifest(), "index")
    assert encoding.fingerprint == manifest.model
    # Another run of the old name does not make them stale.
    rename_run(project, "a", "run1")
    project.check_fresh(manifest)
    assert project.run_of(manifest) == project.run("best")


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [("a", "b", UsageError), ("a", "../x", UsageError), ("nothing", "x", GeomatchError)],
)
def test_a_name_that_cannot_be_given(project, old, new, kind):
    with pytest.raises(kind):
        rename_run(project, old, new)
    assert set(project.run_names()) == {"a", "b", "c", "run1"}


def test_a_trial_keeps_its_name(project):
    (project.root / "tune").mkdir()
    (project.root / "tune" / "s.db").write_text("")
    rename_run(project, "a", "s-001")
    with pytest.raises(UsageError, match="a trial of study s"):
        rename_run(project, "s-001", "a")


def test_tags(project):
    assert tag_run(project, "a", ["good", "paper"]) == ("good", "paper")
    assert tag_run(project, "a", ["good"], ["paper"]) == ("good",)
    assert "run a: good" in command(project, "tag", "a").stderr
    assert next(run for run in list_runs(project) if run.name == "a").tags == ("good",)
    command(project, "tag", "a", "not plain", code=2)
    assert project.run_names()[-1] == "run1"


# Prune


def test_what_is_used_tagged_best_or_latest_is_spared(project):
    tag_run(project, "a", ["keep"])
    assert [run.name for run in prunable(project, best=0)] == ["b", "c"]
    shutil.rmtree(project.run("run1"))
    assert {run.name for run in prunable(project, best=1)} == {"b"}
    # By name, whatever speaks for it.
    assert [run.name for run in prunable(project, ["a"])] == ["a"]


def test_nothing_is_deleted_unasked(project):
    done = command(project, "prune", "a")
    assert "a" in done.stdout.split()
    assert done.stderr.endswith("nothing was deleted\n")
    assert json.loads(command(project, "prune", "a", "--json").stdout)["deleted"] is False
    assert "a" in project.run_names()


@pytest.mark.parametrize("answer", ["n", "y"])
def test_a_person_is_asked(project, monkeypatch, answer):
    asked = []
    monkeypatch.setattr(
        "geomatch.cli.runs.sys", type("S", (), {"stdin": type("T", (), {"isatty": lambda: True})})
    )
    monkeypatch.setattr("typer.confirm", lambda text: asked.append(text) or answer == "y")
    command(project, "prune", "a", "b")
    assert asked == ["delete these 2 runs?"]
    assert ("a" in project.run_names()) == (answer == "n")


def test_what_was_made_by_a_deleted_run_is_told(project):
    name = project.embedding_names()[0]
    size = size_text(next(run for run in list_runs(project) if run.name == "run1").size)
    done = command(project, "prune", "run1", "--yes")
    assert f"warning: embeddings {name}, index {name} came from run1" in done.stderr
    assert f"deleted run1: {size}" in done.stderr
    assert "run1" not in project.run_names()
    assert not (project.root / ".pruned").exists()
    assert project.embedding_names() == [name]


def test_a_run_that_is_being_trained_is_not_deleted(project):
    with project.lock("runs/a"):
        command(project, "prune", "a", "--yes", code=1)
    assert "a" in project.run_names()

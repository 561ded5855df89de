"""Runs in MLflow: a local store read back by MLflow itself, and servers that do not answer."""

from __future__ import annotations

import pytest
from small_project import metrics, settings
from small_runs import SMALL_NETWORK, BrokenOffError, Notes, break_at

from geomatch.errors import GeomatchError, UsageError
from geomatch.report import mlflow_run
from geomatch.report.mlflow_run import MlflowRun
from geomatch.train import train

pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
from mlflow import MlflowClient

QUICK = (*SMALL_NETWORK, "train.epochs=1", "mining.rule=none")


@pytest.fixture(scope="module")
def tracked(tiled, tmp_path_factory):
    """A project whose run was broken off, resumed and told to MLflow in a folder."""
    project = tiled.copied(tmp_path_factory.mktemp("tracked") / "towns")
    wanted = settings(*QUICK, "train.mlflow=mlruns", "train.save_minutes=0")
    with pytest.MonkeyPatch.context() as patch:
        break_at(patch, 4)
        with pytest.raises(BrokenOffError):
            train(project, wanted)
    notes = Notes()
    train(project, wanted, progress=notes)
    client = MlflowClient(tracking_uri=(project.root / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("towns")
    (found,) = client.search_runs([experiment.experiment_id])
    return project, client, found, notes


def test_settings_metrics_and_files_are_in_mlflow(tracked):
    _, client, found, notes = tracked
    assert found.info.run_name == "run1"
    assert found.info.status == "FINISHED"
    assert found.data.params["train.lr"] == "0.002"
    assert found.data.params["model.trunk"] == "convnet"
    assert found.data.tags["version.jax"]
    assert {"config.json", "metrics.jsonl"} <= {
        f.path for f in client.list_artifacts(found.info.run_id)
    }
    assert not any("MLflow" in note for note in notes)


def test_mlflow_has_the_values_of_the_log(tracked):
    project, client, found, _ = tracked
    logged = {
        (line["step"], name): value
        for line in metrics(project, timed=True)
        for name, value in line.items()
        if "/" in name and value is not None
    }
    for (step, name), value in logged.items():
        history = client.get_metric_history(found.info.run_id, name.replace("@", "_at_"))
        assert {point.value for point in history if point.step == step} >= {value}
    assert "validation/map@5" in {name for _, name in logged}


def test_a_server_that_is_down_stops_nothing(tiled, copied, tracked, monkeypatch):
    project, notes = copied(tiled), Notes()
    address = "http://127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    train(project, settings(*QUICK, f"train.mlflow={address}"), progress=notes)
    (warning,) = [note for note in notes if "MLflow" in note]
    assert warning.startswith(f"MLflow at {address}: ")
    assert warning.endswith("; training goes on without it")
    assert (project.run("run1") / "finished.json").exists()
    # Where a run is tracked is no part of the run.
    train(project, settings(*QUICK))


def test_what_was_written_while_the_server_was_down_is_sent_later(tiled, copied, monkeypatch):
    project, notes, sent = copied(tiled), Notes(), []
    down = iter([True, True, False, False])
    folder = project.run("run1")
    folder.mkdir(parents=True)

    def send(self, lines):
        if next(down):
            raise OSError("no route")
        sent.extend(lines)

    monkeypatch.setattr(mlflow_run, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(MlflowRun, "_send", send)
    monkeypatch.setattr(MlflowRun, "_end", lambda self: sent.append("end"))
    with MlflowRun(project, "run1", "https://example.invalid", notes) as run:
        for step in range(3):
            run.write(step, {"train/loss": float(step), "train/lr": None})
    assert [line if line == "end" else line[0] for line in sent] == [0, 1, 2, "end"]
    assert sent[0][2] == {"train/loss": 0.0}
    assert notes == ["MLflow at https://example.invalid: no route; training goes on without it"]


def test_an_address_with_a_password_is_refused_and_recorded_nowhere(tiled, copied):
    project = copied(tiled)
    with pytest.raises(UsageError, match="password"):
        train(project, settings("train.mlflow=https://me:secret@example.invalid"))
    assert project.run_names() == []


def test_the_extra_is_named_where_it_is_missing(tiled, copied, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GeomatchError) as refused:
        mlflow_run.check("mlruns")
    assert refused.value.hint == "pip install 'geomatch[mlflow]'"

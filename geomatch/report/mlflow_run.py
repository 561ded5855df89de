"""A run in MLflow: settings, metrics and files, sent beside the training.

Training never waits for a server, and goes on without one: what could not be sent is kept and sent
when the server answers again.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from geomatch.errors import GeomatchError, UsageError
from geomatch.manifests import RunManifest
from geomatch.progress import ProgressCallback
from geomatch.project import Project, read_json, read_record, write_json

AGAIN_SECONDS = 60.0
"""Time until a server that did not answer is asked again."""
LAST_SECONDS = 20.0
"""Longest wait for a server at the end; a quarter of it where the run was interrupted."""
MOST = 500
"""Metrics in one request."""
FILES = ("config.json", "metrics.jsonl", "figures")
"""What is stored of a run's folder."""

Line = tuple[int, int, dict[str, float]]
"""Step, time in milliseconds, and metrics."""


def check(address: str) -> None:
    """Check that MLflow is there for a folder or address that is not empty.

    Raises:
        UsageError: the address has a password, which the run would record.
        GeomatchError: MLflow is not installed.
    """
    if not address:
        return
    if urlsplit(address).password is not None:
        raise UsageError(
            "train.mlflow has a password in it",
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead.",
        )
    if importlib.util.find_spec("mlflow") is None:
        raise GeomatchError("train.mlflow needs MLflow", "pip install 'geomatch[mlflow]'")


class MlflowRun:
    """Sends the metrics of a run as they are written, and its files at the end.

    A resumed run goes on in the same run of MLflow, whose id is in `mlflow.json`.

    Args:
        address: a folder, relative to the project, or the address of a server.
        name: of the run.
        progress: told once if the server does not answer.
    """

    def __init__(
        self, project: Project, name: str, address: str, progress: ProgressCallback
    ) -> None:
        self._folder, self._name, self._progress = project.run(name), name, progress
        self._experiment = project.root.absolute().name
        self._address = address
        if "://" not in address:
            self._address = (project.root.absolute() / address).as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        # By default MLflow tries for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self._lines: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self._status, self._warned, self._run_id = "FINISHED", False, ""
        self._client: Any = None
        # A daemon, since a server that hangs must not keep the process.
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> MlflowRun:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._status = "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"
        self._lines.put(None)
        self._thread.join(LAST_SECONDS / (1 if kind is None else 4))
        if self._thread.is_alive():
            self._warn("it is not done receiving the run")

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Send the metrics of `step`; None is left out."""
        values = {name: value for name, value in metrics.items() if value is not None}
        self._lines.put((step, time.time_ns() // 1_000_000, values))

    def _work(self) -> None:
        waiting: list[Line] = []
        again, ended = 0.0, False
        while not ended:
            line = self._lines.get()
            ended = line is None
            if line is not None:
                waiting.append(line)
            if ended or time.monotonic() >= again:
                try:
                    self._send(waiting)
                    waiting.clear()
                    if ended:
                        self._end()
                except Exception as error:  # whatever MLflow raises, the run is worth more
                    again = time.monotonic() + AGAIN_SECONDS
                    self._warn(str(error).splitlines()[0] if str(error) else repr(error))

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            self._progress(f"MLflow at {self._address}: {what}; training goes on without it")

    def _send(self, lines: list[Line]) -> None:
        if self._client is None:
            self._begin()
        from mlflow.entities import Metric

        metrics = [
            # MLflow allows no "@" in names.
            Metric(name.replace("@", "_at_"), value, at, step)
            for step, at, values in lines
            for name, value in values.items()
        ]
        for start in range(0, len(metrics), MOST):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + MOST])

    def _begin(self) -> None:
        """Open the run, or begin it, with its settings."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        client = MlflowClient(tracking_uri=self._address)
        manifest = read_record(self._folder / "config.json", RunManifest, "geomatch train")
        record = self._folder / "mlflow.json"
        known = read_json(record, "geomatch train") if record.exists() else {}
        if known.get("address") == self._address:
            self._run_id = known["run_id"]
            client.update_run(self._run_id, status="RUNNING")
        else:
            found = client.get_experiment_by_name(self._experiment)
            experiment = (
                client.create_experiment(self._experiment) if found is None else found.experiment_id
            )
            made = client.create_run(experiment, run_name=self._name, tags=_tags(manifest))
            self._run_id = made.info.run_id
            write_json(record, {"address": self._address, "run_id": self._run_id})
        given = client.get_run(self._run_id).data.params
        values = {
            f"{table}.{key}": str(value)
            for table, keys in manifest.settings.items()
            for key, value in keys.items()
        }
        # What was given cannot be changed, as `train.epochs` may be.
        params = [Param(key, value) for key, value in values.items() if key not in given]
        client.log_batch(self._run_id, params=params)
        self._client = client

    def _end(self) -> None:
        for path in (self._folder / name for name in FILES):
            if path.is_dir():
                self._client.log_artifacts(self._run_id, str(path), path.name)
            elif path.exists():
                self._client.log_artifact(self._run_id, str(path))
        self._client.set_terminated(self._run_id, self._status)


def _tags(manifest: RunManifest) -> dict[str, str]:
    tags = {"geomatch.run_id": manifest.id, "geomatch.tiles": manifest.tiles}
    for begun in manifest.sessions[:1]:
        tags |= {f"version.{name}": version for name, version in begun.versions.items()}
        tags["mlflow.source.name"] = begun.command
        if begun.git is not None:
            tags["mlflow.source.git.commit"] = begun.git.commit
    return tags

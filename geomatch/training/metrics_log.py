"""The metrics of a run, as `metrics.jsonl` and as TensorBoard events."""

from __future__ import annotations

import json
from pathlib import Path

from geomatch.project import replacing
from geomatch.report.mlflow_run import MlflowRun
from geomatch.report.tensorboard import Board

VALIDATION, LOSS = "validation/map@5", "train/loss"


class Scores:
    """The mAP@5 on validation of every round: what all processes of a run keep of its metrics."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = scores
        """mAP@5 on validation of every round so far."""

    def write(self, step: int, metrics: dict[str, float | None]) -> None:
        """Take the metrics of `step`."""
        del step
        if (score := metrics.get(VALIDATION)) is not None:
            self.scores.append(score)


class MetricsLog(Scores):
    """Writes metrics, after cutting what an interrupted run left.

    Args:
        folder: of the run.
        last: step of the last checkpoint, -1 without one. Metrics, events, mined samples and
            figures of later steps are removed.
        round_due: the round at `last` is still to be done; what it left is removed, too.
    """

    def __init__(self, folder: Path, last: int, round_due: bool = False) -> None:
        self._path = folder / "metrics.jsonl"
        super().__init__([])
        if self._path.exists():
            with replacing(self._path) as temporary, temporary.open("w") as kept:
                for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True):
                    # A line truncated by a kill is later than any checkpoint, or of the round.
                    if not line.endswith("\n") or json.loads(line)["step"] > last:
                        break
                    if round_due and json.loads(line)["step"] == last and LOSS not in line:
                        break
                    kept.write(line)
                    super().write(last, json.loads(line))
        for file in (*folder.glob("mining/*.parquet"), *folder.glob("figures/*.png")):
            if int(file.stem) >= last + (not round_due):
                file.unlink()
        self._events, self._last = folder / "events", last
        self.tracker: MlflowRun | None = None
        """Gets the metrics, too."""

    def __enter__(self) -> MetricsLog:
        self.board = Board(self._events, self._last + 1)
        return self

    def __exit__(self, *_: object) -> None:
        self.board.close()

    def write(self, step: int, metrics: dict[str, float | None]) -> None:
        """Append the metrics of `step`."""
        super().write(step, metrics)
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, **metrics}) + "\n")
        self.board.scalars(step, metrics)
        if self.tracker is not None:
            self.tracker.write(step, metrics)

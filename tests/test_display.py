"""What is seen of a command at work: a live view in a terminal, few plain lines elsewhere."""

from __future__ import annotations

import io
import re
import types

import pytest
from command_line import run_command
from rich.console import Console
from rich.text import Text
from small_project import settings
from small_runs import SMALL_NETWORK, script_validation

from geomatch import config
from geomatch.cli import console
from geomatch.progress import duration
from geomatch.train import train

VALUES = {
    "epoch": "117 of 120",
    "time left": "11 h 05 min",
    "images/s": "1234.5",
    "loss": "0.1234",
    "learning rate": "1.00e-04",
    "hard samples": "100.0 %",
    "validation mAP@5": "0.712",
    "best mAP@5": "0.733",
}


@pytest.fixture
def terminal(monkeypatch):
    """A function that puts a terminal of some width in place of stderr, and gives what it got."""

    def open_terminal(width=80):
        written = io.StringIO()
        monkeypatch.setattr(
            console, "err", Console(file=written, force_terminal=True, width=width, height=40)
        )
        return written

    return open_terminal


@pytest.fixture
def clock(monkeypatch):
    """The time as plain lines know it, in seconds; a list of one."""
    now = [1000.0]
    monkeypatch.setattr(console, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


def last_frame(written):
    """Lines of the live view as it was left, notes before it included."""
    lines = []
    for line in written.getvalue().split("\n"):
        # The view is drawn again by going up and wiping line after line.
        up = line.count("\x1b[1A")
        lines = lines[: len(lines) - up] if up else lines
        lines.append(Text.from_ansi(line.split("\x1b[2K")[-1]).plain.rstrip())
    return [line for line in lines if line]


def reported(progress, step=30, **changes):
    progress("training", step, 60, values={**VALUES, **changes})


# In a terminal


def test_the_live_view_shows_every_value_in_80_columns(terminal):
    written = terminal()
    with console.progress() as progress:
        progress("a note of [brackets]")
        reported(progress, 12)
        progress("describing validation", 99_000, 100_000, "12345 tiles/s")
        reported(progress, 30)
    lines = last_frame(written)
    assert lines[0] == "a note of [brackets]"
    assert all(len(line) <= 80 for line in lines)
    text = "\n".join(lines)
    assert "training: 30/60" in text
    for name, value in VALUES.items():
        assert f"{name} {value} " in text
    assert lines[-1].startswith("describing validation ")
    assert "99000/100000" in lines[-1]
    assert lines[-1].endswith("12345 tiles/s")
    # Compact: three rows of values and a bar, in a frame, and the bar of what is done meanwhile.
    assert len(lines) == 1 + 6 + 1
    assert max(map(len, lines)) == 80


@pytest.mark.parametrize("width", [40, 60, 200])
def test_the_live_view_fits_other_widths(terminal, width):
    written = terminal(width)
    with console.progress() as progress:
        reported(progress)
    lines = last_frame(written)
    assert max(map(len, lines)) == min(width, 80)
    for name, value in VALUES.items():
        assert f"{name} {value} " in "\n".join(lines)


def test_a_task_that_comes_again_takes_its_old_line(terminal):
    written = terminal()
    with console.progress() as progress:
        for _ in range(3):
            for done in (32, 64, 88):
                progress("describing validation", done, 88, "9 tiles/s")
        for done in (32, 64):
            progress("describing validation", done, 88, "5 tiles/s")
    (line,) = last_frame(written)
    assert "64/88" in line
    assert line.endswith("5 tiles/s")


def test_a_finished_task_says_how_long_it_took(terminal):
    written = terminal()
    with console.progress() as progress:
        progress("embedding", 1, 2)
        progress("embedding", 2, 2)
    (line,) = last_frame(written)
    assert re.search(r"2/2 in \d+ s", line)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (3569, "59 min"),
        (3599, "1 h 00 min"),
        (39_900, "11 h 05 min"),
    ],
)
def test_durations_are_said_as_people_do(seconds, said):
    assert duration(seconds) == said


# Elsewhere


def test_plain_lines_are_few(capsys, clock):
    with console.progress() as progress:
        for step in range(1, 1001):
            clock[0] += 0.1
            reported(progress, min(step, 59))
        progress("a note")
        reported(progress, 60)
    lines = capsys.readouterr().err.splitlines()
    # 100 s of steps: one line each 15 s, the note, and the last.
    assert len(lines) == 6 + 2
    assert lines[-2] == "a note"
    wanted = ", ".join(f"{name} {value}" for name, value in VALUES.items())
    assert lines[-1] == f"training: 60/60, {wanted}"


def test_a_plain_task_says_what_is_left(capsys, clock):
    with console.progress() as progress:
        for done in (0, 10, 20, 30, 40):
            progress("embedding", done, 40, "1 tiles/s")
            clock[0] += 10
    assert capsys.readouterr().err.splitlines() == [
        "embedding: 20/40 1 tiles/s, 20 s left",
        "embedding: 40/40 1 tiles/s",
    ]


def test_quiet_is_silent(capsys, terminal):
    written = terminal()
    with console.progress(quiet=True) as progress:
        progress("a note")
        reported(progress)
    assert written.getvalue() == "".join(capsys.readouterr()) == ""


# Training


def train_command(project, *options):
    overrides = ["train.epochs=2", "train.batch=4", "mining.every=1", *SMALL_NETWORK]
    arguments = [argument for text in overrides for argument in ("--set", text)]
    result = run_command("train", "-p", str(project.root), *arguments, *options)
    assert result.exit_code == 0, result.output
    return result


def test_training_is_shown_live(tiled, copied, terminal):
    written = terminal()
    train_command(copied(tiled))
    lines = last_frame(written)
    text = "\n".join(lines)
    number = r"\d+\.\d+"
    for wanted in (
        r"training: 12/12 ",
        r"epoch 2 of 2 ",
        r"time left \d+ s ",
        rf"images/s {number} ",
        rf"loss {number} ",
        r"learning rate 1\.00e-04 ",
        rf"hard samples {number} % ",
        rf"validation mAP@5 {number} ",
        rf"best mAP@5 {number} ",
        r"describing validation .*16/16",
        r"describing train .*48/48",
        rf"epoch 0: validation mAP@5 {number}",
        rf"epoch 2: validation mAP@5 {number} \(best {number}\)",
        r"run run1: best checkpoint is step \d+",
    ):
        assert re.search(wanted, text), wanted
    assert all(len(line) <= 80 for line in lines)


def test_training_prints_a_few_lines(tiled, copied):
    result = train_command(copied(tiled))
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert "\x1b" not in result.stderr
    assert sum(line.startswith("training: 12/12") for line in lines) == 1
    # Random weights; each round its tiles and its figure; the last step; the best checkpoint.
    assert len([line for line in lines if "validation mAP@5" in line and "epoch" in line]) <= 6
    assert len(lines) <= 3 * 3 + 4


def test_quiet_training_says_nothing(tiled, copied):
    result = train_command(copied(tiled), "--quiet")
    assert result.output == ""


def test_the_best_counts_what_came_before_a_resume(tiled, copied, monkeypatch):
    project, told, shown = copied(tiled), [], []

    def progress(task, done=0, total=0, detail="", values=None):
        told.append(task)
        if values is not None:
            shown.append(values)

    wanted = settings(*SMALL_NETWORK, "train.epochs=1", "mining.rule=none")
    with monkeypatch.context() as patch:
        script_validation(patch, [0.2, 0.6])
        train(project, wanted, progress=progress)
    assert "epoch 1: validation mAP@5 0.600 (best 0.600)" in told
    assert [values["best mAP@5"] for values in (shown[0], shown[-1])] == ["0.200", "0.600"]
    with monkeypatch.context() as patch:
        script_validation(patch, [0.3, 0.1])
        train(project, config.with_overrides(wanted, ["train.epochs=3"]), progress=progress)
    assert "epoch 2: validation mAP@5 0.300 (best 0.600)" in told
    assert (shown[-1]["validation mAP@5"], shown[-1]["best mAP@5"]) == ("0.100", "0.600")
    assert shown[-1]["epoch"] == "3 of 3"
    assert shown[-1]["time left"] == "0 s"

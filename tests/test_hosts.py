"""Several processes that train one run together, each with two virtual devices."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time

import numpy as np
import pytest
from processes import finish, python
from small_project import QUICK, SPLIT, metrics, settings
from small_runs import SMALL_NETWORK, assert_same_run, last_state

from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS
from geomatch.errors import UsageError
from geomatch.training import hosts
from geomatch.training.feed import BatchFeed
from geomatch.training.hosts import Processes
from geomatch.training.sampler import Sampler

MINUTE = 60.0


def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


TRAIN = """
import sys
from pathlib import Path
from geomatch import train as module
from geomatch.project import Project
from geomatch.training.hosts import Processes
from small_project import settings
from small_runs import SMALL_NETWORK
root, run, address, count, index, *overrides = sys.argv[1:]
module.LOG_STEPS = 1
processes = Processes(address, int(count), int(index)) if int(count) > 1 else None
wanted = settings(*SMALL_NETWORK, *overrides)
print(module.train(Project(Path(root)), wanted, run=run, processes=processes))
"""


def test_two_processes_train_the_run_of_one_with_as_many_devices(tiled, copied):
    project, listen = copied(tiled), address()
    form = ("train.lr=1e-4", "train.epochs=2")
    both = [
        python("-c", TRAIN, str(project.root), "both", listen, "2", str(index), *form)
        for index in range(2)
    ]
    alone = python("-c", TRAIN, str(project.root), "alone", "", "1", "0", *form, devices=4)
    with ended((*both, alone)):
        results = [finish(process, 600).splitlines()[-1] for process in (*both, alone)]
    # All processes know how the run went.
    assert results[0] == results[1]
    lines = {run: metrics(project, run) for run in ("both", "alone")}
    losses = {
        run: [line["train/loss"] for line in lines[run] if "train/loss" in line] for run in lines
    }
    assert len(losses["both"]) == len(losses["alone"]) == 12
    np.testing.assert_allclose(losses["both"][:3], losses["alone"][:3], rtol=1e-5)
    # Until something is mined, of which rounding may give other samples.
    np.testing.assert_allclose(losses["both"][:6], losses["alone"][:6], rtol=1e-3)
    scores = {
        run: [line["validation/map@5"] for line in lines[run] if "validation/map@5" in line]
        for run in lines
    }
    # Of 16 queries: rounding may swap neighbours.
    np.testing.assert_allclose(scores["both"], scores["alone"], atol=0.1)
    mined = [[line for line in lines[run] if "train/hard_share" in line] for run in lines]
    assert [line["step"] for line in mined[0]] == [line["step"] for line in mined[1]] == [6]
    steps, states = zip(*(last_state(project, run) for run in ("both", "alone")), strict=True)
    assert steps == (12, 12)
    mean = states[0].batch_stats["encoder"]["head"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(
        mean, states[1].batch_stats["encoder"]["head"]["BatchNorm_0"]["mean"], atol=1e-2
    )
    # The first process alone leaves files, and those of an ordinary run.
    names = [
        sorted(str(f.relative_to(project.run(run))) for f in project.run(run).glob("[!e]*"))
        for run in ("both", "alone")
    ]
    assert names[0] == names[1]
    assert len(list((project.run("both") / "events").iterdir())) == 1


def commands(project, run="run1", devices=2, epochs=3):
    """`geomatch train` in two processes."""
    listen = address()
    wanted = (*QUICK, *SPLIT, *SMALL_NETWORK, f"train.epochs={epochs}")
    options = ["--run", run, *(f"--set={override}" for override in wanted)]
    return [
        python(
            *("-m", "geomatch", "train", "-p", str(project.root), *options),
            *("--coordinator", listen, "--processes", "2", "--process-id", str(index)),
            devices=devices,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        for index in range(2)
    ]


@contextlib.contextmanager
def ended(processes):
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_for(project, until, processes, run="run1"):
    path = project.run(run) / "metrics.jsonl"
    end = time.monotonic() + 300
    while not (path.exists() and until in path.read_text()):
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0], ids=["another", "the first"])
def test_a_process_that_dies_ends_the_others_and_the_run_goes_on(tiled, copied, victim):
    project = copied(tiled)
    processes = commands(project, epochs=400)
    with ended(processes):
        wait_for(project, '"step": 6', processes)
        processes[victim].kill()
        began = time.monotonic()
        _, err = processes[1 - victim].communicate(timeout=2 * MINUTE)
        assert time.monotonic() - began < MINUTE
        assert processes[1 - victim].returncode != 0
        assert f"error: process {victim} of 2 ended" in err
        if victim:
            # JAX itself would abort with a stack trace.
            assert err.splitlines()[-1].startswith("hint: See what it says. The same command")
            assert processes[0].returncode == 1
    assert not (project.run("run1") / "finished.json").exists()
    step = last_state(project)[0]
    processes = commands(project, epochs=400)
    with ended(processes):
        wait_for(project, f'"step": {(step // 6 + 2) * 6}', processes)
        text = (project.run("run1") / "metrics.jsonl").read_text()
    written = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    steps = [line["step"] for line in written if "validation/map@5" in line]
    assert steps == list(range(0, 6 * len(steps), 6))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_saves_the_run_and_ends_all(tiled, copied, number):
    project = copied(tiled)
    for process in commands(project, "whole", epochs=8):
        finish(process)
    processes = commands(project, "broken", epochs=8)
    with ended(processes):
        wait_for(project, '"step": 6', processes, "broken")
        processes[1].send_signal(number)
        errors = [process.communicate(timeout=MINUTE)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    saved = last_state(project, "broken")[0]
    assert 6 <= saved < 48
    assert errors[0].splitlines()[-3:] == [
        f"run broken: saved at step {saved} of 48",
        "error: interrupted",
        "hint: Finished work is kept: run the same command again to continue.",
    ]
    for process in commands(project, "broken", epochs=8):
        finish(process)
    assert_same_run(project, "broken", project, "whole")


def test_an_error_of_the_first_process_is_everyones(tiled, copied):
    project = copied(tiled)
    with project.lock("runs/run1"):
        processes = commands(project)
        with ended(processes):
            errors = [process.communicate(timeout=3 * MINUTE)[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 1
        assert "error: another geomatch is writing runs/run1" in error or (
            "error: process 0 of 2 ended" in error
        )
        assert "Traceback" not in error


def test_each_process_reads_its_own_part_of_a_batch(tiled):
    tiles = tiled.tiles.select(tiled.tiles.split == SPLITS.index("train"))
    wanted = settings("train.batch=8")
    sampler = Sampler(tiles, wanted.train, wanted.mining)
    store = TileStore.open(tiled.project.pixels)
    with contextlib.ExitStack() as stack:
        whole, *parts = (
            stack.enter_context(BatchFeed(sampler, store, 4, own)).batch(3, None)
            for own in (slice(None), slice(0, 2), slice(2, 4))
        )
    assert whole[0].shape == (4, 3, 2, 32, 32, 3)
    for i in range(2):
        assert parts[i][0].shape == (2, 3, 2, 32, 32, 3)
        for together, own in zip(whole, parts[i], strict=True):
            np.testing.assert_array_equal(own, together[2 * i : 2 * i + 2])


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        # A batch script's own process is no task.
        ({"SLURM_NTASKS": "4"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, True),
    ],
)
def test_processes_of_slurm_and_open_mpi_are_noticed(monkeypatch, environment, several):
    for name in (*hosts.TASKS, "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Processes().are_several == several
    # A process that is said to be alone is.
    assert not Processes(count=1).are_several


@pytest.mark.parametrize(
    ("processes", "words"),
    [
        (Processes("somewhere", 2, 0), "--coordinator somewhere"),
        (Processes(":1234", 2, 0), "--coordinator :1234"),
        (Processes("host:port", 2, 0), "--coordinator host:port"),
        (Processes("host:1234", 2, 2), "--process-id 2 of --processes 2"),
        (Processes("host:1234", 2), "which processes train together is unknown"),
        (Processes(count=2, index=0), "which processes train together is unknown"),
    ],
)
def test_options_that_make_no_sense_are_refused(processes, words, monkeypatch):
    for name in hosts.TASKS:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=words) as refused, hosts.joined(processes):
        pass
    assert "--coordinator HOST:PORT --processes N --process-id I" in refused.value.hint


def test_alone_all_is_ones_own():
    rows = np.arange(6).reshape(3, 2)
    assert hosts.is_first()
    assert hosts.share(3) == slice(0, 3)
    np.testing.assert_array_equal(hosts.gather(rows, 3), rows)
    assert list(hosts.in_turn(iter([1, 2]), 1)) == [1, 2]
    assert hosts.of_first(lambda: 5) == 5
    assert hosts.devices() == (2, slice(0, 2))

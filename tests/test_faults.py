"""Stages killed at random points fifty times in a row: run again, they come to the same end."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import small_project
from processes import python
from small_project import QUICK, SIZE, SPLIT, YEARS, write_imagery
from small_runs import SMALL_NETWORK, assert_same_run

from geomatch.data.embeddings import Embeddings
from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.project import Project
from geomatch.query import query

KILLS = 50
SEED = 0
ATTEMPTS = 6
"""At a stage, until the next one comes."""
SHEETS = {"train": (12, 10), "validation": (4, 10), "test": (6, 10)}
STAGES = ("tile", "train", "embed", "index")


def command(project, imagery, stage):
    """A stage's process, in a group of its own."""
    options = [f"--set={x}" for x in (f"grid.size={SIZE}", *SPLIT, *QUICK, *SMALL_NETWORK)]
    if stage == "tile":
        options += ["--workers", "2", *(f"{y}={imagery}/[!l]*_{y}.tif" for y in YEARS)]
    if stage == "index":
        options = []
    arguments = ("-m", "geomatch", stage, "-p", str(project.root), *options)
    return python(*arguments, start_new_session=True)


def begun(project, process):
    """Wait until a stage takes its locks, so that it has begun its work, or ends."""
    while process.poll() is None and not (project.root / ".locks").exists():
        time.sleep(0.005)


def ended(process):
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error


def empty(root):
    root.mkdir()
    (root / "geomatch.toml").write_text("")
    return Project(root)


@pytest.mark.slow
def test_stages_killed_fifty_times_come_to_the_same_end(compiled_once, tmp_path, monkeypatch):
    monkeypatch.setattr(small_project, "SHEETS", SHEETS)
    imagery = tmp_path / "imagery"
    write_imagery(imagery)
    whole, seconds = empty(tmp_path / "whole"), {}
    for _ in range(2):  # the second time, programs are compiled
        shutil.rmtree(whole.root)
        empty(whole.root)
        for stage in STAGES:
            shutil.rmtree(whole.root / ".locks", ignore_errors=True)
            process = command(whole, imagery, stage)
            begun(whole, process)
            began = time.monotonic()
            ended(process)
            seconds[stage] = time.monotonic() - began
    rng, kills, rounds = random.Random(SEED), dict.fromkeys(STAGES, 0), 0
    while sum(kills.values()) < KILLS:
        project = empty(tmp_path / f"killed{rounds}")
        rounds += 1
        for stage in STAGES:
            # The last attempt goes through.
            for attempt in range(ATTEMPTS):
                shutil.rmtree(project.root / ".locks", ignore_errors=True)
                process = command(project, imagery, stage)
                if sum(kills.values()) >= KILLS or attempt == ATTEMPTS - 1:
                    ended(process)
                    break
                begun(project, process)
                with contextlib.suppress(Exception):
                    process.wait(rng.uniform(0, 1.1 * seconds[stage]))
                if process.poll() is not None:
                    ended(process)
                    break
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                kills[stage] += 1
        same(project, whole)
        shutil.rmtree(project.root)
    print(f"kills: {kills}, in {rounds} chains; seconds of work: {seconds}")


def same(project, whole):
    """Tiles, weights, descriptors and answers are those of an uninterrupted project."""
    tables = [TileTable.load(each.catalogue) for each in (project, whole)]
    assert tables[0].ids() == tables[1].ids()
    np.testing.assert_array_equal(
        *(
            TileStore.open(each.pixels).read(table.store_row)
            for each, table in zip((project, whole), tables, strict=True)
        )
    )
    assert_same_run(project, "run1", whole, "run1")
    (name,) = project.embedding_names()
    assert whole.embedding_names() == [name]
    vectors = [
        Embeddings.load(each.embeddings / f"{name}.parquet").vectors for each in (project, whole)
    ]
    np.testing.assert_array_equal(*vectors)
    for tile in tables[0].ids()[::40]:
        answers = [query(each, tile).matches for each in (project, whole)]
        assert len(answers[0])
        assert answers[0] == answers[1]

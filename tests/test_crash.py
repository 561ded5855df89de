"""A killed `tile` leaves nothing half-valid; run again, it goes on to the same tiles."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin
from small_project import new_project

from geomatch import config
from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.tile import tile

LEFT, TOP = 500_000, 5_000_000
PATIENCE = 60.0
"""Seconds to wait for what comes in a fraction of one on an idle machine."""


def sheet(path, values, nodata=None):
    """A GeoTIFF of 1 m on the grid; `write_raster` lives too short to be shared by tests."""
    bands, height, width = values.shape
    transform = from_origin(LEFT, TOP, 1, 1)
    with rasterio.open(
        path, "w", driver="GTiff", count=bands, height=height, width=width, dtype=values.dtype,
        crs="EPSG:32631", transform=transform, nodata=nodata, tiled=True, blockxsize=64,
        blockysize=64,
    ) as target:  # fmt: skip
        target.write(values)
    return path


def noise(seed):
    return np.random.default_rng(seed).integers(0, 256, (3, 384, 384)).astype(np.uint8)


@pytest.fixture(scope="module")
def imagery(tmp_path_factory):
    """Two years of 2,304 tiles of 8 px, 9 shards of up to 512 rows."""
    folder = tmp_path_factory.mktemp("imagery")
    return {year: sheet(folder / f"{year}.tif", noise(int(year))) for year in ("2010", "2020")}


SHARDS, TILES = 9, 4608


@pytest.fixture(scope="module")
def whole(imagery, tmp_path_factory):
    """What an uninterrupted command makes."""
    project = new_project(tmp_path_factory.mktemp("whole") / "project")
    tile_to_the_end(project, imagery, "--workers", "1")
    return project


def command(project, imagery, *options):
    sources = [f"{year}={path}" for year, path in imagery.items()]
    fixed = ["--size", "8", "--gsd", "1", "--split", "source", *options]
    return [sys.executable, "-m", "geomatch", "tile", "-p", str(project.root), *fixed, *sources]


def tile_to_the_end(*arguments):
    done = subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@contextlib.contextmanager
def running(arguments):
    """A process in a group of its own; whatever becomes of it, its group is gone afterwards."""
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests run in the background, Ctrl-C is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition, process=None):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if condition():
            return True
        if process is not None and process.poll() is not None:
            return condition()
        time.sleep(0.005)
    return False


def finished_shards(project):
    return len(list((project.root / "tiles.partial" / "shards").glob("*.json")))


def descendants(pid):
    """Processes below `pid`: their ids with the time they were started, which no other shares."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                parents[int(folder.name)] = int(fields[1]), fields[19]
    found = set()
    below = {pid}
    while below:
        below = {child for child, (parent, _) in parents.items() if parent in below}
        found |= {(child, parents[child][1]) for child in below}
    return found


def alive(processes):
    left = set()
    for pid, started in processes:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z" and fields[19] == started:
                left.add(pid)
    return left


def same_tiles(one, other):
    """The manifests agree, and so do the pixels that are really there."""
    assert one.tile_manifest().fingerprint == other.tile_manifest().fingerprint
    tables = [TileTable.load(project.catalogue) for project in (one, other)]
    assert tables[0].ids() == tables[1].ids()
    read = [
        TileStore.open(project.pixels).read(table.store_row)
        for project, table in zip((one, other), tables, strict=True)
    ]
    np.testing.assert_array_equal(*read)


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_killed_command_resumes(imagery, whole, tmp_path, workers):
    killed = new_project(tmp_path / "killed")
    arguments = command(killed, imagery, "--workers", workers)
    with running(arguments) as process:
        assert wait_for(lambda: finished_shards(killed) >= 2, process)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    before = finished_shards(killed)
    assert 2 <= before < SHARDS
    assert not killed.tiles.exists()
    done = tile_to_the_end(killed, imagery, "--workers", workers)
    assert "tiles are already cut" in done.stderr
    assert f" of {TILES} " in done.stderr
    same_tiles(killed, whole)
    assert {p.name for p in killed.root.iterdir()} == {p.name for p in whole.root.iterdir()}


def test_what_was_cut_from_imagery_that_changed_is_cut_again(tmp_path):
    imagery = {"2010": sheet(tmp_path / "a.tif", noise(1))}
    project = new_project(tmp_path / "project")
    with running(command(project, imagery, "--workers", "1")) as process:
        assert wait_for(lambda: finished_shards(project) >= 1, process)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    values = noise(2)
    sheet(tmp_path / "a.tif", values)
    tile_to_the_end(project, imagery, "--workers", "1")
    table = TileTable.load(project.catalogue)
    pixels = TileStore.open(project.pixels).read(table.store_row)
    assert len(table) == TILES // 2
    for (left, _, _, top), got in zip(table.bounds().astype(int), pixels, strict=True):
        y, x = TOP - top, left - LEFT
        np.testing.assert_array_equal(got, np.moveaxis(values[:, y : y + 8, x : x + 8], 0, -1))


@linux
def test_workers_die_with_their_parent(imagery, tmp_path):
    """Even when it alone is killed, and so can tell them nothing."""
    project = new_project(tmp_path / "project")
    with running(command(project, imagery, "--workers", "2")) as process:
        assert wait_for(lambda: finished_shards(project) >= 1, process)
        workers = descendants(process.pid)
        assert len(workers) >= 2
        process.kill()
        process.wait()
        end = time.monotonic() + PATIENCE
        while alive(workers) and time.monotonic() < end:
            time.sleep(0.05)
        assert not alive(workers)


@linux
def test_a_worker_that_is_killed_is_reported(imagery, tmp_path):
    """As the kernel does for want of memory; what was cut is kept."""
    project = new_project(tmp_path / "project")
    with running(command(project, imagery, "--workers", "2", "-q")) as process:
        assert wait_for(lambda: finished_shards(project) >= 1, process)
        for pid, _ in descendants(process.pid):
            name = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"forkserver" in name:
                os.kill(pid, signal.SIGKILL)
        _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    lines = stderr.splitlines()
    assert lines[0].startswith("error: a worker process died")
    assert lines[1].startswith("hint: ")
    assert "--workers 1" in lines[1]
    assert len(lines) == 2, stderr
    assert not project.catalogue.exists()
    assert "already cut" in tile_to_the_end(project, imagery, "--workers", "1").stderr


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_is_reported_in_a_line(imagery, whole, tmp_path, workers):
    """The terminal sends it to the whole group."""
    project = new_project(tmp_path / "project")
    with running(command(project, imagery, "--workers", workers, "-q")) as process:
        assert wait_for(lambda: finished_shards(project) >= 2, process)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert stdout == ""
    assert "interrupted" in stderr.splitlines()[0]
    assert len(stderr.splitlines()) <= 2, stderr
    assert not project.catalogue.exists()
    assert "already cut" in tile_to_the_end(project, imagery).stderr
    same_tiles(project, whole)


@linux
def test_ctrl_c_while_workers_start_is_reported_in_a_line(imagery, tmp_path):
    """Workers that are still importing know no handler of ours yet."""
    project = new_project(tmp_path / "project")
    with running(command(project, imagery, "--workers", "2", "-q")) as process:

        def starting():
            names = []
            for pid, _ in descendants(process.pid):
                with contextlib.suppress(OSError):
                    names.append(Path(f"/proc/{pid}/cmdline").read_bytes())
            return any(b"forkserver" in name for name in names)

        assert wait_for(starting, process)
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "Traceback" not in stderr
    assert len(stderr.splitlines()) <= 2, stderr


def limited(arguments, kilobytes):
    """The command where no file may grow beyond `kilobytes`, as on a disk that is full."""
    code = (
        "import os, resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes * 1024}, {kilobytes * 1024}))\n"
        "os.execv(sys.argv[1], sys.argv[1:])\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_full_disk_is_reported(imagery, tmp_path):
    """Shards of 96 kB do not fit; once they do, the same command goes through."""
    project = new_project(tmp_path / "project")
    done = limited(command(project, imagery, "--workers", "2", "-q"), 50)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert "unforeseen" not in lines[0]
    assert "large" in lines[0] or "space" in lines[0], "names the system's reason"
    assert lines[1].startswith("hint: Free space")
    assert len(lines) == 2, done.stderr
    assert not project.catalogue.exists()
    tile_to_the_end(project, imagery)
    assert len(TileTable.load(project.catalogue)) == TILES


def test_a_disk_that_fills_with_the_catalogue_is_reported(tmp_path):
    """Even pixels pack into little, the catalogue of 4,608 tiles does not."""
    path = sheet(tmp_path / "even.tif", np.full((3, 384, 384), 90, np.uint8))
    imagery = {"2010": path, "2020": path}
    project = new_project(tmp_path / "project")
    done = limited(command(project, imagery, "--workers", "1", "-q"), 30)
    assert finished_shards(project) == SHARDS
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert "unforeseen" not in lines[0]
    assert lines[1].startswith("hint: Free space")
    assert len(lines) == 2, done.stderr
    assert not project.catalogue.exists()
    tile_to_the_end(project, imagery)
    assert len(TileTable.load(project.catalogue)) == TILES


class Killed(BaseException):
    """Stands for the end of the process; nothing catches it."""


CALLS = 12
"""At least as many changes of whole files and folders as a small `tile` makes."""


@pytest.mark.parametrize("then", ["the same", "other settings"])
@pytest.mark.parametrize("number", range(CALLS))
def test_killed_between_any_two_renames(
    tmp_path,
    monkeypatch,
    number,
    then,
):
    """At each rename or removal in turn: what is there is whole, and what comes next is right.

    The second command renews older tiles, so that there is something to replace.
    """
    values = np.random.default_rng(0).integers(0, 256, (1, 64, 64)).astype(np.uint8)
    values[0, :5] = 0
    path = sheet(tmp_path / "a.tif", values, nodata=0)
    source = (config.SourceConfig(year="before", images=str(path)),)
    base = ["grid.size=16", "split.by=source", "grid.stride=16"]

    def settings(*more):
        return config.with_overrides(config.Config(source=source), [*base, *more])

    killed, whole = new_project(tmp_path / "killed"), new_project(tmp_path / "whole")
    tile(killed, settings("grid.min_valid=1"), workers=1)
    calls = 0

    def count(real):
        def wrapped(*arguments, **named):
            nonlocal calls
            calls += 1
            if calls - 1 == number:
                raise Killed
            return real(*arguments, **named)

        return wrapped

    with monkeypatch.context() as patched:
        for module, name in [(os, "rename"), (os, "replace"), (shutil, "rmtree")]:
            patched.setattr(module, name, count(getattr(module, name)))
        with contextlib.suppress(Killed):
            tile(killed, settings("grid.min_valid=0.6", "grid.stride=8"), workers=1)
        assert calls < CALLS, "the range of `number` covers every call"
    if killed.catalogue.exists():
        table = TileTable.load(killed.catalogue)
        assert len(table) == killed.tile_manifest().tiles
    last = settings("grid.stride=8", f"grid.min_valid={0.6 if then == 'the same' else 0.7}")
    tile(killed, last, workers=1)
    tile(whole, last, workers=1)
    same_tiles(killed, whole)

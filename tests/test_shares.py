"""`--shard i/n`, `--join` and `--scheduler`: the same result, however the work is shared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import run_command
from small_project import new_project, settings

from geomatch import config
from geomatch.data import store
from geomatch.embed import embed, embed_share
from geomatch.embedding import parts
from geomatch.errors import GeomatchError, UsageError
from geomatch.progress import silent
from geomatch.project import Project
from geomatch.shares import Share
from geomatch.tile import cut_share, tile
from geomatch.tiling import shards

LEFT, TOP, SIDE = 512_000, 5_000_192, 192


@pytest.fixture(scope="module")
def imagery(tmp_path_factory):
    """Two years of 36 tiles of 32 px."""
    import rasterio
    from rasterio.transform import from_origin

    folder = tmp_path_factory.mktemp("imagery")
    place = from_origin(LEFT, TOP, 1, 1)
    form = {"driver": "GTiff", "count": 3, "dtype": "uint8", "crs": "EPSG:32631"}
    for year in ("2010", "2020"):
        values = np.random.default_rng(int(year)).integers(0, 256, (3, SIDE, SIDE), np.uint8)
        path = folder / f"{year}.tif"
        with rasterio.open(path, "w", height=SIDE, width=SIDE, transform=place, **form) as target:
            target.write(values)
    return folder


@pytest.fixture
def small_shards(monkeypatch):
    """Five shards of 16 rows."""
    monkeypatch.setattr(store, "SHARD_BYTES", 1)


def chosen(imagery, *overrides):
    sources = tuple(
        config.SourceConfig(year=year, images=str(imagery / f"{year}.tif"))
        for year in ("2010", "2020")
    )
    wanted = ["grid.size=32", "split.by=source", *overrides]
    return config.with_overrides(config.Config(source=sources), wanted)


def tree(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def whole(imagery, tmp_path):
    """What one process makes."""
    project = new_project(tmp_path / "whole")
    tile(project, chosen(imagery), workers=1)
    return tree(project.tiles)


# Shares


@pytest.mark.parametrize("of", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 100])
def test_shares_have_every_piece_once(of, count):
    parts = [Share(i, of).part(count) for i in range(1, of + 1)]
    assert [piece for part in parts for piece in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "-1/2", "1/2/3", "a/b", "1/0"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(UsageError, match="--shard"):
        Share.parse(text)


# Tiles


@pytest.mark.usefixtures("small_shards")
def test_shares_in_any_order_make_the_same_tiles(imagery, project, tmp_path):
    wanted = chosen(imagery)
    for number in (3, 1, 3):
        cut_share(project, wanted, Share(number, 3), workers=1)
    assert not project.tiles.exists()
    with pytest.raises(GeomatchError, match="1 of 3 shards are not done") as raised:
        tile(project, wanted, join=True)
    assert "geomatch tile --shard 2/3, then geomatch tile --join" in raised.value.hint
    cut_share(project, wanted, Share(2, 3), workers=1)
    done = {path: path.stat().st_mtime_ns for path in project.unfinished_tiles.rglob("*")}
    assert cut_share(project, wanted, Share(2, 3), workers=1).tiles > 0
    assert {p: p.stat().st_mtime_ns for p in project.unfinished_tiles.rglob("*")} == done
    tile(project, wanted, join=True)
    assert tree(project.tiles) == whole(imagery, tmp_path)
    assert not project.unfinished_tiles.exists()
    assert cut_share(project, wanted, Share(2, 3), workers=1).tiles == 0, "up to date"


@pytest.mark.usefixtures("small_shards")
def test_one_machine_can_finish_what_shares_began(imagery, project, tmp_path):
    cut_share(project, chosen(imagery), Share(2, 3), workers=1)
    tile(project, chosen(imagery), workers=1)
    assert tree(project.tiles) == whole(imagery, tmp_path)


@pytest.mark.usefixtures("small_shards")
def test_shares_keep_the_tiles_that_are_there(imagery, project, tmp_path):
    tile(project, config.with_sources(chosen(imagery), chosen(imagery).source[:1]), workers=1)
    kept = [cut_share(project, chosen(imagery), Share(i, 2), workers=1).kept for i in (1, 2)]
    assert sum(kept) == 36
    assert len(project.tile_manifest().years) == 1, "they stay in use meanwhile"
    tile(project, chosen(imagery), join=True)
    assert tree(project.tiles) == whole(imagery, tmp_path)


def test_shares_that_do_not_go_together_are_refused(imagery, project):
    with pytest.raises(GeomatchError, match="no shards"):
        tile(project, chosen(imagery), join=True)
    cut_share(project, chosen(imagery), Share(1, 2), workers=1)
    with pytest.raises(UsageError, match="begun in 2 shards"):
        cut_share(project, chosen(imagery), Share(1, 3), workers=1)
    with pytest.raises(GeomatchError, match="other imagery or settings"):
        cut_share(project, chosen(imagery, "grid.stride=16"), Share(2, 2), workers=1)
    with (
        project.lock("tiles.shard-2-of-2"),
        pytest.raises(GeomatchError, match="another geomatch"),
    ):
        cut_share(project, chosen(imagery), Share(2, 2), workers=1)
    with project.lock("tiles", shared=True), pytest.raises(GeomatchError, match="another geomatch"):
        tile(project, chosen(imagery), workers=1)


def test_what_was_left_by_a_killed_command_does_not_stop_shares(imagery, project, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shards, "finish", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tile(project, chosen(imagery, "grid.stride=16"), workers=1)
    cut_share(project, chosen(imagery), Share(1, 1), workers=1)
    tile(project, chosen(imagery), join=True)
    assert project.tile_manifest().stride == 32


@pytest.mark.slow
def test_shares_that_begin_at_once_have_one_plan(imagery, project, tmp_path):
    sources = [f"{year}={imagery}/{year}.tif" for year in ("2010", "2020")]
    line = [sys.executable, "-m", "geomatch", "tile", "-p", str(project.root), *sources]
    line += ["--size", "16", "--split", "source", "--workers", "1"]
    shares = [
        subprocess.Popen([*line, "--shard", f"{i}/2"], stderr=subprocess.PIPE) for i in (1, 2)
    ]
    for process in shares:
        assert process.communicate()[1].rstrip().endswith(b"0 of them kept")
        assert process.returncode == 0
    joined = run_command("tile", "-p", str(project.root), "--join")
    assert joined.exit_code == 0, joined.stderr
    other = new_project(tmp_path / "other")
    tile(other, chosen(imagery, "grid.size=16"), workers=1)
    assert other.tile_manifest().fingerprint == project.tile_manifest().fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "1/2", "--join"], "exclude each other"),
        (["--join", "--scheduler", "x"], "exclude each other"),
        (["--shard", "3/2"], "is not one of 1/n to n/n"),
        (["--shard", "1/2", "--check"], "cuts tiles alone"),
        (["--shard", "1/2", "--force"], "cuts tiles alone"),
        (["--join", "--force"], "cuts nothing"),
        (["--shard", "1/2", "--folders", "."], "for georeferenced imagery"),
    ],
)
def test_options_that_do_not_go_together(project, options, message):
    done = run_command("tile", "-p", str(project.root), *options)
    assert done.exit_code == 2
    assert message in done.stderr


# Descriptors


def test_shares_of_descriptors_are_those_of_one_process(trained, copied, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART", 20)
    one, shared = trained.copied(tmp_path / "one"), copied(trained)
    wanted = settings()
    made = embed(one, settings=wanted)
    counts = [embed_share(shared, Share(i, 3), settings=wanted) for i in (2, 3)]
    with pytest.raises(GeomatchError, match="1 of 3 shards are not done") as raised:
        embed(shared, settings=wanted, join=True)
    assert "geomatch embed --shard 1/3" in raised.value.hint
    with pytest.raises(UsageError, match="begun in 3 shards"):
        embed_share(shared, Share(1, 2), settings=wanted)
    other = config.with_overrides(wanted, ["embed.engine=onnxruntime"])
    with pytest.raises(GeomatchError, match="another encoder or engine"):
        embed_share(shared, Share(1, 3), settings=other)
    counts.append(embed_share(shared, Share(1, 3), settings=wanted))
    assert sum(counts) == made.tiles
    joined = embed(shared, settings=wanted, join=True)
    assert joined.path.read_bytes() == made.path.read_bytes()
    assert embed_share(shared, Share(1, 3), settings=wanted) == 0, "up to date"


# A cluster


@pytest.fixture(scope="module")
def cluster():
    """Two workers in this process."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
    ) as started:
        yield started.scheduler_address


@pytest.mark.usefixtures("small_shards")
def test_a_cluster_makes_the_same_tiles(imagery, project, tmp_path, cluster):
    tile(project, chosen(imagery), scheduler=cluster)
    assert tree(project.tiles) == whole(imagery, tmp_path)


def fails_at_first(item):
    """Work that fails on the first worker that tries it."""
    folder, message = item
    try:
        (folder / "tried").mkdir()
    except FileExistsError:
        return message
    raise GeomatchError(message)


def fails(item):
    raise GeomatchError(item)


def test_work_that_fails_is_tried_on_another_worker(tmp_path, cluster):
    from geomatch import cluster as module

    said = []
    with module.connect(cluster, tmp_path, silent) as connected:
        found = list(
            connected.run(
                fails_at_first,
                [(tmp_path, "disk full")],
                lambda item: "shard 7",
                lambda task, *_, **__: said.append(task),
            )
        )
        assert found == [((tmp_path, "disk full"), "disk full")]
        assert len(said) == 1
        assert said[0].startswith("shard 7 failed on ")
        assert said[0].endswith("disk full")
        with pytest.raises(GeomatchError, match="no such disk"):
            list(connected.run(fails, ["no such disk"], str, silent))


def test_a_scheduler_that_does_not_answer(imagery, project, monkeypatch):
    from geomatch import cluster as module

    monkeypatch.setattr(module, "PATIENCE", 0.2)
    with pytest.raises(GeomatchError, match="no Dask scheduler answers"):
        tile(project, chosen(imagery), scheduler="tcp://127.0.0.1:9")


def test_a_folder_that_workers_do_not_see(cluster, tmp_path):
    from geomatch import cluster as module

    with (
        pytest.raises(GeomatchError, match="does not see"),
        module.connect(cluster, tmp_path / "elsewhere", silent),
    ):
        pass


@pytest.mark.slow
def test_a_worker_is_killed_in_the_middle(trained, imagery, tmp_path):
    """Its shards are cut by the other one; descriptors then come from both."""
    distributed = pytest.importorskip("distributed")
    whole, shared = new_project(tmp_path / "whole"), new_project(tmp_path / "shared")
    wanted = chosen(imagery, "grid.size=8", "grid.stride=2")
    tile(whole, wanted, workers=1)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as started:
        pids = [worker.pid for worker in started.workers.values()]

        def kill():
            while not list(shared.root.glob("tiles.partial/shards/*.json")):
                time.sleep(0.01)
            os.kill(pids[0], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        tile(shared, wanted, scheduler=started.scheduler_address)
        killer.join()
        assert tree(shared.tiles) == tree(whole.tiles)
        one, other = (trained.copied(tmp_path / name) for name in ("one", "other"))
        made = embed(one, settings=settings())
        on_cluster = embed(other, settings=settings(), scheduler=started.scheduler_address)
    # The tests' own process compiles without optimizations.
    np.testing.assert_allclose(*map(vectors, (made.path, on_cluster.path)), rtol=1e-5, atol=1e-5)


def vectors(path: Path):
    from geomatch.data.embeddings import Embeddings

    return Embeddings.load(path).vectors


def test_a_file_system_without_locks_is_reported(project, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with (
        pytest.raises(GeomatchError, match="cannot be locked: No locks available"),
        project.lock("tiles"),
    ):
        pass


def test_the_lock_of_a_project_can_be_waited_for(project):
    begun = []

    def wait():
        with Project(project.root).lock("tiles.plan", wait=True):
            begun.append(time.monotonic())

    waiting = threading.Thread(target=wait)
    with project.lock("tiles.plan"):
        waiting.start()
        time.sleep(0.1)
        assert not begun
    waiting.join()
    assert begun

"""A project whose tiles, embeddings and indexes are in object storage: moto's S3 on loopback."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorstore
from command_line import run_command
from processes import output_of
from small_project import evaluate, retile, settings

from geomatch import remote
from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.embed import embed
from geomatch.errors import GeomatchError, UsageError
from geomatch.index import index
from geomatch.project import Project
from geomatch.query import query
from geomatch.remote import Remote

server = pytest.importorskip("moto.server", reason="needs moto's server (moto, flask)")


@pytest.fixture(scope="module")
def s3(module_patch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an S3 server that has a bucket named "bucket"."""
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    address = f"http://{host}:{port}"
    module_patch.setenv("AWS_ACCESS_KEY_ID", "key")
    module_patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    module_patch.setenv("AWS_ENDPOINT_URL", address)
    urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT"))
    yield address
    running.stop()


@pytest.fixture
def url(s3: str, tmp_path: Path) -> str:
    return f"s3://bucket/{tmp_path.name}/town"


def opened(root: Path, url: str) -> Project:
    root.mkdir(exist_ok=True)
    (root / "geomatch.toml").write_text(f'[project]\nremote = "{url}"\n')
    return Project.open(root)


def publish(project: Project, *artefacts: str) -> None:
    for artefact in artefacts:
        with project.lock(artefact):
            pass


@pytest.fixture
def moved(indexed, copied, url: str) -> Project:
    """The small project, in storage."""
    project = opened(copied(indexed).root, url)
    name = indexed.embedded.name
    publish(project, "tiles", f"embeddings/{name}", f"index/{name}")
    return project


def test_another_machine_queries_and_evaluates_what_is_in_storage(moved, indexed, tmp_path, url):
    assert not moved.pixels.exists()
    tiles = TileTable.load(indexed.project.catalogue)
    wanted = TileStore.open(indexed.project.pixels).read(tiles.store_row)
    other = opened(tmp_path / "other", url)
    for project in (moved, other):
        np.testing.assert_array_equal(TileStore.open(project.pixels).read(tiles.store_row), wanted)
    target = tiles.ids()[0]
    before, after = (query(each, target) for each in (indexed.project, other))
    assert before == after
    assert evaluate(other).splits == evaluate(indexed.project).splits
    assert not Remote(other.root, url).changed()


def test_stages_move_what_they_made_or_find_made(trained, copied, url, tmp_path):
    project = opened(copied(trained).root, url)
    assert project.pixels.exists()
    retile(project, trained.imagery)
    assert not project.pixels.exists()
    made = embed(project, settings=settings())
    index(project)
    other = opened(tmp_path / "other", url)
    assert other.embedding_names() == other.index_names() == [made.name]
    assert made.path.read_bytes() == (other.embeddings / f"{made.name}.parquet").read_bytes()


def retiled(project: Project, mark: str) -> None:
    """Other tiles, as far as a storage can see."""
    manifest = json.loads(project.tiles_manifest.read_text())
    project.tiles_manifest.write_text(json.dumps(manifest | {"fingerprint": mark}))
    publish(project, "tiles")


def test_of_two_writers_one_is_refused(moved, tmp_path, url):
    other = opened(tmp_path / "other", url)
    retiled(moved, "first")
    with pytest.raises(GeomatchError, match="another project replaced tiles"):
        retiled(other, "second")
    assert Project.open(tmp_path / "other").tile_manifest().fingerprint == "first"
    retiled(Project.open(tmp_path / "other"), "second")
    assert Project.open(moved.root).tile_manifest().fingerprint == "second"


def test_a_writer_is_refused_at_the_last_moment_too(moved, tmp_path, url, monkeypatch):
    """Copying takes a while, in which another one may replace the record."""
    other, copy_all = opened(tmp_path / "other", url), remote._together

    def slowly(copy, names):
        copy_all(copy, names)
        monkeypatch.setattr(remote, "_together", copy_all)
        retiled(moved, "first")

    monkeypatch.setattr(remote, "_together", slowly)
    with pytest.raises(GeomatchError, match="another project replaced tiles"):
        retiled(other, "second")
    assert Project.open(tmp_path / "other").tile_manifest().fingerprint == "first"


def test_the_version_before_stays_for_its_readers(moved, indexed):
    wanted = TileStore.open(indexed.project.pixels).read(np.arange(8))

    def replace(mark: str) -> TileStore:
        shutil.copytree(indexed.project.pixels, moved.pixels)
        retiled(moved, mark)
        return TileStore.open(moved.pixels)

    readers = [TileStore.open(moved.pixels), replace("second"), replace("third")]
    for reader in readers[1:]:
        np.testing.assert_array_equal(reader.read(np.arange(8)), wanted)
    assert not readers[0].read(np.arange(8)).any()


@pytest.mark.parametrize("wrong", ["bucket/town", "s3://bucket", "https://bucket/town"])
def test_another_address_is_refused(tmp_path, wrong):
    with pytest.raises(UsageError, match="is no object storage"):
        opened(tmp_path / "project", wrong)


def test_a_bucket_that_is_not_there_is_one_line(s3, tmp_path):
    with pytest.raises(GeomatchError, match=r"s3://nothing/town cannot be used: .*NoSuchBucket"):
        opened(tmp_path / "project", "s3://nothing/town")


def test_the_address_is_for_all_commands(tmp_path):
    (tmp_path / "geomatch.toml").touch()
    result = run_command("info", "-p", tmp_path, "--set", "project.remote=s3://bucket/town")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "project.remote is for all commands" in result.stderr


def test_imagery_in_a_bucket_is_tiled(s3, tmp_path, write_raster, project):
    """In a process of its own, since GDAL does not let the server run in this one."""
    storage = tensorstore.KvStore.open(remote.kvstore("s3://bucket/imagery")).result()
    values = np.random.default_rng(0).integers(1, 255, (3, 64, 64)).astype(np.uint8)
    path = write_raster("a.tif", values, origin=(500_000, 5_000_000))
    storage.write("a.tif", path.read_bytes()).result()
    asked = ("tile", "2010=/vsis3/bucket/imagery/a.tif", "--size", "32", "--split", "source")
    address = s3.removeprefix("http://")
    where = {"AWS_S3_ENDPOINT": address, "AWS_HTTPS": "NO", "AWS_VIRTUAL_HOSTING": "FALSE"}
    output_of("-m", "geomatch", *asked, "-p", str(project.root), **where)
    table = TileTable.load(project.catalogue)
    pixels = TileStore.open(project.pixels).read(table.store_row)
    assert sorted(pixels.ravel().tolist()) == sorted(values.ravel().tolist())

"""`tile` again with a year or a sheet more: what is there stays, and all is as if cut anew."""

from __future__ import annotations

import os

import numpy as np
import pytest
from small_project import new_project, tile_sources

from geomatch import config
from geomatch.data import store
from geomatch.data.store import TileStore
from geomatch.data.store_rows import StoreRows
from geomatch.data.tiles import TileTable
from geomatch.geo.grid import Grid
from geomatch.tile import tile
from geomatch.tiling.shards import Shard

LEFT, TOP, SIDE = 512_000, 5_000_192, 192
"""A sheet is 6 x 6 tiles of 32 px: a year of one sheet is two shards of 16 rows and a part."""


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(store, "SHARD_BYTES", 1)


@pytest.fixture
def sheet(write_raster):
    """A function that writes a sheet of noise, as `FOLDER/NUMBER.tif`, that many sheets east."""

    def write(year, number=0, seed=0, crs="EPSG:32631", gsd=1.0):
        values = np.random.default_rng([int(year), number, seed]).integers(1, 256, (3, SIDE, SIDE))
        origin = (LEFT + number * SIDE, TOP)
        path = f"{year}/{number}.tif"
        return write_raster(path, values.astype(np.uint8), crs, origin, gsd).parent

    return write


def blind(path):
    """Replace a file by another one that tells nothing, with the same size and time."""
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def tree(project):
    """All files of the tiles by name, and what rows were cut from."""
    rows = vars(StoreRows.load(project.store_rows)) | {"first": ""}
    paths = [path for path in project.tiles.rglob("*") if path.is_file()]
    paths.remove(project.store_rows)
    files = {str(path.relative_to(project.tiles)): path.read_bytes() for path in paths}
    return files | {
        name: value.tobytes() if isinstance(value, np.ndarray) else value
        for name, value in rows.items()
    }


def by_id(project):
    """The tiles by id: pixels and split."""
    table = TileTable.load(project.catalogue)
    pixels = TileStore.open(project.pixels).read(table.store_row)
    return dict(zip(table.ids(), zip(pixels, table.split.tolist(), strict=True), strict=True))


def tiled(project, years, *overrides, gsd=("grid.gsd=1",), **options):
    sources = tuple(config.SourceConfig(year=y, images=str(path)) for y, path in years.items())
    wanted = ["grid.size=32", "split.by=source", *gsd, *overrides]
    settings = config.with_overrides(config.Config(source=sources), wanted)
    return tile(project, settings, workers=1, **options)


@pytest.mark.parametrize("year", ["2000", "2012", "2020"])
def test_another_year_is_cut_beside_those_that_are_there(project, sheet, tmp_path, year):
    """Before, between and after them; their own files are not read again."""
    years = {each: sheet(each) for each in ("2010", "2015")}
    more = dict(sorted({**years, year: sheet(year)}.items()))
    fresh = new_project(tmp_path / "fresh")
    tiled(fresh, more)
    assert tiled(project, years).kept == 0
    for each, folder in years.items():
        blind(tmp_path / each / "0.tif")
        assert folder.exists()
    said = []
    made = tiled(project, more, progress=lambda task, *_, **__: said.append(task))
    assert (made.kept, len(made.table)) == (72, 108)
    assert "72 tiles are kept as they are, 36 are cut" in said
    assert tree(project) == tree(fresh)


def test_shards_that_stay_whole_are_linked(project, sheet):
    years = {"2010": sheet("2010")}
    tiled(project, years)
    before = [path.stat() for path in sorted(project.pixels.glob("c/*/0/0/0"))]
    tiled(project, {**years, "2020": sheet("2020")})
    after = [path.stat() for path in sorted(project.pixels.glob("c/*/0/0/0"))]
    assert [stat.st_ino for stat in after[:2]] == [stat.st_ino for stat in before[:2]]
    assert [stat.st_nlink for stat in after] == [1] * 5


def test_where_links_are_impossible_shards_are_copied(project, sheet, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    years = {"2010": sheet("2010")}
    more = {**years, "2020": sheet("2020")}
    tiled(project, years)
    assert tiled(project, more).kept == 36
    fresh = new_project(tmp_path / "fresh")
    tiled(fresh, more)
    assert tree(project) == tree(fresh)


def test_another_sheet_is_cut_where_it_lies(project, sheet, tmp_path):
    """It is named before the one that is there, and lies over another grid's origin."""
    years = {"2010": sheet("2010", 1), "2020": sheet("2020", 1)}
    tiled(project, years)
    blind(tmp_path / "2010" / "1.tif")
    sheet("2010", 0)
    assert tiled(project, years).kept == 72
    assert len(by_id(project)) == 108


def test_a_changed_sheet_is_cut_anew_and_its_neighbours_stay(project, sheet, tmp_path):
    years = {"2010": sheet("2010", 0), "2020": sheet("2020")}
    sheet("2010", 1)
    tiled(project, years)
    blind(tmp_path / "2010" / "0.tif")
    sheet("2010", 1, seed=1)
    assert tiled(project, years).kept == 72
    for number in (0, 1):
        sheet("2010", number, seed=number)
    fresh = new_project(tmp_path / "fresh")
    tiled(fresh, years)
    for name, (pixels, _) in by_id(fresh).items():
        np.testing.assert_array_equal(by_id(project)[name][0], pixels)


def test_a_year_that_is_left_out_is_gone(project, sheet, tmp_path):
    years = {each: sheet(each) for each in ("2010", "2015", "2020")}
    tiled(project, years)
    del years["2015"]
    assert tiled(project, years).kept == 72
    fresh = new_project(tmp_path / "fresh")
    tiled(fresh, years)
    assert tree(project) == tree(fresh)


@pytest.mark.parametrize(
    "change", ["grid.stride=16", "grid.overlap=nearest-centre", "grid.bands=[1,2]"]
)
def test_settings_that_matter_to_pixels_keep_nothing(project, sheet, change):
    years = {"2010": sheet("2010"), "2020": sheet("2020")}
    tiled(project, years)
    assert tiled(project, years, change).kept == 0


def test_labels_and_masks_of_changed_ground_are_kept_too(project, sheet, write_raster, tmp_path):
    ones = np.random.default_rng(0).integers(0, 2, (1, SIDE, SIDE)).astype(np.uint8)
    labels = write_raster("labels.tif", ones * 60, origin=(LEFT, TOP))
    mask = write_raster("mask.tif", ones, origin=(LEFT, TOP))
    years = {each: sheet(each) for each in ("2010", "2015")}
    more = {**years, "2020": sheet("2020")}
    options = {"labels": {"2010": labels}, "changed": {"2015": mask}}
    fresh = new_project(tmp_path / "fresh")
    tile_sources(project, years, **options)
    tile_sources(fresh, more, **options)
    tile_sources(project, more, **options)
    assert tree(project) == tree(fresh)
    write_raster("mask.tif", 1 - ones, origin=(LEFT, TOP + 1))
    said = []
    tile_sources(project, more, progress=lambda task, *_, **__: said.append(task), **options)
    assert "72 tiles are kept as they are, 36 are cut" in said


def test_splits_stay_where_they_were_drawn(project, sheet, tmp_path):
    """By blocks; new ground is drawn by the same rule, and regions stay apart."""
    years = {"2010": sheet("2010", 0), "2020": sheet("2020", 0)}
    for number in (1, 2):
        sheet("2010", number), sheet("2020", number)
    rule = ("split.by=blocks",)
    tiled(project, years, *rule)
    before = by_id(project)
    for number in (3, 4, 5):
        sheet("2010", number), sheet("2020", number)
    made = tiled(project, years, *rule)
    after = by_id(project)
    assert made.kept == len(before)
    assert {name: after[name][1] for name in before} == {n: s for n, (_, s) in before.items()}
    new = {split for name, (_, split) in after.items() if name not in before}
    assert new == {0, 1, 2}
    table = made.table
    for split in (1, 2):
        own, other = table.select(table.split == split), table.select(table.split != split)
        gap = np.abs(own.col[:, None] - other.col), np.abs(own.row[:, None] - other.row)
        assert np.maximum(*gap).min() > 1, "a tile's width lies between"
    again = new_project(tmp_path / "again")
    tiled(again, years, *rule)
    assert tiled(project, years, *rule).kept == 0, "up to date"


def test_another_seed_draws_all_splits_again_and_cuts_nothing(project, sheet, tmp_path):
    years = {"2010": sheet("2010", 0)}
    for number in (1, 2):
        sheet("2010", number)
    tiled(project, years, "split.by=blocks", "split.buffer=0")
    blind(tmp_path / "2010" / "0.tif")
    made = tiled(project, years, "split.by=blocks", "split.buffer=0", "split.seed=3")
    assert made.kept == len(made.table) == 108
    fresh = new_project(tmp_path / "fresh")
    for number in range(3):
        sheet("2010", number)
    tiled(fresh, years, "split.by=blocks", "split.buffer=0", "split.seed=3")
    assert {n: s for n, (_, s) in by_id(project).items()} == {
        n: s for n, (_, s) in by_id(fresh).items()
    }


def test_an_earlier_year_does_not_move_the_grid(project, sheet):
    years = {"2010": sheet("2010")}
    tiled(project, years, gsd=())
    made = tiled(project, {"2000": sheet("2000", gsd=0.7), **years}, gsd=())
    assert made.grid == "EPSG:32631/32m/32px"
    assert made.kept == 36


def test_force_keeps_nothing(project, sheet):
    years = {"2010": sheet("2010")}
    tiled(project, years)
    assert tiled(project, years, force=True).kept == 0


class BrokenOffError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3])
def test_broken_off_nothing_is_lost(project, sheet, tmp_path, monkeypatch, after):
    years = {"2010": sheet("2010")}
    more = {"2000": sheet("2000"), **years, "2020": sheet("2020")}
    tiled(project, years)
    before = tree(project)
    real, made = Shard.save_record, []

    def save(self, **columns):
        if len(made) == after:
            raise BrokenOffError
        made.append(self.number)
        return real(self, **columns)

    monkeypatch.setattr(Shard, "save_record", save)
    with pytest.raises(BrokenOffError):
        tiled(project, more)
    assert tree(project) == before
    monkeypatch.setattr(Shard, "save_record", real)
    said = []
    tiled(project, more, progress=lambda task, *_, **__: said.append(task))
    assert any(task.startswith(f"resuming: {16 * after} of 108") for task in said)
    fresh = new_project(tmp_path / "fresh")
    tiled(fresh, more)
    assert tree(project) == tree(fresh)


def test_shards_of_another_length_are_not_kept(project, sheet, monkeypatch):
    years = {"2010": sheet("2010")}
    tiled(project, years)
    monkeypatch.setattr(store, "SHARD_BYTES", 2**20)
    assert tiled(project, {**years, "2020": sheet("2020")}).kept == 0


def test_what_is_stale_is_named(indexed, copied, monkeypatch):
    monkeypatch.undo()
    project = copied(indexed)
    sources = [
        config.SourceConfig(year=year, images=str(indexed.imagery / f"[!l]*_{year}.tif"))
        for year in ("2010", "2020")
    ]
    sources.append(config.SourceConfig(year="2030", images=str(indexed.imagery / "train_2020.tif")))
    wanted = ["grid.size=32", "split.by=source", "split.validation=validation*", "split.test=test*"]
    settings = config.with_overrides(config.Config(source=tuple(sources)), wanted)
    made = tile(project, settings, workers=1)
    name = indexed.embedded.name
    assert made.stale == (f"embeddings {name}", f"index {name}")
    assert made.kept == len(indexed.tiles)


def test_two_folders_of_a_year_are_joined(project, sheet, tmp_path):
    first, second = sheet("2010", 0), sheet("2011", 1)
    sources = tuple(config.SourceConfig(year="2010", images=str(p)) for p in (first, second))
    settings = config.with_overrides(config.Config(source=sources), ["grid.size=32"])
    made = tile(project, settings, workers=1)
    assert len(made.table) > 36
    assert made.table.years == ("2010",)
    assert set(made.table.sources) == {"0.tif", "1.tif"}


def test_rows_of_the_store_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    n = 50
    epsg, col, row = rng.integers([[32629], [-9], [-9]], [[32632], [9], [9]], (3, n))
    rows = StoreRows(
        Grid("utm", 32, 0.5, 16), ("a", "b"), ("x.tif",), epsg, col, row, rng.integers(0, 2, n),
        rng.integers(0, 3, n), rng.integers(0, 2**64, n, np.uint64), rng.random(n, np.float32),
        np.zeros(n, np.int64), np.ones(n, np.int64), np.full(n, np.nan, np.float32),
        ({"digest": "d"},), "rule", 12.5, "/x.tif",
    )  # fmt: skip
    rows.save(tmp_path / "rows.parquet")
    found = StoreRows.load(tmp_path / "rows.parquet")
    for name, value in vars(rows).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(found, name), value)
        else:
            assert getattr(found, name) == value
    cells = {}
    for i in range(n):
        cells[rows.years[rows.year[i]], epsg[i], col[i], row[i]] = i
    for (year, *cell), i in cells.items():
        got = found.find(year, *(np.array([value]) for value in cell))
        assert (epsg[got[0]], col[got[0]], row[got[0]]) == tuple(cell)
        assert rows.year[got[0]] == rows.year[i]
    assert found.find("a", np.array([4326]), col[:1], row[:1]).tolist() == [-1]
    assert found.find("c", epsg[:1], col[:1], row[:1]).tolist() == [-1]

"""Index and query: exact answers, from an index alone, and none from a stale one."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
from command_line import run_command
from PIL import Image
from processes import finish, python
from rasterio.warp import transform
from rasterio.windows import Window
from small_project import CRS, SIZE, write_tiff

from geomatch import config
from geomatch.data import index_rows
from geomatch.data.embeddings import Embeddings
from geomatch.errors import GeomatchError, StaleError, UsageError
from geomatch.geo import footprints
from geomatch.index import index
from geomatch.query import query
from geomatch.search.whitening import whitening

COUNTS = (44, 44)
"""Tiles of each year."""
KEYS = ["query", "rank", "tile", "year", "score", "lon", "lat", "distance_m"]
KEYS += ["probability", "match"]


@pytest.fixture(scope="module")
def cosines(indexed):
    """(n, n) similarity of all tiles, computed apart."""
    vectors = Embeddings.load(indexed.embedded.path).vectors.astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


def lonlat(tiles, i, east=0.0, north=0.0):
    """Degrees of a point so many metres off the centre of a tile."""
    x, y = tiles.centres()[i] + [east, north]
    (lon,), (lat,) = transform(CRS, "OGC:CRS84", [x], [y])
    return f"{lon:.8f},{lat:.8f}"


def of_year(tiles, year):
    return np.flatnonzero(tiles.year == tiles.years.index(year))


def assert_nearest(indexed, cosines, found, asked, searched):
    """The answers are the best of the tiles searched, by similarity, in order."""
    ids = indexed.tiles.ids()
    best = np.sort(cosines[asked][searched])[::-1][: len(found.matches)]
    np.testing.assert_allclose([m.score for m in found.matches], best, atol=1e-5)
    for rank, match in enumerate(found.matches, 1):
        position = ids.index(match.tile)
        assert match.rank == rank
        assert position in searched
        assert match.score == pytest.approx(cosines[asked, position], abs=1e-5)
    assert len({match.tile for match in found.matches}) == len(found.matches)


# By tile


@pytest.mark.parametrize("asked", [0, 17, 50, 87])
def test_answers_are_the_nearest_of_the_other_year(indexed, cosines, asked):
    tiles = indexed.tiles
    searched = np.flatnonzero(tiles.year != tiles.year[asked])
    found = query(indexed.project, tiles.ids()[asked], top=7)
    assert len(found.matches) == 7
    assert_nearest(indexed, cosines, found, asked, searched)
    assert {match.query for match in found.matches} == {tiles.ids()[asked]}


@pytest.mark.parametrize("asked", [3, 60])
def test_the_own_year_is_searched_on_request_without_the_tile_itself(indexed, cosines, asked):
    searched = np.setdiff1d(np.arange(88), [asked])
    found = query(indexed.project, indexed.tiles.ids()[asked], top=87, same_year=True)
    assert len(found.matches) == 87
    assert_nearest(indexed, cosines, found, asked, searched)


@pytest.mark.parametrize("year", ["2010", "2020"])
def test_a_year_named_is_searched_alone(indexed, cosines, year):
    asked = int(of_year(indexed.tiles, "2010")[4])
    searched = np.setdiff1d(of_year(indexed.tiles, year), [asked])
    found = query(indexed.project, indexed.tiles.ids()[asked], years=(year,))
    assert_nearest(indexed, cosines, found, asked, searched)


def test_no_more_answers_than_tiles(indexed, cosines):
    found = query(indexed.project, indexed.tiles.ids()[0], top=1000)
    assert len(found.matches) == 44
    assert_nearest(indexed, cosines, found, 0, np.flatnonzero(indexed.tiles.year == 1))


def test_places_and_distances_are_of_tile_centres(indexed):
    tiles, ids = indexed.tiles, indexed.tiles.ids()
    found = query(indexed.project, ids[5])
    centres, degrees = tiles.centres(), footprints.lonlat(tiles.epsg, tiles.centres())
    for match in found.matches:
        i = ids.index(match.tile)
        assert match.distance_m == pytest.approx(np.hypot(*(centres[i] - centres[5])))
        assert (match.lon, match.lat) == pytest.approx(tuple(degrees[i]))
        assert match.year == tiles.years[tiles.year[i]]
    assert found.query.store_row == tiles.store_row[5]
    assert list(found.rows) == [tiles.store_row[ids.index(m.tile)] for m in found.matches]


def test_a_trained_encoder_finds_most_test_places(indexed):
    tiles = indexed.tiles
    asked = [tiles.ids()[i] for i in np.flatnonzero((tiles.split == 2) & (tiles.year == 0))]
    first = [query(indexed.project, tile).matches[0].tile for tile in asked]
    right = [a.split("@")[0] == b.split("@")[0] for a, b in zip(asked, first, strict=True)]
    assert np.mean(right) > 0.5


@pytest.mark.parametrize("by_point", [False, True])
def test_a_query_by_tile_needs_no_jax(indexed, by_point):
    script = (
        "import sys; from pathlib import Path\n"
        "from geomatch.project import Project; from geomatch.query import query\n"
        "found = query(Project(Path(sys.argv[1])), sys.argv[2])\n"
        "assert len(found.matches) == 5\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    target = lonlat(indexed.tiles, 0) if by_point else indexed.tiles.ids()[0]
    out = finish(python("-c", script, str(indexed.root), target))
    assert "'faiss'" in out
    # Pandas is no requirement; where it is installed, pyarrow imports it if given the occasion.
    for heavy in ("jax", "flax", "orbax", "optax", "pandas"):
        assert f"'{heavy}'" not in out


# In parts


@pytest.fixture(scope="module")
def in_parts(indexed, tmp_path_factory):
    """The index again, with groups of 10 rows."""
    project = indexed.copied(tmp_path_factory.mktemp("parts") / "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_rows, "ROWS", 10)
        index(project)
    (folder,) = project.indexes.iterdir()
    assert pq.ParquetFile(folder / "tiles.parquet").num_row_groups == 9
    return project


@pytest.fixture
def read_groups(monkeypatch):
    """The groups of rows that are read of the index, as they are read."""
    read, whole = [], pq.ParquetFile.read_row_group

    def read_row_group(self, group, columns=None):
        read.append(group)
        return whole(self, group, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
    return read


@pytest.mark.parametrize("position", [0, 9, 10, 43, 44, 87])
def test_an_id_is_found_and_only_its_group_is_read(in_parts, read_groups, position):
    (folder,) = in_parts.indexes.iterdir()
    ids = pq.read_table(folder / "tiles.parquet")["id"].to_pylist()
    rows = index_rows.IndexRows(folder, COUNTS)
    read_groups.clear()
    assert rows.find(ids[position]) == position
    assert set(read_groups) == {position // 10}
    assert rows.find("1_1@2020") is None


def test_ids_of_one_key_are_told_apart(in_parts, monkeypatch, tmp_path, indexed):
    monkeypatch.setattr(index_rows, "_key", lambda name: len(name) % 2)
    index_rows.write(tmp_path, indexed.tiles, footprints.lonlat)
    rows = index_rows.IndexRows(tmp_path, COUNTS)
    for position in range(88):
        assert rows.find(rows.take([position])[0]["id"]) == position


def test_rows_come_in_the_order_asked_for(in_parts, indexed):
    (folder,) = in_parts.indexes.iterdir()
    tiles = indexed.tiles.select(np.argsort(indexed.tiles.year, kind="stable"))
    asked = [87, 3, 3, 40, 12]
    found = index_rows.IndexRows(folder, COUNTS).take(asked)
    assert [row["id"] for row in found] == [tiles.ids()[i] for i in asked]
    assert [(row["x"], row["y"]) for row in found] == [tuple(tiles.centres()[i]) for i in asked]
    assert [row["store_row"] for row in found] == tiles.store_row[asked].tolist()


def test_answers_are_the_same_whatever_the_size_of_a_group(in_parts, indexed):
    for i in (0, 30, 87):
        target = indexed.tiles.ids()[i]
        assert query(in_parts, target) == query(indexed.project, target)


def test_a_point_reads_the_groups_that_may_cover_it(in_parts, indexed, read_groups):
    target = lonlat(indexed.tiles, 20, 3, -5)
    found = query(in_parts, target)
    assert found == query(indexed.project, target)
    assert found.matches[0].query.split("@")[0] == indexed.tiles.cells()[20]
    read_groups.clear()
    (folder,) = in_parts.indexes.iterdir()
    x, y = indexed.tiles.centres()[20]
    covering = index_rows.IndexRows(folder, COUNTS).within(lambda epsg: (x + 3, y - 5), 16)
    assert len(covering) == 2
    assert 2 <= len(read_groups) < 9


# By point


@pytest.mark.parametrize(("east", "north"), [(0, 0), (15, 15), (-15, -15), (15, -15)])
def test_a_point_asks_for_the_newest_tile_over_it(indexed, east, north):
    i = int(of_year(indexed.tiles, "2020")[20])
    found = query(indexed.project, lonlat(indexed.tiles, i, east, north))
    assert found.matches[0].query == indexed.tiles.ids()[i]
    assert {match.year for match in found.matches} == {"2010"}


def test_a_point_asks_for_the_tile_of_a_year_that_is_named(indexed):
    i = int(of_year(indexed.tiles, "2010")[20])
    found = query(indexed.project, lonlat(indexed.tiles, i), from_year="2010")
    assert found.matches == query(indexed.project, indexed.tiles.ids()[i]).matches


def test_a_point_beside_all_tiles_is_reported(indexed):
    west = int(np.argmin(indexed.tiles.col))
    with pytest.raises(GeomatchError, match="no tile covers"):
        query(indexed.project, lonlat(indexed.tiles, west, east=-17))
    with pytest.raises(GeomatchError, match="no tile of 2010 covers"):
        query(indexed.project, "2.0,48.0", from_year="2010")


# By image


def image_of(indexed, path, i, margin=0, off=(0, 0)):
    """A GeoTIFF cut from the imagery around a tile, `margin` px larger on each side."""
    tiles = indexed.tiles
    left, bottom, right, top = tiles.bounds()[i] + np.tile(off, 2)
    source = indexed.imagery / tiles.sources[tiles.source[i]]
    with rasterio.open(source) as sheet:
        box = (left - margin, bottom - margin, right + margin, top + margin)
        left_px, top_px = (round(v) for v in ~sheet.transform @ (box[0], box[3]))
        window = Window(left_px, top_px, SIZE + 2 * margin, SIZE + 2 * margin)
        pixels = sheet.read(window=window, boundless=True)
    write_tiff(path, pixels, (box[0], box[3]))
    return pixels


def inner(tiles):
    """A training tile of 2010 with others all around."""
    (i,) = np.flatnonzero(
        (tiles.year == 0) & (tiles.col == tiles.col.min() + 2) & (tiles.row == tiles.row.min() + 2)
    )
    return int(i)


@pytest.mark.parametrize("margin", [0, 20])
def test_a_georeferenced_image_is_the_tile_over_its_centre(indexed, tmp_path, margin):
    i, notes = inner(indexed.tiles), []
    image_of(indexed, tmp_path / "cut.tif", i, margin)
    found = query(
        indexed.project,
        str(tmp_path / "cut.tif"),
        progress=lambda task, *_: notes.append(task),
    )
    best = found.matches[0]
    assert (best.tile, best.distance_m) == (indexed.tiles.ids()[i], 0)
    assert best.score == pytest.approx(1, abs=1e-4)
    assert best.query == str(tmp_path / "cut.tif")
    assert found.query.store_row is None
    assert "the grid cell at its centre" in notes[0]


def test_an_image_off_the_grid_is_cut_where_it_lies(indexed, tmp_path):
    i, notes = inner(indexed.tiles), []
    image_of(indexed, tmp_path / "cut.tif", i, off=(5, -7))
    found = query(
        indexed.project,
        str(tmp_path / "cut.tif"),
        top=88,
        progress=lambda task, *_: notes.append(task),
    )
    assert "off the grid" in notes[0]
    metres = {match.tile: match.distance_m for match in found.matches}
    assert metres[indexed.tiles.ids()[i]] == pytest.approx(np.hypot(5, 7))


def test_an_image_smaller_than_a_tile_is_refused(indexed, tmp_path):
    write_tiff(tmp_path / "small.tif", np.zeros((3, 20, 20), np.uint8), (500_000, 5_000_000))
    with pytest.raises(GeomatchError, match="covers 20 x 20 m, a tile is 32 m"):
        query(indexed.project, str(tmp_path / "small.tif"))


def test_an_image_of_other_bands_is_refused(indexed, tmp_path):
    write_tiff(tmp_path / "grey.tif", np.zeros((1, 40, 40), np.uint8), (500_000, 5_000_000))
    with pytest.raises(GeomatchError, match="1 bands, but the model takes 3"):
        query(indexed.project, str(tmp_path / "grey.tif"))


def test_a_plain_image_is_its_centre_square_without_a_place(indexed, tmp_path):
    i, notes = inner(indexed.tiles), []
    pixels = np.moveaxis(image_of(indexed, tmp_path / "cut.tif", i), 0, -1)
    wide = np.zeros((SIZE, SIZE + 16, 3), np.uint8)
    wide[:, 8:-8] = pixels
    Image.fromarray(wide).save(tmp_path / "plain.png")
    found = query(
        indexed.project,
        str(tmp_path / "plain.png"),
        progress=lambda task, *_: notes.append(task),
    )
    assert found.matches[0].tile == indexed.tiles.ids()[i]
    assert found.matches[0].score == pytest.approx(1, abs=1e-4)
    assert {match.distance_m for match in found.matches} == {None}
    assert "no georeference" in notes[0]


def test_an_image_query_searches_the_years_that_are_named(indexed, tmp_path):
    image_of(indexed, tmp_path / "cut.tif", inner(indexed.tiles))
    found = query(indexed.project, str(tmp_path / "cut.tif"), years=("2020",))
    assert {match.year for match in found.matches} == {"2020"}


# What is refused


def test_wrong_use_is_reported(indexed):
    tile = indexed.tiles.ids()[0]
    for top in (0, -1):
        with pytest.raises(UsageError, match=f"--top {top}"):
            query(indexed.project, tile, top=top)
    with pytest.raises(UsageError, match="no year 1999") as failed:
        query(indexed.project, tile, years=("1999",))
    assert failed.value.hint == "Available: 2010, 2020."
    with pytest.raises(UsageError, match="no year 1999"):
        query(indexed.project, tile, from_year="1999")
    with pytest.raises(GeomatchError, match="neither a tile of the index, nor") as failed:
        query(indexed.project, "nowhere")
    assert indexed.tiles.ids()[0].partition("@")[0][:3] in failed.value.hint
    with pytest.raises(GeomatchError, match="no index 'nope'"):
        query(indexed.project, tile, index="nope")


def test_query_before_index_and_index_before_embed_name_the_command(trained):
    with pytest.raises(GeomatchError) as failed:
        query(trained.project, "0_0@2010", build=False)
    assert failed.value.hint == "Run: geomatch index"
    for use in (lambda: query(trained.project, "0_0@2010"), lambda: index(trained.project)):
        with pytest.raises(GeomatchError) as failed:
            use()
        assert failed.value.hint == "Run: geomatch embed"


def test_a_missing_index_is_made_and_told(indexed, copied):
    project, tile = copied(indexed), indexed.tiles.ids()[0]
    shutil.rmtree(project.indexes)
    done = run_command("query", "-p", project.root, tile, "--no-build")
    assert done.exit_code == 1
    assert "Run: geomatch index" in done.stderr
    assert not project.indexes.exists()
    done = run_command("query", "-p", project.root, tile, "--json", "--set=index.metric=euclidean")
    assert done.exit_code == 0, done.output
    assert "the index of run1@18 is missing or stale: making it" in done.stderr
    (manifest,) = project.indexes.glob("*/manifest.json")
    assert json.loads(manifest.read_text())["metric"] == "euclidean"
    assert max(row["score"] for row in json.loads(done.stdout)) < 0
    # Once.
    assert "making" not in run_command("query", "-p", project.root, tile).stderr


def test_the_latest_embeddings_are_searched_or_a_later_index_of_others(indexed, copied):
    project, tile = copied(indexed), indexed.tiles.ids()[0]
    (path,) = project.embeddings.glob("*.parquet")
    newer = path.with_name("run2@5.parquet")
    table = pq.read_table(path)
    metadata = table.schema.metadata
    manifest = {**json.loads(metadata[b"geomatch"]), "name": "run2@5", "fingerprint": "other"}
    vectors = np.random.default_rng(0).normal(size=(88, manifest["dimension"])).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    table = table.set_column(table.schema.names.index("embedding"), "embedding", column)
    table = table.replace_schema_metadata({**metadata, b"geomatch": json.dumps(manifest)})
    pq.write_table(table, newer)
    old = query(project, tile, build=False)
    new = query(project, tile)
    assert project.index_names() == ["run1@18", "run2@5"]
    assert new != old
    index(project, run="run1")
    assert query(project, tile) == old
    assert query(project, tile, index="run2") == new


def test_an_index_of_embeddings_that_changed_is_stale(indexed, copied):
    project = copied(indexed)
    (path,) = project.embeddings.glob("*.parquet")
    table = pq.read_table(path)
    metadata = table.schema.metadata
    manifest = {**json.loads(metadata[b"geomatch"]), "fingerprint": "another"}
    pq.write_table(
        table.replace_schema_metadata({**metadata, b"geomatch": json.dumps(manifest)}), path
    )
    tile = indexed.tiles.ids()[0]
    with pytest.raises(StaleError) as failed:
        query(project, tile, build=False)
    assert failed.value.hint == "Run: geomatch index"
    assert len(query(project, tile).matches) == 5
    assert len(query(project, tile, build=False).matches) == 5


def test_an_image_is_not_searched_in_an_index_of_another_checkpoint(indexed, copied, tmp_path):
    project = copied(indexed)
    (manifest,) = project.indexes.glob("*/manifest.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "model": "another"}))
    image_of(indexed, tmp_path / "cut.tif", 0)
    with pytest.raises(StaleError, match="changed since it was embedded") as failed:
        query(project, str(tmp_path / "cut.tif"))
    assert failed.value.hint == "Run: geomatch embed, then geomatch index"
    # A tile needs no encoder.
    assert query(project, indexed.tiles.ids()[0]).matches


@pytest.mark.parametrize("damage", ["missing", "cut off"])
@pytest.mark.parametrize("name", ["vectors-000000000044.faiss", "tiles.parquet", "keys.npy"])
def test_a_damaged_index_is_reported(indexed, copied, damage, name):
    project = copied(indexed)
    (segment,) = project.indexes.glob(f"*/{name}")
    if damage == "missing":
        segment.unlink()
    else:
        segment.write_bytes(segment.read_bytes()[:20])
    with pytest.raises(StaleError) as failed:
        query(project, indexed.tiles.ids()[0])
    assert failed.value.hint == "Run: geomatch index"


# The command


def test_json_follows_the_contract(indexed):
    tile = indexed.tiles.ids()[0]
    result = run_command("query", "-p", indexed.root, tile, "--json", "--top", "3")
    assert result.exit_code == 0
    rows = json.loads(result.stdout)
    assert [list(row) for row in rows] == [KEYS] * 3
    wanted = [match.as_json() for match in query(indexed.project, tile, top=3).matches]
    assert rows == wanted


def test_json_of_a_plain_image_has_null_distances(indexed, tmp_path):
    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(tmp_path / "plain.png")
    result = run_command(
        "query", "-p", indexed.root, str(tmp_path / "plain.png"), "--json", "--quiet"
    )
    rows = json.loads(result.stdout)
    assert [row["distance_m"] for row in rows] == [None] * 5
    assert "NaN" not in result.stdout


def test_a_negative_longitude_needs_no_escape(indexed):
    result = run_command("query", "-p", indexed.root, "-1.5,47.2")
    assert result.exit_code == 1
    assert "no tile covers -1.5,47.2" in result.output
    inside = lonlat(indexed.tiles, 20)
    assert inside.startswith("-2.")
    result = run_command("query", "-p", indexed.root, inside, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[0]["query"].startswith(indexed.tiles.cells()[20])


def test_answers_are_shown_as_a_table_too(indexed):
    found = query(indexed.project, indexed.tiles.ids()[0], top=2)
    result = run_command("query", "-p", indexed.root, indexed.tiles.ids()[0], "--top", "2")
    assert result.exit_code == 0
    for match in found.matches:
        assert match.tile in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["TILE", "--top", "0"], 2),
        (["TILE", "--top", "x"], 2),
        (["TILE", "--year", "1999"], 2),
        ([], 2),
        (["nowhere"], 1),
        (["TILE", "--index", "nope"], 1),
    ],
)
def test_exit_codes(indexed, arguments, code):
    arguments = [indexed.tiles.ids()[0] if a == "TILE" else a for a in arguments]
    result = run_command("query", "-p", indexed.root, *arguments)
    assert result.exit_code == code
    assert result.stdout == ""


def test_a_moved_project_still_answers(indexed, tmp_path):
    shutil.copytree(indexed.root, tmp_path / "moved")
    moved = dataclasses.replace(indexed.project, root=tmp_path / "moved")
    tile = indexed.tiles.ids()[0]
    assert query(moved, tile).matches == query(indexed.project, tile).matches


def test_an_image_is_searched_in_a_project_that_moved(indexed, tmp_path):
    shutil.copytree(indexed.root, tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "second")
    second = dataclasses.replace(indexed.project, root=tmp_path / "second")
    image_of(indexed, tmp_path / "cut.tif", inner(indexed.tiles))
    found = query(second, str(tmp_path / "cut.tif"))
    assert found.matches[0].tile == indexed.tiles.ids()[inner(indexed.tiles)]


@pytest.mark.parametrize("point", ["500,100", "39.7,-104.9", "-180.5,0"])
def test_a_point_off_the_globe_is_reported(indexed, point):
    with pytest.raises(UsageError, match="not a longitude and latitude"):
        query(indexed.project, point)


def test_a_run_started_again_makes_its_index_stale(indexed, copied):
    project = copied(indexed)
    path = project.run("run1") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "id": "another"}))
    with pytest.raises(StaleError, match="run1 was started again") as caught:
        query(project, "0_0@2010")
    assert "geomatch embed" in caught.value.hint


# Whitened


def test_a_whitened_index_is_fitted_on_training_tiles_alone(indexed, copied, tmp_path):
    project, tiles = copied(indexed), indexed.tiles
    done = run_command("index", "-p", project.root, "--whiten")
    assert done.exit_code == 0, done.output
    vectors = Embeddings.load(indexed.embedded.path).vectors
    training = tiles.split == 0
    kernel, bias = whitening(vectors[training], tiles.year[training], training.sum() // 2)
    white = (vectors @ kernel + bias).astype(np.float64)
    white /= np.linalg.norm(white, axis=1, keepdims=True)
    found = query(project, tiles.ids()[60], top=7)
    searched = np.flatnonzero(tiles.year != tiles.year[60])
    assert_nearest(indexed, white @ white.T, found, 60, searched)
    # Images go through the whitening as well.
    image_of(indexed, tmp_path / "cut.tif", inner(tiles))
    best = query(project, str(tmp_path / "cut.tif")).matches[0]
    assert best.tile == tiles.ids()[inner(tiles)]
    assert best.score == pytest.approx(1, abs=1e-3)
    (path,) = project.indexes.glob("*/whitening.npz")
    path.write_bytes(b"torn")
    with pytest.raises(StaleError):
        query(project, tiles.ids()[60])
    assert run_command("index", "-p", project.root).exit_code == 0
    assert query(project, tiles.ids()[60], top=7).matches != found.matches


def test_whitening_needs_training_tiles(indexed, copied):
    project = copied(indexed)
    table = pq.read_table(project.catalogue)
    split = pa.array(["test"] * len(table))
    at = table.schema.names.index("split")
    pq.write_table(
        table.set_column(at, "split", split).replace_schema_metadata(table.schema.metadata),
        project.catalogue,
    )
    with pytest.raises(GeomatchError, match="training tiles, of which there are 0"):
        index(project, settings=config.IndexConfig(whiten=True))

"""Indexes on disk: exact and approximate engines, and filters within the search."""

from __future__ import annotations

import json
from dataclasses import replace

import faiss
import neighbourhood
import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import run_command
from hand_made import hand_made_project, hand_made_tiles

from geomatch.config import IndexConfig
from geomatch.data import index_rows
from geomatch.data.filters import Filter
from geomatch.data.index_rows import IndexRows
from geomatch.errors import StaleError
from geomatch.index import index
from geomatch.query import query
from geomatch.search import approximate, engines, flat
from geomatch.search.engines import LocalVectors

METRICS = ["cosine", "euclidean"]
FILTERS = list(neighbourhood.filters(hand_made_tiles([0] * 821, [0] * 821, [0] * 821)))
TILES, VECTORS = neighbourhood.tiles(), neighbourhood.descriptors().astype(np.float32)
FORMS = {
    "float32": IndexConfig(),
    "float16": IndexConfig(dtype="float16"),
    "int8": IndexConfig(dtype="int8"),
    "ivfpq": IndexConfig(engine="ivfpq"),
    "hnsw": IndexConfig(engine="hnsw"),
    # Files of some 700 and 500 vectors.
    "ivfpq in parts": IndexConfig(engine="ivfpq", memory=17e-6),
    "hnsw in parts": IndexConfig(engine="hnsw", memory=100e-6),
}


@pytest.fixture(scope="module", params=METRICS)
def project(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("neighbourhood") / request.param
    return hand_made_project(root, TILES, VECTORS, request.param)


@pytest.fixture(scope="module", params=FORMS)
def built(request, project):
    """An index of every form: its vectors, its manifest, and its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_rows, "ROWS", 256)
        patch.setattr(flat, "SEGMENT_BYTES", 50_000)
        made = index(project, settings=FORMS[request.param])
    folder = project.indexes / made.name
    manifest = project.index_manifest(made.name)
    rows = IndexRows(folder, manifest.counts)
    return LocalVectors(folder, manifest, rows), manifest, folder, request.param


@pytest.fixture(scope="module")
def passing():
    """Every filter by name, with the positions that pass it by a plain loop."""
    known = neighbourhood.filters(TILES)
    return {name: (wanted, neighbourhood.passing(TILES, wanted)) for name, wanted in known.items()}


@pytest.fixture(autouse=True)
def _one_thread():
    """Else threads wait for one another for most of the time that such small work takes."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


@pytest.mark.parametrize("name", FILTERS)
def test_answers_are_the_nearest_that_pass_and_as_many_as_asked_for(built, passing, name):
    vectors, manifest, _, form = built
    wanted, passed = passing[name]
    asked = VECTORS[[0, 3, 820, 1599, 1600, 2500, 3000, 3199, 700, 701]]
    for queries, k in ((asked[:1], 5), (asked, 5), (asked[:2], 60)):
        scores, positions = vectors.search(queries, k, wanted)
        count = min(k, len(passed))
        assert scores.shape == positions.shape == (len(queries), count)
        hits = 0
        for query_, mine, found in zip(queries, scores, positions, strict=True):
            true = neighbourhood.scores(VECTORS, query_, manifest.metric)
            assert np.isin(found, passed).all()
            assert len(set(found.tolist())) == count
            coarse = {"float32": 1e-4, "float16": 5e-3}.get(form, 0.06)
            np.testing.assert_allclose(mine, true[found], atol=coarse)
            assert (np.diff(mine) <= 0).all()
            best = passed[np.argsort(-true[passed], kind="stable")[:count]]
            hits += len(np.intersect1d(best, found))
            if form == "float32":
                np.testing.assert_array_equal(found, best)
        assert hits >= 0.85 * len(queries) * count


@pytest.mark.parametrize("position", [0, 1599, 1600, 3199])
def test_a_vector_is_found_by_its_position(built, position):
    vectors, manifest, _, form = built
    wanted = VECTORS[position]
    if manifest.metric == "cosine":
        wanted = wanted / np.linalg.norm(wanted)
    coarse = {"float32": 1e-6, "float16": 2e-3}.get(form, 0.03)
    np.testing.assert_allclose(vectors.vector(position), wanted, atol=coarse)


def test_the_recall_is_measured_and_kept(built):
    _, manifest, folder, form = built
    engine = manifest.engine
    kept = json.loads((folder / "manifest.json").read_text())["engine"]
    assert kept["recall@5"] == engine.recall
    if form == "float32":
        assert (engine.recall, engine.queries) == (1, 0)
    else:
        assert engine.queries == engines.QUERIES
        assert 0.95 <= engine.recall <= 1
    assert len(engine.segments) > 1
    parts = list(folder.glob("approximate-*.faiss"))
    assert len(parts) == len(engine.parts)
    assert (len(parts) > 2) == ("parts" in form)


def test_a_recall_is_what_a_plain_loop_says(monkeypatch, tmp_path):
    """Of a search that looks at one cell and ranks few candidates again."""
    monkeypatch.setattr(approximate, "EFFORTS", (1,))
    project = hand_made_project(tmp_path / "project", TILES, VECTORS)
    made = index(project, settings=IndexConfig(engine="ivfpq"))
    manifest = project.index_manifest(made.name)
    folder = project.indexes / made.name
    vectors = LocalVectors(folder, manifest, IndexRows(folder, manifest.counts))
    sample = np.unique(np.linspace(0, 3199, engines.QUERIES).astype(int))
    hits = 0
    for i in sample:
        other = Filter(years=(1 - i // 1600,))
        found = vectors.search(VECTORS[[i]], 6, other)[1][0][:5]
        true = neighbourhood.scores(VECTORS, VECTORS[i], "cosine")
        true[TILES.year == i // 1600] = -1
        hits += len(np.intersect1d(np.argsort(-true)[:5], found))
    assert made.engine.recall == pytest.approx(hits / 5 / len(sample), abs=1e-9)
    assert made.engine.recall < 1


@pytest.mark.parametrize("name", FILTERS)
def test_rows_that_pass_are_those_of_a_plain_loop(monkeypatch, tmp_path, passing, name):
    monkeypatch.setattr(index_rows, "ROWS", 100)
    index_rows.write(tmp_path, TILES, neighbourhood.footprints.lonlat)
    wanted, passed = passing[name]
    chosen = IndexRows(tmp_path, (1600, 1600)).select(wanted)
    np.testing.assert_array_equal(np.flatnonzero(chosen), passed)


@pytest.mark.parametrize(
    ("name", "most"), [("year", 0), ("both years", 0), ("box", 20), ("away", 28), ("far", 32)]
)
def test_only_groups_that_a_filter_divides_are_read(monkeypatch, tmp_path, name, most):
    monkeypatch.setattr(index_rows, "ROWS", 100)
    index_rows.write(tmp_path, TILES, neighbourhood.footprints.lonlat)
    rows, read = IndexRows(tmp_path, (1600, 1600)), []
    whole = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, **options: read.append(group) or whole(self, group, **options),
    )
    rows.select(neighbourhood.filters(TILES)[name])
    assert len(read) <= most


def test_a_filter_that_leaves_few_is_searched_exactly(monkeypatch, tmp_path):
    project = hand_made_project(tmp_path / "project", TILES, VECTORS)
    made = index(project, settings=IndexConfig(engine="hnsw"))
    manifest, folder = project.index_manifest(made.name), project.indexes / made.name
    rows = IndexRows(folder, manifest.counts)
    opened = []
    monkeypatch.setattr(
        approximate.ApproximateVectors,
        "_search_file",
        lambda *arguments: opened.append(arguments) or 1 / 0,
    )
    vectors = LocalVectors(folder, manifest, rows)
    wanted = neighbourhood.filters(TILES)["few"]
    found = vectors.search(VECTORS[:1], 5, wanted)[1]
    passed = neighbourhood.passing(TILES, wanted)
    assert len(passed) < 0.05 * 1600
    true = neighbourhood.scores(VECTORS, VECTORS[0], "cosine")
    assert set(found[0]) == set(passed[np.argsort(-true[passed])[:5]])
    assert not opened
    with pytest.raises(ZeroDivisionError):
        vectors.search(VECTORS[:1], 5, Filter(years=(1,)))


def test_a_search_that_finds_too_few_is_done_again_exactly(monkeypatch, tmp_path):
    project = hand_made_project(tmp_path / "project", TILES, VECTORS)
    made = index(project, settings=IndexConfig(engine="ivfpq"))
    manifest, folder = project.index_manifest(made.name), project.indexes / made.name
    vectors = LocalVectors(folder, manifest, IndexRows(folder, manifest.counts))
    whole = approximate.ApproximateVectors._search_file

    def lossy(self, queries, *rest):
        scores, positions = whole(self, queries, *rest)
        scores[1:, -1], positions[1:, -1] = -np.inf, -1
        return scores, positions

    monkeypatch.setattr(approximate.ApproximateVectors, "_search_file", lossy)
    _, positions = vectors.search(VECTORS[:3], 7, Filter(years=(1,)))
    for i in (1, 2):
        true = neighbourhood.scores(VECTORS[1600:], VECTORS[i], "cosine")
        assert len(np.intersect1d(1600 + np.argsort(-true)[:7], positions[i])) >= 6
    assert (positions >= 0).all()


@pytest.mark.parametrize(
    ("kind", "total", "memory", "wanted"),
    [
        ("ivfpq", 10**7, 2e9, {"code": 64, "part": 27_777_777}),
        ("ivfpq", 33 * 10**6, 2e9, {"code": 32, "part": 50_000_000}),
        ("ivfpq", 33 * 10**6, 1e8, {"code": 16, "part": 4_166_666}),
        ("hnsw", 10**6, 2e9, {"links": 32}),
        ("hnsw", 10**7, 2e9, {"links": 16}),
    ],
)
def test_parameters_follow_size_and_memory(kind, total, memory, wanted):
    made = approximate.plan(kind, total, 128, memory)
    assert {name: getattr(made, name) for name in wanted} == wanted


@pytest.mark.parametrize("dimension", [1, 7, 30, 128])
def test_codes_divide_any_dimension(dimension):
    assert dimension % approximate.plan("ivfpq", 10**6, dimension, 1e9).code == 0


@pytest.mark.parametrize("engine", ["ivfpq", "hnsw"])
@pytest.mark.parametrize("count", [1, 3, 30])
def test_few_tiles_have_an_approximate_index_too(tmp_path, engine, count):
    tiles = hand_made_tiles([*range(count)] * 2, [0] * 2 * count, [0] * count + [1] * count)
    vectors = np.random.default_rng(0).normal(size=(2 * count, 16))
    project = hand_made_project(tmp_path / "project", tiles, vectors)
    index(project, settings=IndexConfig(engine=engine))
    assert len(query(project, tiles.ids()[0], top=9).matches) == min(9, count)


def test_the_command_says_the_recall(tmp_path):
    project = hand_made_project(tmp_path / "project", TILES, VECTORS)
    result = run_command("index", "-p", project.root, "--engine", "ivfpq")
    assert result.exit_code == 0
    recall = project.index_manifest("hand@1").engine.recall
    assert f"recall@5 against exact search: {recall:.3f} of 256 queries" in result.stderr


def test_what_a_killed_command_left_is_written_anew(tmp_path):
    project = hand_made_project(tmp_path / "project", TILES, VECTORS)
    partial = project.indexes / ".hand@1.partial"
    partial.mkdir(parents=True)
    (partial / "vectors-000000000000.faiss").write_bytes(b"half")
    (partial / "approximate-000000000007.faiss").write_bytes(b"half")
    index(project, settings=IndexConfig(engine="ivfpq"))
    assert project.index_names() == ["hand@1"]
    assert not (project.indexes / "hand@1" / "approximate-000000000007.faiss").exists()
    assert not partial.exists()
    assert len(query(project, TILES.ids()[0]).matches) == 5


def test_an_index_of_an_earlier_version_names_the_command(tmp_path):
    project = hand_made_project(tmp_path / "project", TILES, VECTORS)
    made = index(project)
    path = project.indexes / made.name / "manifest.json"
    values = json.loads(path.read_text())
    del values["engine"]
    path.write_text(json.dumps(values))
    with pytest.raises(StaleError) as failed:
        query(project, TILES.ids()[0], build=False)
    assert failed.value.hint == "Run: geomatch index"


def test_tiles_without_years_do_not_find_themselves(tmp_path):
    """Nor does the sample on which the recall is measured."""
    table = hand_made_tiles([*range(300)], [0] * 300, [0] * 300)
    table = replace(table, years=("",), sources=tuple(map(str, range(300))), source=np.arange(300))
    project = hand_made_project(tmp_path / "project", table, VECTORS[:300])
    made = index(project, settings=IndexConfig(dtype="int8"))
    assert 0.9 < made.engine.recall < 1
    found = query(project, table.ids()[7], top=299)
    assert "7" not in {match.tile for match in found.matches}
    assert len(found.matches) == 299

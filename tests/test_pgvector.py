"""An index in PostgreSQL: its answers, its filters, and what must not get in or out."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from urllib.parse import quote

import neighbourhood
import numpy as np
import pytest
from command_line import run_command
from hand_made import hand_made_project
from postgres import PASSWORD, server

from geomatch.data.filters import Filter
from geomatch.errors import GeomatchError, StaleError, UsageError
from geomatch.index import index
from geomatch.query import query
from geomatch.search import pgvector

psycopg = pytest.importorskip("psycopg")

TILES, VECTORS = neighbourhood.tiles(), neighbourhood.descriptors().astype(np.float32)
FILTERS = list(neighbourhood.filters(TILES))


@pytest.fixture(scope="module")
def url():
    with server() as found:
        yield found


@pytest.fixture(scope="module")
def project(url, tmp_path_factory):
    """A project that is indexed in a folder and in the database."""
    root = tmp_path_factory.mktemp("postgres") / "project"
    project = hand_made_project(root, TILES, VECTORS)
    index(project)
    index(project, to=url)
    return project


def opened(url, tiles="tiles"):
    connection = psycopg.connect(url)
    return connection, pgvector.PostgresIndex(connection, tiles, url)


@pytest.mark.parametrize("name", FILTERS)
def test_answers_are_the_nearest_that_pass(project, url, name):
    wanted = neighbourhood.filters(TILES)[name]
    passed = neighbourhood.passing(TILES, wanted)
    connection, found = opened(url)
    with connection:
        asked = VECTORS[[0, 820, 3000]]
        for k in (5, 60):
            scores, positions = found.search(asked, k, wanted)
            count = min(k, len(passed))
            assert positions.shape == scores.shape == (3, count)
            hits = 0
            for each, mine, answers in zip(asked, scores, positions, strict=True):
                true = neighbourhood.scores(VECTORS, each, "cosine")
                assert np.isin(answers, passed).all()
                np.testing.assert_allclose(mine, true[answers], atol=2e-3)
                best = passed[np.argsort(-true[passed])[:count]]
                hits += len(np.intersect1d(best, answers))
            assert hits >= 0.9 * 3 * count


def test_euclidean_scores_are_negative_distances(url, tmp_path):
    project = hand_made_project(tmp_path / "p", TILES, VECTORS, "euclidean", "euclidean")
    index(project, to=url)
    connection, found = opened(url, "euclidean")
    with connection:
        scores, positions = found.search(VECTORS[:2], 7, Filter(years=(1,)))
    for each, mine, answers in zip(VECTORS[:2], scores, positions, strict=True):
        true = neighbourhood.scores(VECTORS, each, "euclidean")
        np.testing.assert_allclose(mine, true[answers], atol=0.01)
        assert (np.diff(mine) <= 0).all()


def test_queries_are_answered_as_from_a_folder(project, url):
    tile = TILES.ids()[820]
    lon, lat = neighbourhood.footprints.lonlat(TILES.epsg, TILES.centres())[1999]
    for target in (tile, f"{lon:.7f},{lat:.7f}"):
        mine = query(project, target, index=url)
        theirs = query(project, target)
        assert mine.query == theirs.query
        for a, b in zip(mine.matches, theirs.matches, strict=True):
            assert a.score == pytest.approx(b.score, abs=2e-3)
        # A database tells no probabilities.
        a, b = (dataclasses.replace(each.matches[0], score=0.0) for each in (mine, theirs))
        assert a == dataclasses.replace(b, probability=None, match=None)
    result = run_command("query", "-p", project.root, tile, "--index", url, "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)) == 5


def test_the_table_has_columns_for_other_programs(project, url):
    with psycopg.connect(url) as connection:
        (table,) = connection.execute(
            "SELECT table_name FROM geomatch.indexes WHERE tiles = 'tiles'"
        ).fetchone()
        rows = connection.execute(
            f"SELECT id, year, split, lon, lat, footprint[1] <-> footprint[0], "
            f"point(lon, lat) <@ footprint FROM geomatch.{table} ORDER BY position"
        ).fetchall()
        kinds = {
            text.split("USING ")[1].split()[0]
            for (text,) in connection.execute(
                "SELECT indexdef FROM pg_indexes WHERE tablename = %s", (table,)
            )
        }
    assert [row[0] for row in rows] == TILES.ids()
    assert {row[1] for row in rows} == {"2000", "2010"}
    assert [row[2] for row in rows] == [("train", "validation", "test")[i] for i in TILES.split]
    assert all(row[6] for row in rows)
    assert kinds == {"btree", "gist", "hnsw"}


def test_an_index_written_again_replaces_the_first(project, url):
    def tables():
        with psycopg.connect(url) as connection:
            kept = connection.execute(
                "SELECT tablename FROM pg_tables WHERE schemaname = 'geomatch'"
            ).fetchall()
            named = connection.execute("SELECT table_name FROM geomatch.indexes").fetchall()
        assert {name for (name,) in kept} - {"indexes"} == {name for (name,) in named}
        return set(named)

    before = tables()
    index(project, to=url)
    after = tables()
    assert len(before) == len(after)
    assert before != after


def test_a_command_that_fails_leaves_nothing(project, url, monkeypatch):
    with psycopg.connect(url) as connection:
        before = connection.execute("SELECT count(*) FROM pg_tables").fetchone()
    monkeypatch.setattr(pgvector, "_make_indexes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        index(project, to=url)
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM pg_tables").fetchone() == before
    assert len(query(project, TILES.ids()[0], index=url).matches) == 5


INJECTIONS = [
    "' OR '1'='1",
    "x'; DROP SCHEMA geomatch CASCADE; --",
    "%s",
    "{}",
    "1'::text OR TRUE --",
    "a\0b",
    "\\' OR 1=1 --",
]


@pytest.mark.parametrize("text", INJECTIONS)
def test_an_injection_finds_nothing_and_does_nothing(project, url, text):
    connection, found = opened(url)
    with connection:
        assert found.find(text) is None
    with pytest.raises(GeomatchError):
        query(project, text, index=url)
    with pytest.raises(UsageError, match="no year"):
        query(project, TILES.ids()[0], years=(text,), index=url)
    assert len(query(project, TILES.ids()[0], index=url).matches) == 5


def test_labels_that_are_sql_are_kept_as_text(url, tmp_path):
    years = tuple(text.replace("\0", "") for text in INJECTIONS[:2])
    table = dataclasses.replace(TILES, years=years)
    project = hand_made_project(tmp_path / "p", table, VECTORS, fingerprint="labels")
    index(project, to=url)
    found = query(project, table.ids()[5], index=url)
    assert {match.year for match in found.matches} == {years[1]}
    assert found.matches[0].tile == table.ids()[1605]


def test_the_database_of_another_project_names_the_command(url, tmp_path):
    other = hand_made_project(tmp_path / "p", TILES, VECTORS, fingerprint="other")
    with pytest.raises(StaleError, match="no index of the tiles of this project") as failed:
        query(other, TILES.ids()[0], index=url)
    assert failed.value.hint == "Run: geomatch index --to postgresql://tester@/postgres"


# Passwords


def forms_of(password):
    return {password, quote(password, safe=""), quote(password)}


@pytest.mark.parametrize(
    "change",
    [
        lambda url: url.replace("tester:", "nobody:"),
        lambda url: url.replace("/postgres?", "/nowhere?"),
        lambda url: url.replace("?host=", "?host=/nowhere"),
        lambda url: url + "&nonsense=1",
        lambda url: url + "&port=abc",
        lambda url: url.replace(quote(PASSWORD, safe=""), PASSWORD),
        lambda url: url.replace(quote(PASSWORD, safe=""), "secret@word"),
        lambda url: url.replace(":" + quote(PASSWORD, safe=""), "") + "&password=secret%2Fword",
        lambda url: url.replace("@/", "@localhost:port/"),
    ],
)
@pytest.mark.parametrize("command", ["index", "query"])
def test_an_error_tells_no_password(project, url, change, command, caplog):
    caplog.set_level(logging.DEBUG)
    wrong = change(url)
    assert wrong != url
    arguments = {"index": ["--to", wrong], "query": [TILES.ids()[0], "--index", wrong]}[command]
    result = run_command(command, "-p", project.root, *arguments)
    assert result.exit_code in (1, 2)
    told = result.output + caplog.text
    assert not any(form in told for form in forms_of(PASSWORD))
    assert "word" not in told.replace("password", "").replace("PGPASSWORD", "")
    assert len(result.output.strip().splitlines()) <= 4
    assert "Traceback" not in told


def test_what_is_kept_tells_no_password(project, url):
    result = run_command("index", "-p", project.root, "--to", url)
    assert result.exit_code == 0, result.output
    assert "3200 tiles in postgresql://tester@/postgres" in result.output
    kept = [path.read_bytes() for path in project.root.rglob("*") if path.is_file()]
    with psycopg.connect(url) as connection:
        manifests = connection.execute("SELECT manifest::text FROM geomatch.indexes").fetchall()
    for form in forms_of(PASSWORD):
        assert form not in result.output + str(manifests)
        assert not any(form.encode() in data for data in kept)


def test_without_psycopg_the_extra_is_named(project, url, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(GeomatchError) as failed:
        query(project, TILES.ids()[0], index=url)
    assert "geomatch[postgres]" in failed.value.hint

"""The table of queries: what is read is what was saved, and its file reads well elsewhere."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from hand_made import hand_made_classes, hand_made_tiles

from geomatch.data import query_results
from geomatch.data.query_results import QueryTable
from geomatch.errors import StaleError


def table():
    return QueryTable(
        tile=np.array([0, 3, 1]),
        match=np.array([2, 1, 3]),
        match_score=np.array([0.5, np.nan, 0.9], np.float32),
        rank=np.array([2, 4, 1]),
        top=np.array([[3, 2], [-1, -1], [3, -1]]),
        top_score=np.array([[0.7, 0.5], [np.nan, np.nan], [0.9, np.nan]], np.float32),
        distance_m=np.array([[8.0, 0.0], [np.nan, np.nan], [0.0, np.nan]]),
        lon=np.array([-3.0, 2.0, 1.0]),
        lat=np.array([45.0, 44.0, 43.0]),
    )


def tiles():
    return hand_made_tiles([0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1], [0, 2, 0, 2])


def assert_equal(found, wanted):
    for name in QueryTable.__dataclass_fields__:
        mine, theirs = getattr(found, name), getattr(wanted, name)
        np.testing.assert_array_equal(mine, theirs, name)
        assert mine.dtype == theirs.dtype, name


@pytest.mark.parametrize("block", [1, 2, 65_536])
def test_a_table_is_read_as_it_was_saved(tmp_path, monkeypatch, block):
    monkeypatch.setattr(query_results, "ROW_GROUP", block)
    table().save(tmp_path / "queries.parquet", tiles())
    assert_equal(QueryTable.load(tmp_path / "queries.parquet"), table())
    assert pq.ParquetFile(tmp_path / "queries.parquet").num_row_groups == -(-3 // block)


def test_the_file_speaks_for_itself(tmp_path):
    table().save(tmp_path / "queries.parquet", tiles())
    first, second, third = pq.read_table(tmp_path / "queries.parquet").to_pylist()
    assert first == {
        "id": "0_0@2000",
        "place": "0_0",
        "split": "train",
        "year": "2000",
        "database_year": "2010",
        "rank": 2,
        "match": "0_0@2010",
        "match_score": pytest.approx(0.5),
        "first": "1_0@2010",
        "first_score": pytest.approx(0.7),
        "distance_m": 8.0,
        "top": ["1_0@2010", "0_0@2010"],
        "top_scores": pytest.approx([0.7, 0.5]),
        "top_distances_m": [8.0, 0.0],
        "lon": -3.0,
        "lat": 45.0,
        "row": 0,
        "match_row": 2,
        "top_rows": [3, 2],
    }
    undefined = ("match_score", "first", "first_score", "distance_m")
    assert [second[name] for name in undefined] == [None] * 4
    assert (second["top"], second["top_scores"], second["split"]) == ([], [], "test")
    assert third["top"] == ["1_0@2010"]


def test_images_of_classes_have_no_year_and_no_place(tmp_path):
    nowhere = np.full((3, 2), np.nan)
    images = hand_made_classes([0, 1, 0, 1])
    places = {"distance_m": nowhere, "lon": nowhere[:, 0], "lat": nowhere[:, 0]}
    found = QueryTable(**{**vars(table()), **places})
    found.save(tmp_path / "queries.parquet", images)
    row = pq.read_table(tmp_path / "queries.parquet").to_pylist()[0]
    assert (row["id"], row["place"], row["match"]) == ("a/0.png", "a", "a/2.png")
    assert [row[name] for name in ("year", "database_year", "lon", "lat")] == [None] * 4
    assert (row["distance_m"], row["top_distances_m"]) == (None, [None, None])
    assert_equal(QueryTable.load(tmp_path / "queries.parquet"), found)


def test_tables_are_joined_and_may_be_empty(tmp_path):
    empty = QueryTable.join([])
    assert len(empty) == 0
    assert_equal(
        QueryTable.join([empty, table().select(slice(1)), table().select([1, 2])]), table()
    )
    empty.save(tmp_path / "queries.parquet", tiles())
    assert_equal(QueryTable.load(tmp_path / "queries.parquet"), empty)


def test_a_damaged_table_is_reported(tmp_path):
    (tmp_path / "queries.parquet").write_bytes(b"PAR1")
    for name in ("queries.parquet", "absent.parquet"):
        with pytest.raises(StaleError) as failed:
            QueryTable.load(tmp_path / name)
        assert failed.value.hint == "Run: geomatch eval"

"""Queries that are moved by their answers: query expansion and relevance feedback."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import run_command

from geomatch.data.embeddings import Embeddings
from geomatch.errors import GeomatchError, UsageError
from geomatch.query import query
from geomatch.querying.feedback import expand, rocchio


@pytest.fixture(scope="module")
def unit(indexed):
    vectors = Embeddings.load(indexed.embedded.path).vectors.astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_expansion_by_a_plain_loop():
    rng = np.random.default_rng(0)
    asked, answers = rng.normal(size=8), rng.normal(size=(5, 8))
    answers[0] = asked + 0.1
    answers[4] = -asked  # nothing in common: does not count
    total, weights = asked.copy(), 1.0
    for answer in answers:
        cosine = answer @ asked / np.linalg.norm(answer) / np.linalg.norm(asked)
        if cosine > 0:
            total += cosine**3 * answer
            weights += cosine**3
    found = expand(asked.astype(np.float32), answers.astype(np.float32))
    np.testing.assert_allclose(found, total / weights, rtol=1e-5)


def test_rocchio_by_hand():
    queries = np.array([[1, 0], [0, 2]], np.float32)
    liked, unliked = np.array([[0, 1], [0, 3]], np.float32), np.array([[4, 0]], np.float32)
    none = np.empty((0, 2), np.float32)
    np.testing.assert_allclose(
        rocchio(queries, liked, unliked), np.array([[0.4, 1.5], [-0.6, 3.5]]) / 1.6, rtol=1e-6
    )
    np.testing.assert_allclose(rocchio(queries, none, none), queries)
    # Descriptors that are all moved alike give a query that is moved as they are.
    moved = rocchio(queries + 7, liked + 7, unliked + 7)
    np.testing.assert_allclose(moved, rocchio(queries, liked, unliked) + 7, rtol=1e-5)


def nearest(unit, vector, among, most):
    scores = unit[among] @ vector / np.linalg.norm(vector)
    order = np.argsort(-scores)[:most]
    return among[order], scores[order]


def test_an_expanded_query_is_searched_again(indexed, unit):
    tiles, asked = indexed.tiles, 30
    other = np.flatnonzero(tiles.year != tiles.year[asked])
    first, scores = nearest(unit, unit[asked], other, 3)
    vector = unit[asked] + (scores**3) @ unit[first]
    wanted, scores = nearest(unit, vector, other, 6)
    found = query(indexed.project, tiles.ids()[asked], expand=3, top=6).matches
    assert [match.tile for match in found] == [tiles.ids()[i] for i in wanted]
    np.testing.assert_allclose([match.score for match in found], scores, atol=1e-4)


def test_confirmed_and_rejected_answers_move_a_query(indexed, unit):
    tiles, ids, asked = indexed.tiles, indexed.tiles.ids(), 30
    other = np.flatnonzero(tiles.year != tiles.year[asked])
    first, _ = nearest(unit, unit[asked], other, 4)
    vector = unit[asked] + 0.75 * unit[first[[1, 2]]].mean(axis=0) - 0.15 * unit[first[0]]
    wanted, scores = nearest(unit, vector, np.setdiff1d(other, first[:1]), 5)
    found = query(
        indexed.project, ids[asked], like=(ids[first[1]], ids[first[2]]), unlike=(ids[first[0]],)
    ).matches
    assert [match.tile for match in found] == [ids[i] for i in wanted]
    np.testing.assert_allclose([match.score for match in found], scores, atol=1e-4)
    assert wanted[0] in first[[1, 2]]


def test_the_turn_of_an_expanded_query_is_the_best_one(indexed):
    name = indexed.tiles.ids()[30]
    best = query(indexed.project, name, rotate=90).matches[0].turn
    found = query(indexed.project, name, rotate=90, expand=2).matches
    assert {match.turn for match in found} == {best}


def test_the_command_takes_ids(indexed):
    ids = indexed.tiles.ids()
    asked = ["query", ids[0], "-p", indexed.root, "--json", "--top", "44"]
    every = [each["tile"] for each in json.loads(run_command(*asked).stdout)]
    done = run_command(*asked, "--like", every[20], "--unlike", every[0], "--unlike", every[1])
    assert done.exit_code == 0, done.output
    left = [each["tile"] for each in json.loads(done.stdout)]
    assert sorted(left) == sorted(every[2:])
    assert left.index(every[20]) < 18
    assert run_command("query", ids[0], ids[1], "-p", indexed.root, "--like", ids[2]).exit_code == 2


def test_wrong_use_is_told(indexed):
    name = indexed.tiles.ids()[0]
    with pytest.raises(GeomatchError, match="nowhere is no tile"):
        query(indexed.project, name, unlike=("nowhere",))
    with pytest.raises(UsageError, match="--expand -1"):
        query(indexed.project, name, expand=-1)
    with pytest.raises(UsageError, match="not for scans"):
        query(indexed.project, name, expand=1, scales=(1.0,))

"""Which tiles make a batch."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from small_project import finish, hand_made_tiles, python

from geomatch.data.batches import Sampler
from geomatch.data.mining import HardPairs

pytest_plugins = ["small_fixtures"]


@pytest.fixture
def tiles():
    """Seven places in a row; the sixth is of one year alone, the third misses the middle year."""
    seen = [(c, y) for c in range(7) for y in range(3) if (c, y) not in {(2, 1), (5, 0), (5, 2)}]
    col, year = zip(*seen, strict=True)
    return hand_made_tiles(list(col), [0] * len(col), list(year))


def overlap(tiles, a, b):
    """Whether the ground of two tiles meets, from their bounds."""
    (l1, b1, r1, t1), (l2, b2, r2, t2) = tiles.bounds()[[a, b]]
    return l1 < r2 and l2 < r1 and b1 < t2 and b2 < t1


@pytest.mark.parametrize("batch", [1, 2, 4, 6, 10])
def test_every_place_is_an_anchor_once_an_epoch(tiles, batch):
    sampler = Sampler(tiles, batch, seed=3)
    assert sampler.steps_per_epoch == -(-6 // batch)
    orders = []
    for epoch in range(3):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        drawn = [sampler.draw(step, None) for step in steps]
        assert all(roles.shape == (3, batch) for roles in drawn)
        anchors = tiles.col[np.concatenate([roles[0] for roles in drawn])]
        # The last batch is filled up; the place of a single year is never asked for.
        assert sorted(anchors[:6]) == [0, 1, 2, 3, 4, 6]
        orders.append(tuple(anchors[:6]))
    assert len(set(orders)) > 1


def test_a_positive_is_the_same_place_in_another_year(tiles):
    sampler = Sampler(tiles, 6, seed=0)
    years = set()
    for step in range(30):
        anchors, positives, _ = sampler.draw(step, None)
        np.testing.assert_array_equal(tiles.col[anchors], tiles.col[positives])
        assert (tiles.year[anchors] != tiles.year[positives]).all()
        years |= set(zip(tiles.year[anchors], tiles.year[positives], strict=True))
    assert years == {(a, b) for a in range(3) for b in range(3) if a != b}


@pytest.mark.parametrize("stride", [8, 4, 3])
def test_a_negative_is_of_the_positive_s_year_and_on_other_ground(stride):
    cells = [(c, r) for c in range(6) for r in range(6)] * 2
    col, row = (list(values) for values in zip(*cells, strict=True))
    tiles = hand_made_tiles(col, row, [0] * 36 + [1] * 36, stride=stride)
    sampler = Sampler(tiles, 6, seed=0)
    found = set()
    for step in range(60):
        anchors, positives, negatives = sampler.draw(step, None)
        np.testing.assert_array_equal(tiles.year[negatives], tiles.year[positives])
        for anchor, negative in zip(anchors, negatives, strict=True):
            assert not overlap(tiles, anchor, negative)
        found |= set(negatives)
    assert len(found) > 60


def test_a_draw_depends_on_seed_step_and_mined_pairs_alone(tiles):
    hard = HardPairs(np.array([1]), np.array([0]), np.array([[9, -1]]), 5)
    sampler = Sampler(tiles, 4, seed=1)
    for step in range(12):
        sampler.draw(step, None)
    for mined in (None, hard):
        again = sampler.draw(5, mined)
        np.testing.assert_array_equal(again, Sampler(tiles, 4, seed=1).draw(5, mined))
        assert not np.array_equal(again, sampler.draw(6, mined))
        assert not np.array_equal(again, Sampler(tiles, 4, seed=2).draw(5, mined))
    np.testing.assert_array_equal(sampler.draw(5, hard)[:3], sampler.draw(5, None))


@pytest.mark.parametrize(("negatives", "plain"), [(True, 3), (False, 2)])
def test_hard_roles_come_from_the_mined_table(tiles, negatives, plain):
    hard = HardPairs(
        query=np.array([2, 5, 8]),
        match=np.array([0, 3, 6]),
        negatives=np.array([[9, 11, -1], [12, -1, -1], [1, 4, 14]]),
        asked=14,
    )
    sampler = Sampler(tiles, 6, 0, negatives)
    seen = set()
    for step in range(40):
        roles = sampler.draw(step, hard)
        assert roles.shape == (plain + 3, 6)
        seen |= set(zip(*roles[plain:].tolist(), strict=True))
    assert seen == {(2, 0, 9), (2, 0, 11), (5, 3, 12), (8, 6, 1), (8, 6, 4), (8, 6, 14)}
    np.testing.assert_array_equal(roles[:2], Sampler(tiles, 6, 0).draw(step, None)[:2])


def test_nothing_hard_is_no_hard_role(tiles):
    none = HardPairs(np.empty(0, int), np.empty(0, int), np.empty((0, 5), int), 14)
    assert Sampler(tiles, 4, 0).draw(0, none).shape == (3, 4)


FEW_NEGATIVES = """
from small_project import hand_made_tiles
from geomatch.data.batches import Sampler
from geomatch.data.pairs import are_neutral
from geomatch.errors import GeomatchError
tiles = hand_made_tiles({}, stride=4)
try:
    sampler = Sampler(tiles, 2, 0)
    for step in range(20):
        anchors, _, negatives = sampler.draw(step, None)
        assert not are_neutral(tiles, anchors, negatives).any()
    print("drawn")
except GeomatchError:
    print("refused")
"""


@pytest.mark.parametrize(
    ("where", "possible"),
    [
        # Two places that overlap.
        ("[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]", {"refused"}),
        # Two places, each of them alone in the later year it is seen in.
        ("[0, 0, 5, 5], [0, 0, 0, 0], [0, 1, 0, 2]", {"refused", "drawn"}),
    ],
)
def test_a_negative_that_there_is_not_is_not_sought_for_ever(where, possible):
    process = python("-c", FEW_NEGATIVES.format(where))
    try:
        out = finish(process, timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail("drawing a batch does not end")
    assert out.strip() in possible

"""Which tiles make a batch."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from hand_made import hand_made_classes, hand_made_tiles
from processes import finish, python

from geomatch import config
from geomatch.training.mining import Mined
from geomatch.training.sampler import Sampler, compares_whole_batch, ramp


@pytest.fixture
def tiles():
    """Seven places in a row; the sixth is of one year alone, the third misses the middle year."""
    seen = [(c, y) for c in range(7) for y in range(3) if (c, y) not in {(2, 1), (5, 0), (5, 2)}]
    col, year = zip(*seen, strict=True)
    return hand_made_tiles(list(col), [0] * len(col), list(year))


LABELS = [0] * 4 + [1] * 7 + [2] + [3] * 3
"""Of four classes, of which the third has a single image."""


def sampling(tiles, batch, seed=0, loss="bce", views=2, **mining):
    train = config.TrainConfig(batch=batch, seed=seed, loss=loss, views=views)
    return Sampler(tiles, train, config.MiningConfig(**mining))


def mined(query, match, negatives, asked=14):
    hardness = np.zeros(len(query), np.float32)
    arrays = (np.array(values, int) for values in (query, match))
    return Mined(*arrays, np.array(negatives, int), hardness, asked, len(query))


def epoch(sampler, number, found=None):
    """(roles, n) tiles of all batches of an epoch."""
    steps = range(number * sampler.steps_per_epoch, (number + 1) * sampler.steps_per_epoch)
    return np.concatenate([sampler.draw(step, found) for step in steps], axis=1)


def overlap(tiles, a, b):
    """Whether the ground of two tiles meets, from their bounds."""
    (l1, b1, r1, t1), (l2, b2, r2, t2) = tiles.bounds()[[a, b]]
    return l1 < r2 and l2 < r1 and b1 < t2 and b2 < t1


# Places seen in several years


@pytest.mark.parametrize("batch", [1, 2, 4, 6, 10])
def test_every_place_is_an_anchor_once_an_epoch(tiles, batch):
    sampler = sampling(tiles, batch, seed=3)
    assert sampler.steps_per_epoch == -(-6 // batch)
    orders = []
    for number in range(3):
        steps = range(number * sampler.steps_per_epoch, (number + 1) * sampler.steps_per_epoch)
        drawn = [sampler.draw(step, None) for step in steps]
        assert all(roles.shape == (3, batch) for roles in drawn)
        anchors = tiles.col[np.concatenate([roles[0] for roles in drawn])]
        # The last batch is filled up; the place of a single year is never asked for.
        assert sorted(anchors[:6]) == [0, 1, 2, 3, 4, 6]
        orders.append(tuple(anchors[:6]))
    assert len(set(orders)) > 1


def test_a_positive_is_the_same_place_in_another_year(tiles):
    sampler = sampling(tiles, 6)
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
    sampler = sampling(tiles, 6)
    found = set()
    for step in range(60):
        anchors, positives, negatives = sampler.draw(step, None)
        np.testing.assert_array_equal(tiles.year[negatives], tiles.year[positives])
        for anchor, negative in zip(anchors, negatives, strict=True):
            assert not overlap(tiles, anchor, negative)
        found |= set(negatives)
    assert len(found) > 60


@pytest.mark.parametrize("views", [3, 5])
def test_views_are_all_years_of_a_place_and_then_some_again(tiles, views):
    sampler = sampling(tiles, 6, loss="infonce", views=views, rule="none")
    seen = set()
    for step in range(20):
        drawn = sampler.draw(step, None)
        assert drawn.shape == (views, 6)
        for place in drawn.T:
            col, years = tiles.col[place], tiles.year[place].tolist()
            assert len(set(col)) == 1
            own = set(tiles.year[tiles.col == col[0]].tolist())
            assert set(years[: len(own)]) == own
            seen.add((len(own), tuple(years)))
            # Where years are too few they come again, in the same order.
            assert years == [years[i % len(own)] for i in range(views)]
    assert {number for number, _ in seen} == {2, 3}
    assert len(seen) > 6


# Class folders


def test_every_class_comes_in_its_turn():
    tiles = hand_made_classes(LABELS)
    sampler = sampling(tiles, 5)
    assert (sampler.anchors, sampler.steps_per_epoch) == (3, 3)
    anchors = np.concatenate([epoch(sampler, number)[0] for number in range(8)])
    # Batches of five and runs of three end at different places; classes of one image are left out.
    runs = tiles.label[anchors].reshape(-1, 3)
    assert np.sort(runs, axis=1).tolist() == [[0, 1, 3]] * 40
    assert len(set(map(tuple, runs.tolist()))) == 6
    for label in (0, 1, 3):
        # A class's own images come once before any comes again.
        own, size = anchors[tiles.label[anchors] == label], LABELS.count(label)
        rounds = own[: len(own) // size * size].reshape(-1, size)
        assert np.sort(rounds, axis=1).tolist() == [
            np.flatnonzero(tiles.label == label).tolist()
        ] * (len(rounds))
        assert len(set(map(tuple, rounds.tolist()))) > 1


def test_every_tile_of_equal_classes_is_an_anchor_once_an_epoch():
    tiles = hand_made_classes([0, 1, 2] * 4)
    sampler = sampling(tiles, 4)
    orders = [epoch(sampler, number)[0].tolist() for number in range(4)]
    for order in orders:
        assert sorted(order) == list(range(12))
    assert len(set(map(tuple, orders))) == 4


def test_half_of_the_pairs_of_classes_are_of_one():
    tiles = hand_made_classes(LABELS)
    sampler = sampling(tiles, 6)
    positives, negatives = set(), set()
    for step in range(150):
        anchor, positive, negative = sampler.draw(step, None)
        # Two pairs of each anchor: one of its class, and one of another.
        np.testing.assert_array_equal(tiles.label[anchor], tiles.label[positive])
        assert (anchor != positive).all()
        assert (tiles.label[anchor] != tiles.label[negative]).all()
        positives |= set(zip(anchor, positive, strict=True))
        negatives |= set(negative)
    assert len(positives) == 4 * 3 + 7 * 6 + 3 * 2
    # A class of a single image is still another one.
    assert negatives == set(range(len(LABELS)))


def test_views_of_a_class_are_its_other_tiles_and_then_some_again():
    tiles = hand_made_classes([0] * 6 + [1] * 3 + [2] * 2)
    sampler = sampling(tiles, 3, loss="multi-similarity", views=5, rule="none")
    for step in range(30):
        drawn = sampler.draw(step, None)
        assert drawn.shape == (5, 3)
        for views in drawn.T:
            anchor, others = views[0], views[1:].tolist()
            assert len(set(tiles.label[views])) == 1
            assert anchor not in others
            different = min(4, (tiles.label == tiles.label[anchor]).sum() - 1)
            assert len(set(others[:different])) == len(set(others)) == different


# What was mined


def test_a_draw_depends_on_seed_step_and_mined_pairs_alone(tiles):
    hard = mined([1], [0], [[9, -1]])
    sampler = sampling(tiles, 4, seed=1)
    for step in range(12):
        sampler.draw(step, None)
    for found in (None, hard):
        again = sampler.draw(5, found)
        np.testing.assert_array_equal(again, sampling(tiles, 4, seed=1).draw(5, found))
        assert not np.array_equal(again, sampler.draw(6, found))
        assert not np.array_equal(again, sampling(tiles, 4, seed=2).draw(5, found))
    np.testing.assert_array_equal(sampler.draw(5, hard)[:3], sampler.draw(5, None))


@pytest.mark.parametrize("rule", ["none", "knn", "ranked", "neighbours", "in-batch"])
@pytest.mark.parametrize("grounded", [True, False])
def test_a_draw_does_not_depend_on_those_before(tiles, rule, grounded):
    """As of a run that goes on, or whose batches are read by several threads."""
    tiles = tiles if grounded else hand_made_classes(LABELS)
    if rule == "neighbours" and not grounded:
        pytest.skip("of places with years")
    forms = {"loss": "triplet", "rule": rule, "ramp": 3.0, "every": 1, "hardest": 9}
    parts = [([3, 6], [4, 8], [[9, 12], [1, -1]]), ([9, 12], [10, 14], [[0, 3], [6, 0]])]
    sampler = sampling(tiles, 4, **forms)
    asked = [(step, part) for step in [7, 2, 8, 3, 3, 7, 2, 8] for part in parts]
    # What was mined is made again each time, and may come to lie where other samples lay.
    drawn = [sampler.draw(step, mined(*part)) for step, part in asked]
    fresh = [sampling(tiles, 4, **forms).draw(step, mined(*part)) for step, part in asked]
    np.testing.assert_array_equal(drawn, fresh)


@pytest.mark.parametrize(("loss", "plain"), [("bce", 3), ("infonce", 2)])
def test_hard_roles_come_from_the_mined_table(tiles, loss, plain):
    hard = mined([2, 5, 8], [0, 3, 6], [[9, 11, -1], [12, -1, -1], [1, 4, 14]])
    sampler = sampling(tiles, 6, loss=loss)
    assert (sampler.roles(hard=False), sampler.roles(hard=True)) == (plain, plain + 3)
    seen = set()
    for step in range(40):
        roles = sampler.draw(step, hard)
        assert roles.shape == (plain + 3, 6)
        seen |= set(zip(*roles[plain:].tolist(), strict=True))
    assert seen == {(2, 0, 9), (2, 0, 11), (5, 3, 12), (8, 6, 1), (8, 6, 4), (8, 6, 14)}
    np.testing.assert_array_equal(roles[:2], sampling(tiles, 6).draw(step, None)[:2])


def test_nothing_hard_is_no_hard_role(tiles):
    none = mined([], [], np.empty((0, 5)))
    assert sampling(tiles, 4).draw(0, none).shape == (3, 4)


@pytest.mark.parametrize(("count", "hardest"), [(10, 10), (12, 12), (7, 10)])
def test_ranked_triplets_are_the_batches_each_once_an_epoch(tiles, count, hardest):
    rows = np.arange(count)
    found = mined(rows % 14, (rows + 1) % 14, (rows[:, None] + 5) % 14)
    wanted = list(zip(found.query, found.match, found.negatives[:, 0], strict=True))
    sampler = sampling(tiles, 4, loss="triplet", rule="ranked", hardest=hardest)
    assert sampler.steps_per_epoch == 3
    orders = []
    for number in range(3):
        drawn = [tuple(column) for column in epoch(sampler, number, found).T]
        assert len(drawn) == 12
        assert sorted(drawn[:count]) == sorted(wanted)
        # Where fewer were found than are asked for they come again.
        assert drawn[count:] == drawn[: 12 - count]
        orders.append(tuple(drawn))
    assert len(set(orders)) == 3
    assert sampler.draw(0, None).shape == (3, 4)


@pytest.fixture
def row_of_places():
    """Thirty places in a row, seen in two years each; the last in a year alone."""
    return hand_made_tiles([*range(30), *range(31)], [0] * 61, [0] * 30 + [1] * 31)


def neighbouring(k=4):
    """Of each place three to follow it: those five, ten and one away, of either year."""
    place = np.arange(30)
    others = np.stack([(place + 5) % 30 + 30, (place + 10) % 30, (place - 1) % 30 + 30], axis=1)
    # Each place again in its other year; the place of a single year, whose tile is 60, is no help.
    again = np.pad(others[:, :1], ((0, 0), (1, k - 2)), constant_values=60)
    again[:, 2:] = -1
    others = np.pad(others, ((0, 0), (0, k - 3)), constant_values=-1)
    return mined([*place, *place + 30], [*place + 30, *place], np.concatenate([others, again]))


@pytest.mark.parametrize(("ramp", "most"), [(0.0, 4), (4.0, 2)])
def test_neighbours_follow_their_place_and_all_come_once(row_of_places, ramp, most):
    tiles = row_of_places
    sampler = sampling(tiles, 5, loss="infonce", rule="neighbours", k=4, ramp=ramp)
    heads = []
    for number in (2, 3) if not ramp else (2,):
        places = tiles.col[epoch(sampler, number, neighbouring())[0]].tolist()
        assert sorted(places) == list(range(30))
        left, told = list(places), []
        while left:
            place = left.pop(0)
            told.append(place)
            near = [(place + 5) % 30, (place + 10) % 30, (place - 1) % 30]
            for other in [other for other in near if other in left][:most]:
                assert left.pop(0) == other
        heads.append(tuple(told))
    assert len(set(heads)) == len(heads)
    assert all(len(told) < 20 for told in heads)


def test_neighbours_begin_as_a_plain_order_where_they_are_ramped(row_of_places):
    forms = {"loss": "infonce", "rule": "neighbours", "k": 4}
    slow, none = (sampling(row_of_places, 5, **forms, ramp=ramp) for ramp in (10.0, 0.0))
    found = neighbouring()
    np.testing.assert_array_equal(epoch(slow, 0, found), epoch(none, 0))
    assert not np.array_equal(epoch(slow, 5, found), epoch(none, 5))
    np.testing.assert_array_equal(epoch(slow, 10, found), epoch(none, 10, found))


def test_neighbours_are_of_one_batch_with_their_place(row_of_places):
    sampler = sampling(row_of_places, 6, loss="infonce", rule="neighbours", k=4)
    near = apart = 0
    for number in range(10):
        for found, plain in ((neighbouring(), False), (None, True)):
            batches = row_of_places.col[epoch(sampler, number, found)[0]].reshape(-1, 6)
            like = sum((p + 5) % 30 in batch for batch in batches for p in batch)
            near, apart = near + like * (not plain), apart + like * plain
    assert near > 2 * apart


@pytest.mark.parametrize(
    ("ramp_epochs", "epochs", "share"),
    [(0, 0, 1), (0, 7, 1), (4, 0, 0), (4, 1, 0.25), (4, 4, 1), (4, 9, 1), (4, -1, 0)],
)
def test_the_share_of_hard_samples_rises(ramp_epochs, epochs, share):
    assert ramp(config.MiningConfig(ramp=ramp_epochs), epochs) == share


@pytest.mark.parametrize("grounded", [True, False])
def test_hard_samples_come_in_slowly_where_they_are_ramped(tiles, grounded):
    tiles = tiles if grounded else hand_made_classes(LABELS)
    # Of 900 places a batch, an epoch is a step; nothing is mined before epoch 2.
    sampler = sampling(tiles, 900, every=2, ramp=4.0)
    assert sampler.steps_per_epoch == 1
    hard = mined([1], [0], [[9]]) if grounded else mined([1], [0], [[14]])
    shares = []
    for step in range(2, 8):
        query, match, negative = sampler.draw(step, hard)[3:]
        mine = (query == 1) & (match == 0) & (negative == hard.negatives[0, 0])
        shares.append(mine.mean())
        # The others are drawn as all samples are.
        place = tiles.places()
        assert (place[query] == place[match]).all()
        assert (place[query] != place[negative])[~mine].all()
        if grounded:
            assert (tiles.year[query] != tiles.year[match])[~mine].all()
            assert (tiles.year[negative] == tiles.year[match])[~mine].all()
    np.testing.assert_allclose(shares, [0, 0.25, 0.5, 0.75, 1, 1], atol=0.07)
    assert shares[0] < 0.02
    assert shares[4:] == [1, 1]


@pytest.mark.parametrize(
    ("loss", "rule", "wanted"),
    [
        ("bce", "knn", False),
        ("triplet", "ranked", False),
        ("triplet", "in-batch", True),
        ("infonce", "none", True),
        ("multi-similarity", "neighbours", True),
    ],
)
def test_some_losses_compare_batches_as_a_whole(loss, rule, wanted):
    assert (
        compares_whole_batch(config.TrainConfig(loss=loss), config.MiningConfig(rule=rule))
        == wanted
    )


FEW_NEGATIVES = """
from hand_made import hand_made_tiles
from geomatch import config
from geomatch.training.sampler import Sampler
from geomatch.data.ground_truth import are_neutral
from geomatch.errors import GeomatchError
tiles = hand_made_tiles({}, stride=4)
try:
    sampler = Sampler(tiles, config.TrainConfig(batch=2), config.MiningConfig())
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
def test_searching_for_a_missing_negative_ends(where, possible):
    process = python("-c", FEW_NEGATIVES.format(where))
    try:
        out = finish(process, timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail("drawing a batch does not end")
    assert out.strip() in possible

"""What a run does between epochs: it measures itself, mines and draws, here with fixed weights."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hand_made import hand_made_classes
from PIL import Image
from small_network import network
from small_project import YEARS, settings

from geomatch.data.ground_truth import are_neutral
from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS
from geomatch.nn.describe import describe
from geomatch.nn.encoder import TileForm
from geomatch.nn.step import State
from geomatch.progress import silent
from geomatch.training import mining, rounds
from geomatch.training.rounds import Validator

FORM = TileForm(32, 3, 0)
MODEL = {"trunk": "convnet", "stage": 2, "head": "dense", "descriptor": 6}


@pytest.fixture(scope="module")
def siamese():
    """A network and the state of a run whose averaged weights are others than those that learn."""
    model, variables = network(FORM, **MODEL)
    _, average = network(FORM, seed=1, **MODEL)
    plain = State(variables["params"], variables.get("batch_stats", {}), None, {})
    average = {"params": average["params"], "batch_stats": average.get("batch_stats", {})}
    return model, plain, plain._replace(average=average)


class Pictures:
    """Stands for a store, and counts what is read of it."""

    def __init__(self, pixels):
        self.pixels, self.asked = pixels, []

    def read(self, rows):
        self.asked += np.asarray(rows).tolist()
        return self.pixels[rows]


@pytest.fixture
def pictures(tiled):
    return Pictures(TileStore.open(tiled.project.pixels).read(tiled.tiles.store_row))


@pytest.fixture
def round_of(tiled, siamese, pictures, tmp_path):
    """A function that makes a round of these settings, at a step and epoch."""

    def make(*overrides, step=6, epoch=1, average=False, tiles=None):
        tiles = tiled.tiles if tiles is None else tiles
        splits = {name: tiles.select(tiles.split == i) for i, name in enumerate(SPLITS)}
        model, plain, averaged = siamese
        validator = Validator(model, settings(*overrides), pictures, splits, tmp_path)
        return validator.round((averaged if average else plain).variables, step, epoch, silent)

    return make


@pytest.fixture(scope="module")
def vectors(tiled, siamese):
    """(plain, averaged) descriptors of all tiles."""
    model, *states = siamese
    pixels = TileStore.open(tiled.project.pixels).read(tiled.tiles.store_row)
    return [np.array(next(describe(model, s.variables, [pixels], len(pixels)))) for s in states]


def nearness(metric, a, b):
    if metric == "cosine":
        return float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b))
    return -float(np.linalg.norm(a - b))


def of_split(tiles, split):
    return np.flatnonzero(tiles.split == SPLITS.index(split)).tolist()


def map5_by_hand(tiles, vectors, split, metric):
    """Every tile asked for in the other year, among those of the split."""
    mine, place = of_split(tiles, split), tiles.places()
    terms = []
    for query in mine:
        database = [t for t in mine if tiles.year[t] != tiles.year[query]]
        near = {t: nearness(metric, vectors[query], vectors[t]) for t in database}
        matches = [t for t in database if place[t] == place[query]]
        if matches:
            rank = sum(near[t] >= near[matches[0]] - 1e-6 for t in database)
            terms.append(1 / rank if rank <= 5 else 0)
    return sum(terms) / len(terms)


# Measures


@pytest.mark.parametrize(("loss", "metric"), [("bce", "cosine"), ("contrastive", "euclidean")])
@pytest.mark.parametrize("average", [False, True])
def test_a_split_is_measured_with_the_weights_that_are_kept(
    round_of, tiled, vectors, loss, metric, average
):
    now = round_of(f"train.loss={loss}", average=average)
    for split in SPLITS:
        wanted = map5_by_hand(tiled.tiles, vectors[average], split, metric)
        assert now.map5(split) == pytest.approx(wanted)
        assert 0 < wanted < 1


def test_splits_are_described_once_and_only_when_needed(round_of, tiled, pictures):
    now = round_of("mining.rule=knn", "train.frames=test")
    assert now.rate == 0
    now.map5("validation")
    assert sorted(pictures.asked) == of_split(tiled.tiles, "validation")
    now.mine()
    now.map5("train")
    now.map5("validation")
    assert sorted(pictures.asked) == sorted(
        of_split(tiled.tiles, "validation") + of_split(tiled.tiles, "train")
    )
    now.draw()
    assert sorted(pictures.asked) == list(range(len(tiled.tiles)))
    assert now.rate > 0


def test_a_split_without_queries_has_no_metric(round_of, tiled):
    of_one_year = tiled.tiles.year == 0
    # Validation tiles of one year alone, and no test tiles.
    keep = (tiled.tiles.split == 0) | ((tiled.tiles.split == 1) & of_one_year)
    now = round_of(tiles=tiled.tiles.select(keep))
    assert now.map5("validation") is None
    assert now.map5("test") is None
    assert now.map5("train") is not None


def test_a_large_split_is_measured_on_some_queries_of_each_year(
    round_of, tiled, vectors, monkeypatch
):
    monkeypatch.setattr(rounds, "SAMPLE", 5)
    asked, real = [], rounds.retrieve

    def retrieve(found, tasks, metric):
        asked.extend(tasks)
        return real(found, tasks, metric)

    monkeypatch.setattr(rounds, "retrieve", retrieve)
    first, again = (round_of().map5("train") for _ in range(2))
    assert first == again
    assert [len(task.queries) for task in asked] == [5, 5] * 2
    assert [len(task.database) for task in asked] == [24, 24] * 2
    np.testing.assert_array_equal(asked[0].queries, asked[2].queries)
    # They are drawn from all of the split, and are not its first.
    first_of_year = np.flatnonzero(training(tiled).year == 0)[:5]
    assert asked[0].queries.tolist() != first_of_year.tolist()


# Mines


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("knn", [False, True, True, False]),
        ("ranked", [True, True, True, False]),
        ("neighbours", [True, True, True, False]),
        ("in-batch", [False] * 4),
        ("none", [False] * 4),
    ],
)
def test_rules_mine_when_there_is_something_to_learn_from_it(round_of, rule, wanted):
    """Not at the end; hard pairs not before anything was learnt."""
    validator = round_of(f"mining.rule={rule}")._validator
    assert [validator.mines(step, 18) for step in (0, 6, 12, 18)] == wanted


def training(tiled):
    return tiled.tiles.select(tiled.tiles.split == SPLITS.index("train"))


def own(tiled, vectors, average=False):
    return vectors[average][of_split(tiled.tiles, "train")]


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(("loss", "metric"), [("bce", "cosine"), ("triplet", "euclidean")])
@pytest.mark.parametrize("k", [3, 5])
def test_hard_queries_of_the_newer_year_by_brute_force(
    round_of, tiled, vectors, loss, metric, average, k
):
    form = (f"train.loss={loss}", f"mining.k={k}", "mining.truth_within=2")
    found = round_of(*form, average=average).mine()
    tiles, mine = training(tiled), own(tiled, vectors, average)
    place, wanted = tiles.places(), {}
    for query in np.flatnonzero(tiles.year == YEARS.index("2020")).tolist():
        database = np.flatnonzero(tiles.year == YEARS.index("2010")).tolist()
        near = {t: nearness(metric, mine[query], mine[t]) for t in database}
        order = sorted(database, key=lambda t: -near[t])
        match = next(t for t in order if place[t] == place[query])
        if match not in order[:2]:
            wanted[query] = match, [t for t in order[:k] if t != match]
    assert 3 < len(wanted) < 24
    assert found.query.tolist() == list(wanted)
    assert (found.examined, found.hard) == (24, len(wanted))
    for query, match, negatives, hardness in zip(
        found.query, found.match, found.negatives.tolist(), found.hardness, strict=True
    ):
        assert (match, [t for t in negatives if t >= 0]) == wanted[query]
        if metric == "cosine":
            first = nearness(metric, mine[query], mine[negatives[0]])
            assert hardness == pytest.approx(
                first - nearness(metric, mine[query], mine[match]), abs=1e-5
            )
        assert hardness > 0


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_approximate_neighbours_are_mined_beyond_exact_up_to(round_of, monkeypatch, metric):
    loss = {"cosine": "bce", "euclidean": "triplet"}[metric]
    form, limits = (f"train.loss={loss}", "mining.truth_within=1"), []
    real = rounds.exact.search

    def search(*arguments):
        limits.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(rounds.exact, "search", search)
    exact, approximate = (round_of(*form, f"mining.exact_up_to={n}").mine() for n in (24, 0))
    assert limits == [24, 0]
    # All cells of so few are searched; only what eight bits lose can differ.
    shared = set(exact.query.tolist()) & set(approximate.query.tolist())
    assert len(shared) > 0.8 * len(exact.query)


@pytest.mark.parametrize("squared", [True, False])
def test_the_hardest_triplets_by_brute_force(round_of, tiled, vectors, squared):
    form = ("train.loss=triplet", f"train.squared={str(squared).lower()}", "mining.rule=ranked")
    form += ("mining.hardest=30", "mining.candidates=23", "train.margin=0.25", "train.seed=3")
    found = round_of(*form).mine()
    tiles, mine = training(tiled), own(tiled, vectors)
    candidates = mining.candidate_triplets(tiles, 23, (3, 6))
    hardness = {}
    for anchor, positive, negative in np.concatenate(list(candidates), axis=1).T:
        near, far = (np.linalg.norm(mine[anchor] - mine[other]) for other in (positive, negative))
        hardness[anchor, positive, negative] = near**2 - far**2 if squared else near - far
    best = sorted(hardness.values(), reverse=True)[:30]
    np.testing.assert_allclose(found.hardness, best, rtol=1e-3)
    rows = zip(found.query, found.match, found.negatives[:, 0], strict=True)
    for triplet, value in zip(rows, found.hardness, strict=True):
        assert hardness[triplet] == pytest.approx(value, rel=1e-3)
    assert found.examined == 24 * 23
    assert found.hard == sum(value + 0.25 > 0 for value in hardness.values())
    assert 0 < found.share < 1


def test_ranked_triplets_are_drawn_at_first_where_they_are_ramped(round_of):
    form = ("train.loss=triplet", "mining.rule=ranked", "mining.hardest=30", "mining.ramp=4.0")
    means = [round_of(*form, epoch=epoch).mine().hardness.mean() for epoch in (0, 2, 4)]
    assert means == sorted(means)
    assert means[2] > means[0] + 0.1 * abs(means[0])


def test_other_rounds_rank_other_triplets(round_of):
    form = ("train.loss=triplet", "mining.rule=ranked", "mining.hardest=30")
    first, again, later = (round_of(*form, step=step).mine() for step in (6, 6, 12))
    np.testing.assert_array_equal(first.negatives, again.negatives)
    assert not np.array_equal(first.negatives, later.negatives)


def test_neighbours_are_those_on_the_ground_before_anything_is_learnt(round_of, tiled, pictures):
    form = ("train.loss=infonce", "mining.rule=neighbours", "mining.k=4")
    found = round_of(*form, step=0, epoch=0).mine()
    tiles = training(tiled)
    assert pictures.asked == []
    assert len(found.query) == 24
    for query, negatives in zip(found.query, found.negatives, strict=True):
        away = np.hypot(tiles.col - tiles.col[query], tiles.row - tiles.row[query])[tiles.year == 0]
        mine = np.hypot(
            tiles.col[negatives] - tiles.col[query], tiles.row[negatives] - tiles.row[query]
        )
        np.testing.assert_allclose(mine, np.sort(away)[1:5])


def test_later_neighbours_are_those_of_the_descriptors(round_of, tiled, vectors):
    found = round_of("train.loss=infonce", "mining.rule=neighbours", "mining.k=4").mine()
    tiles, mine = training(tiled), own(tiled, vectors)
    place = tiles.places()
    assert found.query.tolist() == np.flatnonzero(tiles.year == 1).tolist()
    hard = 0
    for query, match, negatives in zip(found.query, found.match, found.negatives, strict=True):
        database = np.flatnonzero(tiles.year == 0).tolist()
        near = {t: nearness("cosine", mine[query], mine[t]) for t in database}
        order = sorted(database, key=lambda t: -near[t])[:4]
        assert place[match] == place[query]
        assert negatives[negatives >= 0].tolist() == [t for t in order if t != match]
        hard += order[0] != match
    assert found.hard == hard
    assert 0 < found.share < 1


@pytest.mark.parametrize("rule", ["knn", "ranked"])
def test_classes_are_mined_by_brute_force(round_of, tiled, vectors, rule):
    """The tiles as images of four classes; one of them in none but the training split."""
    split = tiled.tiles.split
    tiles = hand_made_classes((np.arange(len(split)) * 7 % 4).tolist(), split.tolist())
    form = ("train.loss=triplet", f"mining.rule={rule}", "mining.hardest=20", "mining.k=4")
    now = round_of(*form, tiles=tiles)
    found, mine = now.mine(), own(tiled, vectors)
    label = tiles.select(split == 0).label
    np.testing.assert_array_equal(label[found.query], label[found.match])
    assert (found.query != found.match).all()
    if rule == "ranked":
        assert len(found.query) == 20
        assert (label[found.negatives[:, 0]] != label[found.query]).all()
        return
    wanted = {}
    for query in range(len(mine)):
        near = [nearness("euclidean", mine[query], other) for other in mine]
        # It is searched itself, and counts for nothing.
        order = sorted(range(len(mine)), key=lambda t, near=near: -near[t])[:5]
        others = [t for t in order if t != query]
        if not any(label[t] == label[query] for t in others[:1]):
            wanted[query] = [t for t in others if label[t] != label[query]]
    assert found.examined == len(mine) == 48
    negatives = [row[row >= 0].tolist() for row in found.negatives]
    assert dict(zip(found.query.tolist(), negatives, strict=True)) == wanted


def test_training_tiles_alone_are_mined(round_of, tiled, pictures):
    tiles, allowed = training(tiled), set(of_split(tiled.tiles, "train"))
    for rule, step in itertools.product(("knn", "ranked", "neighbours"), (0, 6)):
        pictures.asked.clear()
        found = round_of("train.loss=triplet", f"mining.rule={rule}", step=step).mine()
        assert set(pictures.asked) <= allowed
        used = np.concatenate([found.query, found.match, found.negatives.ravel()])
        assert used.max() < len(tiles)
        wrong = found.negatives >= 0
        neutral = are_neutral(tiles, found.query[:, None], found.negatives)
        assert not (neutral & wrong).any()


def test_overlapping_tiles_are_never_mined_as_wrong(round_of, tiled):
    grid = dataclasses.replace(tiled.tiles.grid, stride=16)
    tiles = dataclasses.replace(tiled.tiles, grid=grid)
    assert grid.reach == 1
    mine = tiles.select(tiles.split == 0)
    for rule, step in itertools.product(("knn", "ranked", "neighbours"), (0, 6)):
        form = ("train.loss=triplet", f"mining.rule={rule}", "mining.k=20")
        found = round_of(*form, step=step, tiles=tiles).mine()
        rows, columns = np.nonzero(found.negatives >= 0)
        query, negative = found.query[rows], found.negatives[rows, columns]
        assert len(query) > 20
        far = np.maximum(
            abs(mine.col[query] - mine.col[negative]), abs(mine.row[query] - mine.row[negative])
        )
        assert far.min() > 1


# Draws


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_frame_is_drawn_of_the_requested_split(round_of, tiled, pictures, tmp_path, split):
    round_of(f"train.frames={split}", step=12).draw()
    with Image.open(tmp_path / "figures" / "00000012.png") as picture:
        assert min(picture.size) > 300
    assert sorted(pictures.asked) == of_split(tiled.tiles, split)
    # Nothing else is left in the folder of the run.
    assert [path.name for path in tmp_path.iterdir()] == ["figures"]


def test_no_frame_is_drawn_by_default(round_of, pictures, tmp_path):
    round_of().draw()
    assert pictures.asked == []
    assert list(tmp_path.iterdir()) == []

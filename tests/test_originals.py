"""What was wrong in the systems that are re-implemented here is not here."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import rasterio
from hand_made import hand_made_classes, hand_made_tiles
from small_network import network
from small_project import SIZE, YEARS, evaluate, make_project, settings
from small_runs import SMALL_NETWORK

from geomatch import config
from geomatch.data.ground_truth import tasks
from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.embedding import parts
from geomatch.evaluation.verification import sample
from geomatch.nn.encoder import TileForm
from geomatch.nn.step import State
from geomatch.progress import silent
from geomatch.search.metrics import mean, rank_relevant, recall_at
from geomatch.search.protocol import map5, retrieve
from geomatch.train import train
from geomatch.training import rounds
from geomatch.training.mining import candidate_triplets
from geomatch.training.rounds import Validator
from geomatch.training.sampler import Sampler

# The originals of cross-year retrieval (examples/cross-year)


@pytest.mark.parametrize("loss", ["bce", "focal", "contrastive", "cosine", "triplet"])
def test_random_negatives_are_never_the_anchor_nor_of_its_year(loss):
    """In the original any tile was a negative: the anchor itself, and mostly tiles of its year."""
    # So few places that a careless draw would hit the anchor's own at every third.
    tiles = hand_made_tiles([0, 1, 2] * 2, [0] * 6, [0] * 3 + [1] * 3)
    sampler = Sampler(tiles, config.TrainConfig(loss=loss, batch=6), config.MiningConfig())
    place = tiles.places()
    for step in range(100):
        anchor, positive, negative = sampler.draw(step, None)
        assert (place[anchor] != place[negative]).all()
        assert (tiles.year[anchor] != tiles.year[negative]).all()
        assert (tiles.year[positive] == tiles.year[negative]).all()
    for anchor, _, negative in candidate_triplets(tiles, 100, (0,)):
        assert (place[anchor] != place[negative]).all()
        assert (tiles.year[anchor] != tiles.year[negative]).all()


def test_labels_stand_beside_the_image_and_do_not_overwrite_it(tiled, tmp_path):
    """In the original one loader gave the label's pixels for the image's."""
    project = make_project(tmp_path / "project", tiled.imagery, labels=True)
    tiles = TileTable.load(project.catalogue)
    pixels = TileStore.open(project.pixels).read(tiles.store_row)
    assert pixels.shape == (len(tiles), SIZE, SIZE, 4)
    for split in SPLITS:
        for code, year in enumerate(YEARS):
            with (
                rasterio.open(tiled.imagery / f"{split}_{year}.tif") as images,
                rasterio.open(tiled.imagery / f"labels_{split}_{year}.tif") as labels,
            ):
                left, top = images.bounds.left, images.bounds.top
                sheet = np.concatenate([images.read(), labels.read()])
            mine = np.flatnonzero((tiles.split == SPLITS.index(split)) & (tiles.year == code))
            assert len(mine)
            for tile in mine:
                x, y = int(tiles.bounds()[tile, 0] - left), int(top - tiles.bounds()[tile, 3])
                wanted = np.moveaxis(sheet[:, y : y + SIZE, x : x + SIZE], 0, -1)
                np.testing.assert_array_equal(pixels[tile], wanted)
    assert (pixels[..., 0] != pixels[..., 3]).any()


def test_the_last_batch_of_tiles_is_measured_too(tiled, tmp_path, monkeypatch):
    """In the original a batch that was not full was dropped from evaluation."""
    model, variables = network(TileForm(SIZE, 3, 0), trunk="convnet", stage=2, head="dense")
    state = State(variables["params"], variables.get("batch_stats", {}), None, {})
    store = TileStore.open(tiled.project.pixels)
    splits = {name: tiled.tiles.select(tiled.tiles.split == i) for i, name in enumerate(SPLITS)}
    validator = Validator(model, settings(), store, splits, tmp_path)
    counted, scores, real = [], [], rounds.retrieve

    def counting(vectors, asked, metric):
        found = real(vectors, asked, metric)
        counted.append(sum(len(outcome.ranking.rank) for outcome in found))
        return found

    monkeypatch.setattr(rounds, "retrieve", counting)
    for batch in (5, 16, 17, 32):
        monkeypatch.setattr(rounds, "BATCH", batch)
        scores.append(validator.round(state.variables, 0, 0, silent).map5("validation"))
    assert counted == [16] * 4
    assert scores == [scores[0]] * 4


def test_every_tile_is_embedded_and_every_place_is_a_query(indexed, trained):
    tiles, found = indexed.tiles, evaluate(indexed.project).splits
    # 88 tiles are no whole number of batches.
    assert len(tiles) % parts.BATCH
    place = tiles.places()
    for code, split in enumerate(SPLITS):
        if split in found:
            mine = place[tiles.split == code]
            assert found[split].queries == sum((mine == p).sum() == 2 for p in mine)
    assert found["test"].queries == 24


@pytest.mark.parametrize(
    ("rule", "loss"),
    [("knn", "bce"), ("ranked", "triplet"), ("neighbours", "infonce"), ("in-batch", "triplet")],
)
def test_no_region_is_measured_that_is_trained_on_or_mined(tiled, copied, monkeypatch, rule, loss):
    """The original mined, and "tested", on the regions that it trained on."""
    project, read, real = copied(tiled), [], TileStore.read

    def reading(store, rows):
        read.append(np.asarray(rows))
        return real(store, rows)

    monkeypatch.setattr(TileStore, "read", reading)
    mined, search = [], rounds.exact.search

    def searching(vectors, *arguments):
        mined.append(len(vectors))
        return search(vectors, *arguments)

    monkeypatch.setattr(rounds.exact, "search", searching)
    form = (f"mining.rule={rule}", f"train.loss={loss}", "mining.hardest=24")
    train(project, settings(*SMALL_NETWORK, *form, "train.epochs=2"))
    split_of = np.empty(len(tiled.tiles), int)
    split_of[tiled.tiles.store_row] = tiled.tiles.split
    # What is read at once is of one split, and never of the test split.
    kinds = [{SPLITS[split] for split in split_of[rows]} for rows in read]
    assert all(kind in ({"train"}, {"validation"}) for kind in kinds)
    # Validation tiles are read to be measured at three rounds, and for nothing else.
    assert sum(len(rows) for rows, kind in zip(read, kinds, strict=True) if kind != {"train"}) == (
        3 * int((tiled.tiles.split == SPLITS.index("validation")).sum())
    )
    assert set(mined) <= {int((tiled.tiles.split == SPLITS.index("train")).sum())}
    assert bool(mined) == (rule in ("knn", "neighbours"))
    # The regions share no ground.
    bounds = tiled.tiles.bounds()
    for a in range(3):
        for b in range(a):
            mine, other = (bounds[tiled.tiles.split == code] for code in (a, b))
            gap = mine[:, None, 0] - other[None, :, 2]
            assert (gap >= 0).all()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("length", [0.0, 1.0, 30.0, 3000.0])
@pytest.mark.parametrize("dimension", [2, 7, 128])
def test_blank_tiles_that_tie_find_nothing(tiled, metric, length, dimension):
    """In the original the first of equal scores was the match: blank tiles found themselves."""
    everything = np.ones(len(tiled.tiles), bool)
    blank = np.random.default_rng(0).normal(size=dimension)
    vectors = np.tile(length * blank / np.linalg.norm(blank), (len(tiled.tiles), 1))
    dated = retrieve(vectors.astype(np.float32), tasks(tiled.tiles, everything, everything), metric)
    assert sum(len(outcome.task.queries) for outcome in dated) == 88
    assert map5(dated) == 0
    for outcome in dated:
        # All others of the year come first.
        assert (outcome.ranking.rank == len(outcome.task.database)).all()
    classes = hand_made_classes([0] * 20 + [1] * 20)
    everything = np.ones(40, bool)
    found = retrieve(
        vectors[:40].astype(np.float32), tasks(classes, everything, everything), metric
    )
    assert map5(found) == 0


# Of ranked triplets (examples/ranked-triplets)


def test_hit_at_5_is_not_called_map():
    """The original's "mAP" was the share of queries with a match among the first five."""
    # Of two queries with three relevant images each, whose first is at rank 1 and 4.
    scores = np.array([[9, 1, 2, 8, 7, 6, 5, 4, 3], [5, 4, 1, 9, 8, 7, 3, 2, 0]], np.float32)
    database_place = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
    none = (np.empty(0, np.int64), np.empty(0, np.int64))
    found = rank_relevant(
        scores, np.eye(9, dtype=np.float32), np.zeros(2, np.int64), database_place, none
    )
    assert recall_at(found.rank, 5) == 1
    # Ranks 1, 8 and 9; and 4, 5 and 8.
    assert mean(found.ap) == pytest.approx(
        ((1 + 2 / 8 + 3 / 9) / 3 + (1 / 4 + 2 / 5 + 3 / 8) / 3) / 2
    )
    assert mean(found.ap_at) == pytest.approx((1 / 3 + (1 / 4 + 2 / 5) / 3) / 2)


# Of semi-hard triplets (examples/image-matching)


def test_pairs_that_are_verified_are_of_all_anchors():
    """The original took the first 32,000 pairs of a nested loop, which are about four anchors'."""
    place = np.repeat(np.arange(200), 40)
    itself = np.arange(len(place)), np.arange(len(place))
    draw = partial(sample, place, place, itself)
    found = draw(32_000, np.random.default_rng(0))
    nested = np.arange(32_000) // (len(place) - 1)
    assert len(np.unique(nested)) <= 5
    assert len(np.unique(found.anchor)) == len(place)
    # As many pairs of one place as of two, of each class as many.
    assert np.bincount(place[found.anchor]).tolist() == [40] * 200
    assert (place[found.same] == place[found.anchor]).all()
    assert (found.same != found.anchor).all()
    assert (place[found.other] != place[found.anchor]).all()
    # Fewer than there are anchors are spread over their classes, too.
    few = draw(1000, np.random.default_rng(0))
    assert len(few.anchor) == 1000
    assert len(np.unique(place[few.anchor])) > 190

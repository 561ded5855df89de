"""The loss of a batch from its descriptors, by plain loops; and the same on one and two devices."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_network import network

from geomatch import config
from geomatch.nn import losses
from geomatch.nn.encoder import TileForm
from geomatch.nn.objective import MARGINS, Batch, MatchRule, margin, objective

pytestmark = pytest.mark.usefixtures("strict_dtypes")

AXIS = "devices"
D = 6
DATED, CLASSES = MatchRule(dated=True, reach=1), MatchRule(dated=False, reach=0)
KINDS = {True: DATED, False: CLASSES}
WHOLE = {
    "semi-hard": ("triplet", {"rule": "in-batch", "pick": "semi-hard"}),
    "batch-hard": ("triplet", {"rule": "in-batch", "pick": "batch-hard"}),
    "multi-similarity": ("multi-similarity", {"rule": "none"}),
    "infonce": ("infonce", {"rule": "none"}),
}


@functools.cache
def siamese():
    """A network for its pair head and its temperature alone."""
    return network(TileForm(16, 3, 0), trunk="convnet", stage=1, head="dense", descriptor=D)


def configured(loss, mining=None, **train):
    train = config.TrainConfig(loss=loss, **train)
    return config.Config(train=train, mining=config.MiningConfig(**(mining or {})))


def descriptors(roles, batch, seed=0):
    """(roles, batch, D) that are more alike than others where they are of one place."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(0, 0.6, (1, batch, D)) + rng.normal(0, 0.4, (roles, batch, D))
    rows[2::3] = rng.normal(0, 0.6, rows[2::3].shape)
    return rows.astype(np.float32)


def grounds(roles, batch, dated=True, views=2, seed=0):
    """(roles, batch, 4): views of a place each, and places of their own; some lie side by side."""
    rng = np.random.default_rng(seed)
    places = np.zeros((roles, batch, 4), np.int32)
    if not dated:
        # Of class folders: few classes, which come again, and the tile's own number.
        places[:, :, 1] = rng.integers(0, 4, (1, batch))
        places[views:, :, 1] = rng.integers(0, 4, (roles - min(views, roles), batch))
        places[..., 3] = rng.integers(0, 9, (roles, batch)) * 4 + places[..., 1]
        return places
    places[..., 0] = 32630 + rng.integers(0, 2, batch)
    places[..., 1:3] = rng.integers(0, 4, (1, batch, 2))
    places[views:, :, 1:3] = rng.integers(0, 4, (max(roles - views, 0), batch, 2))
    places[..., 3] = (rng.integers(0, 3, batch) + np.arange(roles)[:, None]) % 3
    return places


def of_devices(values, devices):
    roles, batch = values.shape[:2]
    parts = values.reshape(roles, devices, batch // devices, *values.shape[2:])
    return np.moveaxis(parts, 0, 1)


def loss_and_gradient(settings, rows, places, match_rule=DATED, views=0, devices=1, features=None):
    """Loss, share of hard triplets and gradient of a batch, by the means of all devices.

    The gradient is that of factors of each value of descriptors and of the network's parameters,
    as a step averages it.
    """
    model, variables = siamese()
    loss_of_batch = objective(settings, match_rule, AXIS, views)

    def of_device(rows, places, features):
        def loss(factors, params):
            return loss_of_batch(Batch(model, params, rows * factors, places, features))

        (value, hard), gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            jnp.ones(D), variables["params"]
        )
        return jax.lax.pmean((value, hard, gradient), AXIS)

    step = jax.pmap(of_device, axis_name=AXIS, devices=jax.local_devices()[:devices])
    given = (None if x is None else of_devices(x, devices) for x in (rows, places, features))
    value, hard, gradient = step(*given)
    return float(value[0]), float(hard[0]), jax.tree.map(lambda leaf: np.asarray(leaf[0]), gradient)


# What losses compare, in plain loops


def relation(a, b, dated):
    """How two rows of places relate: "match", "other", or neutral."""
    if dated:
        apart = a[0] != b[0] or abs(int(a[1]) - int(b[1])) > 1 or abs(int(a[2]) - int(b[2])) > 1
    else:
        apart = a[1] != b[1]
    if apart:
        return "other"
    return "match" if (a[:3] == b[:3]).all() and a[3] != b[3] else "neutral"


def length(a, b, squared=False):
    square = sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True))
    return square if squared else math.sqrt(square)


def cosine(a, b):
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def pairs_of(rows):
    """(first, second, matching) of batches of anchors, positives and negatives."""
    for first in range(0, len(rows), 3):
        for i in range(rows.shape[1]):
            yield rows[first, i], rows[first + 1, i], True
            yield rows[first, i], rows[first + 2, i], False


def pair_losses(name, apart, gamma=2.0, alpha=0.25):
    head = siamese()[1]["params"]["pair_head"]

    def focal(a, b, match):
        logit = float(np.abs(a - b) @ head["kernel"][:, 0] + head["bias"][0])
        right = 1 / (1 + math.exp(-logit if match else logit))
        weight = alpha if match else 1 - alpha
        return -weight * (1 - right) ** gamma * math.log(right)

    def contrastive(a, b, match):
        far = length(a, b)
        return (far**2 if match else max(0, apart - far) ** 2) / 2

    def embedding(a, b, match):
        return 1 - cosine(a, b) if match else max(0, cosine(a, b) - apart)

    return {"focal": focal, "contrastive": contrastive, "cosine": embedding}[name]


@pytest.mark.parametrize("roles", [3, 6])
@pytest.mark.parametrize(
    ("loss", "train", "apart"),
    [
        ("contrastive", {}, 1.0),
        ("contrastive", {"margin": 2.5}, 2.5),
        ("cosine", {}, 0.0),
        ("cosine", {"margin": 0.3}, 0.3),
        ("focal", {}, None),
        ("focal", {"gamma": 0.5, "alpha": 0.75}, None),
    ],
)
def test_losses_of_pairs(loss, train, apart, roles):
    rows, places = descriptors(roles, 5), grounds(roles, 5)
    by_hand = pair_losses(loss, apart, **{k: v for k, v in train.items() if k != "margin"})
    terms = [by_hand(*pair) for pair in pairs_of(rows)]
    assert len(terms) == 2 * 5 * roles // 3
    value, hard, _ = loss_and_gradient(configured(loss, **train), rows, places)
    assert value == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert math.isnan(hard)


@pytest.mark.parametrize(
    ("squared", "apart", "roles"), [(True, None, 3), (False, 0.7, 3), (True, 0.7, 6)]
)
def test_triplets(squared, apart, roles):
    rows = descriptors(roles, 5)
    wanted = 0.1 if apart is None else apart
    terms = []
    for first in range(0, roles, 3):
        for a, p, n in zip(*rows[first : first + 3], strict=True):
            terms.append(max(0, length(a, p, squared) - length(a, n, squared) + wanted))
    assert min(terms) == 0 < max(terms)
    value, hard, _ = loss_and_gradient(
        configured("triplet", margin=apart, squared=squared), rows, grounds(roles, 5)
    )
    assert value == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert math.isnan(hard)


def test_margins_are_the_systems_own_unless_they_are_set():
    assert MARGINS == {"contrastive": 1.0, "cosine": 0.0, "triplet": 0.1}
    for loss, wanted in MARGINS.items():
        assert margin(configured(loss)) == wanted
        assert margin(configured(loss, margin=0.0)) == 0
        assert margin(configured(loss, margin=3.0)) == 3
    assert margin(configured("infonce")) == 0


def flat(rows, places):
    return rows.reshape(-1, rows.shape[-1]), places.reshape(-1, 4)


def in_batch_by_hand(rows, places, dated, pick, squared, apart):
    """Mean loss and share of hard of the triplets that are picked among all rows."""
    rows, places = flat(rows, places)
    count, terms = len(rows), []
    for a in range(count):
        kinds = [relation(places[a], places[other], dated) for other in range(count)]
        far = [length(rows[a], rows[other], squared) for other in range(count)]

        def others(p, kinds=kinds):
            """The rows of other places that may go with a positive."""
            same_year = [not dated or places[p, 3] == places[n, 3] for n in range(count)]
            return [n for n in range(count) if kinds[n] == "other" and same_year[n]]

        positives = [p for p in range(count) if kinds[p] == "match"]
        if pick == "batch-hard":
            hardest = max(positives, key=far.__getitem__, default=None)
            positives = [] if hardest is None else [hardest]
        for p in positives:
            negatives = others(p)
            if not negatives:
                continue
            if pick == "batch-hard":
                n = min(negatives, key=far.__getitem__)
            else:
                within = [n for n in negatives if far[p] < far[n] < far[p] + apart]
                n = (
                    min(within, key=far.__getitem__)
                    if within
                    else max(negatives, key=far.__getitem__)
                )
            terms.append(far[p] - far[n] + apart)
    return sum(max(0, t) for t in terms) / len(terms), sum(t > 0 for t in terms) / len(terms)


@pytest.mark.parametrize(
    ("dated", "squared", "views"), [(True, True, 2), (True, False, 3), (False, True, 3)]
)
@pytest.mark.parametrize(("pick", "apart"), [("semi-hard", 0.8), ("batch-hard", 0.05)])
def test_triplets_within_a_batch(dated, squared, views, pick, apart):
    rows, places = descriptors(views, 8), grounds(views, 8, dated, views)
    settings = configured(
        "triplet", {"rule": "in-batch", "pick": pick}, squared=squared, margin=apart, views=views
    )
    value, hard, _ = loss_and_gradient(settings, rows, places, KINDS[dated], views)
    wanted, share = in_batch_by_hand(rows, places, dated, pick, squared, apart)
    assert value == pytest.approx(wanted, rel=1e-4)
    assert hard == pytest.approx(share, abs=1e-6)
    assert share > 0


def test_a_batch_without_a_triplet_costs_nothing():
    rows, places = descriptors(2, 4), grounds(2, 4)
    # All of one place.
    places[..., :3] = places[0, 0, :3]
    settings = configured("triplet", {"rule": "in-batch"})
    value, hard, gradient = loss_and_gradient(settings, rows, places, views=2)
    assert (value, hard) == (0, 0)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def multi_similarity_by_hand(rows, places, dated):
    rows, places = flat(rows, places)
    terms = []
    for a in range(len(rows)):
        near = {"match": [], "other": [], "neutral": []}
        for other in range(len(rows)):
            near[relation(places[a], places[other], dated)].append(cosine(rows[a], rows[other]))
        term = 0.0
        if near["match"] and near["other"]:
            pull = [s for s in near["match"] if s - losses.EPSILON < max(near["other"])]
            push = [s for s in near["other"] if s + losses.EPSILON > min(near["match"])]
            for hard, scale in ((pull, -losses.ALPHA), (push, losses.BETA)):
                total = sum(math.exp(scale * (s - losses.BASE)) for s in hard)
                term += math.log1p(total) / abs(scale)
        terms.append(term)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("dated", [True, False])
@pytest.mark.parametrize("roles", [2, 3, 6])
def test_multi_similarity_of_a_batch(dated, roles):
    views = 2 if roles == 2 else 3
    rows, places = descriptors(roles, 8), grounds(roles, 8, dated, views)
    settings = configured("multi-similarity", {"rule": "knn"}, views=views)
    value, hard, _ = loss_and_gradient(settings, rows, places, KINDS[dated], views)
    assert value == pytest.approx(multi_similarity_by_hand(rows, places, dated), rel=1e-4)
    assert math.isnan(hard)


def info_nce_by_hand(rows, places, dated, views):
    """The mean over the ways of asking: each view in the next one, and the last in the first."""
    temperature = math.exp(float(siamese()[1]["params"]["log_temperature"]))
    batch, ways = rows.shape[1], []
    for view in range(views):
        asking, answers, further = [view], [(view + 1) % views], []
        if len(rows) > views and view < 2:
            # A hard query is asked like a first view, with its negative as one more candidate.
            asking.append(views + view)
            answers.append(views + 1 - view)
            further = [] if view else [views + 2]
        terms = []
        for role, answer in zip(asking, answers, strict=True):
            for i in range(batch):
                weights = {}
                for other in (*answers, *further):
                    for j in range(batch):
                        own = (other, j) == (answer, i)
                        if own or relation(places[role, i], places[other, j], dated) == "other":
                            near = cosine(rows[role, i], rows[other, j])
                            weights[other, j] = math.exp(near / temperature)
                terms.append(-math.log(weights[answer, i] / sum(weights.values())))
        ways.append(sum(terms) / len(terms))
    return sum(ways) / len(ways)


@pytest.mark.parametrize(
    ("dated", "views", "roles"),
    [(True, 2, 2), (True, 2, 5), (False, 3, 3), (True, 3, 3), (True, 3, 6), (False, 4, 4)],
)
def test_info_nce_of_several_views(dated, views, roles):
    rows, places = descriptors(roles, 6), grounds(roles, 6, dated, views)
    settings = configured("infonce", {"rule": "knn"}, views=views)
    value, hard, _ = loss_and_gradient(settings, rows, places, KINDS[dated], views)
    wanted = info_nce_by_hand(rows, places, dated, views)
    assert value == pytest.approx(wanted, rel=1e-4)
    assert math.isnan(hard)


def kept_by_hand(rows, features, places, views):
    """How far each view's choice among the next one's tiles is from that by its features."""
    centred = features - features.mean(axis=(0, 1))
    batch, ways = rows.shape[1], []
    for view in range(views):
        answer = (view + 1) % views
        terms = []
        for i in range(batch):
            kept = [
                j
                for j in range(batch)
                if j == i or relation(places[view, i], places[answer, j], True) == "other"
            ]
            ours, theirs = (
                np.array([math.exp(cosine(x[view, i], x[answer, j]) / 0.05) for j in kept])
                for x in (rows, centred)
            )
            ours, theirs = ours / ours.sum(), theirs / theirs.sum()
            terms.append((theirs * np.log(theirs / ours)).sum())
        ways.append(np.mean(terms))
    return np.mean(ways)


@pytest.mark.parametrize("views", [2, 3])
def test_info_nce_keeps_the_similarities_of_features(views):
    rows, places = descriptors(views, 6), grounds(views, 6, views=views)
    features = np.random.default_rng(5).normal(1, 1, (views, 6, 9)).astype(np.float32)
    settings = configured("infonce", {"rule": "none"}, views=views, distil=0.7)
    value, *_ = loss_and_gradient(settings, rows, places, DATED, views, features=features)
    wanted = info_nce_by_hand(rows, places, True, views)
    wanted += 0.7 * kept_by_hand(rows, features, places, views)
    assert value == pytest.approx(wanted, rel=1e-4)
    two = loss_and_gradient(settings, rows, places, DATED, views, 2, features)
    assert two[0] == pytest.approx(wanted, rel=1e-4)


# What never counts


def assert_alike(found, wanted, tolerance=1e-4):
    """Values and gradients that are the same."""
    assert found[0] == pytest.approx(wanted[0], rel=tolerance)
    assert found[1] == pytest.approx(wanted[1], rel=tolerance, nan_ok=True)
    leaves = [jax.tree.leaves(each[2]) for each in (found, wanted)]
    scale = max(np.abs(leaf).max() for leaf in leaves[1])
    for mine, theirs in zip(*leaves, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize(("dated", "views"), [(True, 3), (False, 2)])
def test_two_devices_have_the_loss_and_gradient_of_one(kind, dated, views):
    loss, mining = WHOLE[kind]
    rows, places = descriptors(views, 8), grounds(views, 8, dated, views)
    settings = configured(loss, mining, margin=0.8, views=views)
    one, two = (
        loss_and_gradient(settings, rows, places, KINDS[dated], views, devices)
        for devices in (1, 2)
    )
    assert_alike(two, one)
    assert np.abs(one[2][0]).max() > 1e-3


@pytest.mark.parametrize(("loss", "views"), [("infonce", 3), ("multi-similarity", 2)])
def test_two_devices_have_the_loss_of_one_with_hard_samples(loss, views):
    rows, places = descriptors(views + 3, 8), grounds(views + 3, 8, True, views)
    settings = configured(loss, {"rule": "knn"}, views=views)
    assert_alike(
        *(loss_and_gradient(settings, rows, places, DATED, views, devices) for devices in (2, 1))
    )


@pytest.mark.parametrize("pick", ["semi-hard", "batch-hard"])
def test_a_device_that_finds_fewer_triplets_does_not_count_for_more(pick):
    rows, places = descriptors(2, 4), grounds(2, 4)
    places[..., 0], places[..., 2] = 32630, 0
    places[..., 1] = [0, 10, 20, 30]
    # Of the second device one place has no view in another year.
    places[1, 3, 3] = places[0, 3, 3]
    settings = configured("triplet", {"rule": "in-batch", "pick": pick}, margin=0.8)
    one, two = (loss_and_gradient(settings, rows, places, DATED, 2, devices) for devices in (1, 2))
    assert_alike(two, one)
    assert one[0] == pytest.approx(in_batch_by_hand(rows, places, True, pick, True, 0.8)[0])


@pytest.mark.parametrize("kind", WHOLE)
def test_overlapping_neighbours_are_neutral(kind):
    """Two places that overlap: whatever the second looks like, the first's rows do not see it."""
    loss, mining = WHOLE[kind]
    settings = configured(loss, mining, margin=0.8)
    rows, places = descriptors(2, 2), np.zeros((2, 2, 4), np.int32)
    places[1, :, 3] = 1
    found = {}
    for column in (1, 2):
        places[:, 1, 1] = column
        for scale in (1, -3):
            moved = rows.copy()
            moved[:, 1] *= scale
            found[column, scale] = loss_and_gradient(settings, moved, places, DATED, 2)
    if kind == "infonce":
        # Its matches are the only candidates.
        assert found[1, 1][0] == found[1, -3][0] == pytest.approx(0, abs=1e-6)
    else:
        assert found[1, 1][0] == found[1, -3][0] == 0
    assert np.abs(found[1, 1][2][0]).max() == pytest.approx(0, abs=1e-6)
    # A column on they are other places, which is of account.
    assert found[2, 1][0] != found[2, -3][0]


@pytest.mark.parametrize("pick", ["semi-hard", "batch-hard"])
def test_triplets_in_a_batch_have_negatives_of_the_positive_s_year(pick):
    """A row of another year next to the anchor is no negative, though it would be the hardest."""
    settings = configured("triplet", {"rule": "in-batch", "pick": pick}, margin=0.5, squared=False)
    rows = np.zeros((2, 2, D), np.float32)
    # One anchor's place in years 0 and 1, and another in years 0 and 2.
    rows[0, 0, 0], rows[1, 0, 0] = 0.0, 1.0
    rows[0, 1, 0], rows[1, 1, 0] = 1.2, 5.0
    places = np.zeros((2, 2, 4), np.int32)
    places[:, 1, 1] = 50
    places[1, 0, 3], places[1, 1, 3] = 1, 2
    value, hard, _ = loss_and_gradient(settings, rows, places, DATED, 2)
    # From year 0 at 0: its positive is of year 1, of which there is no other. From year 1 at 1: the
    # positive at 0 (1 away), the negative of year 0 at 1.2 (0.2 away). So too the other place: from
    # 5 the positive at 1.2 (3.8 away) and the negative of year 0 at 0 (5 away).
    assert value == pytest.approx(((1 - 0.2 + 0.5) + 0) / 2)
    assert hard == 0.5
    anyone, _, _ = loss_and_gradient(settings, rows, places, MatchRule(dated=False, reach=1), 2)
    assert anyone != pytest.approx(value)


def test_relations_are_of_zone_cell_and_year():
    rng = np.random.default_rng(6)
    places = rng.integers(0, 3, (40, 4)).astype(np.int32)
    for reach in (0, 1):
        positive, negative = MatchRule(True, reach).relations(places, places[:17])
        assert positive.shape == (40, 17)
        for i, a in enumerate(places):
            for j, b in enumerate(places[:17]):
                near = a[0] == b[0] and max(abs(a[1:3] - b[1:3])) <= reach
                assert positive[i, j] == ((a[:3] == b[:3]).all() and a[3] != b[3])
                assert negative[i, j] == (not near)
    assert not (positive & negative).any()
    assert not (positive | negative).all()

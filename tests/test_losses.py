"""Losses against plain loops, and the loss of a batch from its descriptors."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geomatch.nn.layers import unit
from geomatch.nn.losses import (
    binary_cross_entropy,
    contrastive,
    cosine_embedding,
    distance,
    distillation,
    focal,
    head_penalty,
    info_nce,
    multi_similarity,
    triplet,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")

REFERENCE = np.load(Path(__file__).parent / "references" / "metric_learning.npz")


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_bce_matches_plain_loops():
    logits = [-3.0, -0.2, 0.0, 0.7, 4.0, 1.5]
    matching = [0, 1, 1, 0, 1, 0]
    terms = [
        -math.log(sigmoid(x)) if y else -math.log(1 - sigmoid(x))
        for x, y in zip(logits, matching, strict=True)
    ]
    found = binary_cross_entropy(jnp.array(logits), jnp.array(matching, float))
    assert float(found) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_bce_does_not_overflow():
    logits = jnp.array([1000.0, -1000.0, 1000.0, -1000.0])
    matching = jnp.array([1.0, 0.0, 0.0, 1.0])
    loss, gradient = jax.value_and_grad(binary_cross_entropy)(logits, matching)
    assert float(loss) == pytest.approx((0 + 0 + 1000 + 1000) / 4)
    np.testing.assert_allclose(gradient, [0, 0, 0.25, -0.25], atol=1e-6)


def test_bce_gradient_is_the_error_of_the_probability():
    logits, matching = [-2.0, 0.3, 1.1], [1.0, 0.0, 1.0]
    gradient = jax.grad(binary_cross_entropy)(jnp.array(logits), jnp.array(matching))
    wanted = [(sigmoid(x) - y) / 3 for x, y in zip(logits, matching, strict=True)]
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5)


def test_head_penalty_applies_at_512_px_alone():
    rng = np.random.default_rng(0)
    conv, dense = rng.normal(size=(3, 3, 2, 4)), rng.normal(size=(5, 6))
    head = {
        "Conv_0": {"kernel": jnp.array(conv), "bias": jnp.full(4, 9.0)},
        "Dense_0": {"kernel": jnp.array(dense), "bias": jnp.full(6, 9.0)},
    }
    params = {"encoder": {"head": head, "trunk": {"stem": {"kernel": jnp.ones(3)}}}}
    squares = 2e-4 * sum(v * v for v in conv.ravel()) + 1e-3 * sum(v * v for v in dense.ravel())
    assert float(head_penalty(params, 512)) == pytest.approx(squares, rel=1e-5)
    assert float(head_penalty(params, 256)) == 0
    assert float(head_penalty({"encoder": {}}, 512)) == 0


def test_info_nce_matches_plain_loops():
    rng = np.random.default_rng(0)
    queries, candidates = rng.normal(size=(3, 4)), rng.normal(size=(5, 4))
    match, temperature = [1, 0, 4], 0.3
    neutral = np.zeros((3, 5), bool)
    # A match may itself be marked as common ground; query 1 leaves out candidate 3.
    neutral[0, 1] = neutral[1, 3] = True
    total = 0.0
    for i in range(3):
        weights = [
            math.exp(float(queries[i] @ candidates[j]) / temperature)
            if j == match[i] or not neutral[i, j]
            else 0.0
            for j in range(5)
        ]
        total -= math.log(weights[match[i]] / sum(weights))
    found = info_nce(
        jnp.array(queries),
        jnp.array(candidates),
        jnp.array(match),
        jnp.array(neutral),
        jnp.array(temperature),
    )
    assert float(found) == pytest.approx(total / 3, rel=1e-5)


def test_distillation_matches_plain_loops():
    rng = np.random.default_rng(0)
    ours, theirs = rng.uniform(-1, 1, (2, 3, 5))
    match = [1, 0, 4]
    neutral = np.zeros((3, 5), bool)
    neutral[0, 1] = neutral[1, 3] = True
    total = 0.0
    for i in range(3):
        kept = [j for j in range(5) if j == match[i] or not neutral[i, j]]

        def choice(cosines, kept=kept):
            weights = {j: math.exp(float(cosines[j]) / 0.05) for j in kept}
            return {j: weight / sum(weights.values()) for j, weight in weights.items()}

        p, q = choice(theirs[i]), choice(ours[i])
        total += sum(p[j] * math.log(p[j] / q[j]) for j in kept)
    found = distillation(jnp.array(ours), jnp.array(theirs), jnp.array(match), jnp.array(neutral))
    assert float(found) == pytest.approx(total / 3, rel=1e-5)


def test_distillation_of_a_student_that_agrees_is_zero_and_flat():
    cosines = jnp.array(np.random.default_rng(0).uniform(-1, 1, (4, 4)).astype(np.float32))
    neutral = jnp.eye(4, k=1, dtype=bool)
    value, gradient = jax.value_and_grad(distillation)(cosines, cosines, jnp.arange(4), neutral)
    assert float(value) == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_info_nce_has_a_finite_gradient_beside_neutral_candidates():
    rows = jnp.eye(3)
    neutral = jnp.array([[True, True, True], [False, True, False], [False, False, True]])

    def loss(rows):
        return info_nce(rows, rows, jnp.arange(3), neutral, jnp.array(0.01))

    value, gradient = jax.value_and_grad(loss)(rows)
    assert np.isfinite(float(value))
    assert np.isfinite(np.asarray(gradient)).all()


def masks(classes):
    """Positives and negatives among rows of these classes, each row no positive of its own."""
    same = classes[:, None] == classes[None]
    return same & ~np.eye(len(classes), dtype=bool), ~same


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (2.0, 0.75), (0.5, 0.5), (0.0, 0.25)])
def test_focal_matches_plain_loops(gamma, alpha):
    logits = [-3.0, -0.2, 0.0, 0.7, 4.0, 1.5]
    matching = [0, 1, 1, 0, 1, 0]
    total = 0.0
    for x, y in zip(logits, matching, strict=True):
        right = sigmoid(x) if y else 1 - sigmoid(x)
        total -= (alpha if y else 1 - alpha) * (1 - right) ** gamma * math.log(right)
    found = focal(jnp.array(logits), jnp.array(matching, float), gamma, alpha)
    assert float(found) == pytest.approx(total / 6, rel=1e-5)


def test_focal_does_not_overflow():
    logits = jnp.array([1000.0, -1000.0, 1000.0, -1000.0])
    matching = jnp.array([1.0, 0.0, 0.0, 1.0])
    loss, gradient = jax.value_and_grad(focal)(logits, matching, 2.0, 0.25)
    assert float(loss) == pytest.approx((0 + 0 + 750 + 250) / 4)
    np.testing.assert_allclose(gradient, [0, 0, 0.75 / 4, -0.25 / 4], atol=1e-6)


def test_distance_matches_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 1, 5)), rng.normal(size=(4, 5))
    wanted = np.linalg.norm(a - b, axis=-1)
    np.testing.assert_allclose(distance(jnp.array(a), jnp.array(b)), wanted, rtol=1e-5)
    squares = distance(jnp.array(a), jnp.array(b), squared=True)
    np.testing.assert_allclose(squares, wanted**2, rtol=1e-5)


def test_distance_has_the_gradient_of_a_direction_and_none_at_zero():
    a, b = jnp.array([[3.0, 4.0], [1.0, 2.0]]), jnp.array([[0.0, 0.0], [1.0, 2.0]])
    gradient = jax.grad(lambda a: distance(a, b).sum())(a)
    np.testing.assert_allclose(gradient, [[0.6, 0.8], [0, 0]], rtol=1e-6)


def test_contrastive_matches_plain_loops():
    distances, matching, margin = [0.3, 1.4, 0.2, 0.5, 0.9], [1, 1, 0, 0, 0], 0.8
    total = 0.0
    for d, y in zip(distances, matching, strict=True):
        total += (d**2 if y else max(0, margin - d) ** 2) / 2
    found = contrastive(jnp.array(distances), jnp.array(matching, float), margin)
    assert float(found) == pytest.approx(total / 5, rel=1e-5)


def test_contrastive_has_the_terms_of_pytorch_metric_learning():
    rows, terms = jnp.array(REFERENCE["rows"]), []
    for kind in ("pos", "neg"):
        a, b = REFERENCE[f"contrastive_{kind}_pairs"]
        matching = jnp.full(len(a), float(kind == "pos"))
        found = contrastive(distance(rows[a], rows[b]), matching, 1.0)
        terms.append((REFERENCE[f"contrastive_{kind}"] ** 2).mean() / 2)
        assert float(found) == pytest.approx(terms[-1], rel=1e-5)
    assert min(terms) > 0.001


def test_cosine_embedding_matches_plain_loops():
    cosines, matching, margin = [0.9, -0.4, 0.8, 0.1, -0.7], [1, 1, 0, 0, 0], 0.2
    total = 0.0
    for c, y in zip(cosines, matching, strict=True):
        total += 1 - c if y else max(0, c - margin)
    found = cosine_embedding(jnp.array(cosines), jnp.array(matching, float), margin)
    assert float(found) == pytest.approx(total / 5, rel=1e-5)


def test_triplet_matches_plain_loops_over_those_that_count():
    positive, negative, margin = [0.3, 1.0, 0.6, 0.9], [0.5, 0.4, 0.65, 5.0], 0.1
    terms = [max(0, p - n + margin) for p, n in zip(positive, negative, strict=True)]
    args = jnp.array(positive), jnp.array(negative), margin
    assert float(triplet(*args)) == pytest.approx(sum(terms) / 4, rel=1e-5)
    found = triplet(*args, weight=jnp.array([True, False, True, True]))
    assert float(found) == pytest.approx((terms[0] + terms[2] + terms[3]) / 3, rel=1e-5)


def test_triplet_is_0_without_any():
    distances = jnp.array([0.3, 0.5]), jnp.array([0.1, 0.2])
    loss, gradient = jax.value_and_grad(triplet)(*distances, 0.1, jnp.zeros(2))
    assert float(loss) == 0
    np.testing.assert_array_equal(gradient, [0, 0])


@pytest.mark.parametrize("squared", [False, True])
def test_triplet_matches_pytorch_metric_learning(squared):
    positive, negative = masks(REFERENCE["classes"])
    a, p, n = np.nonzero(positive[:, :, None] & negative[:, None, :])

    def loss(rows):
        near, far = (distance(rows[a], rows[other], squared) for other in (p, n))
        return triplet(near, far, float(REFERENCE["margin"]))

    value, gradient = jax.value_and_grad(loss)(jnp.array(REFERENCE["rows"]))
    name = "triplet_squared" if squared else "triplet"
    assert float(value) == pytest.approx(float(REFERENCE[name]), rel=1e-5)
    np.testing.assert_allclose(gradient, REFERENCE[f"{name}_gradient"], rtol=1e-3, atol=1e-6)


def test_multi_similarity_matches_plain_loops():
    rng = np.random.default_rng(0)
    kinds = rng.choice(["positive", "negative", "neutral"], (6, 9))
    similarity = rng.uniform(-0.3, 0.6, (6, 9)) + 0.3 * (kinds == "positive")
    kinds[4][kinds[4] == "positive"] = "neutral"
    kinds[5][kinds[5] == "negative"] = "neutral"
    total, left_out = 0.0, 0
    for i in range(6):
        positives = [similarity[i, j] for j in range(9) if kinds[i, j] == "positive"]
        negatives = [similarity[i, j] for j in range(9) if kinds[i, j] == "negative"]
        if not positives or not negatives:
            continue
        hard_positives = [s for s in positives if s < max(negatives) + 0.1]
        hard_negatives = [s for s in negatives if s > min(positives) - 0.1]
        left_out += len(positives) - len(hard_positives) + len(negatives) - len(hard_negatives)
        total += math.log(1 + sum(math.exp(-2 * (s - 0.5)) for s in hard_positives)) / 2
        total += math.log(1 + sum(math.exp(50 * (s - 0.5)) for s in hard_negatives)) / 50
    assert left_out > 3
    args = (jnp.array(a) for a in (similarity, kinds == "positive", kinds == "negative"))
    assert float(multi_similarity(*args)) == pytest.approx(total / 6, rel=1e-5)


def test_multi_similarity_matches_pytorch_metric_learning():
    positive, negative = map(jnp.array, masks(REFERENCE["classes"]))

    def loss(rows):
        rows = unit(rows)
        return multi_similarity(rows @ rows.T, positive, negative)

    value, gradient = jax.value_and_grad(loss)(jnp.array(REFERENCE["rows"]))
    assert float(value) == pytest.approx(float(REFERENCE["multi_similarity"]), rel=1e-5)
    wanted = REFERENCE["multi_similarity_gradient"]
    np.testing.assert_allclose(gradient, wanted, rtol=1e-3, atol=1e-6)


def test_multi_similarity_has_no_gradient_without_positives_or_negatives():
    similarity, some, none = jnp.ones((2, 3)), jnp.ones((2, 3), bool), jnp.zeros((2, 3), bool)
    for positive, negative in [(some, none), (none, some), (none, none)]:
        loss, gradient = jax.value_and_grad(multi_similarity)(similarity, positive, negative)
        assert float(loss) == 0
        np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


def test_info_nce_matches_pytorch_metric_learning_ntxent():
    places, temperature = jnp.arange(12), jnp.array(REFERENCE["temperature"])

    def loss(rows):
        queries, candidates = unit(rows[:12]), unit(rows[12:])
        return info_nce(queries, candidates, places, jnp.zeros((12, 12), bool), temperature)

    value, gradient = jax.value_and_grad(loss)(jnp.array(REFERENCE["rows"]))
    assert float(value) == pytest.approx(float(REFERENCE["ntxent"]), rel=1e-5)
    np.testing.assert_allclose(gradient, REFERENCE["ntxent_gradient"], rtol=1e-3, atol=1e-6)


# Of descriptors (8, d): rows 0 to 3 ask, 4 to 7 answer.
OF_DESCRIPTORS = {
    "contrastive": lambda rows, positive, negative: contrastive(
        distance(rows[:4], rows[4:]), jnp.array([1.0, 0.0, 1.0, 0.0]), 1.0
    ),
    "cosine": lambda rows, positive, negative: cosine_embedding(
        (unit(rows[:4]) * unit(rows[4:])).sum(-1), jnp.array([1.0, 0.0, 1.0, 0.0]), 0.0
    ),
    "triplet": lambda rows, positive, negative: triplet(
        distance(rows[:4], rows[4:]), distance(rows[:4], jnp.roll(rows[4:], 1, axis=0)), 0.1
    ),
    "triplet_squared": lambda rows, positive, negative: triplet(
        distance(rows[:4], rows[4:], True),
        distance(rows[:4], jnp.roll(rows[4:], 1, axis=0), True),
        0.1,
    ),
    "multi_similarity": lambda rows, positive, negative: multi_similarity(
        unit(rows[:4]) @ unit(rows[4:]).T, positive, negative
    ),
    "info_nce": lambda rows, positive, negative: info_nce(
        unit(rows[:4]),
        unit(rows[4:]),
        jnp.arange(4),
        ~positive & ~negative,
        jnp.array(0.07),
    ),
}


@pytest.mark.parametrize("rows", [np.ones((8, 3)), np.zeros((8, 3))], ids=["same", "zero"])
@pytest.mark.parametrize("name", OF_DESCRIPTORS)
def test_gradients_are_finite_where_all_descriptors_are_the_same(name, rows):
    matches = jnp.eye(4, dtype=bool)
    loss = OF_DESCRIPTORS[name]
    value, gradient = jax.value_and_grad(loss)(jnp.array(rows), matches, ~matches)
    assert np.isfinite(float(value))
    assert np.isfinite(np.asarray(gradient)).all()


@pytest.mark.parametrize("name", ["multi_similarity", "info_nce"])
def test_a_neutral_candidate_never_counts(name):
    rng = np.random.default_rng(0)
    # Alike, so that all pairs are hard ones.
    queries, candidates = 2 + rng.normal(size=(3, 5)), 2 + rng.normal(size=(4, 5))
    # The last candidate is neutral to every query, and the third to the first query.
    neutral = np.zeros((3, 4), bool)
    neutral[:, 3] = neutral[0, 2] = True
    positive = np.eye(3, 4, dtype=bool)
    neutral, positive, negative = map(jnp.array, (neutral, positive, ~positive & ~neutral))

    def loss(candidates):
        cosines = unit(queries) @ unit(candidates).T
        if name == "multi_similarity":
            return multi_similarity(cosines, positive, negative)
        rows = unit(queries), unit(candidates)
        return info_nce(*rows, jnp.arange(3), neutral, jnp.array(0.1))

    value, gradient = jax.value_and_grad(loss)(jnp.array(candidates))
    np.testing.assert_array_equal(gradient[3], np.zeros(5))
    assert (np.abs(gradient[:3]).max(axis=1) > 1e-3).all()
    # As near to the first query as can be: it would be its hardest negative.
    candidates[3] = queries[0]
    again, same = jax.value_and_grad(loss)(jnp.array(candidates))
    assert float(again) == float(value)
    np.testing.assert_array_equal(same[:3], gradient[:3])

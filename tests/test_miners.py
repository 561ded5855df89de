"""In-batch miners against plain loops and pytorch-metric-learning."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geomatch.nn.losses import distance, triplet
from geomatch.nn.miners import batch_hard, semi_hard

pytestmark = pytest.mark.usefixtures("strict_dtypes")

REFERENCE = np.load(Path(__file__).parent / "references" / "metric_learning.npz")
MARGIN = 0.3


def batch(seed=0, shape=(6, 9)):
    """Distances, and masks with neutral pairs, one anchor without positives, one without others."""
    rng = np.random.default_rng(seed)
    distances = rng.uniform(0, 1.5, shape).astype(np.float32)
    kinds = rng.choice(["positive", "negative", "neutral"], shape, p=[0.3, 0.5, 0.2])
    kinds[-2][kinds[-2] == "positive"] = "neutral"
    kinds[-1][kinds[-1] == "negative"] = "neutral"
    return distances, kinds == "positive", kinds == "negative"


def years(columns):
    """Which columns are of one year, of three."""
    year = np.arange(columns) % 3
    return year[:, None] == year[None]


def rows_of(triplets):
    """The valid triplets as (anchor, positive, negative)."""
    valid = np.asarray(triplets.valid)
    columns = (triplets.anchor, triplets.positive, triplets.negative)
    return [tuple(map(int, row)) for row in np.stack(columns, axis=1)[valid]]


def semi_hard_by_loops(distances, positive, negative, margin, allowed):
    found = []
    for a, p in zip(*np.nonzero(positive), strict=True):
        others = [n for n in np.nonzero(negative[a])[0] if allowed[p, n]]
        within = [n for n in others if distances[a, p] < distances[a, n] < distances[a, p] + margin]
        if within:
            found.append((a, p, min(within, key=lambda n: distances[a, n])))
        elif others:
            found.append((a, p, max(others, key=lambda n: distances[a, n])))
    return found


def batch_hard_by_loops(distances, positive, negative, allowed):
    found = []
    for a, row in enumerate(distances):
        positives = np.nonzero(positive[a])[0]
        if len(positives):
            p = max(positives, key=lambda p: row[p])
            others = [n for n in np.nonzero(negative[a])[0] if allowed[p, n]]
            if others:
                found.append((a, p, min(others, key=lambda n: row[n])))
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("by_year", [False, True])
def test_semi_hard_matches_plain_loops(seed, by_year):
    distances, positive, negative = batch(seed)
    allowed = years(9) if by_year else np.ones((9, 9), bool)
    found = jax.jit(semi_hard)(
        distances, positive, negative, MARGIN, allowed=allowed if by_year else None
    )
    wanted = semi_hard_by_loops(distances, positive, negative, MARGIN, allowed)
    assert len(wanted) > 4
    assert rows_of(found) == wanted
    assert found.valid.shape == found.hardness.shape == (54,)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("by_year", [False, True])
def test_batch_hard_matches_plain_loops(seed, by_year):
    distances, positive, negative = batch(seed)
    allowed = years(9) if by_year else np.ones((9, 9), bool)
    found = jax.jit(batch_hard)(distances, positive, negative, allowed=allowed if by_year else None)
    wanted = batch_hard_by_loops(distances, positive, negative, allowed)
    assert len(wanted) > 1
    assert rows_of(found) == wanted
    assert found.valid.shape == found.hardness.shape == (6,)


@pytest.mark.parametrize("mine", [lambda *args: semi_hard(*args, MARGIN), batch_hard])
def test_hardness_is_the_difference_of_the_distances(mine):
    distances, *rest = batch()
    found = mine(distances, *rest)
    wanted = [distances[a, p] - distances[a, n] for a, p, n in rows_of(found)]
    np.testing.assert_array_equal(found.hardness[found.valid], wanted)
    assert not np.any(found.hardness[~found.valid])


def test_what_is_allowed_need_not_be_symmetric():
    distances = np.array([[0.1, 0.3, 0.2, 0.4]], np.float32)
    positive = np.array([[True, True, False, False]])
    allowed = np.zeros((4, 4), bool)
    allowed[0, 3] = allowed[1, 2] = True
    found = semi_hard(distances, positive, ~positive, 1.0, allowed)
    assert rows_of(found) == [(0, 0, 3), (0, 1, 2)]
    assert rows_of(batch_hard(distances, positive, ~positive, allowed)) == [(0, 1, 2)]


@pytest.mark.parametrize("mine", [lambda *args: semi_hard(*args, MARGIN), batch_hard])
def test_a_neutral_candidate_is_in_no_triplet(mine):
    distances, positive, negative = batch()
    neutral = ~positive & ~negative
    assert neutral.any()
    found = mine(distances, positive, negative)
    # Wherever it lies.
    for place in (0.0, 0.7, 9.0):
        moved = mine(np.where(neutral, np.float32(place), distances), positive, negative)
        assert rows_of(moved) == rows_of(found)
        np.testing.assert_array_equal(moved.hardness, found.hardness)


def reference():
    """Distances of the reference's descriptors, and which are of one class."""
    rows, classes = jnp.array(REFERENCE["rows"]), REFERENCE["classes"]
    same = classes[:, None] == classes[None]
    positive = same & ~np.eye(len(classes), dtype=bool)
    return np.asarray(distance(rows[:, None], rows[None])), positive, ~same


def test_semi_hard_takes_the_nearest_that_pytorch_metric_learning_finds():
    distances, positive, negative = reference()
    within = {}
    for a, p, n in REFERENCE["semi_hard"].T.tolist():
        within.setdefault((a, p), []).append(n)
    found = rows_of(semi_hard(distances, positive, negative, float(REFERENCE["margin"])))
    assert [(a, p) for a, p, _ in found] == list(zip(*np.nonzero(positive), strict=True))
    assert 10 < len(within) < len(found)
    for a, p, n in found:
        if (a, p) in within:
            assert n == min(within[a, p], key=lambda n: distances[a, n])
        else:
            assert distances[a, n] == distances[a][negative[a]].max()


def test_batch_hard_matches_pytorch_metric_learning():
    found = rows_of(batch_hard(*reference()))
    assert found == [tuple(row) for row in REFERENCE["batch_hard"].T.tolist()]


def test_the_loss_of_semi_hard_triplets_matches_tensorflow_addons():
    distances, positive, negative = reference()
    distances = distances**2
    total = 0.0
    for a, p in zip(*np.nonzero(positive), strict=True):
        others = distances[a][negative[a]]
        outside = others[others > distances[a, p]]
        total += max(0, distances[a, p] - (min(outside, default=max(others))) + MARGIN)
    found = semi_hard(distances, positive, negative, MARGIN)
    near, far = distances[found.anchor, found.positive], distances[found.anchor, found.negative]
    loss = triplet(jnp.array(near), jnp.array(far), MARGIN, found.valid)
    assert float(loss) == pytest.approx(total / positive.sum(), rel=1e-5)


@pytest.mark.parametrize("mine", [lambda *args: semi_hard(*args, MARGIN), batch_hard])
def test_mining_has_no_gradient_and_the_loss_of_its_triplets_has(mine):
    _, positive, negative = reference()

    def loss(rows, through):
        distances = distance(rows[:, None], rows[None])
        found = mine(distances, jnp.array(positive), jnp.array(negative))
        if not through:
            return found.hardness.sum()
        pairs = (distances[found.anchor, other] for other in (found.positive, found.negative))
        return triplet(*pairs, MARGIN, found.valid)

    rows = jnp.array(REFERENCE["rows"])
    np.testing.assert_array_equal(jax.grad(loss)(rows, False), np.zeros_like(rows))
    assert np.abs(jax.grad(loss)(rows, True)).max() > 1e-3
    # All descriptors the same: neither order nor direction.
    assert np.isfinite(np.asarray(jax.grad(loss)(jnp.ones_like(rows), True))).all()


def test_a_batch_of_512_needs_no_cube_of_memory():
    shapes = [jax.ShapeDtypeStruct((512, 512), kind) for kind in (jnp.float32, bool, bool, bool)]
    compiled = jax.jit(lambda d, p, n, allowed: semi_hard(d, p, n, MARGIN, allowed))
    analysis = compiled.lower(*shapes).compile().memory_analysis()
    # Bytes; a cube of bools has 134 million.
    assert analysis.temp_size_in_bytes < 30e6

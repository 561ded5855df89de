"""The revisited Oxford and Paris protocol: by hand, and against the published program."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import auc

from geomatch.evaluation.oxford import Truth, evaluate, trapezoidal_ap, without_junk


def ints(*values):
    return np.array(values, np.int64)


def published(ranking, ok, junk, depths=(1, 5, 10)):
    """AP and precisions of one query as `compute_map` of the authors' revisitop counts them."""
    pos = np.flatnonzero(np.isin(ranking, ok))
    junk = np.flatnonzero(np.isin(ranking, junk))
    k = ij = 0
    for ip in range(len(pos)):
        while ij < len(junk) and pos[ip] > junk[ij]:
            k += 1
            ij += 1
        pos[ip] -= k
    ap = 0.0
    for j, rank in enumerate(pos):
        before = 1.0 if rank == 0 else j / rank
        ap += (before + (j + 1) / (rank + 1)) / len(ok) / 2
    pos = pos + 1
    precisions = [(pos <= min(pos.max(), k)).sum() / min(pos.max(), k) for k in depths]
    return [ap, *precisions]


def test_trapezoids_by_hand():
    assert trapezoidal_ap(ints(0, 1, 2), 3) == 1
    # Found second and fourth of four: (0 + 1/2) / 2 and (1/3 + 2/4) / 2.
    assert trapezoidal_ap(ints(1, 3), 2) == pytest.approx((1 / 4 + 5 / 12) / 2)
    assert trapezoidal_ap(ints(), 2) == 0


def test_trapezoids_are_the_area_under_the_curve():
    places = ints(0, 3, 4, 9)
    recall, precision = [0.0], [1.0]
    for found, place in enumerate(places):
        recall += [found / 4, (found + 1) / 4]
        precision += [found / place if place else 1.0, (found + 1) / (place + 1)]
    assert trapezoidal_ap(places, 4) == pytest.approx(auc(recall, precision))


def test_junk_neither_helps_nor_hurts():
    ranking = ints(7, 3, 5, 1, 2)
    assert without_junk(ranking, ints(5, 2), ints(7, 1)).tolist() == [1, 2]
    assert without_junk(ranking, ints(5, 2), ints()).tolist() == [2, 4]


def test_difficulties_by_hand():
    found = evaluate([ints(4, 0, 1, 2, 3)], [Truth(ints(0), ints(2), ints(4))])
    # Easy: 0 1 3; medium: 0 1 2 3; hard: 1 2 3.
    assert found["easy"] == {"trapezoidal map": 1, "mp@1": 1, "mp@5": 1, "mp@10": 1}
    medium = (1 + (1 / 2 + 2 / 3) / 2) / 2
    wanted = {"trapezoidal map": medium, "mp@1": 1, "mp@5": 2 / 3, "mp@10": 2 / 3}
    assert found["medium"] == pytest.approx(wanted)
    wanted = {"trapezoidal map": 1 / 4, "mp@1": 0, "mp@5": 1 / 2, "mp@10": 1 / 2}
    assert found["hard"] == pytest.approx(wanted)


def test_metrics_match_the_authors_program():
    rng = np.random.default_rng(0)
    rankings, truths = [], []
    for i in range(30):
        kind = rng.choice(4, 60, p=[0.1, 0.1, 0.1, 0.7])
        if i % 5 == 0:
            kind[kind == i % 2] = 3  # nothing easy, or nothing hard
        rankings.append(rng.permutation(60))
        truths.append(Truth(*(np.flatnonzero(kind == k) for k in range(3))))
    found = evaluate(rankings, truths)
    parts = {
        "easy": lambda t: (t.easy, [*t.junk, *t.hard]),
        "medium": lambda t: ([*t.easy, *t.hard], t.junk),
        "hard": lambda t: (t.hard, [*t.junk, *t.easy]),
    }
    for name, part in parts.items():
        asked = [(r, *part(t)) for r, t in zip(rankings, truths, strict=True)]
        wanted = np.mean([published(r, ok, junk) for r, ok, junk in asked if len(ok)], axis=0)
        assert list(found[name].values()) == pytest.approx(wanted.tolist())
    assert found["easy"] != found["hard"]


def test_without_anything_to_find_metrics_are_undefined():
    found = evaluate([ints(0, 1)], [Truth(ints(0), ints(), ints())])
    assert set(found["hard"].values()) == {None}
    assert found["medium"] == found["easy"]

"""Queries without a match: standard scores, thresholds and probabilities, by plain loops."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import run_command
from hand_made import describe_by_hand, hand_made_tiles
from small_project import evaluate

from geomatch.data.confidence import ANSWERS, Confidence, standard_scores
from geomatch.errors import StaleError, UsageError
from geomatch.evaluation import no_match
from geomatch.index import index
from geomatch.query import query


def standing(scores, years):
    """Standard scores of one query's answers, best first."""
    others = scores[years:ANSWERS]
    return [(s - np.mean(others)) / np.std(others) for s in scores]


def territory(places, years, moved=0.6, split=1, seed=0, stride=8):
    """Tiles in a row, and descriptors that differ between years by `moved`."""
    rng = np.random.default_rng(seed)
    place = np.tile(np.arange(places), years)
    year = np.repeat(np.arange(years), places)
    tiles = hand_made_tiles(
        place.tolist(), [0] * len(place), year.tolist(), [split] * len(place), stride
    )
    ground = rng.normal(size=(places, 12))
    vectors = ground[place] + moved * rng.normal(size=(len(place), 12))
    return tiles, (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_standard_scores_compare_with_the_answers_that_come_later():
    scores = -np.sort(-np.random.default_rng(0).normal(size=(3, 80)))
    found = standard_scores(scores, 2)
    np.testing.assert_allclose(found, [standing(row, 2) for row in scores])
    # What is beyond the first answers, or added to all scores, changes nothing.
    np.testing.assert_allclose(standard_scores(5 + 2 * scores[:, :ANSWERS], 2), found[:, :ANSWERS])


def test_too_few_answers_have_no_standard_scores():
    scores = np.linspace(1, 0, 10)[None]
    assert np.isfinite(standard_scores(scores, 2)).all()
    assert np.isnan(standard_scores(scores, 3)).all()
    missing = np.where(np.arange(10) < 9, scores, np.nan)
    assert np.isnan(standard_scores(missing, 2)).all()
    assert standard_scores(np.ones((1, 20)), 1).tolist() == [[0.0] * 20]


def test_a_threshold_lets_at_most_a_share_pass():
    first = np.random.default_rng(0).integers(0, 40, 300) / 4
    known = Confidence("validation", 1, 1.0, 0.0, tuple(first.tolist()))
    for fpr in (0.01, 0.05, 0.5, 1.0):
        threshold = known.threshold(fpr)
        assert (first >= threshold).mean() <= fpr
        lower = first[first < threshold]
        assert not len(lower) or (first >= lower.max()).mean() > fpr
    # Of 300 queries, one in 1,000 is less than one.
    assert known.threshold(0.001) is None
    assert known.judge(np.linspace(1, 0, 20, dtype=np.float32), 0.001).is_match is None


def test_probabilities_are_those_of_a_logistic_curve():
    known = Confidence("validation", 1, 2.0, -3.0, (0.0,))
    assert known.probability(2.0) == pytest.approx(1 / (1 + np.exp(-1)))
    assert known.probability(-1e6) == pytest.approx(0)
    scores = np.linspace(1, 0, 20, dtype=np.float32)
    expected = [known.probability(each) for each in standing(scores, 1)]
    assert known.judge(scores, 1.0).probability == pytest.approx(expected, rel=1e-4)
    assert known.judge(scores[:5], 1.0) is None


@pytest.mark.parametrize(("years", "stride"), [(3, 8), (2, 4)])
def test_answers_are_those_of_a_plain_search(years, stride):
    tiles, vectors = territory(80, years, stride=stride)
    found = no_match.answered(vectors, "cosine", tiles, "validation")
    near = 8 // stride - 1
    assert len(found) == 80 * years
    row = 0
    for year in range(years):
        for query_row in np.flatnonzero(tiles.year == year):
            database = np.flatnonzero(tiles.year != year)
            scores = vectors[database] @ vectors[query_row]
            order = np.argsort(-scores)
            scores, away = scores[order], abs(tiles.col[database[order]] - tiles.col[query_row])
            assert found.place[row] == tiles.places()[query_row]
            np.testing.assert_allclose(
                found.score[row], standing(scores, years - 1)[:5], rtol=1e-3, atol=1e-3
            )
            np.testing.assert_array_equal(found.right[row], away[:5] == 0)
            np.testing.assert_array_equal(found.wrong[row], away[:5] > near)
            left = scores[away > near]
            np.testing.assert_allclose(
                found.without[row], standing(left, years - 1)[:5], rtol=1e-3, atol=1e-3
            )
            row += 1


def test_tiles_without_a_partner_or_without_years_are_no_queries():
    tiles, vectors = territory(60, 2)
    kept = np.arange(len(tiles)) != 3
    found = no_match.answered(vectors[kept], "cosine", tiles.select(kept), "validation")
    assert len(found) == 2 * 60 - 2
    assert no_match.answered(vectors, "cosine", tiles, "test") is None
    few, vectors = territory(8, 2)
    assert no_match.answered(vectors, "cosine", few, "validation") is None


def test_without_validation_tiles_training_tiles_tell():
    tiles, vectors = territory(60, 2, split=0)
    assert no_match.reference(vectors, "cosine", tiles).split == "train"


def test_rates_are_counted_on_both_splits():
    tiles, vectors = territory(300, 2, moved=0.3)
    tiles.split[tiles.col >= 150] = 2
    found = no_match.measured(vectors, "cosine", tiles, 0.05)
    assert set(found) == {"validation", "test"}
    known = no_match.reference(vectors, "cosine", tiles)
    test = no_match.answered(vectors, "cosine", tiles, "test")
    threshold = known.confidence().threshold(0.05)
    assert found["test"].threshold == threshold
    assert found["validation"].fpr == (known.without[:, 0] >= threshold).mean() <= 0.05
    assert found["test"].fpr == (test.without[:, 0] >= threshold).mean()
    assert found["test"].tpr == (test.right[:, 0] & (test.score[:, 0] >= threshold)).mean() > 0.3
    low, high = found["test"].fpr_interval
    assert low < found["test"].fpr < high
    assert found["test"].holds
    assert found["test"].threshold_interval[0] <= threshold <= found["test"].threshold_interval[1]
    # Of queries with and without a match alike, probabilities are shares.
    assert found["test"].error < 0.03


def test_where_other_ground_is_harder_the_threshold_does_not_hold():
    tiles, vectors = territory(300, 2, moved=0.3)
    tiles.split[tiles.col >= 150] = 2
    # Each test place has a double elsewhere that looks the same in both years.
    doubles = np.flatnonzero(tiles.col >= 150)
    vectors[doubles] = vectors[doubles - (tiles.col[doubles] % 2)]
    found = no_match.measured(vectors, "cosine", tiles, 0.05)
    assert found["test"].fpr > 0.3
    assert not found["test"].holds
    assert found["validation"].holds


def test_a_confidence_is_read_as_it_was_written(tmp_path):
    assert Confidence.load(tmp_path) is None
    known = Confidence("train", 3, 0.1, -2.5, (0.5, 1 / 3))
    known.save(tmp_path)
    assert Confidence.load(tmp_path) == known
    (tmp_path / "confidence.json").write_text("{")
    with pytest.raises(StaleError) as failed:
        Confidence.load(tmp_path)
    assert failed.value.hint == "Run: geomatch index"


@pytest.fixture(scope="module")
def known(tiled, tmp_path_factory):
    """The small project, indexed, with places 0 to 9 that are alike in no two years."""
    project = tiled.copied(tmp_path_factory.mktemp("known") / "project")
    rng, place = np.random.default_rng(0), tiled.tiles.places()
    ground = rng.normal(size=(place.max() + 1, 16))
    noise = rng.normal(size=(len(place), 16))
    describe_by_hand(project, np.where(place[:, None] < 10, noise, ground[place] + 0.1 * noise))
    index(project)
    return project, place, tiled.tiles.ids()


def test_queries_say_how_sure_they_are(known):
    project, place, ids = known
    lost, found = (query(project, ids[np.flatnonzero(place == p)[0]], fpr=0.1) for p in (0, 30))
    assert all(match.match is False for match in lost.matches)
    assert all(match.match is True for match in found.matches)
    assert found.matches[0].probability > 0.9 > lost.matches[0].probability
    probabilities = [match.probability for match in found.matches]
    assert probabilities == sorted(probabilities, reverse=True)
    # The small validation split has 16 tiles: too few to tell one in a hundred.
    assert query(project, ids[0]).matches[0].match is None
    with pytest.raises(UsageError, match="--fpr 2"):
        query(project, ids[0], fpr=2)


def test_an_index_of_an_earlier_version_answers_without(known, tmp_path):
    project, _, ids = known
    path = project.indexes / "hand@1" / "confidence.json"
    text = path.read_text()
    path.unlink()
    try:
        (match, *_) = query(project, ids[0], fpr=0.1).matches
        assert (match.probability, match.match) == (None, None)
    finally:
        path.write_text(text)


def test_commands_print_it(known):
    project, place, ids = known
    lost = ids[np.flatnonzero(place == 0)[0]]
    arguments = ("query", lost, "-p", project.root, "--fpr", "0.1", "-q")
    assert f"{lost}: no match; nearest tiles" in run_command(*arguments).stdout
    assert [m.get("match") for m in json.loads(run_command(*arguments, "--json").stdout)] == [
        False
    ] * 5
    arguments = ("eval", "-p", project.root, "--no-html", "-q", "--fpr", "0.1")
    printed = run_command(*arguments)
    assert "a match or none, at FPR 0.1" in printed.stdout
    report = evaluate(project, fpr=0.1)
    measured = report.splits["test"].no_match
    assert f"{measured.fpr:.3f}" in printed.stdout
    assert ("warning" in printed.stderr) == (not measured.holds)
    assert evaluate(project).splits["test"].no_match is None

"""Graded answers: what is searched and what counts, by hand, and what a file may say."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import run_command
from hand_made import describe_by_hand, hand_made_classes
from small_project import evaluate

from geomatch.errors import GeomatchError
from geomatch.evaluate import Report
from geomatch.evaluation import graded
from geomatch.evaluation.oxford import Truth

HEAD = "query,tile,grade\n"


def along(*angles):
    """(n, 2) unit vectors at these degrees from the first axis."""
    turn = np.radians(angles)
    return np.stack([np.cos(turn), np.sin(turn)], axis=1).astype(np.float32)


def truth(easy=(), hard=(), junk=()):
    return Truth(*(np.array(rows, int) for rows in (easy, hard, junk)))


def test_queries_are_no_answers_and_grades_decide():
    # Of query 0, in order: 5 (junk), 1 (easy), 4, 2 (hard), 3; 6 is another query.
    vectors = along(0, 10, 30, 40, 20, 5, 1)
    found = graded.measure(
        vectors, "cosine", np.arange(7), {0: truth([1], [2], [5]), 6: truth([1])}
    )
    assert (found.queries, found.database) == (2, 5)
    # Of query 6, at 1 degree: 5 unknown to it and so wrong, then 1.
    assert found.easy["trapezoidal map"] == pytest.approx((1 + (0 + 1 / 2) / 2) / 2)
    assert found.hard["trapezoidal map"] == pytest.approx((0 + 1 / 2) / 2)
    medium = (1 + (1 / 2 + 2 / 3) / 2) / 2
    assert found.medium["trapezoidal map"] == pytest.approx((medium + 1 / 4) / 2)


def test_only_what_is_searched_counts():
    vectors = along(0, 10, 20, 5)
    found = graded.measure(vectors, "cosine", np.array([1, 2]), {0: truth([2])})
    assert found.database == 2
    assert found.easy["mp@1"] == 0
    assert found.easy["mp@5"] == 1 / 2


def test_ties_never_help():
    vectors = along(0, 10, 10, 10)
    found = graded.measure(vectors, "cosine", np.arange(4), {0: truth([1])})
    assert found.easy["trapezoidal map"] == pytest.approx((0 + 1 / 3) / 2)


def test_distances_rank_where_the_metric_says_so():
    vectors = np.array([[1, 0], [9, 0], [0.5, 0.5]], np.float32)
    for metric, precision in (("cosine", 1), ("euclidean", 0)):
        found = graded.measure(vectors, metric, np.arange(3), {0: truth([1])})
        assert found.easy["mp@1"] == precision


def test_a_file_is_read(tmp_path):
    path = tmp_path / "truth.csv"
    path.write_text(
        f"note,{HEAD}x,a/0.png,a/1.png,easy\n,a/0.png,b/3.png,junk\ny,b/2.png,a/1.png,hard\n"
    )
    found = graded.read(path, hand_made_classes([0, 0, 1, 1]))
    assert list(found) == [0, 2]
    assert [rows.tolist() for rows in found[0]] == [[1], [], [3]]
    assert [rows.tolist() for rows in found[2]] == [[], [1], []]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has no column query"),
        ("query,tile\na/0.png,a/1.png\n", "has no column grade"),
        (HEAD, "grades no answers"),
        (f"{HEAD}a/0.png,a/9.png,easy\n", "line 2: there is no tile 'a/9.png'"),
        (f"{HEAD}a/0.png\n", "line 2: there is no tile None"),
        (f"{HEAD}a/0.png,a/1.png,good\n", "line 2: the grade is 'good'"),
        (f"{HEAD}a/0.png,a/1.png,easy\na/0.png,a/1.png,junk\n", "line 3: a/1.png is graded twice"),
        ("\xff", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_an_unusable_file_is_reported(tmp_path, text, told):
    path = tmp_path / "truth.csv"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(GeomatchError) as failed:
        graded.read(path, hand_made_classes([0, 0, 1, 1]))
    assert told in failed.value.message


def test_eval_measures_graded_answers(tiled, copied):
    """Of a query, easy is its own place, junk another, and hard a third one's."""
    project, tiles = copied(tiled), tiled.tiles
    vectors = np.random.default_rng(3).normal(size=(len(tiles), 6)).astype(np.float32)
    describe_by_hand(project, vectors)
    ids, places = tiles.ids(), tiles.places()
    asked = np.flatnonzero((tiles.split == 2) & (tiles.year == 0))[:4]
    lines, truths = [], {}
    for query in asked:
        others = np.flatnonzero((tiles.split == 2) & (tiles.year == 1))
        same = others[places[others] == places[query]]
        hard, junk = others[places[others] != places[query]][:2]
        truths[int(query)] = truth(same, [hard], [junk])
        answers = [(int(same[0]), "easy"), (int(hard), "hard"), (int(junk), "junk")]
        lines += [f"{ids[query]},{ids[row]},{grade}\n" for row, grade in answers]
    path = project.root / "truth.csv"
    path.write_text(HEAD + "".join(lines))
    arguments = ["eval", "-p", str(project.root), "--grades", str(path), "--no-html"]

    def shown(*more):
        result = run_command(*arguments, *more)
        assert result.exit_code == 0, result.output
        return result.stdout

    found = json.loads(shown("--json"))["graded"]
    test = np.flatnonzero(tiles.split == 2)
    assert found == graded.measure(vectors, "cosine", test, truths).as_json()
    assert found["database"] == len(test) - 4
    assert Report.load(project.reports / "hand@1" / "report.json").graded.as_json() == found
    told = shown()
    assert "Oxford" in told
    assert f"{found['hard']['trapezoidal map']:.3f}" in told
    newer = np.flatnonzero((tiles.split == 2) & (tiles.year == 1))
    assert evaluate(project, grades=path, years=(tiles.years[1],)).graded == graded.measure(
        vectors, "cosine", newer, truths
    )
    everything = evaluate(project, grades=path, database="all").graded
    assert everything.database == len(tiles) - 4
    assert evaluate(project).graded is None

"""Evaluation: metrics of hand-made descriptors, counted again in plain loops."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics

import numpy as np
import pytest
from command_line import run_command
from hand_made import describe_by_hand
from PIL import Image
from sklearn.metrics import auc
from small_project import evaluate, make_project, new_project, retile

from geomatch import config
from geomatch.data.embeddings import DescriptorFile
from geomatch.data.pair_scores import ScoredPairs
from geomatch.data.query_results import QueryTable
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import GeomatchError, StaleError, UsageError
from geomatch.evaluate import Report
from geomatch.evaluation import measure as measuring
from geomatch.evaluation.verification import ROC
from geomatch.geo import footprints
from geomatch.search import exact
from geomatch.search import metrics as ranking
from geomatch.tile import tile

METRICS = [
    "queries",
    "database",
    "map@5",
    "recall@1",
    "recall@5",
    "recall@10",
    "median_rank",
    "median_error_m",
]
MORE = ["mean_rank", "mrr", "within_1_tiles", "within_2_tiles", "within_5_tiles"]
METRES = ["median_error_m", *MORE[2:]]
GROUPS = ["intervals", "content"]


def splits_of(report):
    """The metrics of each split as JSON has them."""
    return {split: metrics.as_json() for split, metrics in report.splits.items()}


@pytest.fixture(scope="module")
def vectors(tiled):
    """Descriptors that find some places and miss others, with a few blank and equal ones."""
    rng = np.random.default_rng(5)
    place = tiled.tiles.places()
    ground = rng.normal(size=(place.max() + 1, 6))
    found = ground[place] + rng.normal(0, 0.7, (len(place), 6))
    found[rng.choice(len(place), 6, replace=False)] = 0
    found[rng.choice(len(place), 6, replace=False)] = found[1]
    return found


def metrics_by_hand(tiles, vectors, split, wider=False, same_year=False, years=("2010", "2020")):
    """A split's metrics after the protocol, in plain loops over pairs of tiles."""
    ids, code = tiles.cells(), SPLITS.index(split)
    lengths = np.linalg.norm(vectors, axis=1)
    unit = vectors / np.maximum(lengths, 1e-12)[:, None]
    centres = tiles.centres()
    ranks, errors, searched, pairs = [], [], set(), []
    for a in range(2):
        b = 1 - a
        if tiles.years[b] not in years:
            continue
        mine = []
        database = [
            j
            for j in range(len(tiles))
            if (wider or tiles.split[j] == code) and (tiles.year[j] == b or same_year)
        ]
        for i in range(len(tiles)):
            if tiles.split[i] != code or tiles.year[i] != a:
                continue
            matches = [j for j in database if ids[j] == ids[i] and tiles.year[j] == b]
            if not matches:
                continue
            goal = unit[i] @ unit[matches[0]]
            rank, best, first = 1, -math.inf, matches[0]
            for j in database:
                if ids[j] == ids[i]:
                    continue
                score = unit[i] @ unit[j]
                if score >= goal - 1e-6:
                    rank += 1
                    if score > best:
                        best, first = score, j
            mine.append((rank, math.dist(centres[i], centres[first])))
        searched |= set(database)
        pairs.append(
            {
                "query_year": tiles.years[a],
                "database_year": tiles.years[b],
                **summary([r for r, _ in mine], [e for _, e in mine], len(database)),
            }
        )
        ranks += [r for r, _ in mine]
        errors += [e for _, e in mine]
    return {**summary(ranks, errors, len(searched)), "pairs": pairs}


def summary(ranks, errors, database):
    n = len(ranks)
    near = {f"within_{k}_tiles": sum(e <= 32 * k for e in errors) / n for k in (1, 2, 5)}
    return {
        **near,
        "mean_rank": sum(ranks) / n,
        "mrr": sum(1 / r for r in ranks) / n,
        "queries": n,
        "database": database,
        "map@5": sum(1 / r for r in ranks if r <= 5) / n,
        "recall@1": sum(r <= 1 for r in ranks) / n,
        "recall@5": sum(r <= 5 for r in ranks) / n,
        "recall@10": sum(r <= 10 for r in ranks) / n,
        "median_rank": statistics.median(ranks),
        "median_error_m": statistics.median(errors),
    }


def assert_metrics(found, wanted, skipped=()):
    assert list(found) == [*METRICS, *MORE, *GROUPS, "regions", "pairs", "roc"]
    assert len(found["pairs"]) == len(wanted["pairs"])
    for mine, theirs in ((found, wanted), *zip(found["pairs"], wanted["pairs"], strict=True)):
        single = set(mine) - {"roc", "regions", *GROUPS}
        assert single == set(theirs)
        for key in single - {"pairs", *skipped}:
            expected = theirs[key]
            wanted_value = expected if isinstance(expected, str) else pytest.approx(expected)
            assert mine[key] == wanted_value, key


@pytest.mark.parametrize("wider", [False, True])
@pytest.mark.parametrize("same_year", [False, True])
def test_metrics_match_those_counted_by_hand(tiled, copied, vectors, wider, same_year):
    project = copied(tiled)
    tiles = describe_by_hand(project, vectors)
    found = evaluate(project, database="all" if wider else "split", same_year=same_year)
    assert found.embeddings == "hand@1"
    assert list(splits_of(found)) == ["train", "validation", "test"]
    # A first answer among equal ones is any of them, so metres are compared elsewhere.
    for split in SPLITS:
        wanted = metrics_by_hand(tiles, vectors, split, wider, same_year)
        assert 0 < wanted["map@5"] < 1
        assert_metrics(splits_of(found)[split], wanted, skipped=METRES)
    assert splits_of(found)["test"]["database"] == (88 if wider else 24)
    # Figures of other conditions do not take the place of the usual ones.
    folder = "hand@1" + "-all" * wider + "-same-year" * same_year
    assert Report.load(project.reports / folder / "report.json") == found


def test_metres_are_to_the_first_answer(tiled, copied):
    project = copied(tiled)
    # No two are equal, so that the first answer is one tile.
    vectors = np.random.default_rng(1).normal(size=(88, 6))
    tiles = describe_by_hand(project, vectors)
    found = evaluate(project)
    for split in SPLITS:
        wanted = metrics_by_hand(tiles, vectors, split)
        assert wanted["median_error_m"] > 0
        assert_metrics(splits_of(found)[split], wanted)


def test_perfect_descriptors_have_perfect_metrics(tiled, copied):
    project = copied(tiled)
    describe_by_hand(project, np.eye(44)[tiled.tiles.places()])
    for split, metrics in splits_of(evaluate(project, database="all")).items():
        expected = {"map@5": 1, "recall@1": 1, "recall@5": 1, "recall@10": 1}
        expected |= {"median_rank": 1, "median_error_m": 0, "database": 88}
        assert {key: metrics[key] for key in expected} == expected, split


def test_blank_descriptors_come_last(tiled, copied):
    project = copied(tiled)
    describe_by_hand(project, np.zeros((88, 4)))
    test = splits_of(evaluate(project))["test"]
    assert test["median_rank"] == 12
    assert test["map@5"] == 0


def test_a_year_named_is_searched_alone(tiled, copied, vectors):
    project = copied(tiled)
    tiles = describe_by_hand(project, vectors)
    found = splits_of(evaluate(project, years=("2010",)))["test"]
    wanted = metrics_by_hand(tiles, vectors, "test", years=("2010",))
    assert_metrics(found, wanted, skipped=METRES)
    assert [pair["database_year"] for pair in found["pairs"]] == ["2010"]


def test_fictitious_placement_has_no_metres(tmp_path, tiled, vectors):
    project = make_project(tmp_path / "nowhere", tiled.imagery, placement="fictitious")
    describe_by_hand(project, vectors)
    for metrics in splits_of(evaluate(project)).values():
        for place in (metrics, *metrics["pairs"]):
            assert [place[key] for key in METRES] == [None] * 4
        assert metrics["map@5"] > 0


def test_undefined_metrics_are_null(tmp_path, tiled):
    project = make_project(tmp_path / "open", tiled.imagery, "split.validation=[]")
    describe_by_hand(project, np.eye(44)[tiled.tiles.places()])
    evaluate(project)
    text = (project.reports / "hand@1" / "report.json").read_text()
    assert "NaN" not in text
    metrics = json.loads(text)["splits"]["validation"]
    assert metrics["queries"] == 0
    assert metrics["pairs"] == []
    assert metrics["roc"] is None
    for key in [*METRICS[2:], *MORE]:
        assert metrics[key] is None
    assert set(metrics["intervals"].values()) == {None}


def test_json_follows_the_contract(tiled, copied, vectors):
    project = copied(tiled)
    describe_by_hand(project, vectors)
    arguments = ["eval", "-p", str(project.root), "--json", "--quiet"]
    result = run_command(*arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["splits"] == splits_of(evaluate(project))
    assert set(found["splits"]["test"]) > {*METRICS, "pairs", "roc"}
    wider = run_command(*arguments, "--database", "all", "--same-year")
    assert json.loads(wider.stdout)["splits"]["test"]["database"] == 88


def test_metrics_are_shown_as_a_table_too(tiled, copied, vectors):
    project = copied(tiled)
    describe_by_hand(project, vectors)
    result = run_command("eval", "-p", str(project.root), "--quiet")
    assert result.exit_code == 0
    for text in ("test", "validation", "2010 in 2020", "mAP@5"):
        assert text in result.stdout
    assert f"{splits_of(evaluate(project))['test']['map@5']:.3f}" in result.stdout


@pytest.mark.parametrize("arguments", [["--database", "some"], ["--year", "1999"]])
def test_wrong_use_is_reported(tiled, copied, vectors, arguments):
    project = copied(tiled)
    describe_by_hand(project, vectors)
    result = run_command("eval", "-p", str(project.root), *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_eval_before_embed_and_of_unknown_years_is_reported(tiled, copied, vectors):
    project = copied(tiled)
    with pytest.raises(GeomatchError) as failed:
        evaluate(project)
    assert failed.value.hint == "Run: geomatch embed"
    describe_by_hand(project, vectors)
    with pytest.raises(UsageError, match="no tiles of 1999"):
        evaluate(project, years=("1999",))


def test_embeddings_of_other_tiles_are_stale(tiled, copied, vectors):
    project = copied(tiled)
    describe_by_hand(project, vectors)
    retile(project, tiled.imagery, "grid.size=16")
    with pytest.raises(StaleError) as failed:
        evaluate(project)
    assert failed.value.hint == "Run: geomatch embed, then geomatch index"


def test_training_and_evaluation_agree_on_the_validation_split(indexed):
    found = splits_of(evaluate(indexed.project))["validation"]["map@5"]
    assert found == pytest.approx(indexed.trained.map5, abs=0.05)


def test_pairs_are_told_apart_at_the_threshold_of_validation(tiled, copied, vectors):
    project = copied(tiled)
    describe_by_hand(project, vectors)
    found = {name: split["roc"] for name, split in splits_of(evaluate(project, fpr=0.2)).items()}
    assert len({metrics["threshold"] for metrics in found.values()}) == 1
    assert found["validation"]["fpr"] <= 0.2
    for name, metrics in found.items():
        (tn, fp), (fn, tp) = metrics["confusion"]
        # Every tile has a partner in the other year, and each is an anchor once.
        assert tn + fp == fn + tp == (tiled.tiles.split == SPLITS.index(name)).sum()
        assert metrics["fpr"] == fp / (tn + fp)
        assert metrics["tpr"] == tp / (fn + tp)
        assert 0.5 < metrics["auc"] < 1
        assert 0 < metrics["eer"] < 0.5
    stricter = splits_of(evaluate(project, fpr=0.0))["validation"]["roc"]
    assert stricter["threshold"] > found["validation"]["threshold"]
    assert stricter["confusion"][0][1] == 0
    # Figures of another rate stand beside the others.
    assert (project.reports / "hand@1-fpr0.2" / "report.json").exists()


def test_pairs_of_perfect_descriptors_are_told_apart(tiled, copied):
    project = copied(tiled)
    describe_by_hand(project, np.eye(44)[tiled.tiles.places()])
    found = splits_of(evaluate(project))["test"]["roc"]
    assert found["auc"] == 1
    assert found["eer"] == 0
    assert found["confusion"] == [[24, 0], [0, 24]]


def test_without_validation_the_threshold_is_the_split_s_own(tmp_path, tiled, vectors):
    project = make_project(tmp_path / "two", tiled.imagery, "split.validation=[]")
    describe_by_hand(project, vectors)
    found = {name: split["roc"] for name, split in splits_of(evaluate(project)).items()}
    assert found["validation"] is None
    assert found["test"]["threshold"] != found["train"]["threshold"]
    assert found["test"]["fpr"] <= 0.01


@pytest.mark.parametrize("fpr", ["-0.1", "1.5"])
def test_a_rate_outside_0_to_1_is_refused(tiled, copied, vectors, fpr):
    project = copied(tiled)
    describe_by_hand(project, vectors)
    result = run_command("eval", "-p", str(project.root), "--fpr", fpr)
    assert result.exit_code == 2
    assert "--fpr" in result.stderr


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Three classes of twelve small images each: of each class, five to train and four to test."""
    root = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for name in ("ash", "birch", "cedar"):
        (root / "images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(256, size=(16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{i:02d}.png")
    project = new_project(root / "project")
    overrides = [
        f"images.folders={json.dumps([str(root / 'images')])}",
        "images.validation=3",
        "images.test=4",
    ]
    tile(project, config.with_overrides(config.Config(), overrides), overrides=overrides, workers=1)
    tiles = TileTable.load(project.catalogue)
    ground = np.random.default_rng(1).normal(size=(3, 4))
    noise = np.random.default_rng(2).normal(0, 0.8, (len(tiles), 4))
    vectors = ground[tiles.label] + noise
    return project, describe_by_hand(project, vectors), vectors


def precision_by_hand(scores, relevant):
    """(rank of the first relevant item, AP, AP@5), in plain loops."""
    order = sorted(range(len(scores)), key=lambda j: -scores[j])
    hits = [rank for rank, j in enumerate(order, 1) if relevant[j]]
    precision = [i / rank for i, rank in enumerate(hits, 1)]
    within = sum(p for p, rank in zip(precision, hits, strict=True) if rank <= 5)
    return hits[0], sum(precision) / len(hits), within / min(len(hits), 5)


@pytest.mark.parametrize("database", ["split", "all", "train"])
def test_metrics_of_classes_match_those_counted_by_hand(classes, database):
    project, tiles, vectors = classes
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found = evaluate(project, database=database)
    for code, split in enumerate(SPLITS):
        wanted, label = [], []
        searched = [
            j
            for j in range(len(tiles))
            if database == "all" or tiles.split[j] == (code if database == "split" else 0)
        ]
        for i in np.flatnonzero(tiles.split == code):
            others = [j for j in searched if j != i]
            relevant = [tiles.label[j] == tiles.label[i] for j in others]
            wanted.append(precision_by_hand([unit[i] @ unit[j] for j in others], relevant))
            label.append(tiles.label[i])
        rank, ap, ap5 = np.array(wanted).T
        metrics = splits_of(found)[split]
        assert list(metrics)[: len(METRICS)] == METRICS
        assert {"map", "pairs", "classes", "roc", *GROUPS} < set(metrics)
        assert metrics["queries"] == len(rank) == [15, 9, 12][code]
        assert metrics["database"] == len(searched)
        assert metrics["map"] == pytest.approx(ap.mean())
        assert metrics["map@5"] == pytest.approx(ap5.mean())
        assert metrics["recall@1"] == pytest.approx((rank == 1).mean())
        assert metrics["recall@5"] == pytest.approx((rank <= 5).mean())
        assert metrics["median_rank"] == statistics.median(rank)
        assert metrics["median_error_m"] is None
        assert metrics["pairs"] == []
        first5 = [
            [
                tiles.label[j] == tiles.label[i]
                for j in sorted(searched, key=lambda j, i=i: -unit[i] @ unit[j])
                if j != i
            ][:5]
            for i in np.flatnonzero(tiles.split == code)
        ]
        assert metrics["mp@5"] == pytest.approx(np.sum(first5, axis=1).mean() / 5)
        relevant = len(searched) // 3 - (database == "all" or database == "split" or code == 0)
        recalled = np.sum(first5, axis=1).mean() / relevant
        assert metrics["relevant_recall@5"] == pytest.approx(recalled)
        assert [row["class"] for row in metrics["classes"]] == ["ash", "birch", "cedar"]
        for k, row in enumerate(metrics["classes"]):
            mine = np.array(label) == k
            assert row["queries"] == mine.sum()
            assert row["hit@5"] == pytest.approx((rank[mine] <= 5).mean())
            assert row["map"] == pytest.approx(ap[mine].mean())
            assert row["map@5"] == pytest.approx(ap5[mine].mean())
    assert 0 < splits_of(found)["test"]["map"] < 1


def test_classes_are_shown_as_tables(classes):
    project, _, _ = classes
    result = run_command("eval", "-p", str(project.root), "--quiet")
    assert result.exit_code == 0, result.output
    for text in ("mAP", "by class", "birch", "AUC"):
        assert text in result.stdout
    assert "error" not in result.stdout
    arguments = ["eval", "-p", str(project.root), "--database", "train", "--json", "-q"]
    found = json.loads(run_command(*arguments).stdout)["splits"]
    assert found == splits_of(evaluate(project, database="train"))
    assert (project.reports / "hand@1-train" / "report.json").exists()


def test_every_query_is_kept_beside_the_report(tiled, copied):
    project = copied(tiled)
    # No two are equal, so that answers have one order.
    vectors = np.random.default_rng(1).normal(size=(88, 6))
    tiles = describe_by_hand(project, vectors)
    report = evaluate(project)
    found = QueryTable.load(project.reports / report.name / "queries.parquet")
    assert len(found) == 88
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    scores, cells, centres = unit @ unit.T, tiles.cells(), tiles.centres()
    for i, tile_row in enumerate(found.tile):
        searched = np.flatnonzero(
            (tiles.split == tiles.split[tile_row]) & (tiles.year != tiles.year[tile_row])
        )
        order = searched[np.argsort(-scores[tile_row, searched])]
        match = next(j for j in searched if cells[j] == cells[tile_row])
        assert found.match[i] == match
        assert found.rank[i] == 1 + order.tolist().index(match)
        assert found.top[i].tolist() == order[:5].tolist()
        np.testing.assert_allclose(found.top_score[i], scores[tile_row, order[:5]], atol=1e-6)
        assert found.match_score[i] == pytest.approx(scores[tile_row, match], abs=1e-6)
        away = [math.dist(centres[tile_row], centres[answer]) for answer in order[:5]]
        assert found.distance_m[i].tolist() == away
    for code, split in enumerate(SPLITS):
        mine = tiles.split[found.tile] == code
        assert splits_of(report)[split]["recall@1"] == pytest.approx((found.rank[mine] == 1).mean())
        assert splits_of(report)[split]["median_error_m"] == np.median(found.distance_m[mine, 0])
    # The first sheet begins at the zone's meridian of 3 degrees west.
    assert ((found.lon >= -3) & (found.lon < -2.99)).all()
    assert ((found.lat > 45) & (found.lat < 45.3)).all()


def test_queries_of_euclidean_descriptors_score_by_distance(tiled, copied):
    project = copied(tiled)
    vectors = np.random.default_rng(1).normal(size=(88, 6)).astype(np.float32)
    describe_by_hand(project, vectors, metric="euclidean")
    found = QueryTable.load(project.reports / evaluate(project).name / "queries.parquet")
    away = np.linalg.norm(vectors[found.tile] - vectors[found.match], axis=1)
    np.testing.assert_allclose(found.match_score, -away, rtol=1e-4)
    away = np.linalg.norm(vectors[found.tile, None] - vectors[found.top], axis=2)
    np.testing.assert_allclose(found.top_score, -away, rtol=1e-4)


def test_queries_of_classes_are_kept_too(classes):
    project, tiles, _ = classes
    report = evaluate(project)
    found = QueryTable.load(project.reports / report.name / "queries.parquet")
    assert len(found) == 36
    np.testing.assert_array_equal(tiles.label[found.tile], tiles.label[found.match])
    assert (found.tile != found.match).all()
    assert (found.top != found.tile[:, None]).all()
    right = tiles.label[found.top[:, 0]] == tiles.label[found.tile]
    np.testing.assert_array_equal(right, found.rank == 1)
    assert np.isnan(np.column_stack([found.distance_m, found.lon, found.lat])).all()


def test_curves_and_histograms_are_of_the_pairs(tiled, copied, vectors):
    project = copied(tiled)
    describe_by_hand(project, vectors)
    for split, metrics in splits_of(evaluate(project)).items():
        found, n = metrics["roc"], (tiled.tiles.split == SPLITS.index(split)).sum()
        curve = found["curve"]
        assert auc(curve["fpr"], curve["tpr"]) == pytest.approx(found["auc"])
        assert len(curve["threshold"]) == len(curve["fpr"])
        assert (found["pr"]["recall"][0], found["pr"]["precision"][0]) == (0, 1)
        bars = found["histogram"]
        assert sum(bars["same"]) == sum(bars["other"]) == n
        assert len(bars["edges"]) == len(bars["same"]) + 1
        # Of places that are told apart, one's own score more.
        mean = [np.average(bars["edges"][1:], weights=bars[kind]) for kind in ("same", "other")]
        assert mean[0] > mean[1]


def test_intervals_hold_the_metrics(tiled, copied, vectors):
    project = copied(tiled)
    describe_by_hand(project, vectors)
    for metrics in splits_of(evaluate(project)).values():
        for key, (low, high) in metrics["intervals"].items():
            assert 0 <= low <= metrics[key] <= high <= 1
        low, high = metrics["intervals"]["map@5"]
        assert 0.02 < high - low < 0.6


def test_blank_and_ambiguous_queries_are_counted_apart(tiled, copied):
    project = copied(tiled)
    tiles = tiled.tiles
    place, test = tiles.places(), tiles.split == SPLITS.index("test")
    blank, doubled = np.unique(place[test])[:3], np.unique(place[test])[3:5]
    vectors = np.random.default_rng(0).normal(size=(88, 6))
    vectors[np.isin(place, blank)] = 1
    # Of two places, the later year's are equal: the earlier one's cannot choose between them.
    later = np.isin(place, doubled) & (tiles.year == 1)
    vectors[np.isin(place, doubled)] = vectors[later][0]
    vectors[np.isin(place, doubled) & (tiles.year == 0)] += [[0.01] * 6, [0.02] * 6]
    describe_by_hand(project, vectors)
    found = {row["content"]: row for row in splits_of(evaluate(project))["test"]["content"]}
    assert list(found) == ["distinct", "ambiguous", "blank"]
    # The later year's two are exactly another place's.
    assert found["blank"]["queries"] == 6 + 2
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    equal = np.isin(place, blank) | later
    ambiguous = 0
    for i in np.flatnonzero(test & ~equal):
        first, second = np.sort(-(unit[test & (tiles.year != tiles.year[i])] @ unit[i]))[:2]
        ambiguous += second - first < 1e-6
    assert found["ambiguous"]["queries"] == ambiguous >= 2
    assert found["distinct"]["queries"] == 24 - 8 - ambiguous
    assert found["ambiguous"]["recall@1"] == 0
    assert found["ambiguous"]["median_rank"] >= 2
    assert {row["content"] for row in splits_of(evaluate(project))["train"]["content"]} == {
        "distinct"
    }


def test_strata_are_of_the_ground_that_changed(tiled, copied, vectors):
    project = copied(tiled)
    test = np.flatnonzero(tiled.tiles.split == SPLITS.index("test"))
    later = test[tiled.tiles.year[test] == 1]
    # The mask is of the later year, and says nothing of one place.
    changed = np.full(88, np.nan, np.float32)
    changed[later] = [0] * 5 + [0.02, 0.1] + [0.11, 0.5, 1, 1] + [np.nan]
    tiles = dataclasses.replace(tiled.tiles, changed=changed)
    tiles.save(project.catalogue, *footprints.file_geometry(tiles.grid))
    describe_by_hand(project, vectors)
    splits = splits_of(evaluate(project))
    found = {row["changed"]: row for row in splits["test"]["changed"]}
    assert {name: row["queries"] for name, row in found.items()} == {
        "0": 10,
        "up to 10%": 4,
        "above 10%": 8,
    }
    assert splits["train"]["changed"] == []
    queries = QueryTable.load(project.reports / "hand@1" / "queries.parquet")
    above = np.isin(tiles.places()[queries.tile], tiles.places()[later[7:11]])
    assert found["above 10%"]["recall@5"] == (queries.rank[above] <= 5).mean()


def test_regions_are_sheets_or_blocks_and_add_up(tmp_path, tiled, copied, vectors):
    project = copied(tiled)
    describe_by_hand(project, vectors)
    for split, metrics in splits_of(evaluate(project)).items():
        regions = metrics["regions"]
        # One sheet a year in each split.
        assert all(row["region"].startswith("block ") for row in regions), split
        assert sum(row["queries"] for row in regions) == metrics["queries"]
        weighted = sum(row["queries"] * row["map@5"] for row in regions)
        assert weighted / metrics["queries"] == pytest.approx(metrics["map@5"])
    assert len(splits_of(evaluate(project))["train"]["regions"]) > 1
    whole = make_project(tmp_path / "whole", tiled.imagery, "split.validation=[]")
    describe_by_hand(whole, vectors)
    found = {r["region"]: r for r in splits_of(evaluate(whole))["train"]["regions"]}
    assert set(found) == {f"{s}_{y}.tif" for s in ("train", "validation") for y in (2010, 2020)}
    assert found["validation_2010.tif"]["queries"] == 8


def test_calibration_is_of_validation_and_holds_there(tiled, copied, vectors):
    project = copied(tiled)
    describe_by_hand(project, vectors)
    found = {name: s["roc"]["calibration"] for name, s in splits_of(evaluate(project)).items()}
    assert len({(c["slope"], c["intercept"]) for c in found.values()}) == 1
    for name, metrics in found.items():
        n = (tiled.tiles.split == SPLITS.index(name)).sum()
        assert sum(metrics["pairs"]) == 2 * n
        assert 0 <= metrics["error"] < 0.3
    mine = found["validation"]
    assert np.average(mine["share"], weights=mine["pairs"]) == pytest.approx(0.5)
    assert np.average(mine["probability"], weights=mine["pairs"]) == pytest.approx(0.5, abs=0.02)


def test_pairs_are_kept_for_compare_unless_conditions_are_unusual(tiled, copied, vectors):
    project = copied(tiled)
    describe_by_hand(project, vectors)
    path = ScoredPairs.beside(project.embeddings / "hand@1.parquet")
    evaluate(project, database="all")
    assert not path.exists()
    roc = splits_of(evaluate(project, fpr=0.1))["validation"]["roc"]
    kept = ScoredPairs.load(path)
    assert (kept.split, kept.embeddings) == ("validation", "by hand")
    assert ROC.of(kept.same, kept.other).threshold(0.1) == roc["threshold"]
    assert project.embedding_names() == ["hand@1"]
    path.write_bytes(b"PK")
    with pytest.raises(StaleError) as failed:
        ScoredPairs.load(path)
    assert failed.value.hint == "Run: geomatch eval"


# Parts: some queries, and a block of descriptors at a time


def test_drawn_queries_are_measured_as_among_all(tiled, copied, vectors):
    project = copied(tiled)
    tiles = describe_by_hand(project, vectors)
    found = splits_of(evaluate(project, queries=17))
    whole = QueryTable.load(results_of(project, queries=0))
    some = QueryTable.load(project.reports / "hand@1-queries17" / "queries.parquet")
    total = {"train": 48, "validation": 16, "test": 24}
    for code, split in enumerate(SPLITS):
        mine = some.select(tiles.split[some.tile] == code)
        assert len(mine) == found[split]["queries"] == min(17, total[split])
        assert found[split].get("drawn_from") == (total[split] if total[split] > 17 else None)
        assert found[split]["database"] == total[split]
        assert found[split]["map@5"] == pytest.approx(np.mean((mine.rank <= 5) / mine.rank))
    where = [whole.tile.tolist().index(tile) for tile in some.tile.tolist()]
    for name in ("match", "rank", "top"):
        np.testing.assert_array_equal(getattr(some, name), getattr(whole.select(where), name))
    # They are of other conditions than what `compare` takes its threshold from.
    assert not list(project.embeddings.glob("*.npz"))


def results_of(project, **options):
    report = evaluate(project, **options)
    assert all(metrics.drawn_from is None for metrics in report.splits.values())
    return project.reports / report.name / "queries.parquet"


def test_it_is_said_how_many_queries_were_drawn(tiled, copied, vectors):
    project = copied(tiled)
    describe_by_hand(project, vectors)
    arguments = ["eval", "-p", str(project.root), "--no-html", "--set", "eval.queries=17"]
    shown = run_command(*arguments)
    assert "train: 17 of 48 queries, drawn at random" in shown.stderr
    assert "17 of 24" in shown.stdout
    found = json.loads(run_command(*arguments, "--json", "--quiet").stdout)["splits"]
    assert (found["test"]["queries"], found["test"]["drawn_from"]) == (17, 24)
    assert "drawn_from" not in found["validation"]


def test_descriptors_are_read_in_blocks(tiled, copied, monkeypatch):
    project = copied(tiled)
    # No two are equal, so that the first answers are the same ones.
    describe_by_hand(project, np.random.default_rng(1).normal(size=(88, 6)))
    wanted = evaluate(project, queries=8)
    read, whole = [], DescriptorFile.__getitem__

    def getitem(self, rows):
        found = whole(self, rows)
        read.append(len(found))
        return found

    monkeypatch.setattr(DescriptorFile, "__getitem__", getitem)
    monkeypatch.setattr(ranking, "READ", 7)
    for module in (measuring, exact):
        monkeypatch.setattr(module, "BLOCK", 7)
    assert evaluate(project, queries=8) == wanted
    # Eight anchors with a tile of the same place and one of another each.
    assert max(read) <= 3 * 8


def test_equal_hashes_make_no_equal_descriptors(tiled, copied, vectors, monkeypatch):
    project = copied(tiled)
    describe_by_hand(project, vectors)
    wanted = evaluate(project)
    monkeypatch.setattr(measuring, "_hashed", lambda vectors, n: np.zeros(n, np.uint64))
    assert evaluate(project) == wanted

"""The report as a page: what a browser shows, looked at in headless Chromium."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from browser import browser
from command_line import run_command
from hand_made import (
    describe_by_hand,
    hand_made_embedding_manifest,
    hand_made_split_metrics,
    hand_made_tile_manifest,
    hand_made_tiles,
)
from image_sets import class_folders, tile_folders
from PIL import Image, ImageColor
from small_project import evaluate

from geomatch.data.embeddings import Embeddings
from geomatch.data.eval_report import Report
from geomatch.data.query_results import QueryTable
from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.errors import StaleError
from geomatch.geo import footprints
from geomatch.geo.coordinates import project_points
from geomatch.geo.grid import Grid
from geomatch.project import Project, write_json, write_record
from geomatch.report import contact_sheet, html
from geomatch.report.html import write_page
from geomatch.report.matches import TilePictures, match_folder

COLOURS = ((1, "#0072b2"), (5, "#56b4e9"), (20, "#e69f00"), (10**9, "#d55e00"))
"""Of squares on the map, up to a rank."""
PHONE = 390


@pytest.fixture(scope="module")
def chromium():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def written(indexed, tmp_path_factory):
    """The small project's report: its metrics, its queries and its page."""
    project = indexed.copied(tmp_path_factory.mktemp("report") / "project")
    folder = project.reports / evaluate(project).name
    write_page(project, folder)
    return folder


@pytest.fixture
def unwritten(written, tmp_path):
    """A folder with the metrics and queries of the small project's report."""
    for name in ("report.json", "queries.parquet"):
        shutil.copy(written / name, tmp_path)
    return tmp_path


@pytest.fixture
def page(written, chromium):
    """The page of the small project, on a wide screen."""
    chromium.open(written / "report.html")
    return chromium


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory):
    """The report of a project of class folders, one of an awkward name."""
    root = tmp_path_factory.mktemp("classes")
    (root / "geomatch.toml").write_text("")
    project = Project(root)
    names = ["<!--<script>", "barn", "church"]
    images = class_folders(root / "images", dict.fromkeys(names, 12))
    tile_folders(project, images, test=4, validation=3, **{"grid.size": 12})
    rng = np.random.default_rng(3)
    tiles = TileTable.load(project.catalogue)
    label = tiles.label[:, None]
    describe_by_hand(project, np.eye(3)[label[:, 0]] + rng.normal(0, 0.3 * (1 + label), (36, 3)))
    folder = project.reports / evaluate(project).name
    return write_page(project, folder).parent


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def queries_of(folder, split="test"):
    """Rows of the queries of a split, as dictionaries."""
    rows = pq.read_table(folder / "queries.parquet").to_pylist()
    return [row for row in rows if row["split"] == split]


def text(page, selector):
    return page.run(f"document.querySelector({selector!r})?.innerText ?? null")


def texts(page, selector):
    return page.run(f"[...document.querySelectorAll({selector!r})].map((e) => e.innerText)")


def table(page, selector):
    """Cells of a table's rows."""
    found = f"[...document.querySelectorAll({selector + ' tbody tr'!r})]"
    return page.run(f"{found}.map((row) => [...row.cells].map((cell) => cell.innerText.trim()))")


def box(page, selector):
    """Left, top, width and height of an element, brought into view."""
    element = f"document.querySelector({selector!r})"
    page.run(f"{element}.scrollIntoView({{behavior: 'instant', block: 'center'}})")
    page.settle()
    found = page.run(f"{element}.getBoundingClientRect().toJSON()")
    return [found[name] for name in ("x", "y", "width", "height")]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, PHONE])
@pytest.mark.parametrize("which", ["written", "of_classes"])
def test_nothing_is_complained_of_and_nothing_sticks_out(request, chromium, which, width, dark):
    folder = request.getfixturevalue(which)
    chromium.open(folder / "report.html", width, dark=dark)
    assert chromium.complaints == []
    assert chromium.run("document.documentElement.scrollWidth") == width
    assert chromium.run("innerWidth") == width
    assert chromium.run("document.querySelectorAll('main > section').length") > 4
    boxes = "[...document.querySelectorAll('section, .map, .chart, .query, img, dl, h1, h2')]"
    right = chromium.run(f"Math.max(...{boxes}.map((e) => e.getBoundingClientRect().right))")
    assert 0.8 * width < right <= width


def test_complaints_would_be_seen(chromium, tmp_path):
    path = tmp_path / "broken.html"
    path.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('a'); b()</script>")
    chromium.open(path)
    assert len(chromium.complaints) >= 3


def test_nothing_is_fetched(written):
    content = (written / "report.html").read_text()
    assert set(re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', content)) == set()
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", content)


def test_a_page_is_the_same_each_time(written):
    project = Project(written.parent.parent)
    before = (written / "report.html").read_bytes()
    assert write_page(project, written).read_bytes() == before


def test_metrics_are_those_of_the_report(page, written):
    splits = report_of(written)["splits"]
    metrics = splits["test"]
    cards = dict(zip(texts(page, ".cards dt"), texts(page, ".cards dd"), strict=True))
    assert cards["mAP@5"].startswith(f"{metrics['map@5']:.3f}")
    assert cards["R@10"].startswith(f"{metrics['recall@10']:.3f}")
    assert cards["AUC of pairs"].startswith(f"{metrics['roc']['auc']:.3f}")
    assert f"{100 * metrics['recall@1']:.1f} %" in text(page, "#metrics h2")
    heads = [head.strip() for head in texts(page, "#splits thead th")]
    rows = {row[0]: dict(zip(heads, row, strict=True)) for row in table(page, "#splits")}
    for split, metrics in splits.items():
        assert rows[split]["queries"] == str(metrics["queries"])
        assert rows[split]["mAP@5"].startswith(f"{metrics['map@5']:.3f}")
        assert rows[split]["R@1"].startswith(f"{metrics['recall@1']:.3f}")
    assert rows["2020 in 2010"]["R@5"].startswith(f"{splits['test']['pairs'][1]['recall@5']:.3f}")


def test_others_are_beside(chromium, written, tmp_path, indexed):
    folder = tmp_path / "beside"
    shutil.copytree(written, folder)
    report = report_of(folder)
    worse = json.loads(json.dumps(report["splits"]))
    worse["test"]["map@5"] = 0.125
    differences = {"test": {"map@5": [-0.25, -0.5, 0.0625]}}
    report["others"] = [{"name": "colours", "splits": worse, "differences": differences}]
    write_json(folder / "report.json", report)
    chromium.open(write_page(indexed.project, folder))
    heads = texts(chromium, "#beside thead th")
    mine, other = (dict(zip(heads, row, strict=True)) for row in table(chromium, "#beside"))
    assert mine["mAP@5"].startswith(f"{report['splits']['test']['map@5']:.3f}")
    assert (mine["name"], mine["ahead"]) == (report["embeddings"], "–")
    assert other["mAP@5"].startswith("0.125")
    assert other["ahead"].split("\n") == ["-0.250", "-0.500 – +0.063"]
    assert chromium.complaints == []


def test_graded_answers_are_shown(chromium, written, tmp_path, indexed):
    folder = tmp_path / "graded"
    shutil.copytree(written, folder)
    report = report_of(folder)
    names = ("trapezoidal map", "mp@1", "mp@5", "mp@10")
    report["graded"] = {"queries": 3, "database": 40, "easy": dict.fromkeys(names, 0.25)}
    report["graded"] |= {"medium": dict.fromkeys(names, 0.125), "hard": dict.fromkeys(names)}
    write_json(folder / "report.json", report)
    chromium.open(write_page(indexed.project, folder))
    assert texts(chromium, "#grades thead th")[:3] == ["grade", "trapezoidal mAP", "mP@1"]
    rows = table(chromium, "#grades")
    assert [row[:2] for row in rows] == [["easy", "0.250"], ["medium", "0.125"], ["hard", "–"]]
    assert "3 queries among 40 tiles" in text(chromium, "#graded")
    assert chromium.complaints == []


def test_the_confusion_matrix(page, written):
    (tn, fp), (fn, tp) = report_of(written)["splits"]["test"]["roc"]["confusion"]
    cells = [row[1:] for row in table(page, "#confusion")]
    counts = [[int(cell.split()[0]) for cell in row] for row in cells]
    assert counts == [[tn, fp], [fn, tp]]
    assert f"{100 * tp / (fn + tp):.1f} %" in cells[1][1]


def test_tiles_are_counted(page, indexed):
    tiles = indexed.tiles
    rows = {row[0]: row for row in table(page, "#tiles")}
    for code, year in enumerate(tiles.years):
        counts = [int(((tiles.year == code) & (tiles.split == split)).sum()) for split in range(3)]
        assert [int(cell) for cell in rows[year][2:]] == [*counts, sum(counts)]


def test_what_was_measured_is_said(page, written, indexed):
    said = page.run("document.querySelector('#measured').textContent")
    manifest = indexed.project.tile_manifest()
    assert manifest.fingerprint in said
    assert manifest.grid in said
    assert "resnet10" in said
    assert written.name in text(page, "h1")


def chosen(rows, key):
    """The first queries by a key, one of each place."""
    kept = {}
    for row in sorted(rows, key=key):
        kept.setdefault(row["place"], row)
    return list(kept.values())[: html.SHOWN]


def test_best_and_worst_queries_are_shown_with_their_answers(page, written):
    rows = queries_of(written)
    wanted = [
        *chosen(rows, lambda row: (row["rank"], -row["first_score"])),
        *chosen(rows, lambda row: (-row["rank"], -row["first_score"])),
    ]
    found = page.run(
        "[...document.querySelectorAll('.query')].map((q) => [...q.querySelectorAll('figure')]"
        ".map((f) => [f.className, f.querySelector('img').alt, f.innerText]))"
    )
    assert len(found) == 3 * html.SHOWN
    for row, metrics in zip(wanted, found, strict=False):
        assert metrics[0][:2] == ["asked", f"Query {row['id']}"]
        assert len(metrics) == 1 + len(row["top"])
        for i, (tile, score) in enumerate(zip(row["top"], row["top_scores"], strict=True), start=1):
            kind, alt, caption = metrics[i]
            right = tile.split("@")[0] == row["place"]
            assert kind == ("right" if right else "wrong")
            assert alt.endswith(tile)
            assert ("✓" if right else "✗") in caption
            assert f"{score:.3f}" in caption
            assert f"{tile.split('@')[1]}, {row['top_distances_m'][i - 1]:.0f} m" in caption


def test_thumbnails_show_the_tile(page, written, indexed):
    """Mean colour of each picture, as far as JPEG keeps it."""
    tiles, store = indexed.tiles, TileStore.open(indexed.project.pixels)
    row_of = {name: row for row, name in enumerate(tiles.ids())}
    contact_sheet = page.run(
        "[...document.querySelectorAll('.query img')].map((i) => {"
        " const c = document.createElement('canvas'), n = i.naturalWidth;"
        " [c.width, c.height] = [n, n]; const x = c.getContext('2d'); x.drawImage(i, 0, 0);"
        " const values = x.getImageData(0, 0, n, n).data, sum = [0, 0, 0];"
        " values.forEach((v, j) => { if (j % 4 < 3) sum[j % 4] += v; });"
        " return [i.alt, n, sum.map((v) => v / n / n)]; })"
    )
    assert len(contact_sheet) == 3 * html.SHOWN * 6
    for alt, width, colour in contact_sheet:
        pixels = store.read(np.array([row_of[alt.split()[-1]]]))[0]
        assert width == html.LARGE
        assert np.abs(pixels.mean(axis=(0, 1)) - colour).max() < 4


# Curves


def test_a_curve_tells_its_values(page, written):
    roc = report_of(written)["splits"]["test"]["roc"]
    left, top = box(page, "#chart-roc svg")[:2]
    # The corner of a perfect curve: what lies nearest is a point of one of the curves.
    page.mouse("mouseMoved", left + 60, top + 14)
    said = text(page, "#chart-roc output")
    split, fpr, tpr = re.fullmatch(
        r"(\w+): false positive rate (\S+), true positive rate (\S+)", said
    ).groups()
    curve = report_of(written)["splits"][split]["roc"]["curve"]
    points = {(f"{x:.3f}", f"{y:.3f}") for x, y in zip(curve["fpr"], curve["tpr"], strict=True)}
    assert (fpr, tpr) in points
    box(page, "#chart-scores svg")
    page.run("document.querySelector('#chart-scores svg').focus()")
    page.key("ArrowRight")
    page.key("ArrowRight")
    bins = roc["histogram"]
    assert text(page, "#chart-scores output") == (
        f"score {bins['edges'][1]:.3f} to {bins['edges'][2]:.3f}: "
        f"{bins['same'][1]} of the same place, {bins['other'][1]} of other places"
    )


def test_curves_of_training(page, written, indexed):
    names = texts(page, ".chart strong")
    assert "Training loss" in names
    page.run("document.querySelector('#chart-map5 svg').focus()")
    rounds = [line for line in indexed.metrics if line.get("validation/map@5") is not None]
    assert len(rounds) > 2
    for line in rounds:
        page.key("ArrowRight")
        said = text(page, "#chart-map5 output")
        assert said.endswith(f"mAP@5 {line['validation/map@5']:.3f}")


def test_curves_are_pictures_too(written):
    names = {path.stem for path in (written / "figures").iterdir()}
    assert names == {"loss", "map5", "roc", "pr", "calibration", "scores", "confusion"}
    for path in (written / "figures").iterdir():
        with Image.open(path) as picture:
            colours = np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)
            assert len(colours) > 20


def test_shown_queries_are_pictures_too(written, indexed):
    pictured = {path.stem for path in (written / "matches").iterdir()}
    assert pictured == {f"{k}-{n + 1}" for k in ("best", "worst", "random") for n in range(6)}
    row = chosen(queries_of(written), lambda row: (-row["rank"], -row["first_score"]))[1]
    right = [tile.split("@")[0] == row["place"] for tile in row["top"]]
    colours = [
        contact_sheet.QUERY,
        *(contact_sheet.RIGHT if hit else contact_sheet.WRONG for hit in right),
    ]
    check_sheet(written / "matches" / "worst-2.png", indexed, [row["id"], *row["top"]], colours)


def check_sheet(path, indexed, tiles, colours):
    """See that a sheet shows these tiles, in frames of these colours."""
    store, ids = TileStore.open(indexed.project.pixels), indexed.tiles.ids()
    with Image.open(path) as drawn:
        for i, (tile, colour) in enumerate(zip(tiles, colours, strict=True)):
            left = contact_sheet.GAP + i * (128 + 2 * contact_sheet.EDGE + contact_sheet.GAP)
            assert drawn.getpixel((left, contact_sheet.GAP)) == ImageColor.getrgb(colour)
            stored = indexed.tiles.store_row[[ids.index(tile)]]
            own = Image.fromarray(store.read(stored)[0, ..., :3])
            wanted = own.resize((128, 128), Image.Resampling.NEAREST)
            corner = left + contact_sheet.EDGE, contact_sheet.GAP + contact_sheet.EDGE
            found = drawn.crop((*corner, corner[0] + 128, corner[1] + 128))
            assert found.tobytes() == wanted.tobytes()


def test_a_match_that_was_missed_comes_last(indexed, tmp_path):
    tiles = indexed.tiles
    query = 3
    others = np.flatnonzero(tiles.year != tiles.year[query])
    match = others[tiles.places()[others] == tiles.places()[query]]
    top = others[tiles.places()[others] != tiles.places()[query]][:2]
    nothing = np.full(1, np.nan)
    scores = np.array([[0.9, 0.8]], np.float32)
    asked = QueryTable(
        tile=np.array([query]),
        match=match,
        match_score=np.array([0.1], np.float32),
        rank=np.array([9]),
        top=top[None],
        top_score=scores,
        distance_m=scores.astype(float),
        lon=nothing,
        lat=nothing,
    )
    match_folder(TilePictures.of(indexed.project), asked, {"worst": [0]}, tmp_path)
    ids = tiles.ids()
    shown = [ids[row] for row in (query, *top, *match)]
    colours = [contact_sheet.QUERY, contact_sheet.WRONG, contact_sheet.WRONG, contact_sheet.RIGHT]
    check_sheet(tmp_path / "worst-1.png", indexed, shown, colours)


def test_pictures_of_an_earlier_report_are_removed(unwritten, indexed):
    old = unwritten / "matches" / "best-99.png"
    old.parent.mkdir()
    old.touch()
    write_page(indexed.project, unwritten)
    assert not old.exists()


# The map


def squares(page, rows):
    """Middle of each query's square in the window, by id, as the map is first seen; its side."""
    left, top, width, height = box(page, ".map")
    cells = {row["id"]: tuple(map(int, row["place"].split("_"))) for row in rows}
    low, high = np.min([*cells.values()], axis=0), np.max([*cells.values()], axis=0)
    across = high - low + 1
    # A border of 1 px, then the middle of the region in the middle of the map.
    side = min((width - 2 - 24) / across[0], (height - 2 - 24) / across[1], 96)
    middle = np.array([left + width / 2, top + height / 2])
    placed = {}
    for name, cell in cells.items():
        step = (np.array(cell) - low + 0.5 - across / 2) * side
        placed[name] = middle + step * (1, -1)
    return placed, side


def pixel(page, x, y):
    """Colour of the map's canvas at a point of the window."""
    values = page.run(
        "(() => { const c = document.querySelector('canvas.ground'), r = c.getBoundingClientRect();"
        f"return [...c.getContext('2d').getImageData({x} - r.x, {y} - r.y, 1, 1).data]; }})()"
    )
    return "#" + "".join(f"{value:02x}" for value in values[:3])


def drawn(page):
    return page.run("document.querySelector('canvas.ground').toDataURL()")


def of_pair(folder, pair=("2010", "2020")):
    return [r for r in queries_of(folder) if (r["year"], r["database_year"]) == pair]


def tip(page):
    """What is said of the query that is chosen, None where there is none."""
    return page.run("((t) => t.hidden ? null : t.innerText)(document.querySelector('.tip'))")


def test_the_map_shows_each_query_at_its_place_in_the_colour_of_its_rank(page, written):
    rows = of_pair(written)
    placed, side = squares(page, rows)
    assert len(rows) == 12
    for row in rows:
        x, y = placed[row["id"]]
        wanted = next(colour for most, colour in COLOURS if row["rank"] <= most)
        assert pixel(page, x - side / 2 + 2, y) == wanted
        page.mouse("mouseMoved", x, y)
        said = tip(page)
        assert f"{row['id']}: match at rank {row['rank']}" in said
        assert f"First answer {row['first']}, score {row['first_score']:.3f}" in said
        assert ("✓" if row["rank"] == 1 else "✗") in said
        if row["distance_m"]:
            assert f"{row['distance_m']:.0f} m away" in said
    page.mouse("mouseMoved", 5, 5)
    assert tip(page) is None


def test_the_legend_counts(page, written):
    ranks = np.array([row["rank"] for row in of_pair(written)])
    counts = [
        int(entry.split(":")[1].split()[0])
        for entry in texts(page, "#map .legend span")[::1]
        if ":" in entry
    ]
    edges = [0, 1, 5, 20, 10**9]
    assert counts == np.histogram(ranks, np.array(edges) + 0.5)[0].tolist()


def test_the_map_zooms_about_the_pointer_and_moves_with_it(page, written):
    rows = of_pair(written)
    placed, _ = squares(page, rows)
    row = rows[3]
    x, y = placed[row["id"]]
    first = drawn(page)
    page.mouse("mouseWheel", x, y, deltaX=0, deltaY=-400)
    page.until("document.querySelector('.tip').hidden")
    zoomed = drawn(page)
    assert zoomed != first
    page.mouse("mouseMoved", x + 1, y)
    assert row["id"] in tip(page)
    # Dragged, the square comes along.
    page.mouse("mousePressed", x, y, button="left", buttons=1, clickCount=1)
    page.mouse("mouseMoved", x + 30, y + 20, button="left", buttons=1)
    page.mouse("mouseMoved", x + 60, y + 40, button="left", buttons=1)
    page.mouse("mouseReleased", x + 60, y + 40, button="left", clickCount=1)
    assert drawn(page) != zoomed
    page.mouse("mouseMoved", x + 61, y + 40)
    assert row["id"] in tip(page)
    page.mouse("mouseMoved", 5, 5)
    page.run("document.querySelector('[aria-label=\"Show all\"]').click()")
    page.settle()
    assert drawn(page) == first
    page.run("document.querySelector('[aria-label=\"Zoom in\"]').click()")
    page.settle()
    assert drawn(page) != first


def test_the_map_answers_to_keys(page, written):
    rows = of_pair(written)
    squares(page, rows)
    page.run("document.querySelector('canvas.ground').focus()")
    page.key("ArrowRight")
    start = tip(page).split(":")[0].split()[-1]
    column, row = map(int, start.split("@")[0].split("_"))
    page.key("ArrowUp")
    assert f"{column}_{row + 1}@2010" in tip(page)
    page.key("ArrowDown")
    assert start in tip(page)
    before = drawn(page)
    page.key("+")
    assert drawn(page) != before
    page.key("Escape")
    assert tip(page) is None


def test_the_other_years_are_a_choice(page, written):
    rows = of_pair(written, ("2020", "2010"))
    placed, _ = squares(page, rows)
    page.run(
        "(() => { const s = document.querySelector('#map select'); s.value = '1';"
        "s.dispatchEvent(new Event('change')); })()"
    )
    page.settle()
    page.mouse("mouseMoved", *placed[rows[5]["id"]])
    assert f"{rows[5]['id']}: match at rank {rows[5]['rank']}" in tip(page)


def test_fingers_tap_and_pinch(chromium, written):
    chromium.open(written / "report.html", PHONE)
    rows = of_pair(written)
    placed, _ = squares(chromium, rows)
    x, y = placed[rows[4]["id"]]
    first = drawn(chromium)
    chromium.touch("touchStart", (x, y))
    chromium.touch("touchEnd")
    chromium.until("!document.querySelector('.tip').hidden")
    assert rows[4]["id"] in tip(chromium)
    shown = "document.querySelector('.tip').getBoundingClientRect()"
    assert 0 <= chromium.run(f"{shown}.left") < chromium.run(f"{shown}.right") <= PHONE
    chromium.touch("touchStart", (x - 20, y), (x + 20, y))
    for spread in (22, 25):
        chromium.touch("touchMove", (x - spread, y), (x + spread, y))
    chromium.touch("touchEnd")
    assert drawn(chromium) != first
    # About their middle: the same square is there still.
    chromium.touch("touchStart", (x, y))
    chromium.touch("touchEnd")
    assert rows[4]["id"] in tip(chromium)
    # Two fingers side by side take it along.
    chromium.touch("touchStart", (x - 20, y), (x + 20, y))
    for far in (30, 60, 90):
        chromium.touch("touchMove", (x - 20 - far, y + far), (x + 20 - far, y + far))
    chromium.touch("touchEnd")
    chromium.touch("touchStart", (x - 90, y + 90))
    chromium.touch("touchEnd")
    assert rows[4]["id"] in tip(chromium)


def test_thumbnails_beyond_the_size_are_left_out_with_a_note(
    chromium, unwritten, monkeypatch, indexed
):
    monkeypatch.setattr(html, "SHEET", 2)  # four thumbnails a sheet
    path = write_page(indexed.project, unwritten)
    whole = path.read_text()
    assert whole.count('class="sheet"') == 6  # of 24 tiles
    monkeypatch.setattr(html, "BYTES", len(whole) - 1000)
    write_page(indexed.project, unwritten)
    assert path.read_text().count('class="sheet"') == 5
    assert path.stat().st_size < len(whole)
    monkeypatch.setattr(html, "SQUARES", 10)
    write_page(indexed.project, unwritten)
    chromium.open(path)
    assert "The map shows a random sample of 10 of 24 queries." in text(chromium, "#map .note")


def test_without_room_for_thumbnails_the_map_says_so(
    chromium, written, unwritten, monkeypatch, indexed
):
    monkeypatch.setattr(html, "BYTES", 0)
    chromium.open(write_page(indexed.project, unwritten))
    assert "only a random sample of 0 queries has thumbnails" in text(chromium, "#map .note")
    rows = of_pair(written)
    chromium.mouse("mouseMoved", *squares(chromium, rows)[0][rows[0]["id"]])
    assert rows[0]["id"] in tip(chromium)
    assert chromium.complaints == []


def hand_made_report(root, tiles, size=8):
    """A project of tiles of noise in two years, half of them of each, and a report on it."""
    n = len(tiles) // 2
    project = Project(root)
    (root / "geomatch.toml").write_text("")
    project.tiles.mkdir()
    footprint, crs = footprints.file_geometry(tiles.grid)
    tiles.save(project.catalogue, footprint, crs)
    rng = np.random.default_rng(0)
    store = TileStore.create(project.pixels, 2 * n, size, 3)
    shard = 512
    for start in range(0, 2 * n, shard):
        count = min(shard, 2 * n - start)
        store.write(start, rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8))
    write_record(project.tiles_manifest, hand_made_tile_manifest(tiles.grid, 2 * n))
    manifest = hand_made_embedding_manifest(2, name="hand@0", step=0)
    project.embeddings.mkdir()
    vectors = Embeddings(np.zeros((2 * n, 2), np.float32), manifest)
    vectors.save(project.embeddings / "hand@0.parquet", tiles, footprint, crs)
    query = np.arange(2 * n)
    match = (query + n) % (2 * n)
    rank = rng.choice([1, 1, 2, 5, 6, 20, 21], 2 * n)
    top = np.where(query < n, n, 0)[:, None] + rng.integers(n, size=(2 * n, 5))
    top[rank == 1, 0] = match[rank == 1]
    scores = -np.sort(-rng.random((2 * n, 5)).astype(np.float32), axis=1)
    lonlat = footprints.lonlat(tiles.epsg, tiles.centres())
    metres = rng.random(top.shape)
    table = QueryTable(query, match, scores[:, 0], rank, top, scores, metres, *lonlat.T)
    folder = project.reports / "hand@0"
    folder.mkdir(parents=True)
    table.save(folder / "queries.parquet", tiles)
    metrics = hand_made_split_metrics(2 * n, 2 * n)
    splits = dict.fromkeys(("train", "validation", "test"), metrics)
    Report("hand@0", "split", splits, name="hand@0").save(folder / "report.json")
    return project, folder


def test_zones_lie_side_by_side_on_the_map(chromium, tmp_path):
    """Either side of the meridian 0, which divides two zones: west is left of east."""
    lon = np.array([-0.010, -0.005, 0.005, 0.010])
    epsg = np.array([32630, 32630, 32631, 32631])
    tiles = hand_made_tiles([0] * 8, [0] * 8, [0] * 4 + [1] * 4, [2] * 8)
    col, row = [], []
    for x, code in zip(lon, epsg, strict=True):
        zone = project_points("OGC:CRS84", np.array([x]), np.array([45.0]), f"EPSG:{code}")
        col.append(int(zone[0][0] // 8))
        row.append(int(zone[1][0] // 8))
    tiles = dataclasses.replace(
        tiles,
        grid=Grid("utm", 8, 1.0, 8),
        epsg=np.tile(epsg, 2),
        col=np.tile(col, 2),
        row=np.tile(row, 2),
    )
    project, folder = hand_made_report(tmp_path, tiles)
    path = write_page(project, folder)
    found = json.loads(re.search(r'id="page">(.*?)</script>', path.read_text()).group(1))["map"]
    x = dict(zip((found["ids"][i] for i in found["query"]), found["x"], strict=True))
    y = dict(zip((found["ids"][i] for i in found["query"]), found["y"], strict=True))
    names = [name for name in tiles.ids() if name.endswith("@2000")]
    metres = [8 * (x[name] - x[names[0]]) for name in names]
    # A degree of longitude at 45 degrees north is 78.8 km.
    np.testing.assert_allclose(metres, (lon - lon[0]) * 78_800, atol=25)
    assert max(y.values()) * 8 < 25
    chromium.open(path)
    assert chromium.complaints == []


def test_every_colour_of_the_map(chromium, tmp_path):
    cell = np.tile(np.arange(40), 2)
    years = np.repeat([0, 1], 40).tolist()
    tiles = hand_made_tiles((cell % 8).tolist(), (cell // 8).tolist(), years, [2] * 80)
    project, folder = hand_made_report(tmp_path, tiles)
    chromium.open(write_page(project, folder))
    rows = of_pair(folder, ("2000", "2010"))
    placed, side = squares(chromium, rows)
    seen = set()
    for row in rows:
        x, y = placed[row["id"]]
        wanted = next(colour for most, colour in COLOURS if row["rank"] <= most)
        assert pixel(chromium, x - side / 2 + 2, y) == wanted
        seen.add(wanted)
    assert len(rows) == 40
    assert len(seen) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "seconds"), [(5_000, 60), (100_000, 60)])
def test_size_and_time(chromium, tmp_path, queries, seconds):
    n = queries // 2
    place = np.arange(n)
    tiles = hand_made_tiles(
        np.tile(place % 300, 2).tolist(),
        np.tile(place // 300, 2).tolist(),
        np.repeat([0, 1], n).tolist(),
        [2] * (2 * n),
    )
    project, folder = hand_made_report(tmp_path, tiles)
    begun = time.monotonic()
    path = write_page(project, folder)
    assert time.monotonic() - begun < seconds
    assert path.stat().st_size < 15_000_000
    chromium.open(path)
    assert chromium.complaints == []
    pictured = '"queries has thumbnails"'
    assert chromium.run(f"document.body.innerText.includes({pictured})") == (queries > 5_000)


# Classes, themes, the command


def test_classes_have_a_table_that_sorts_and_no_map(chromium, of_classes):
    chromium.open(of_classes / "report.html")
    classes = report_of(of_classes)["splits"]["test"]["classes"]
    assert text(chromium, "#map") is None
    assert "Training loss" not in texts(chromium, ".chart strong")
    assert [row[0] for row in table(chromium, "#by-classes")] == [row["class"] for row in classes]
    heads = texts(chromium, "#by-classes th button")
    column = heads.index("mAP")
    click = f"document.querySelectorAll('#by-classes th button')[{column}].click()"
    by_map = sorted(classes, key=lambda row: row["map"])
    assert by_map[0]["map"] < by_map[1]["map"] < by_map[2]["map"]
    assert text(chromium, "#by-classes p").startswith("Test, by class")
    for wanted in (by_map[::-1], by_map):
        chromium.run(click)
        found = [(row[0], row[column]) for row in table(chromium, "#by-classes")]
        assert found == [(row["class"], f"{row['map']:.3f}") for row in wanted]
    chromium.run("document.querySelectorAll('#by-classes th button')[0].click()")
    names = [row[0] for row in table(chromium, "#by-classes")]
    assert sorted(names) == sorted(row["class"] for row in classes)
    assert names.index("barn") < names.index("church")


def test_colour_schemes(chromium, written):
    def paper():
        found = chromium.run("getComputedStyle(document.body).backgroundColor")
        return np.mean([int(value) for value in re.findall(r"\d+", found)[:3]])

    chromium.open(written / "report.html")
    assert paper() > 200
    chromium.scheme("dark")
    assert paper() < 50
    chromium.run("document.getElementById('theme').click()")
    assert paper() > 200
    chromium.scheme("light")
    assert paper() > 200
    chromium.run("document.getElementById('theme').click()")
    assert paper() < 50


def test_eval_writes_the_page_unless_no_html_is_given(copied, indexed):
    project = copied(indexed)
    arguments = ["eval", "-p", str(project.root), "--quiet"]
    done = run_command(*arguments, "--no-html")
    assert done.exit_code == 0, done.output
    (folder,) = (path.parent for path in project.reports.glob("*/report.json"))
    assert not (folder / "report.html").exists()
    done = run_command(*arguments, "--json")
    assert done.exit_code == 0, done.output
    assert (folder / "report.html").exists()
    assert str(folder / "report.html") in done.stderr.replace("\n", "")
    assert "test" in json.loads(done.stdout)["splits"]


def test_a_report_without_its_queries_names_the_remedy(copied, indexed):
    project = copied(indexed)
    folder = project.reports / evaluate(project).name
    (folder / "queries.parquet").unlink()
    with pytest.raises(StaleError, match=r"queries\.parquet") as failure:
        write_page(project, folder)
    assert failure.value.hint == "Run: geomatch eval"

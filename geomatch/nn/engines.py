"""What computes descriptors: JAX, or a runtime for CPUs that takes the encoder's ONNX graph."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from geomatch.errors import GeomatchError, UsageError
from geomatch.nn import backend
from geomatch.nn.describe import Engine, Jax, in_dtype
from geomatch.nn.encoder import Siamese, TileForm
from geomatch.nn.onnx_export import to_onnx


class EngineChoice(NamedTuple):
    """An engine and what it computes in: names of the command line, neither of them "auto"."""

    engine: str
    dtype: str


FASTEST = (
    EngineChoice("openvino", "bfloat16"),
    EngineChoice("jax", "bfloat16"),
    EngineChoice("openvino", "float32"),
    EngineChoice("onnxruntime", "float32"),
    EngineChoice("jax", "float32"),
    EngineChoice("openvino", "int8"),
)
"""As measured on a CPU with bfloat16; int8 comes last, for it has to be asked for."""

PACKAGES = {
    "jax": (),
    "openvino": ("openvino", "nncf", "onnx"),
    "onnxruntime": ("onnxruntime", "onnx"),
}
"""What an engine needs, by the name of its extra."""


def choose(engine: str, dtype: str) -> EngineChoice:
    """The engine asked for, or with "auto" the fastest that is installed for the device at hand.

    JAX's backend is not started, so that it can still be set up for the choice.

    Args:
        engine: "auto", "jax", "openvino" or "onnxruntime".
        dtype: "auto", "float32", "bfloat16" or "int8".

    Raises:
        UsageError: the engine does not compute in that dtype.
        GeomatchError: the engine is not installed.
    """
    order = list(FASTEST)
    if not backend.cpu_only():
        order.sort(key=lambda choice: choice.engine != "jax")
    elif dtype == "auto" and not backend.has_bfloat16():
        order = [choice for choice in order if choice.dtype != "bfloat16"]
    fitting = [c for c in order if engine in ("auto", c.engine) and dtype in ("auto", c.dtype)]
    if not fitting:
        able = " or ".join(choice.engine for choice in FASTEST if choice.dtype == dtype)
        raise UsageError(f"{engine} does not compute in {dtype}", f"Use --engine {able}.")
    for choice in fitting:
        if all(importlib.util.find_spec(package) for package in PACKAGES[choice.engine]):
            return choice
    name = fitting[0].engine
    raise GeomatchError(f"{name} is not installed", f"Run: pip install 'geomatch[{name}]'")


def build(
    choice: EngineChoice,
    model: Siamese,
    variables: Any,
    form: TileForm,
    size: int,
    calibration: Iterable[NDArray[np.uint8]] = (),
) -> Engine:
    """The engine of a network.

    Args:
        variables: parameters and BatchNorm statistics.
        size: tiles a batch.
        calibration: batches (n, h, w, c) of some 300 tiles in all, read for int8 alone.

    Raises:
        GeomatchError: the network cannot be written for the engine, or int8 has no tiles.
    """
    if choice.engine == "jax":
        model = in_dtype(model, choice.dtype)
        fixed = backend.uses_onednn(choice.dtype)
        return Jax(model, variables, size, " ".join(choice), fixed)
    forward = partial(in_dtype(model, "float32").apply, variables)
    graph = to_onnx(forward, (form.size, form.size, form.channels))
    if choice.engine == "onnxruntime":
        return OnnxRuntime(graph, size)
    return OpenVino(graph, choice.dtype, size, calibration)


UNDER_WAY = 2
"""Batches that `describe_with` has begun and not finished, at the most."""


class OnnxRuntime:
    """onnxruntime on the CPU, in float32."""

    def __init__(self, graph: bytes, size: int) -> None:
        import onnxruntime

        self.name = "onnxruntime float32"
        self.size = size
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])

    def start(self, tiles: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
        (descriptors,) = self.session.run(None, {"tiles": tiles})
        return lambda: descriptors


class OpenVino:
    """OpenVINO on the CPU."""

    def __init__(
        self, graph: bytes, dtype: str, size: int, calibration: Iterable[NDArray[np.uint8]] = ()
    ) -> None:
        # Else openvino and nncf report their use to their makers, from a fork of this process, and
        # with JAX's threads a fork may hang.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        import openvino

        core = openvino.Core()
        network = core.read_model(graph)
        if dtype == "int8":
            network = _quantised(network, calibration)
        network.reshape([size, *list(network.input().partial_shape)[1:]])
        hints = {
            "NUM_STREAMS": UNDER_WAY,
            "INFERENCE_PRECISION_HINT": "f32" if dtype == "float32" else "bf16",
        }
        self.network = core.compile_model(network, "CPU", hints)
        # All at once, for to make one may wait for those at work.
        self.idle = [self.network.create_infer_request() for _ in range(UNDER_WAY)]
        self.name = f"openvino {dtype}"
        self.size = size

    def start(self, tiles: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
        request = self.idle.pop() if self.idle else self.network.create_infer_request()
        request.start_async([tiles])

        def finish() -> NDArray[np.float32]:
            request.wait()
            descriptors = np.array(request.get_output_tensor().data)
            self.idle.append(request)
            return descriptors

        return finish


def _quantised(network: Any, calibration: Iterable[NDArray[np.uint8]]) -> Any:
    """An OpenVINO network in int8, its ranges taken from tiles."""
    tiles = [tile[None] for batch in calibration for tile in batch]
    if not tiles:
        raise GeomatchError(
            "there are no tiles to calibrate int8 on", "Embed with --dtype bfloat16 or float32."
        )
    with contextlib.redirect_stdout(io.StringIO()):  # its own progress bars
        import nncf

        return nncf.quantize(network, nncf.Dataset(tiles), subset_size=len(tiles))

"""Engines that compute descriptors: JAX, or a CPU runtime for the encoder's ONNX graph."""

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
from geomatch.nn.describe import Engine, JaxEngine
from geomatch.nn.encoder import Siamese, TileForm, with_dtype
from geomatch.nn.onnx_export import to_onnx


class EngineChoice(NamedTuple):
    """An engine and its dtype, as named on the command line, neither of them "auto"."""

    engine: str
    dtype: str


FASTEST_FIRST = (
    EngineChoice("openvino", "bfloat16"),
    EngineChoice("jax", "bfloat16"),
    EngineChoice("openvino", "float32"),
    EngineChoice("onnxruntime", "float32"),
    EngineChoice("jax", "float32"),
    EngineChoice("openvino", "int8"),
)
"""As measured on a CPU with bfloat16; int8 is last, since it is used on request only."""

PACKAGES = {
    "jax": (),
    "openvino": ("openvino", "nncf", "onnx"),
    "onnxruntime": ("onnxruntime", "onnx"),
}
"""Packages that an engine needs, by its name, which is also that of the extra."""


def choose(engine: str, dtype: str) -> EngineChoice:
    """The requested engine and dtype; "auto" takes the fastest installed for this device.

    JAX is not initialised, so that `backend.prepare` can still set it up for the choice.

    Args:
        engine: "auto", "jax", "openvino" or "onnxruntime".
        dtype: "auto", "float32", "bfloat16" or "int8".

    Raises:
        UsageError: the engine does not support the dtype.
        GeomatchError: the engine is not installed.
    """
    order = list(FASTEST_FIRST)
    if not backend.cpu_only():
        order.sort(key=lambda choice: choice.engine != "jax")
    elif dtype == "auto" and not backend.has_bfloat16():
        order = [choice for choice in order if choice.dtype != "bfloat16"]
    fitting = [c for c in order if engine in ("auto", c.engine) and dtype in ("auto", c.dtype)]
    if not fitting:
        able = " or ".join(choice.engine for choice in FASTEST_FIRST if choice.dtype == dtype)
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
        size: tiles per batch.
        calibration: batches (n, h, w, c) of about 300 tiles in total, read for int8 only.

    Raises:
        GeomatchError: the network cannot be exported to ONNX, or int8 has no calibration tiles.
    """
    if choice.engine == "jax":
        model = with_dtype(model, choice.dtype)
        constant_weights = backend.uses_onednn(choice.dtype)
        return JaxEngine(model, variables, size, " ".join(choice), constant_weights)
    forward = partial(with_dtype(model, "float32").apply, variables)
    graph = to_onnx(forward, (form.size, form.size, form.channels))
    if choice.engine == "onnxruntime":
        return OnnxRuntimeEngine(graph, size)
    return OpenVinoEngine(graph, choice.dtype, size, calibration)


MAX_PENDING = 2
"""Maximum number of batches that `describe_with` has started and not finished."""


class OnnxRuntimeEngine:
    """onnxruntime on the CPU, in float32."""

    def __init__(self, graph: bytes, size: int) -> None:
        import onnxruntime

        self.name = "onnxruntime float32"
        self.batch_size = size
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])

    def start(self, tiles: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
        (descriptors,) = self.session.run(None, {"tiles": tiles})
        return lambda: descriptors


class OpenVinoEngine:
    """OpenVINO on the CPU."""

    def __init__(
        self, graph: bytes, dtype: str, size: int, calibration: Iterable[NDArray[np.uint8]] = ()
    ) -> None:
        # Otherwise openvino and nncf send telemetry from a fork of this process, which may hang
        # because of JAX's threads.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        import openvino

        core = openvino.Core()
        network = core.read_model(graph)
        if dtype == "int8":
            network = _quantised(network, calibration)
        network.reshape([size, *list(network.input().partial_shape)[1:]])
        hints = {
            "NUM_STREAMS": MAX_PENDING,
            "INFERENCE_PRECISION_HINT": "f32" if dtype == "float32" else "bf16",
        }
        self.network = core.compile_model(network, "CPU", hints)
        # Created up front, since creating one later may wait for running requests.
        self.idle = [self.network.create_infer_request() for _ in range(MAX_PENDING)]
        self.name = f"openvino {dtype}"
        self.batch_size = size

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
    """An OpenVINO network quantised to int8, calibrated on tiles."""
    tiles = [tile[None] for batch in calibration for tile in batch]
    if not tiles:
        raise GeomatchError(
            "there are no tiles to calibrate int8 on", "Embed with --dtype bfloat16 or float32."
        )
    with contextlib.redirect_stdout(io.StringIO()):  # hides nncf's progress bars
        import nncf

        return nncf.quantize(network, nncf.Dataset(tiles), subset_size=len(tiles))

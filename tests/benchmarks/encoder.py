"""Images per second of a training step and of embedding, for ours and all installed peers.

    pip install '.[benchmark]'
    python tests/benchmarks/encoder.py training --trunk resnet50 --size 128 --batch 32
    python tests/benchmarks/encoder.py embedding --trunk resnet50 --size 256 --batch 16

Each contender is a separate process, and they take turns, one repetition each, so that drifting
machine speed affects all equally. Values are medians, their ratio to the best peer of the same
precision, and the peak resident memory of each process.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

Work = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """The measured case: a network on a batch of square uint8 tiles."""

    trunk: str
    size: int
    batch: int
    channels: int

    def tiles(self) -> np.ndarray:
        """(batch, size, size, channels) uint8."""
        shape = (self.batch, self.size, self.size, self.channels)
        return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["training", "embedding"])
    parser.add_argument("--trunk", default="resnet50")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32, help="images; half of them anchors")
    parser.add_argument("--channels", type=int, default=3, help="3, or 6 with labels")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="batches per repetition")
    parser.add_argument("--only", nargs="*", help="names of contenders")
    args = parser.parse_args()
    case = Case(args.trunk, args.size, args.batch, args.channels)
    known = TRAINING if args.what == "training" else EMBEDDING
    names = args.only or [name for name in known if installed(name)]
    workers = {name: Worker(args.what, name, case, args.steps) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.repeats):
        for name, worker in workers.items():
            times[name].append(worker.time())
    memory = {name: worker.close() for name, worker in workers.items()}
    show(args, times, memory)


def installed(name: str) -> bool:
    """Whether the package that a contender needs is installed."""
    package = name.split()[0]
    return package in ("ours", "plain") or importlib.util.find_spec(package) is not None


class Worker:
    """A contender in a separate process, which works on request."""

    def __init__(self, what: str, name: str, case: Case, steps: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, what, name, case, steps))
        self._process.start()
        self._pipe.recv()  # compiled

    def time(self) -> float:
        """Seconds per batch."""
        self._pipe.send(True)
        seconds: float = self._pipe.recv()
        return seconds

    def close(self) -> int:
        """End the process; returns its peak memory in bytes."""
        self._pipe.send(False)
        peak: int = self._pipe.recv()
        self._process.join()
        return peak


def serve(pipe: Connection, what: str, name: str, case: Case, steps: int) -> None:
    """The main function of a worker's process."""
    work = (TRAINING if what == "training" else EMBEDDING)[name](case)
    for _ in range(3):
        work()
    pipe.send(True)
    while pipe.recv():
        start = time.perf_counter()
        for _ in range(steps):
            work()
        pipe.send((time.perf_counter() - start) / steps)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def show(args: Any, times: dict[str, list[float]], memory: dict[str, int]) -> None:
    """Print the table."""
    import jax
    from rich.console import Console
    from rich.table import Table

    images = args.batch * (2 if args.what == "embedding" else 1)
    speed = {name: images / statistics.median(values) for name, values in times.items()}
    title = f"{args.what}, {args.trunk}, {args.size} px, {args.channels} channels, "
    table = Table(title=title + f"batch {args.batch}, jax {jax.__version__}")
    for column in ("", "images/s", "slowest", "fastest", "relative to best peer", "peak GB"):
        table.add_column(column, justify="right" if column else "left")
    for name in sorted(speed, key=lambda name: -speed[name]):
        precision = name.split()[-1]
        peers = [
            value
            for other, value in speed.items()
            if other.split()[-1] == precision and other.split()[0] in PEERS
        ]
        low, high = (images / extreme(times[name]) for extreme in (max, min))
        ratio = f"{speed[name] / max(peers):.2f}" if peers else ""
        row = (name, f"{speed[name]:.1f}", f"{low:.1f}", f"{high:.1f}", ratio)
        table.add_row(*row, f"{memory[name] / 1e9:.2f}")
    Console().print(table)


PEERS = ("torch", "keras", "openvino")


def ours_training(dtype: str, plain: bool = False) -> Callable[[Case], Work]:
    """Our whole training step, including augmentation and optimizer."""

    def prepare(case: Case) -> Work:
        import contextlib

        from geomatch.nn import backend

        backend.prepare(dtype)
        import jax

        from geomatch.nn import layers
        from geomatch.nn.encoder import build
        from geomatch.nn.objective import MatchRule
        from geomatch.nn.step import RunLength, initial_state, make_step, replicate

        settings, form = ours(case, dtype)
        model = build(settings, form)
        state = replicate(initial_state(model, settings, form))
        step = make_step(model, settings, form, MatchRule(True, 0), RunLength(1, 1), views=2)
        shaped = case.tiles().reshape(1, 2, case.batch // 2, *case.tiles().shape[1:])
        places = np.arange(case.batch * 4, dtype=np.int32).reshape(1, 2, case.batch // 2, 4)

        def work() -> object:
            nonlocal state
            with layers.plain_ops() if plain else contextlib.nullcontext():
                state, loss = step(state, shaped, places, np.uint32(0))
            return jax.block_until_ready(loss)

        return work

    return prepare


def ours(case: Case, dtype: str) -> Any:
    """Our settings and tile form for a case."""
    from geomatch import config
    from geomatch.nn.encoder import TileForm

    settings = config.with_overrides(
        config.Config(),
        [
            f"model.trunk={case.trunk}",
            "model.head=pool",
            "train.loss=infonce",
            f"train.dtype={dtype}",
        ],
    )
    return settings, TileForm(case.size, 3, case.channels - 3)


def torch_model(case: Case) -> Any:
    """torchvision's network, or timm's, with a fusion layer if there are labels."""
    import torch

    if case.trunk == "efficientnet_lite0":
        import timm

        trunk = timm.create_model("efficientnet_lite0", num_classes=0)
    else:
        import torchvision

        trunk = getattr(torchvision.models, case.trunk)(weights=None)
        trunk.fc = torch.nn.Identity()
    fusion = torch.nn.Conv2d(case.channels, 3, 1) if case.channels != 3 else torch.nn.Identity()
    return torch.nn.Sequential(fusion, trunk).to(memory_format=torch.channels_last)


def torch_training(dtype: str, compiled: bool = False) -> Callable[[Case], Work]:
    """The same step in torch: channels-last, autocast in bfloat16, a fused optimizer."""

    def prepare(case: Case) -> Work:
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        model = torch_model(case).train()
        optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
        tiles = torch.from_numpy(case.tiles())
        half = case.batch // 2
        target = torch.arange(half)

        def loss_of(pixels: Any) -> Any:
            x = pixels.permute(0, 3, 1, 2).float().div(128).sub(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                rows = model(x.contiguous(memory_format=torch.channels_last))
            rows = torch.nn.functional.normalize(rows.float(), dim=1)
            logits = rows[:half] @ rows[half:].T / 0.1
            entropy = torch.nn.functional.cross_entropy
            return (entropy(logits, target) + entropy(logits.T, target)) / 2

        forward = torch.compile(loss_of) if compiled else loss_of

        def work() -> object:
            optimizer.zero_grad(set_to_none=True)
            loss = forward(tiles)
            loss.backward()
            optimizer.step()
            return loss.item()

        return work

    return prepare


def keras_training(dtype: str) -> Callable[[Case], Work]:
    """The same step in Keras on TensorFlow, compiled by tf.function."""

    def prepare(case: Case) -> Work:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        import keras
        import tensorflow as tf

        keras.mixed_precision.set_global_policy(
            "mixed_bfloat16" if dtype == "bfloat16" else "float32"
        )
        model = keras.applications.ResNet50(
            include_top=False, weights=None, input_shape=(case.size, case.size, 3), pooling="max"
        )
        optimizer = keras.optimizers.Adam(1e-4)
        tiles = tf.constant(case.tiles()[..., :3])
        half = case.batch // 2

        @tf.function
        def step() -> Any:
            with tf.GradientTape() as tape:
                rows = tf.cast(
                    model(tf.cast(tiles, tf.float32) / 128 - 1, training=True), "float32"
                )
                rows = tf.math.l2_normalize(rows, axis=1)
                logits = tf.matmul(rows[:half], rows[half:], transpose_b=True) / 0.1
                entropy = tf.nn.sparse_softmax_cross_entropy_with_logits
                loss = tf.reduce_mean(entropy(tf.range(half), logits))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            return loss

        return lambda: float(step())

    return prepare


TRAINING = {
    "ours float32": ours_training("float32"),
    "ours bfloat16": ours_training("bfloat16"),
    "plain float32": ours_training("float32", plain=True),
    "torch float32": torch_training("float32"),
    "torch bfloat16": torch_training("bfloat16"),
    "torch compile float32": torch_training("float32", compiled=True),
    "torch compile bfloat16": torch_training("bfloat16", compiled=True),
    "keras float32": keras_training("float32"),
    "keras bfloat16": keras_training("bfloat16"),
}


def ours_embedding(engine: str, dtype: str) -> Callable[[Case], Work]:
    """The engine of `embed`, from uint8 tiles to descriptors."""

    def prepare(case: Case) -> Work:
        from geomatch.nn import backend, engines

        if engine == "jax":
            backend.keep_memory()
        import geomatch.embed  # noqa: F401  (its libraries start threads)

        backend.prepare(dtype)
        from geomatch.nn.describe import describe_with
        from geomatch.nn.encoder import build
        from geomatch.nn.step import initial_state

        settings, form = ours(case, "float32")
        model, tiles = build(settings, form), case.tiles()
        variables = initial_state(model, settings, form).variables
        choice = engines.EngineChoice(engine, dtype)
        built = engines.build(choice, model, variables, form, case.batch, [tiles])
        return lambda: list(describe_with(built, [tiles, tiles]))

    return prepare


def torch_embedding(dtype: str, compiled: bool = False) -> Callable[[Case], Work]:
    """torch: channels-last, autocast in bfloat16; frozen when compiled."""

    def prepare(case: Case) -> Work:
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        model = torch_model(case).eval()
        if compiled:
            import torch._inductor.config

            torch._inductor.config.freezing = True
            model = torch.compile(model)
        tiles = torch.from_numpy(case.tiles())

        def work() -> object:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, dtype == "bfloat16"):
                for _ in range(2):
                    x = tiles.permute(0, 3, 1, 2).float().div(128).sub(1)
                    rows = model(x.contiguous(memory_format=torch.channels_last))
            return rows.float().numpy()

        return work

    return prepare


def openvino_embedding(dtype: str) -> Callable[[Case], Work]:
    """torchvision's network converted by OpenVINO, with the same preprocessing inside."""

    def prepare(case: Case) -> Work:
        import openvino
        import torch

        class WithPreprocessing(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = torch_model(case).eval()

            def forward(self, tiles: Any) -> Any:
                return self.network(tiles.permute(0, 3, 1, 2).float() / 128 - 1)

        tiles = case.tiles()
        network = openvino.convert_model(WithPreprocessing(), example_input=torch.from_numpy(tiles))
        network.reshape(list(tiles.shape))
        hint = {"INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32"}
        compiled = openvino.Core().compile_model(network, "CPU", hint | {"NUM_STREAMS": 2})
        requests = [compiled.create_infer_request() for _ in range(2)]

        def work() -> object:
            for request in requests:
                request.start_async([tiles])
            for request in requests:
                request.wait()
            return np.array(requests[0].get_output_tensor().data)

        return work

    return prepare


EMBEDDING = {
    "ours openvino int8": ours_embedding("openvino", "int8"),
    "ours openvino bfloat16": ours_embedding("openvino", "bfloat16"),
    "ours openvino float32": ours_embedding("openvino", "float32"),
    "ours onnxruntime float32": ours_embedding("onnxruntime", "float32"),
    "ours jax bfloat16": ours_embedding("jax", "bfloat16"),
    "ours jax float32": ours_embedding("jax", "float32"),
    "openvino bfloat16": openvino_embedding("bfloat16"),
    "openvino float32": openvino_embedding("float32"),
    "torch bfloat16": torch_embedding("bfloat16"),
    "torch float32": torch_embedding("float32"),
    "torch compile bfloat16": torch_embedding("bfloat16", compiled=True),
}
"""Each processes two batches per repetition, as `embed` has two in flight."""


if __name__ == "__main__":
    main()

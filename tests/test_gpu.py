"""On a GPU: the same results as on a CPU. Skips where JAX has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_project import QUICK, SPLIT

from geomatch.nn import backend

pytestmark = pytest.mark.gpu

PROGRAM = Path(__file__).parent / "gpu_program.py"


def run(*arguments, platform=""):
    """What a Python process prints; one device, and by default the one that JAX prefers."""
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    environment |= {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if platform:
        environment["JAX_PLATFORMS"] = platform
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def _gpu():
    if not backend.accelerated():
        pytest.skip("no GPU: JAX has no plugin for one (pip install '.[cuda]')")
    found = run("-c", "import jax; print(jax.default_backend())").split()[-1]
    if found != "gpu":
        pytest.skip(f"no GPU: JAX runs on {found}")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_descriptors_and_losses_are_those_of_a_cpu(dtype, tolerance):
    gpu, cpu = (json.loads(run(PROGRAM, dtype, platform=p)) for p in ("", "cpu"))
    assert (gpu["platform"], gpu["cpu_ops"]) == ("gpu", False)
    assert (cpu["platform"], cpu["cpu_ops"]) == ("cpu", True)
    vectors, wanted = np.array(gpu["descriptors"]), np.array(cpu["descriptors"])
    assert np.abs(vectors - wanted).max() < tolerance * np.abs(wanted).max()
    np.testing.assert_allclose(gpu["losses"], cpu["losses"], rtol=10 * tolerance)


def test_a_run_is_planned_trained_and_embedded(tiled, copied):
    project = copied(tiled)
    options = ["-q", "-p", project.root, *(f"--set={text}" for text in (*QUICK, *SPLIT))]
    told = json.loads(run("-m", "geomatch", "train", "--dry-run", "--json", *options))
    assert told["devices"] != ["cpu"]
    assert 0 < told["step_bytes"] < told["free_bytes"]
    run("-m", "geomatch", "train", *options)
    trained = json.loads((project.run("run1") / "finished.json").read_text())
    assert trained["map5"] > trained["untrained"]
    run("-m", "geomatch", "embed", *options)
    assert len(project.embedding_names()) == 1

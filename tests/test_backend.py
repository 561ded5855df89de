"""What JAX is told before it starts: in processes of their own, for a flag is read but once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import pytest
from processes import output_of

from geomatch.nn import backend
from geomatch.nn.backend import ONEDNN_FLAG

NEW = jax.__version_info__ >= (0, 12)
TOLD = """
import json, os, sys
from geomatch.nn import backend
backend.prepare(*sys.argv[1:])
import jax
flags = os.environ["XLA_FLAGS"]
print(json.dumps([flags, backend.xla_uses_onednn(), jax.config.jax_enable_compilation_cache]))
"""


FRESH = """
import resource, statistics, sys
from geomatch.nn import backend
if sys.argv[1] == "kept":
    backend.keep_memory()
import pyarrow
backend.prepare()
import jax
import jax.numpy as jnp
work = jax.jit(lambda x: ((x + 1) @ x[0]).sum())
x = jnp.ones((4096, 4096))
pages = []
for _ in range(60):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work(x).block_until_ready()
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
# The heap grows at first, longer the busier the machine is: a run may find the place of the last
# one too narrow, and be given another.
print(statistics.median_low(pages[30:]))
"""


def told(*arguments, said=""):
    return json.loads(output_of("-c", TOLD, *arguments, XLA_FLAGS=said))


def test_in_float32_programs_are_kept():
    flags, onednn, kept = told("float32")
    assert ONEDNN_FLAG not in flags
    assert (onednn, kept) == (False, True)


def test_in_bfloat16_onednn_computes_where_it_can():
    flags, onednn, kept = told("bfloat16")
    assert (f"--{ONEDNN_FLAG}=true" in flags) is NEW
    assert (onednn, kept) == (NEW, not NEW and not backend.calls_onednn())


def test_what_the_user_says_holds():
    flags, onednn, kept = told("bfloat16", said=f"--{ONEDNN_FLAG}=false")
    assert flags.count(ONEDNN_FLAG) == 1
    assert (onednn, kept) == (False, True)


def check_bfloat16(tests, onednn):
    """Run the tests of bfloat16 in a file with oneDNN allowed ("true") or forbidden ("false")."""
    path = str(Path(__file__).with_name(tests))
    flag = f"--{ONEDNN_FLAG}={onednn}"
    arguments = ("-m", "pytest", "-n", "0", "-q", path, "-k", "bfloat16")
    assert " passed" in output_of(*arguments, XLA_FLAGS=flag)


@pytest.mark.skipif(not backend.calls_onednn(), reason="XLA gives it to oneDNN, or has none")
@pytest.mark.slow
def test_layers_in_bfloat16_hold_without_onednn_too():
    check_bfloat16("test_layers.py", onednn="false")


@pytest.mark.skipif(not NEW, reason="before jax 0.12 XLA gives oneDNN nothing")
@pytest.mark.parametrize("tests", ["test_layers.py", "test_engines.py"])
def test_bfloat16_holds_by_onednn_too(tests):
    check_bfloat16(tests, onednn="true")


def test_an_accelerator_keeps_its_programs_in_bfloat16(monkeypatch):
    monkeypatch.setattr(backend, "cpu_only", lambda: False)
    monkeypatch.setattr(backend, "xla_uses_onednn", lambda: False)
    monkeypatch.setattr(backend, "calls_onednn", lambda: True)
    assert not backend.uses_onednn("bfloat16")


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc's malloc")
def test_memory_is_kept_from_one_run_of_a_program_to_the_next():
    pages = {}
    for how in ("given back", "kept"):
        pages[how] = int(output_of("-c", FRESH, how))
    assert pages["given back"] > 4096 * 4096 * 4 / 4096
    assert pages["kept"] < 100

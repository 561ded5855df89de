"""What the machine is told before JAX starts."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import platform
import sys
from pathlib import Path

FLAGS = {
    # XLA's YNN library convolves on one core alone.
    "xla_cpu_experimental_ynn_fusion_type": "-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION",
    # A third less memory for a training step, at the same speed.
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}
"""Of XLA's CPU backend, where the user says nothing else; known to jax 0.10 to 0.12."""
ONEDNN = "xla_cpu_experimental_onednn_custom_call"
"""Gives bfloat16 convolutions and products to oneDNN, five times faster, from jax 0.12 on.

Earlier it does nothing; "false" then keeps `geomatch` from calling oneDNN by name.
"""
MALLOC = {-8: 1, -4: 0, -1: 2**31 - 1}
"""glibc's M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD, with which it keeps what is freed."""


def prepare(dtype: str = "float32") -> None:
    """Set up JAX: programs are kept in the user's cache folder, convolutions use every core.

    Later calls change nothing, nor does one after JAX has started.

    Args:
        dtype: that networks compute in. For "bfloat16" programs are not kept where oneDNN is at
            hand, since they cannot be stored.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        # A CPU's programs are cut for its cores, which JAX's keys do not say.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        cache = folder / "geomatch" / f"jax-{cores}-cores"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    said = os.environ.get("XLA_FLAGS", "")
    if cpu_only() and jax.__version_info__ < (0, 13):
        flags = dict(FLAGS)
        if dtype == "bfloat16" and jax.__version_info__ >= (0, 12):
            flags[ONEDNN] = "true"
        mine = [f"--{name}={value}" for name, value in flags.items() if name not in said]
        os.environ["XLA_FLAGS"] = " ".join([said, *mine]).strip()
    if uses_onednn(dtype):
        jax.config.update("jax_enable_compilation_cache", False)


def keep_memory() -> None:
    """Have memory that is freed stay with the process, rather than go back to the system.

    XLA's CPU backend asks anew for all that a program needs each time it runs, and to be given
    fresh pages takes time. Call this before libraries begin threads (pyarrow does): threads that
    are there have memory of their own, where large pieces are not kept.
    """
    if cpu_only() and sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        for parameter, value in MALLOC.items():
            library.mallopt(parameter, value)


def uses_onednn(dtype: str) -> bool:
    """Whether JAX computes a network in `dtype` by oneDNN; its programs cannot be stored."""
    return has_onednn() or (dtype == "bfloat16" and cpu_only() and onednn_by_name())


def has_onednn() -> bool:
    """Whether XLA gives bfloat16 to oneDNN by itself."""
    import jax

    return jax.__version_info__ >= (0, 12) and f"--{ONEDNN}=true" in os.environ.get("XLA_FLAGS", "")


def onednn_by_name() -> bool:
    """Whether XLA on a CPU has oneDNN for bfloat16, but gives it work only if called by name."""
    import jax

    if not (0, 10) <= jax.__version_info__ < (0, 12):
        return False
    forbidden = f"--{ONEDNN}=false" in os.environ.get("XLA_FLAGS", "")
    built_in = sys.platform == "linux" and platform.machine() == "x86_64"
    return built_in and not forbidden and has_bfloat16()


@functools.cache
def has_bfloat16() -> bool:
    """Whether the processor computes in bfloat16, rather than imitate it."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(flags)


def cpu_only() -> bool:
    """Whether JAX will run on the CPU, told without starting it."""
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")
    return os.environ.get("JAX_PLATFORMS") == "cpu" or not any(
        importlib.util.find_spec(name) for name in plugins
    )

"""Process-wide JAX and XLA settings; call before JAX initialises."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import platform
import sys
from pathlib import Path

XLA_FLAGS = {
    # XLA's YNN library runs convolutions on a single core.
    "xla_cpu_experimental_ynn_fusion_type": "-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION",
    # A training step takes a third less memory, at the same speed.
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}
"""Flags of XLA's CPU backend in jax 0.10 to 0.12, set unless the user set them."""
ONEDNN_FLAG = "xla_cpu_experimental_onednn_custom_call"
"""Makes XLA use oneDNN for bfloat16 convolutions and products, five times faster, from jax 0.12 on.

Earlier versions ignore it; there "false" keeps `geomatch` from calling oneDNN itself.
"""
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")
"""Packages by which JAX runs on other devices than the CPU."""
MALLOC_OPTIONS = {-8: 1, -4: 0, -1: 2**31 - 1}
"""glibc's M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD, so that malloc keeps freed memory."""


def prepare(dtype: str = "float32") -> None:
    """Set up JAX: a compilation cache in the user's cache folder, convolutions on all cores.

    Only the first call takes effect, and only before JAX has initialised.

    Args:
        dtype: in which networks compute. With "bfloat16" and oneDNN the compilation cache is off,
            since such programs cannot be stored.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        # CPU programs are compiled for a number of cores, which is not in JAX's cache keys.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        cache = folder / "geomatch" / f"jax-{cores}-cores"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    given = os.environ.get("XLA_FLAGS", "")
    if cpu_only() and jax.__version_info__ < (0, 13):
        flags = dict(XLA_FLAGS)
        if dtype == "bfloat16" and jax.__version_info__ >= (0, 12):
            flags[ONEDNN_FLAG] = "true"
        added = [f"--{name}={value}" for name, value in flags.items() if name not in given]
        os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()
    if uses_onednn(dtype):
        jax.config.update("jax_enable_compilation_cache", False)


def keep_memory() -> None:
    """Make malloc keep freed memory in the process instead of returning it to the system.

    XLA's CPU backend allocates all memory of a program again each time it runs, and faulting in
    fresh pages takes time. Call this before libraries start threads (pyarrow does): existing
    threads have arenas of their own, which do not keep large blocks.
    """
    if cpu_only() and sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        for parameter, value in MALLOC_OPTIONS.items():
            library.mallopt(parameter, value)


def uses_onednn(dtype: str) -> bool:
    """Whether networks in `dtype` run on oneDNN; such programs cannot be stored."""
    return xla_uses_onednn() or (dtype == "bfloat16" and cpu_only() and calls_onednn())


def xla_uses_onednn() -> bool:
    """Whether XLA itself uses oneDNN for bfloat16."""
    import jax

    enabled = f"--{ONEDNN_FLAG}=true" in os.environ.get("XLA_FLAGS", "")
    return enabled and jax.__version_info__ >= (0, 12)


def calls_onednn() -> bool:
    """Whether bfloat16 on a CPU calls oneDNN explicitly, since XLA has it but does not use it."""
    import jax

    if not (0, 10) <= jax.__version_info__ < (0, 12):
        return False
    forbidden = f"--{ONEDNN_FLAG}=false" in os.environ.get("XLA_FLAGS", "")
    built_in = sys.platform == "linux" and platform.machine() == "x86_64"
    return built_in and not forbidden and has_bfloat16()


@functools.cache
def has_bfloat16() -> bool:
    """Whether the processor has bfloat16 instructions, rather than emulating them."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(flags)


def cpu_only() -> bool:
    """Whether JAX will run on the CPU, found without initialising it."""
    return os.environ.get("JAX_PLATFORMS") == "cpu" or not accelerated()


def accelerated() -> bool:
    """Whether JAX has a plugin for another device than the CPU."""
    return any(importlib.util.find_spec(name) for name in PLUGINS)

"""What the machine is told before JAX starts."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Parameters of glibc's `mallopt`."""


def prepare() -> None:
    """Set up JAX: programs are kept in the user's cache folder, a CPU's memory in the process.

    Each step of a program on a CPU asks for one large buffer, which glibc takes from the system and
    gives back at once: a fifth of a training step went by in page faults.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(folder / "geomatch" / "jax"))
    if _cpu_only():
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(M_ARENA_MAX, 1)
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, -1)


def _cpu_only() -> bool:
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")
    return os.environ.get("JAX_PLATFORMS") == "cpu" or not any(
        importlib.util.find_spec(name) for name in plugins
    )

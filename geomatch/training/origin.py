"""The origin of a run: the command, versions, devices and state of the project it came from."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jax

from geomatch import __version__
from geomatch.manifests import GitState, Session

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "tensorstore")
"""Packages whose version may change the weights of a run."""
GIT_SECONDS = 10
"""After which git is not waited for, as on a slow network drive."""


def session(root: Path) -> Session:
    """This start of `train` on a run of the project in `root`."""
    program = Path(sys.argv[0]).name
    program = "geomatch" if program == "__main__.py" else program
    return Session(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join([program, *sys.argv[1:]]),
        python=platform.python_version(),
        platform=platform.platform(),
        devices=tuple(device.device_kind for device in jax.local_devices()),
        versions={"geomatch": __version__, **{name: version(name) for name in PACKAGES}},
        git=_git_state(root),
    )


def _git_state(root: Path) -> GitState | None:
    """The commit that a folder is at; None if it is in no repository, or there is no git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, timeout=GIT_SECONDS, check=True)
        return done.stdout.decode(errors="replace").strip()

    try:
        commit = git("rev-parse", "--verify", "HEAD")
        branch = git("rev-parse", "--abbrev-ref", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return GitState(commit, branch, bool(changed))

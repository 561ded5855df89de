"""Parameter groups: the modules and parameters of a network whose path starts with a name.

Names such as "fusion", "trunk", "trunk/stage1", "head" and "pair_head" select what `train.freeze`
freezes and `train.lr_scale` scales. "encoder", which contains most of them, is left out of paths.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax

from geomatch.errors import UsageError

BATCH_NORM = "batch_norm"
"""In `train.freeze`: the running statistics of every BatchNorm, not a parameter group."""


def within(path: Sequence[str], group: str) -> bool:
    """Whether `path` is in `group`; "trunk/stage1" includes "trunk/stage1_block2"."""
    name = "/".join(key for key in path if key != "encoder")
    return name == group or name.startswith((group + "/", group + "_"))


def path_of(keys: Iterable[Any]) -> tuple[str, ...]:
    """The names in a key path of `jax.tree_util`."""
    return tuple(str(key.key) for key in keys)


def check(groups: Iterable[str], params: Any, setting: str) -> None:
    """Check that every group has parameters.

    Args:
        params: of the whole network.
        setting: the setting that names the groups, for the error message.

    Raises:
        UsageError: a group has no parameters.
    """
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    for group in groups:
        if not any(within(path, group) for path in paths):
            known = sorted({next(key for key in path if key != "encoder") for path in paths})
            raise UsageError(
                f"{setting}: the network has no parameter group {group!r}",
                f"Available: {', '.join(known)}; also within the trunk, such as trunk/stage1.",
            )

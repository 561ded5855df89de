"""Parts of a network by name: "trunk", "trunk/stage1", "head", "fusion", "pair_head"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax

from geomatch.errors import UsageError

BATCH_NORM = "batch_norm"
"""Names the statistics of every BatchNorm rather than a part."""


def within(path: Sequence[str], part: str) -> bool:
    """Whether a module or parameter at `path` is of `part`; "stage1" holds "stage1_block2"."""
    name = "/".join(key for key in path if key != "encoder")
    return name == part or name.startswith((part + "/", part + "_"))


def path_of(keys: Iterable[Any]) -> tuple[str, ...]:
    """A path as `jax.tree_util` gives it, as names."""
    return tuple(str(key.key) for key in keys)


def check(parts: Iterable[str], params: Any, where: str) -> None:
    """See that every part names some parameters.

    Args:
        params: of the whole network.
        where: the setting they come from, for the error.

    Raises:
        UsageError: a part names none.
    """
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    for part in parts:
        if not any(within(path, part) for path in paths):
            known = sorted({next(key for key in path if key != "encoder") for path in paths})
            raise UsageError(
                f"{where}: the network has no part {part!r}",
                f"Its parts: {', '.join(known)}; of the trunk also trunk/stage1 and so on.",
            )

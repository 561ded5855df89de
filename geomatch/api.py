"""The Python API: the project and the stages, each imported on first use.

    from geomatch.api import Project, embed, evaluate

`geomatch.tile` and the like are the modules of the stages; the functions are here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geomatch.change import change
    from geomatch.compare import compare
    from geomatch.embed import embed
    from geomatch.evaluate import evaluate
    from geomatch.export import export
    from geomatch.index import index
    from geomatch.project import Project
    from geomatch.query import query
    from geomatch.tile import tile
    from geomatch.train import train
    from geomatch.tune import tune

__all__ = [
    "Project",
    "change",
    "compare",
    "embed",
    "evaluate",
    "export",
    "index",
    "query",
    "tile",
    "train",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"geomatch.{name.lower()}"), name)


def __dir__() -> list[str]:
    return __all__

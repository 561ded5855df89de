"""The small project made, trained, embedded and indexed once for a whole session.

A test file asks for these with `pytest_plugins = ["small_fixtures"]`. What they give is read,
never changed: a test that writes takes `copied` first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from small_project import Small, make_project, settings, write_imagery

from geomatch.data.tiles import TileTable
from geomatch.embed import embed
from geomatch.index import index
from geomatch.project import Project
from geomatch.train import train


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile quickly, and keep programs for the session: most runs of the tests share theirs."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """The small project, tiled."""
    root = tmp_path_factory.mktemp("small")
    write_imagery(root / "imagery")
    project = make_project(root / "project", root / "imagery")
    return Small(project, root / "imagery", TileTable.load(project.catalogue))


@pytest.fixture(scope="session")
def trained(tiled: Small, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """The small project with a run, trained without interruption on two devices."""
    root = tmp_path_factory.mktemp("trained") / "project"
    project = tiled.copied(root)
    result = train(project, settings())
    return Small(project, tiled.imagery, tiled.tiles, result)


@pytest.fixture(scope="session")
def indexed(trained: Small, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """The small project trained, embedded and indexed."""
    root = tmp_path_factory.mktemp("indexed") / "project"
    project = trained.copied(root)
    made = embed(project, settings=settings())
    index(project)
    return Small(project, trained.imagery, trained.tiles, trained.trained, made)


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Small], Project]:
    """A function that copies a project, for a test to change."""
    return lambda small: small.copied(tmp_path / "copy")

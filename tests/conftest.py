"""Fixtures: small rasters and projects, programs compiled once, and two virtual CPU devices."""

from __future__ import annotations

import gc
import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin
from small_project import Small, make_project, new_project, settings, write_imagery

from geomatch.data.tiles import TileTable
from geomatch.project import Project

MEMORY_MAPS = 20_000
"""From which on compiled programs are freed."""

hypothesis.settings.register_profile("same_each_time", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same_each_time")


@pytest.fixture(scope="session")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile quickly, and keep programs for the session: most runs of the tests share theirs."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session", autouse=True)
def _compiled_once_where_jax_is_imported(request: pytest.FixtureRequest) -> None:
    """Compile every test module alike, run alone or among others; JAX is imported for none."""
    if "jax" in sys.modules:
        request.getfixturevalue("compiled_once")


@pytest.fixture
def programs_are_not_stored(compiled_once: None) -> Iterator[None]:
    """For bfloat16: programs that call oneDNN cannot be stored (see `backend.prepare`)."""
    import jax

    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 3600.0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


@pytest.fixture(autouse=True)
def _programs_are_forgotten() -> Iterator[None]:
    """Free compiled programs in time: a worker that has 65,530 memory maps ends on Linux."""
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > MEMORY_MAPS:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def strict_dtypes() -> Iterator[None]:
    """JAX refuses to promote dtypes unasked; not for optax, which does so itself."""
    import jax

    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """The small project, tiled. To change it, or those below, take `copied`."""
    root = tmp_path_factory.mktemp("small")
    write_imagery(root / "imagery")
    project = make_project(root / "project", root / "imagery")
    return Small(project, root / "imagery", TileTable.load(project.catalogue))


@pytest.fixture(scope="session")
def trained(compiled_once: None, tiled: Small, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """The small project with a run, trained without interruption on two devices."""
    from geomatch.train import train

    root = tmp_path_factory.mktemp("trained") / "project"
    project = tiled.copied(root)
    result = train(project, settings())
    return Small(project, tiled.imagery, tiled.tiles, result)


@pytest.fixture(scope="session")
def indexed(trained: Small, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """The small project trained, embedded and indexed."""
    from geomatch.embed import embed
    from geomatch.index import index

    root = tmp_path_factory.mktemp("indexed") / "project"
    project = trained.copied(root)
    made = embed(project, settings=settings())
    index(project)
    return Small(project, trained.imagery, trained.tiles, trained.trained, made)


@pytest.fixture(scope="module")
def module_patch() -> Iterator[pytest.MonkeyPatch]:
    """What `monkeypatch` is, for a whole module."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Small], Project]:
    """A function that copies a project, for a test to change."""
    return lambda small: small.copied(tmp_path / "copy")


@pytest.fixture
def write_raster(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a GeoTIFF and returns its path.

    Arguments: name, array (bands, h, w), crs (None for none), origin (left, top), pixel size,
    nodata.
    """

    def write(
        name: str,
        values: np.ndarray,
        crs: str | None = "EPSG:32631",
        origin: tuple[float, float] = (500_000.0, 5_000_000.0),
        gsd: float = 1.0,
        nodata: float | None = None,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with rasterio.open(
            path,
            "w",
            driver="GTiff",
            count=values.shape[0],
            height=values.shape[1],
            width=values.shape[2],
            dtype=values.dtype,
            crs=crs,
            transform=from_origin(*origin, gsd, gsd),
            nodata=nodata,
            tiled=True,
            blockxsize=64,
            blockysize=64,
        ) as target:
            target.write(values)
        return path

    return write


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """An empty project with default settings."""
    return new_project(tmp_path / "project")


@pytest.fixture
def data() -> Path:
    """The folder of real imagery; the test skips where it is absent."""
    folder = Path(os.environ.get("GEOMATCH_DATA", "../shared/data"))
    if not folder.is_dir():
        pytest.skip(f"no real imagery at {folder} (set GEOMATCH_DATA)")
    return folder.absolute()

"""Fixtures: small georeferenced rasters, and two virtual CPU devices for JAX."""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)
os.environ["JAX_PLATFORMS"] = "cpu"

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin
from small_project import new_project

from geomatch.project import Project


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

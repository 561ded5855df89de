"""Ground that looks like something: noise of several sizes, as local features need it."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import rasterio
from PIL import Image
from rasterio.transform import from_origin
from scipy.ndimage import gaussian_filter
from small_project import CRS, new_project, tile_sources

from geomatch.data.tiles import TileTable
from geomatch.geo.georeferencing import Scan
from geomatch.project import Project


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(h, w, 3) uint8 with detail of 1.5 to 12 pixels."""
    rng = np.random.default_rng(seed)
    planes = np.zeros((height, width, 3))
    for sigma in (1.5, 3, 6, 12):
        noise = gaussian_filter(rng.normal(size=(height, width, 3)), (sigma, sigma, 0))
        planes += noise / noise.std()
    return np.clip(128 + 25 * planes, 0, 255).astype(np.uint8)


LEFT, TOP, GSD, EPSG = 500_000.0, 5_000_256.0, 0.5, 32630
GROUND = texture(512, 512)
"""256 x 256 m, eight by eight tiles of 64 px."""


def textured_project(root: Path) -> tuple[Project, TileTable]:
    """A project of `GROUND` in 2010 and, lighter, in 2020, without the tile in the south-east."""
    root.mkdir()
    later = np.clip(GROUND.astype(int) + 20, 0, 255).astype(np.uint8)
    for year, pixels in (("2010", GROUND), ("2020", later)):
        values = np.maximum(np.moveaxis(pixels, -1, 0), 1)
        values[:, 448:, 448:] = 0
        form = {"driver": "GTiff", "count": 3, "dtype": "uint8", "crs": CRS, "nodata": 0}
        form |= {"width": 512, "height": 512, "transform": from_origin(LEFT, TOP, GSD, GSD)}
        with rasterio.open(root / f"{year}.tif", "w", **form) as target:
            target.write(values)
    project = new_project(root / "project")
    paths: dict[str, str | Path] = {year: root / f"{year}.tif" for year in ("2010", "2020")}
    return project, tile_sources(project, paths, "grid.size=64", f"grid.gsd={GSD}")


def scan_of_ground(
    path: Path, turn: float = 37.0, gsd: float = 0.6, side: int = 220
) -> tuple[Scan, np.ndarray]:
    """A turned and rescaled scan of `GROUND`, and the transform (2, 3) that places it."""
    angle = np.radians(turn)
    truth = gsd * np.array([[np.cos(angle), np.sin(angle)], [np.sin(angle), -np.cos(angle)]])
    centre = np.array([LEFT + 120, TOP - 130])
    truth = np.column_stack([truth, centre - truth @ [side / 2, side / 2]])
    to_pixels = np.array([[1 / GSD, 0, -LEFT / GSD], [0, -1 / GSD, TOP / GSD]])
    matrix = to_pixels[:, :2] @ truth[:, :2]
    shift = to_pixels[:, :2] @ truth[:, 2] + to_pixels[:, 2]
    moved = np.column_stack([matrix, matrix @ [0.5, 0.5] + shift - 0.5])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    Image.fromarray(cv2.warpAffine(GROUND, moved, (side, side), flags=flags)).save(path)
    return Scan.open(str(path)), truth

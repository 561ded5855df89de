"""Images without a place: mosaics, finding where they lie, and the files that say so."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.transform import from_gcps, from_origin
from small_project import CRS, tile_sources
from textures import texture

from geomatch.data import index_rows
from geomatch.data.mosaic import Ground
from geomatch.data.store import TileStore
from geomatch.errors import GeomatchError
from geomatch.geo import footprints, georeferencing
from geomatch.geo.georeferencing import Scan
from geomatch.querying import placing
from geomatch.querying.placed import Placed

LEFT, TOP, GSD = 500_000.0, 5_000_256.0, 0.5
EPSG = 32630
GROUND = texture(512, 512)
"""256 x 256 m, eight by eight tiles of 64 px."""


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """The ground tiled, with one tile missing, as `Ground` reads it."""
    from small_project import new_project

    root = tmp_path_factory.mktemp("ground")
    later = np.clip(GROUND.astype(int) + 20, 0, 255).astype(np.uint8)
    for year, pixels in (("2010", GROUND), ("2020", later)):
        form = {"driver": "GTiff", "count": 3, "dtype": "uint8", "crs": CRS, "nodata": 0}
        values = np.maximum(np.moveaxis(pixels, -1, 0), 1)
        values[:, 448:, 448:] = 0  # a tile that there is not
        with rasterio.open(
            root / f"{year}.tif", "w", width=512, height=512,
            transform=from_origin(LEFT, TOP, GSD, GSD), **form,
        ) as target:  # fmt: skip
            target.write(values)
    project = new_project(root / "project")
    paths = {year: root / f"{year}.tif" for year in ("2010", "2020")}
    tiles = tile_sources(project, paths, "grid.size=64", f"grid.gsd={GSD}")
    index_rows.write(root, tiles, footprints.lonlat)
    store = TileStore.open(project.pixels)
    return Ground(index_rows.IndexRows(root), store, tiles.grid, 3)


def scan_of(path, turn=37.0, gsd=0.6, side=220, centre=(LEFT + 120, TOP - 130)):
    """A turned and rescaled scan of the ground, and the transform (2, 3) that places it."""
    angle = np.radians(turn)
    truth = gsd * np.array([[np.cos(angle), np.sin(angle)], [np.sin(angle), -np.cos(angle)]])
    truth = np.column_stack([truth, np.array(centre) - truth @ [side / 2, side / 2]])
    to_pixels = np.array([[1 / GSD, 0, -LEFT / GSD], [0, -1 / GSD, TOP / GSD]])
    matrix = to_pixels[:, :2] @ truth[:, :2]
    shift = to_pixels[:, :2] @ truth[:, 2] + to_pixels[:, 2]
    moved = np.column_stack([matrix, matrix @ [0.5, 0.5] + shift - 0.5])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    Image.fromarray(cv2.warpAffine(GROUND, moved, (side, side), flags=flags)).save(path)
    return Scan.open(str(path)), truth


def off(matrix, truth, scan):
    """Largest error in metres over the corners of a scan."""
    points = scan.corners
    apart = points @ (matrix - truth)[:, :2].T + (matrix - truth)[:, 2]
    return np.hypot(*apart.T).max()


def test_a_mosaic_is_the_ground_without_what_no_tile_covers(ground):
    mosaic = ground.mosaic(EPSG, (LEFT + 200.2, TOP - 200.2), 70, "2020")
    assert mosaic.pixels.shape == (280, 280, 3)
    x, y = round((mosaic.left - LEFT) / GSD), round((TOP - mosaic.top) / GSD)
    later = np.clip(GROUND.astype(int) + 20, 1, 255)
    for row in range(0, 280, 9):
        for col in range(0, 280, 9):
            at = y + row, x + col
            is_there = max(at) < 512 and not min(at) >= 448
            assert mosaic.valid[row, col] == is_there
            wanted = later[at] if is_there else [0, 0, 0]
            assert mosaic.pixels[row, col].tolist() == list(wanted)
    assert mosaic.to_ground() @ [0, 0, 1] == pytest.approx([mosaic.left, mosaic.top])


def test_a_mosaic_is_bounded_and_of_its_crs_and_year_alone(ground, monkeypatch):
    monkeypatch.setattr("geomatch.data.mosaic.MOST", 100)
    assert ground.mosaic(EPSG, (LEFT + 128, TOP - 128), 1e6, "2010").valid.shape == (100, 100)
    assert not ground.mosaic(EPSG + 1, (LEFT + 128, TOP - 128), 20, "2010").valid.any()
    assert not ground.mosaic(EPSG, (LEFT + 128, TOP - 128), 20, "2011").valid.any()


def test_a_reduced_mosaic_has_means_and_is_valid_where_all_pixels_are(ground):
    mosaic = ground.mosaic(EPSG, (LEFT + 200, TOP - 200), 70, "2010")
    small = mosaic.reduced(3)
    assert small.gsd == 1.5
    assert small.pixels.shape == (93, 93, 3)
    for row, col in ((0, 0), (40, 50), (92, 10)):
        part = slice(3 * row, 3 * row + 3), slice(3 * col, 3 * col + 3)
        assert small.valid[row, col] == mosaic.valid[part].all()
        assert small.pixels[row, col] == pytest.approx(
            mosaic.pixels[part].reshape(9, 3).mean(axis=0), abs=0.51
        )


def test_a_scan_is_placed_from_a_rough_start(ground, tmp_path):
    scan, truth = scan_of(tmp_path / "scan.png")
    start = np.array([[0.8, 0, LEFT + 140 - 88], [0, -0.8, TOP - 110 + 88]])
    placed = placing.place(scan, ground, EPSG, start, "2020")
    assert off(placed.matrix, truth, scan) < GSD
    assert placed.rmse < GSD
    assert placed.gsd == pytest.approx(0.6, rel=0.01)
    assert placed.turn == pytest.approx(37, abs=0.5)
    assert placed.concern() is None
    assert str(placed).startswith(f"{len(placed.at)} points, RMSE 0.")


def test_other_ground_is_not_placed(ground, tmp_path):
    Image.fromarray(texture(220, 220, 9)).save(tmp_path / "scan.png")
    scan = Scan.open(str(tmp_path / "scan.png"))
    start = np.array([[0.6, 0, LEFT + 60], [0, -0.6, TOP - 60]])
    assert placing.place(scan, ground, EPSG, start, "2010") is None


def placed_at(points, scan):
    matrix = np.array([[0.6, 0, LEFT], [0, -0.6, TOP]])
    at = np.asarray(points, np.float64)
    return Placed(scan, EPSG, matrix, at, at @ matrix[:, :2].T + matrix[:, 2] + [3, 4], 9.0)


def test_few_points_and_empty_quarters_are_of_concern():
    scan = Scan("scan.png", 100, 100)
    corners = [(20, 20), (80, 20), (20, 80), (80, 80)]
    assert placed_at(corners * 5, scan).concern() is None
    assert placed_at(corners * 5, scan).rmse == pytest.approx(5)
    assert placed_at(corners, scan).concern() == "only 4 points"
    right = [(80, 20), (80, 80)] * 15
    assert placed_at(right, scan).concern() == (
        "hardly any points in the upper left and lower left quarter of the image"
    )


def test_files_place_a_scan_as_gdal_reads_them(tmp_path):
    scan, truth = scan_of(tmp_path / "scan.png")
    at = np.array([[10.0, 20], [200, 30], [40, 210], [190, 190], [100, 100]])
    to = at @ truth[:, :2].T + truth[:, 2]
    to[4] += [0.6, 0]
    placed = Placed(scan, EPSG, truth, at, to, 9.0)
    gsd = placing.write(placed, tmp_path / "out.tif")
    assert gsd == 0.6
    # North up, on the ground that it was cut from.
    with rasterio.open(tmp_path / "out.tif") as written:
        assert written.crs.to_epsg() == EPSG
        assert written.transform.b == 0 == written.transform.d
        assert written.count == 4
        pixels, mask = written.read([1, 2, 3]), written.dataset_mask() > 0
        rows, cols = np.nonzero(cv2.erode(mask.astype(np.uint8), np.ones((7, 7))))
        x, y = written.transform * (cols + 0.5, rows + 0.5)
    assert 0.4 < mask.mean() < 0.6
    # Pixels of the ground, interpolated by OpenCV.
    some = slice(None, None, 5)
    rows, cols = rows[some], cols[some]
    maps = [each[some, None].astype(np.float32) for each in ((x - LEFT) / GSD, (TOP - y) / GSD)]
    wanted = cv2.remap(GROUND, maps[0] - 0.5, maps[1] - 0.5, cv2.INTER_LINEAR)[:, 0]
    assert np.abs(pixels[:, rows, cols].T.astype(int) - wanted).mean() < 4
    # As QGIS writes and reads them: the CRS, a header, rows of the image downward below zero.
    first, header, *lines = (tmp_path / "out.points").read_text(encoding="utf-8").splitlines()
    assert rasterio.crs.CRS.from_wkt(first.removeprefix("#CRS: ")).to_epsg() == EPSG
    assert header == "mapX,mapY,sourceX,sourceY,enable,dX,dY,residual"
    values = np.array([list(map(float, line.split(","))) for line in lines])
    assert values[:, :2] == pytest.approx(to, abs=1e-3)
    assert values[:, 2:4] == pytest.approx(at * [1, -1])
    assert (values[:, 4] == 1).all()
    assert values[:4, 5:] == pytest.approx(0, abs=1e-6)
    assert values[4, 7] == pytest.approx(1, abs=1e-6)
    # GDAL's own fit of the points of the VRT.
    with rasterio.open(tmp_path / "out.vrt") as virtual:
        points, crs = virtual.gcps
        assert crs.to_epsg() == EPSG
        assert (virtual.width, virtual.height, virtual.count) == (220, 220, 3)
        assert (virtual.read() == np.moveaxis(np.asarray(Image.open(scan.path)), -1, 0)).all()
    assert np.array([(p.col, p.row) for p in points]) == pytest.approx(at)
    fitted = from_gcps(points[:4])
    assert (fitted.a, fitted.b, fitted.d, fitted.e) == pytest.approx(
        (truth[0, 0], truth[0, 1], truth[1, 0], truth[1, 1]), abs=1e-6
    )
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"scan.png", "out.tif", "out.points", "out.vrt"}


def test_scans_of_other_kinds_are_read(tmp_path, write_raster):
    values = np.arange(3 * 40 * 60, dtype=np.uint16).reshape(3, 40, 60) * 9
    path = write_raster("deep.tif", values, crs=None)
    image, valid = Scan.open(str(path)).read(2)
    assert image.shape == (20, 30, 3)
    assert image.dtype == np.uint8
    assert (image.min(), image.max()) == (0, 255)
    assert valid.all()
    Image.fromarray(GROUND[:40, :60]).quantize(8).save(tmp_path / "few.png")
    image, _ = Scan.open(str(tmp_path / "few.png")).read(1)
    assert image.shape == (40, 60, 3)
    wanted = np.asarray(Image.open(tmp_path / "few.png").convert("RGB"))
    assert (image == wanted).all()
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(GeomatchError, match="cannot be opened"):
        Scan.open(str(tmp_path / "no.png"))


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    scan, truth = scan_of(tmp_path / "scan.png")
    with pytest.raises(GeomatchError, match="cannot be written as"):
        georeferencing.write_geotiff(scan, truth, EPSG, tmp_path / "none" / "out.tif")

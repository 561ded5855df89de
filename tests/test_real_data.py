"""Real imagery, tiled: places are where rasterio's own warp of the whole images puts them."""

from __future__ import annotations

import geopandas
import numpy as np
import pytest
import rasterio
from rasterio.features import rasterize
from rasterio.transform import from_origin
from rasterio.warp import Resampling, reproject
from small_project import tile_sources

from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS
from geomatch.errors import GeomatchError
from geomatch.manifests import Channels


def read(project, table, name):
    row = table.store_row[table.ids().index(name)]
    return TileStore.open(project.pixels).read(np.array([row]))[0]


def shared_cells(table):
    per_year = [
        {cell for cell, year in zip(table.cells(), table.year, strict=True) if year == code}
        for code in range(len(table.years))
    ]
    return sorted(set.intersection(*per_year))


def mosaic(folder, crs, left, top, gsd, side):
    """(3, side, side) of all images of a folder, each warped whole, the first by name on top."""
    canvas = np.zeros((3, side, side), np.uint8)
    for path in sorted(folder.glob("*.tif"), reverse=True):
        with rasterio.open(path) as source:
            warped = np.zeros_like(canvas)
            reproject(
                source.read(),
                warped,
                src_transform=source.transform,
                src_crs=source.crs,
                dst_transform=from_origin(left, top, gsd, gsd),
                dst_crs=crs,
                resampling=Resampling.bilinear,
            )
        canvas = np.where(warped.any(axis=0), warped, canvas)
    return canvas


def best_shift(patch, canvas, row, col):
    """Where within 4 px of (row, col) a grey patch correlates best with the canvas."""
    h, w = patch.shape
    best = (0, 0, -1.0)
    for dy in range(-4, 5):
        for dx in range(-4, 5):
            other = canvas[row + dy : row + dy + h, col + dx : col + dx + w]
            score = float(np.corrcoef(patch.ravel(), other.ravel())[0, 1])
            if score > best[2]:
                best = dy, dx, score
    return best


def test_places_of_two_crs_are_where_they_are(data, project):
    """joplin: pre in EPSG:26915, post in EPSG:4326, on one grid of EPSG:26915 at 0.6 m.

    Measured: at every point both years match best at a shift of 0 px, correlation above 0.99.
    """
    years = {"pre": data / "joplin" / "pre", "post": data / "joplin" / "post"}
    table = tile_sources(
        project, years, "grid.crs=EPSG:26915", "grid.gsd=0.6", "grid.size=128", "split.by=source"
    )
    assert table.grid.id == "EPSG:26915/76.8m/128px"
    assert table.years == ("pre", "post")
    cells = shared_cells(table)
    assert 150 <= len(cells) <= 200
    gsd, step = 0.6, 76.8
    left, bottom, right, top = (
        f(table.bounds()[:, i]) for i, f in enumerate((np.min, np.min, np.max, np.max))
    )
    left, top = left - 10 * gsd, top + 10 * gsd
    side = int(max(right - left, top - bottom) / gsd) + 20
    chosen = np.random.default_rng(0).choice(cells, 10, replace=False)
    measured = []
    for year, folder in years.items():
        canvas = mosaic(folder, "EPSG:26915", left, top, gsd, side).mean(axis=0)
        for cell in chosen:
            col, row = map(int, cell.split("_"))
            pixels = read(project, table, f"{cell}@{year}").mean(axis=-1)
            x = round((col * step - left) / gsd)
            y = round((top - (row + 1) * step) / gsd)
            dy, dx, score = best_shift(pixels[40:88, 40:88], canvas, y + 40, x + 40)
            measured.append((year, str(cell), dy, dx, round(score, 4)))
    assert all(max(abs(dy), abs(dx)) <= 2 for _, _, dy, dx, _ in measured), measured
    assert all(score > 0.95 for *_, score in measured), measured


def test_buildings_are_drawn_on_their_ground(data, project):
    """joplin's footprints are in degrees; against rasterio's own drawing on one big canvas."""
    buildings = data / "joplin" / "buildings_joplin.geojson"
    settings = ("grid.crs=EPSG:26915", "grid.gsd=0.6", "grid.size=128", "split.by=source")
    table = tile_sources(
        project, {"pre": data / "joplin" / "pre"}, *settings, labels={"pre": buildings}
    )
    assert project.tile_manifest().channels == Channels(3, 1)
    shapes = geopandas.read_file(buildings).to_crs(26915).geometry
    check_drawn(project, table, [(shape, 255) for shape in shapes])


def check_drawn(project, table, shapes):
    """Labels are what rasterio draws of (shape, value) pairs on one canvas of 0.6 m."""
    left, _, _, _ = table.bounds().min(axis=0)
    top = table.bounds()[:, 3].max()
    place = from_origin(left, top, 0.6, 0.6)
    canvas = rasterize(shapes, out_shape=(2048, 2048), transform=place, dtype="uint8")
    assert (canvas > 0).mean() > 0.05
    for name, bounds in zip(table.ids(), table.bounds(), strict=True):
        x, y = round((bounds[0] - left) / 0.6), round((top - bounds[3]) / 0.6)
        got = read(project, table, name)[..., 3]
        assert (got != canvas[y : y + 128, x : x + 128]).mean() < 0.001, name


def test_buildings_by_class(data, project):
    """joplin's large and small buildings in yards of 5 m."""
    buildings = geopandas.read_file(data / "joplin" / "buildings_joplin.geojson").to_crs(26915)
    area = buildings.geometry.area
    buildings["size"] = np.where(area > 200, "large", "small")
    path = project.root / "buildings.gpkg"
    buildings.to_file(path)
    table = tile_sources(
        project,
        {"pre": data / "joplin" / "pre"},
        *("grid.crs=EPSG:26915", "grid.gsd=0.6", "grid.size=128", "split.by=source"),
        tables=[
            {"file": str(path), "class": "yard", "buffer": 5},
            {"file": str(path), "attribute": "size", "classes": ["small=house", "large=hall"]},
        ],
    )
    shares = project.tile_manifest().label_classes
    assert list(shares) == ["yard", "house", "hall"]
    assert all(share > 0.01 for share in shares.values())
    shapes = [(shape, 1) for shape in buildings.geometry.buffer(5)]
    for value, chosen in ((2, area <= 200), (3, area > 200)):
        shapes += [(shape, value) for shape in buildings.geometry[chosen]]
    check_drawn(project, table, shapes)


def test_jpeg_2000_of_16_bits_in_degrees(data, project):
    """oscd: a Sentinel-2 city, cut in its UTM zone at 10 m."""
    city = data / "oscd" / "pisa"
    first, second = sorted(city.glob("*.jp2"))
    dates = [path.stem.split("_")[-1] for path in (first, second)]
    settings = ("grid.size=64", "grid.gsd=10", "grid.stretch=2%,98%", "split.by=source")
    table = tile_sources(project, {dates[1]: second, dates[0]: first}, *settings)
    assert table.grid.id == "EPSG:32632/640m/64px"
    assert list(table.years) == dates
    assert len(shared_cells(table)) > 50
    for date, path in zip(dates, (first, second), strict=True):
        kept = project.tile_manifest().years[date].stretch
        with rasterio.open(path) as source:
            low, high = np.percentile(source.read(1), [2, 98])
        assert kept["low"][0] == pytest.approx(low, rel=0.05)
        assert kept["high"][0] == pytest.approx(high, rel=0.05)
        rows = table.store_row[table.year == table.years.index(date)]
        pixels = TileStore.open(project.pixels).read(rows)
        assert 0.005 < (pixels == 0).mean() < 0.05
        assert 0.005 < (pixels == 255).mean() < 0.05


def test_four_bands_of_two_years(data, project):
    """naip: sheets whose heights and origins differ a little."""
    paths = {year: next((data / "naip").glob(f"*_{year}*.tif")) for year in ("2009", "2020")}
    table = tile_sources(project, paths, "grid.size=32", "grid.gsd=5", "split.by=source")
    assert project.tile_manifest().channels == Channels(4, 0)
    cells = shared_cells(table)
    assert 580 <= len(cells) <= 660
    for year, path in paths.items():
        for cell in cells[::60]:
            col, row = map(int, cell.split("_"))
            wanted = np.zeros((4, 32, 32), np.uint8)
            with rasterio.open(path) as source:
                reproject(
                    source.read(),
                    wanted,
                    src_transform=source.transform,
                    src_crs=source.crs,
                    dst_transform=from_origin(col * 160, row * 160 + 160, 5, 5),
                    dst_crs="EPSG:26914",
                    resampling=Resampling.bilinear,
                )
            got = np.moveaxis(read(project, table, f"{cell}@{year}"), -1, 0).astype(int)
            assert np.abs(got - wanted).max() <= 2, (year, cell)


@pytest.mark.parametrize("year", ["2009", "2012", "2016", "2020"])
def test_near_infrared_tagged_alpha_is_noticed(data, project, tmp_path, year):
    """naip, tagged as gdal_translate tags four bands of 8 bits; its mask as alpha passes."""
    with rasterio.open(next((data / "naip").glob(f"*_{year}*.tif"))) as source:
        values, form = source.read(), source.profile
    form.update(photometric="RGB", alpha="YES", nodata=None)
    with rasterio.open(tmp_path / "a.tif", "w", **form) as target:
        target.write(values)
    sources, size = {year: tmp_path / "a.tif"}, "grid.size=32"
    with pytest.raises(GeomatchError, match="band 4 is alpha"):
        tile_sources(project, sources, size, "grid.gsd=5")
    tile_sources(project, sources, size, "grid.gsd=5", "grid.bands=[4,1,2,3]")
    assert project.tile_manifest().channels == Channels(4, 0)
    values[3] = np.where(values.any(axis=0), 255, 0)
    with rasterio.open(tmp_path / "a.tif", "w", **form) as target:
        target.write(values)
    tile_sources(project, sources, size, "grid.gsd=5")
    assert project.tile_manifest().channels == Channels(3, 0)


def test_scenes_are_set_apart_by_file(data, project):
    """levir: 28, 6 and 6 scenes that share no ground, each of 64 tiles of 64 m.

    They are cut at 2 m in place of 0.5, for speed.
    """
    folder = data / "levir"
    settings = (
        "grid.size=32",
        "grid.gsd=2",
        "split.by=source",
        'split.validation=["scene_029*", "scene_03[0-4]*"]',
        'split.test=["scene_03[5-9]*", "scene_040*"]',
    )
    table = tile_sources(
        project, {"before": folder / "before", "after": folder / "after"}, *settings
    )
    places = table.places()
    counts = [len(np.unique(places[table.split == code])) for code in range(3)]
    assert dict(zip(SPLITS, counts, strict=True)) == {"train": 1792, "validation": 384, "test": 384}
    assert len(shared_cells(table)) == 2560
    assert project.tile_manifest().splits == {"train": 3584, "validation": 768, "test": 768}
    for code, numbers in enumerate((range(1, 29), range(29, 35), range(35, 41))):
        names = {table.sources[i] for i in np.unique(table.source[table.split == code])}
        assert names == {f"scene_{n:03d}.tif" for n in numbers}

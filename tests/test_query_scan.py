"""A scan of unknown place, turn and scale is cut into windows, which vote for one place."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from command_line import run_command
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning
from small_project import SIZE, new_project, tile_sources

from geomatch import image_input
from geomatch.data.embeddings import Embeddings
from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.errors import GeomatchError, UsageError
from geomatch.geo import footprints
from geomatch.manifests import EmbeddingManifest
from geomatch.nn.encoder import TileForm
from geomatch.query import query
from geomatch.querying.scan import Pose, Windows, _lattice, windows
from geomatch.querying.turns import turned
from geomatch.querying.votes import Place, best_places, places

REAL = SimpleNamespace(**vars(image_input))
"""Before its functions are replaced."""

# Windows


@pytest.mark.parametrize(("turn", "gsd"), [(0, 1.0), (30, 1.0), (90, 0.5), (-120, 2.0)])
def test_a_window_is_the_ground_at_its_offset(turn, gsd):
    """Of a smooth ground, seen turned and scaled."""

    def ground(x, y):
        return np.stack([128 + x, 128 + y, 128 + x / 2 - y / 2], axis=-1)

    side = round(100 / gsd)
    at = (np.arange(side) - (side - 1) / 2) * gsd
    right, up = np.meshgrid(at, -at)
    angle = math.radians(turn)
    x = right * math.cos(angle) - up * math.sin(angle)
    y = right * math.sin(angle) + up * math.cos(angle)
    scan = ground(x, y).round().astype(np.uint8)
    (cut,) = windows(scan, [Pose(turn, gsd)], 32, 1.0)
    assert len(cut.pixels) > 20
    assert np.abs(cut.offsets).max() > 20
    within = (np.arange(32) - 15.5)[8:24]  # without corners, which may be mirrored
    for pixels, (x0, y0) in zip(cut.pixels, cut.offsets, strict=True):
        expected = ground(*np.meshgrid(x0 + within, y0 - within))
        difference = pixels[8:24, 8:24].astype(float) - expected
        assert np.abs(difference).max() <= 3


def test_windows_overlap_within_the_scan():
    upright = _lattice(64, 96, 0, 32)
    assert sorted({x for x, _ in upright}) == [-32, -24, -16, -8, 0, 8, 16, 24, 32]
    assert sorted({y for _, y in upright}) == [-16, -8, 0, 8, 16]
    np.testing.assert_array_equal(_lattice(96, 64, 90, 32), upright)
    assert len(_lattice(64, 64, 45, 32)) >= 20
    assert _lattice(32, 32, 30, 32).tolist() == [[0, 0]]
    assert len(_lattice(31, 400, 0, 32)) == 0
    assert len(_lattice(4000, 4000, 0, 32)) == 64


def test_blank_windows_are_left_out():
    scan = np.full((64, 128, 3), 90, np.uint8)
    scan[:, 80:] = np.random.default_rng(0).integers(0, 255, (64, 48, 3))
    (cut,) = windows(scan, [Pose(0, 1)], 32, 1.0)
    assert cut.offsets[:, 0].min() >= 8
    assert list(windows(scan[:, :64], [Pose(0, 1)], 32, 1.0)) == []


# Votes


def election(true, offsets, answers, rng, right):
    """Answers to windows: for some the tile below it, and tiles anywhere else."""
    n, k = len(offsets), answers
    centres = rng.uniform(-5000, 5000, (n, k, 2))
    scores = np.sort(rng.uniform(0.1, 0.3, (n, k)))[:, ::-1]
    for i in right:
        centres[i, 0] = 64 * np.round((true + offsets[i]) / 64)
        scores[i, 0] = 0.8
    return centres, scores.astype(np.float32)


def test_votes_that_agree_win():
    rng = np.random.default_rng(0)
    offsets = _lattice(256, 256, 0, 64)
    true = np.array([1000.0, -2000.0])
    centres, scores = election(true, offsets, 10, rng, range(5, 17))
    epsg = np.full(scores.shape, 32630)
    positions = np.arange(scores.size).reshape(scores.shape)
    cut = Windows(Pose(30, 0.5), np.empty((len(offsets), 0)), offsets)
    first, second = places(cut, scores, positions, epsg, centres, 64, 2)
    assert math.hypot(first.x - true[0], first.y - true[1]) < 32
    assert first.agreeing >= 12
    assert first.windows == len(offsets)
    assert first.weight > 3 * second.weight
    voted = centres.reshape(-1, 2)[first.tile]
    assert np.abs(voted - true).max() <= 64
    # Votes in another zone are for other places.
    epsg[11:, 0] = 32631
    apart = places(cut, scores, positions, epsg, centres, 64, 1)[0]
    assert apart.weight < first.weight
    # What is seen everywhere does not count.
    assert places(cut, np.full_like(scores, 0.9), positions, epsg, centres, 64, 2) == []


def test_a_place_counts_once_in_its_best_pose():
    def place(weight, x, epsg=1, turn=0):
        return Place(Pose(turn, 1), epsg, x, 0, weight, 0, 0.5, 1, 1)

    kept = best_places(
        [place(1, 0), place(3, 100, turn=90), place(2, 400), place(0.5, 0, epsg=2)], 64, 3
    )
    assert [(each.weight, each.x, each.epsg) for each in kept] == [
        (3, 100, 1),
        (2, 400, 1),
        (0.5, 0, 2),
    ]


@pytest.mark.parametrize("turn", [0, 90, 37])
def test_pixels_of_a_scan_on_the_ground(turn):
    place = Place(Pose(turn, 0.5), 32630, 1000.0, 2000.0, 1, 0, 0.5, 1, 1)
    angle = math.radians(turn)
    # 10 px right of and 4 px above the centre of a scan of 60 x 40 px.
    (found,) = place.to_ground(np.array([[40.0, 16.0]]), (40, 60))
    right, up = 5.0, 2.0
    np.testing.assert_allclose(
        found,
        [
            1000 + right * math.cos(angle) - up * math.sin(angle),
            2000 + right * math.sin(angle) + up * math.cos(angle),
        ],
    )
    outline = shapely.Polygon(place.ring((40, 60)))
    assert outline.exterior.is_ccw
    assert outline.area == pytest.approx(40 * 60 * 0.25)


# From end to end


def describe(pixels):
    """Descriptors by brightness, for want of an encoder: blocks of 4 x 4 px, less their mean."""
    n, side, _, channels = pixels.shape
    blocks = pixels.reshape(n, side // 4, 4, side // 4, 4, channels).mean(axis=(2, 4))
    vectors = blocks.reshape(n, -1).astype(np.float32)
    return vectors - vectors.mean(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def project(tiled, tmp_path_factory):
    """The small project, indexed by brightness."""
    project = tiled.copied(tmp_path_factory.mktemp("scan") / "project")
    tiles = TileTable.load(project.catalogue)
    vectors = describe(TileStore.open(project.pixels).read(tiles.store_row))
    manifest = EmbeddingManifest(
        name="plain@0",
        tiles=project.tile_manifest().fingerprint,
        model="",
        run="plain",
        run_id="",
        step=0,
        metric="cosine",
        centres=None,
        geomatch="",
        dimension=vectors.shape[1],
        normalise=False,
        engine="",
        dtype="",
        fingerprint="",
    )
    project.embeddings.mkdir()
    path = project.embeddings / "plain@0.parquet"
    Embeddings(vectors, manifest).save(path, tiles, *footprints.file_geometry(tiles.grid))
    return project


@pytest.fixture(autouse=True)
def _encoder(monkeypatch):
    encoding = SimpleNamespace(form=TileForm(SIZE, 3, 0))
    monkeypatch.setattr(image_input, "encoder_of", lambda *_: encoding)
    monkeypatch.setattr(image_input, "describe_pixels", lambda _, pixels, *__: describe(pixels))


@pytest.fixture(scope="module")
def scan(tiled, tmp_path_factory):
    """A function that writes part of the later imagery, turned and scaled, without its place."""
    folder = tmp_path_factory.mktemp("scans")
    with rasterio.open(tiled.imagery / "train_2020.tif") as sheet:
        pixels = np.moveaxis(sheet.read(), 0, -1)
        left, top = sheet.bounds.left, sheet.bounds.top

    def write(turn, scale):
        # 4 x 3 tiles, off the grid.
        part = pixels[10 : 10 + 3 * SIZE, 20 : 20 + 4 * SIZE]
        seen = np.rot90(part, -turn // 90)
        height, width = (round(side * scale) for side in seen.shape[:2])
        path = folder / f"{turn}-{scale}.png"
        Image.fromarray(seen).resize((width, height), Image.Resampling.BILINEAR).save(path)
        return str(path), (left + 20 + 2 * SIZE, top - 10 - 1.5 * SIZE)

    return write


def test_a_scan_is_found(project, scan):
    path, (x, y) = scan(0, 1)
    found = query(project, path, scales=(1.0,), years=("2010",))
    first = found.matches[0]
    assert math.hypot(found.places[0].x - x, found.places[0].y - y) < SIZE / 3
    assert (first.turn, first.gsd, first.year) == (0, 1, "2010")
    assert 0.2 < first.confidence <= 1
    assert [match.confidence for match in found.matches[1:]] == [0] * (len(found.matches) - 1)
    assert first.agreeing > first.windows / 3


def test_the_turn_and_scale_of_a_scan_are_found_and_written(project, scan, tmp_path):
    path, (x, y) = scan(90, 2)
    arguments = ["query", path, "-p", project.root, "--scales", "0.5,1", "--rotate", "--json"]
    done = run_command(*arguments, "--year", "2010", "--top", "2", "--gpkg", tmp_path / "a.gpkg")
    assert done.exit_code == 0, done.output
    first = json.loads(done.stdout)[0]
    assert (first["turn"], first["gsd"]) == (90, 0.5)
    answers = geopandas.read_file(tmp_path / "a.gpkg", layer="answers")
    outline = answers.geometry[0]
    assert shapely.distance(outline.centroid, shapely.Point(x, y)) < SIZE / 3
    assert outline.area == pytest.approx(12 * SIZE**2)
    assert np.ptp(outline.bounds[::2]) == pytest.approx(4 * SIZE)


def test_a_scan_is_shown_with_its_confidence(project, scan):
    path, _ = scan(0, 1)
    shown = run_command("query", path, "-p", project.root, "--gsd", "1", "--top", "1").stdout
    for title in ("turn", "m/px", "confidence", "windows"):
        assert title in shown


def test_scales_that_make_no_sense(project, scan):
    path, _ = scan(0, 1)
    with pytest.raises(GeomatchError, match=r"nothing to go by at 0.1 m per pixel"):
        query(project, path, scales=(0.1,))
    with pytest.raises(UsageError, match="no scale"):
        query(project, path, scales=(-1.0,))
    for wrong in (["--scales", "1,x"], ["--gsd", "1", "--scales", "1"]):
        assert run_command("query", path, "-p", project.root, *wrong).exit_code == 2


# Real imagery


@pytest.fixture(scope="module")
def farmland(tmp_path_factory):
    """Ten years of farmland with ImageNet descriptors, and its images by year."""
    folder = Path(os.environ.get("GEOMATCH_DATA", "../shared/data")) / "naip"
    if not folder.is_dir():
        pytest.skip(f"no real imagery at {folder} (set GEOMATCH_DATA)")
    from geomatch.embed import embed

    project = new_project(tmp_path_factory.mktemp("naip") / "project")
    images = {path.stem[-8:]: str(path.absolute()) for path in sorted(folder.glob("*.tif"))}
    sizes = ("grid.size=64", "grid.gsd=5.0", "split.by=blocks")
    tile_sources(project, images, *sizes, workers=2)
    embed(project, model="imagenet")
    return project, images


def mosaics(project, image, year, tiles, turn, scale, folder):
    """Images of so many tiles a side around test places, turned and scaled, by their centre."""
    table = TileTable.load(project.catalogue)
    held_back = np.flatnonzero((table.split == 2) & (table.year == table.years.index(year)))
    shift = np.random.default_rng(0).uniform(-0.5, 0.5, (6, 2)) * 320
    centres = table.centres()[held_back[:: len(held_back) // 6][:6]] + shift
    with rasterio.open(image) as source:
        pixels = np.moveaxis(source.read(), 0, -1)
        at = [~source.transform @ tuple(centre) for centre in centres]
    for (x, y), (column, row) in zip(centres, at, strict=True):
        off = (column - pixels.shape[1] / 2, pixels.shape[0] / 2 - row)
        angle = math.radians(-turn)
        east = off[0] * math.cos(angle) - off[1] * math.sin(angle)
        north = off[0] * math.sin(angle) + off[1] * math.cos(angle)
        seen = turned(pixels, -turn, tiles * 64, 4, (east, north))
        side = round(tiles * 64 * scale)
        planes = [
            np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BILINEAR))
            for plane in np.moveaxis(seen, -1, 0)
        ]
        path = folder / f"{x:.0f}-{y:.0f}.tif"
        # The fourth band is near infrared, which would otherwise be tagged as alpha.
        form = {"driver": "GTiff", "count": 4, "dtype": "uint8", "photometric": "MINISBLACK"}
        form |= {"height": side, "width": side}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            target = rasterio.open(path, "w", **form)
        with target:
            target.write(np.stack(planes))
        yield str(path), x, y


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tiles", "turn", "scale", "options"),
    [
        (2, 0, 1.0, {"scales": (5.0,)}),
        (4, 0, 1.0, {"scales": (5.0,)}),
        (3, 90, 0.7, {"scales": (5 / 0.7,), "rotate": 90}),
        (4, 0, 1.4, {"scales": (1.8, 5 / 1.4, 7.2)}),
    ],
)
def test_mosaics_of_held_back_farmland_are_found(farmland, tmp_path, tiles, turn, scale, options):
    project, images = farmland
    year = list(images)[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_input, "encoder_of", REAL.encoder_of)
        patch.setattr(image_input, "describe_pixels", REAL.describe_pixels)
        errors, right_poses = [], 0
        years = tuple(each for each in images if each != year)
        for path, x, y in mosaics(project, images[year], year, tiles, turn, scale, tmp_path):
            found = query(project, path, years=years, **options)
            place = found.places[0]
            errors.append(math.hypot(place.x - x, place.y - y))
            right_poses += place.pose == Pose(turn, pytest.approx(5 / scale))
    assert np.count_nonzero(np.array(errors) < 320) >= 5
    assert np.median(errors) < 80
    assert right_poses >= 5

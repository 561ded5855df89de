"""`tile --check`: years shifted on purpose are told, and no shift is told where none is known."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import rasterio
from affine import Affine
from command_line import run_command
from PIL import Image
from rasterio.warp import transform
from scipy import ndimage

from geomatch import config
from geomatch.errors import UsageError
from geomatch.project import Project
from geomatch.tile import tile

LEFT, TOP = 500_000.0, 5_000_000.0
GSD = 2.0


def ground(seed, side=640):
    """Grey levels (3, side, side) of blobs of all sizes."""
    rng = np.random.default_rng(seed)
    layers = [ndimage.gaussian_filter(rng.normal(size=(side, side)), s) * s for s in (1, 3, 9)]
    return np.clip(np.stack([120 + 80 * sum(layers)] * 3), 0, 255).astype(np.uint8)


def checked(project, years, *overrides, placement="real"):
    """The pairs of years that the check of `tile` compares."""
    sources = tuple(
        config.SourceConfig(year=year, images=str(path), placement=placement)
        for year, path in years.items()
    )
    wanted = ["grid.size=64", "split.by=source", *overrides]
    settings = config.with_overrides(config.Config(source=sources), wanted)
    return tile(project, settings, workers=1, check=True).registration


def test_a_year_shifted_on_purpose_is_told(write_raster, project):
    """By 3.4 px to the east and 1.2 px to the south; the third year is where the first one is."""
    image = ground(0)
    moved = (LEFT + 3.4 * GSD, TOP - 1.2 * GSD)
    paths = {
        "2010": write_raster("2010.tif", image, origin=(LEFT, TOP), gsd=GSD),
        "2015": write_raster("2015.tif", image, origin=moved, gsd=GSD),
        "2020": write_raster("2020.tif", image, origin=(LEFT, TOP), gsd=GSD),
    }
    pairs = {pair.years: pair.as_json() for pair in checked(project, paths)}
    assert list(pairs) == [("2010", "2015"), ("2010", "2020"), ("2015", "2020")]
    length = np.hypot(3.4, 1.2)
    for years, direction in ((("2010", "2015"), (3.4, -1.2)), (("2015", "2020"), (-3.4, 1.2))):
        found = pairs[years]
        assert found["answered"] == found["places"] >= 9
        assert (found["east_px"], found["north_px"]) == pytest.approx(direction, abs=0.1)
        assert (found["median_px"], found["p95_px"]) == pytest.approx((length,) * 2, abs=0.1)
        assert (found["median_m"], found["p95_m"]) == pytest.approx((length * GSD,) * 2, abs=0.2)
    assert pairs["2010", "2020"]["p95_px"] == 0
    with Image.open(project.reports / "registration.png") as picture:
        assert picture.size[0] > 300


def test_the_check_reads_as_tiles_are_cut(write_raster, project):
    """Through the mask of a collar, and without bad files; nothing is left beside the tiles."""
    image = ground(0)
    framed = image.copy()
    framed[:, :64], framed[:, :, :64] = 0, 0
    first = write_raster("2010/a.tif", framed, origin=(LEFT, TOP), gsd=GSD)
    write_raster("2020/b.tif", image, origin=(LEFT + 3 * GSD, TOP), gsd=GSD)
    (first.parent / "torn.tif").write_bytes(first.read_bytes()[:5000])
    years = {year: first.parent.parent / year for year in ("2010", "2020")}
    wanted = ("grid.collar=true", "grid.skip_bad=true")
    (pair,) = (pair.as_json() for pair in checked(project, years, *wanted))
    assert pair["answered"] >= 9
    assert (pair["east_px"], pair["p95_px"]) == pytest.approx((3, 3), abs=0.1)
    assert not (project.root / "tiles.partial").exists()
    assert [*project.tile_manifest().unreadable] == [str(first.parent / "torn.tif")]


def test_places_are_where_they_are(write_raster, project):
    """A year is shifted in its eastern half only."""
    west, east = ground(0), ground(1)
    edge = LEFT + 640 * GSD
    for year, move in (("2010", 0.0), ("2020", 5 * GSD)):
        write_raster(f"{year}/west.tif", west, origin=(LEFT, TOP), gsd=GSD)
        write_raster(f"{year}/east.tif", east, origin=(edge + 20 * GSD, TOP + move), gsd=GSD)
    root = project.root.parent
    (pair,) = checked(project, {year: root / year for year in ("2010", "2020")})
    found = pair.as_json()
    assert len(found["at"]) == found["answered"] >= 18
    (middle,), _ = transform("EPSG:32631", "OGC:CRS84", [edge], [TOP])
    for place in found["at"]:
        expected = 5.0 if place["lon"] > middle else 0.0
        assert place["north_px"] == pytest.approx(expected, abs=0.1)
        assert place["east_px"] == pytest.approx(0, abs=0.1)
    np.testing.assert_array_equal(pair.xy[:, 0] > edge, pair.lonlat[:, 0] > middle)


def test_no_shift_is_told_where_none_is_known(write_raster, project):
    """Places that are flat in a year or show other ground give no answer, and are counted."""
    changed = ground(1, 1024)
    changed[:, :, :560] = 80
    paths = {
        "2010": write_raster("a.tif", ground(0, 1024), origin=(LEFT, TOP), gsd=GSD),
        "2020": write_raster("b.tif", changed, origin=(LEFT, TOP), gsd=GSD),
    }
    (pair,) = checked(project, paths)
    found = pair.as_json()
    flat = pair.xy[:, 0] + 128 * GSD <= LEFT + 560 * GSD
    np.testing.assert_array_equal(pair.flat, flat)
    assert found["flat"] == flat.sum() > 2
    assert found["changed"] == (~flat).sum() > 2
    assert (found["answered"], found["at"]) == (0, [])
    statistics = ("median_px", "p95_px", "median_m", "p95_m", "east_px", "north_px")
    assert [found[name] for name in statistics] == [None] * 6


def test_incomplete_windows_are_not_compared(write_raster, project):
    """A hole in one year, of which the check would see the edges."""
    holed = ground(0, 1024)
    holed[:, 400:600, 400:600] = 0
    paths = {
        "2010": write_raster("a.tif", ground(0, 1024), origin=(LEFT, TOP), gsd=GSD),
        "2020": write_raster("b.tif", holed, origin=(LEFT, TOP), gsd=GSD, nodata=0),
    }
    (pair,) = checked(project, paths)
    from_hole = np.abs(pair.xy - [LEFT + 500 * GSD, TOP - 500 * GSD]).max(axis=1)
    assert len(pair) > 0
    assert (from_hole > (100 + 128 - 26) * GSD).all()


@pytest.mark.parametrize(("side", "window"), [(640, 256), (400, 128), (200, 64)])
def test_little_ground_is_compared_in_small_windows(write_raster, project, side, window):
    image = ground(0)[:, :side, :side]
    paths = {
        "2010": write_raster("a.tif", image, origin=(LEFT, TOP), gsd=GSD),
        "2020": write_raster("b.tif", image, origin=(LEFT + 3.4 * GSD, TOP), gsd=GSD),
    }
    (pair,) = checked(project, paths, "grid.size=32")
    found = pair.as_json()
    assert found["window_px"] == window
    assert found["answered"] > 0.8 * found["places"] > 3
    assert (found["east_px"], found["north_px"]) == pytest.approx((3.4, 0), abs=0.2)


def test_years_without_a_whole_window_have_no_shift(write_raster, project):
    small = ground(0)[:, :60, :60]
    paths = {year: write_raster(f"{year}.tif", small, gsd=GSD) for year in ("2010", "2020")}
    (pair,) = checked(project, paths, "grid.size=16")
    assert (len(pair), pair.shift()) == (0, None)


def test_every_window_over_large_tiles_is_compared(write_raster, project):
    """Of 256 px, 128 px apart, where they lie within the images."""
    image = ground(0, 1024)
    paths = {year: write_raster(f"{year}.tif", image, gsd=GSD) for year in ("2010", "2020")}
    (pair,) = checked(project, paths, "grid.size=512", "grid.min_valid=0.4")
    assert pair.side == 256
    xs, ys = (np.unique(values) for values in pair.xy.T)
    assert set(np.diff(xs)) == set(np.diff(ys)) == {128 * GSD}
    assert len(pair) == len(xs) * len(ys) >= 36


def test_each_zone_of_a_utm_grid_is_compared(write_raster, project):
    """Sheets in zones 30 and 31, both shifted; the places of the map are in degrees."""
    for year, move in (("2010", 0.0), ("2020", 6.0)):
        for zone, seed in ((30, 0), (31, 1)):
            write_raster(
                f"{year}/{zone}.tif", ground(seed), f"EPSG:326{zone}", (LEFT + move, TOP), GSD
            )
    root = project.root.parent
    years = {year: root / year for year in ("2010", "2020")}
    (pair,) = checked(project, years, "grid.crs=utm", "grid.gsd=2")
    assert set(np.round(pair.lonlat[:, 0])) == {-3, 3}
    np.testing.assert_array_equal(pair.xy, pair.lonlat)
    np.testing.assert_allclose(pair.east_north, [[3.0, 0.0]] * len(pair), atol=0.1)


def test_fictitious_metres_are_not_quoted(write_raster, project):
    paths = {year: write_raster(f"{year}.tif", ground(0), gsd=GSD) for year in ("2010", "2020")}
    (pair,) = checked(project, paths, placement="fictitious")
    found = pair.as_json()
    assert (found["median_px"], found["median_m"], found["p95_m"]) == (0, None, None)


def test_what_has_no_two_years_on_the_ground_is_refused(write_raster, project):
    path = write_raster("a.tif", ground(0))
    with pytest.raises(UsageError, match="only 2010"):
        checked(project, {"2010": path})
    settings = config.with_overrides(config.Config(), ["images.folders=['a']"])
    with pytest.raises(UsageError, match="georeferenced"):
        tile(project, settings, check=True)


# On the command line


@pytest.fixture
def paths(write_raster):
    """Three years: the second is shifted by 3.4 px, the third shows other ground."""
    origin = LEFT + 3.4 * GSD, TOP
    return [
        f"2010={write_raster('a.tif', ground(0), origin=(LEFT, TOP), gsd=GSD)}",
        f"2015={write_raster('b.tif', ground(0), origin=origin, gsd=GSD)}",
        f"2020={write_raster('c.tif', ground(1), origin=(LEFT, TOP), gsd=GSD)}",
    ]


def test_the_command_prints_a_table_and_warns(project, paths):
    options = ("--size", 64, "--split", "source", "-p", project.root, "-q")
    done = run_command("tile", *paths, *options, "--check")
    assert done.exit_code == 0, done.output
    line = next(line for line in done.stdout.splitlines() if "2010 to 2015" in line)
    shown = [float(value) for value in line.split()[-6:]]
    assert shown == pytest.approx([3.4, 3.4, 6.8, 6.8, 3.4, 0], abs=0.15)
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: years shifted by more than 2 px: 2010 to 2015 (3.4 px)",
        "warning: years whose shift is unknown: 2010 to 2020 (0 of 9 places answered), "
        "2015 to 2020 (0 of 9 places answered)",
    ]
    assert "reports/registration.png" in done.stderr
    # Nothing is cut again, and nothing is compared that was not asked for.
    assert "shift" not in run_command("tile", "-p", project.root).output


def test_years_told_by_file_names_are_compared(project, write_raster):
    for year, east in (("2010", 0), ("2020", 3)):
        path = write_raster(
            f"ortho/a_{year}.tif", ground(0), origin=(LEFT + east * GSD, TOP), gsd=GSD
        )
    options = ("--size", 64, "--split", "source", "-p", project.root, "-q", "--check", "--json")
    done = run_command("tile", path.parent, "--year-from", r"_(\d{4})", *options)
    assert done.exit_code == 0, done.output
    (pair,) = json.loads(done.stdout)["registration"]
    assert pair["years"] == ["2010", "2020"]
    assert pair["east_px"] == pytest.approx(3, abs=0.1)


def test_too_little_ground_is_said(project, write_raster):
    small = ground(0)[:, :60, :60]
    given = [f"{year}={write_raster(f'{year}.tif', small, gsd=GSD)}" for year in (2010, 2020)]
    options = ("--size", 16, "--split", "source", "-p", project.root, "-q", "--check")
    done = run_command("tile", *given, *options)
    assert done.exit_code == 0, done.output
    assert "unknown: 2010 to 2020 (no window is whole in both)" in done.stderr
    line = next(line for line in done.stdout.splitlines() if "2010 to 2020" in line)
    assert line.split() == ["2010", "to", "2020", *"0000", *"------"]


def test_json_has_the_counts_and_the_shifts(project, paths):
    options = ("--size", 64, "--split", "source", "-p", project.root, "-q", "--json")
    values = json.loads(run_command("tile", *paths[:2], *options).stdout)
    assert values["registration"] is None
    assert values["splits"] == {"train": values["tiles"], "validation": 0, "test": 0}
    again = json.loads(run_command("tile", *options[4:], "--check").stdout)
    (pair,) = again.pop("registration")
    assert again | {"registration": None} == values
    assert pair["years"] == ["2010", "2015"]
    assert pair["median_m"] == pytest.approx(6.8, abs=0.2)


# Real imagery

JOPLIN = ("grid.crs=EPSG:26915", "grid.gsd=0.6", "grid.size=128")


def joplin(data, folder, east):
    """The pre images of joplin in another folder, and `east` metres to the east."""
    shutil.copytree(data / "joplin" / "pre", folder)
    for path in folder.glob("*.tif"):
        with rasterio.open(path, "r+") as target:
            target.transform = Affine.translation(east, 0) * target.transform
    return folder


def test_joplin_shifted_by_3_4_px(data, project, tmp_path):
    """Before and after the tornado, in two CRSs: 2 px apart at most, and further when shifted.

    Measured: median 1.1 px, 95th percentile 2.5 px, about a third of 100 places answering; the
    others lie along the track of the tornado.
    """
    years = {"pre": joplin(data, tmp_path / "a", 0), "post": data / "joplin" / "post"}
    (pair,) = checked(project, years, *JOPLIN)
    before = pair.as_json()
    assert before["places"] == 100
    assert 25 <= before["answered"] <= 45
    assert before["median_px"] < 1.5
    assert before["p95_px"] < 3.5
    years["pre"] = joplin(data, tmp_path / "b", -3.4 * 0.6)
    (pair,) = checked(project, years, *JOPLIN)
    after = pair.as_json()
    assert after["answered"] >= 25
    assert after["east_px"] - before["east_px"] == pytest.approx(3.4, abs=0.3)
    assert after["north_px"] == pytest.approx(before["north_px"], abs=0.3)


def test_joplin_against_other_ground(data, project, tmp_path):
    """Half a kilometre away is another part of the town: almost no place may answer."""
    years = {"pre": joplin(data, tmp_path / "a", 500), "post": data / "joplin" / "post"}
    (pair,) = checked(project, years, *JOPLIN)
    assert len(pair) >= 30
    assert pair.answered.sum() <= 1
    assert pair.shift() is None


def test_naip_shifted_by_3_4_px(data, project, tmp_path):
    """Four bands of three years at 5 m: fields, of which other years' look different."""
    dates = ("20160816", "20180716", "20200831")
    for date in dates:
        found = next((data / "naip").glob(f"*_{date}.tif"))
        with rasterio.open(found) as source:
            profile = source.profile | {"driver": "GTiff"}
            with rasterio.open(tmp_path / f"{date}.tif", "w", **profile) as target:
                target.colorinterp = source.colorinterp  # else near infrared is tagged alpha
                target.write(source.read())
    years = {date: tmp_path / f"{date}.tif" for date in dates}
    wanted = ("grid.gsd=5", "grid.size=32")
    before = [pair.as_json() for pair in checked(project, years, *wanted)]
    assert all(pair["answered"] >= 0.85 * pair["places"] > 15 for pair in before)
    assert all(pair["median_px"] < 1 for pair in before)
    with rasterio.open(years["20180716"], "r+") as target:
        target.transform = Affine.translation(0, 3.4 * 5) * target.transform
    after = [pair.as_json() for pair in checked(Project(project.root), years, *wanted)]
    moved = [b["north_px"] - a["north_px"] for a, b in zip(before, after, strict=True)]
    assert moved == pytest.approx([3.4, 0, -3.4], abs=0.3)

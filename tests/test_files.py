"""Which file is the imagery of which year: names, tile indexes and STAC items."""

from __future__ import annotations

import json
import os

import geopandas
import numpy as np
import pytest
import shapely
from command_line import run_command
from small_project import tile_sources

from geomatch.config import SourceConfig
from geomatch.data.store import TileStore
from geomatch.errors import GeomatchError, UsageError
from geomatch.geo import rasters
from geomatch.project import read_json
from geomatch.tiling import imagery

LEFT, TOP = 500_000, 5_000_000


def found(images, **options):
    """File names by year, in order."""
    return {
        source.year: [os.path.relpath(path, os.path.dirname(images)) for path in paths]
        for source, paths in imagery.by_year([SourceConfig(images=str(images), **options)])
    }


# Names


@pytest.fixture
def folder(tmp_path):
    """Empty files, of which only the names count."""
    for name in ("a_20100629", "a_20090818", "b_20090901"):
        (tmp_path / "ortho").mkdir(exist_ok=True)
        (tmp_path / "ortho" / f"{name}.tif").touch()
    return tmp_path / "ortho"


def test_names_tell_the_year(folder):
    a, b, c = "ortho/a_20090818.tif", "ortho/b_20090901.tif", "ortho/a_20100629.tif"
    assert found(folder, year_from=r"_(\d{4})") == {"2009": [a, b], "2010": [c]}
    assert found(folder, year_from=r"(?<=_)\d{6}") == {"200908": [a], "200909": [b], "201006": [c]}
    dates = found(folder, year_from=r"_(\d{4})(\d{2})(\d{2})\.tif$")
    assert list(dates) == ["2009-08-18", "2009-09-01", "2010-06-29"]
    assert found(folder, year="all") == {"all": [a, c, b]}


def test_companions_that_a_glob_matches_are_not_imagery(folder):
    for name in ("a_20090818.tif.aux.xml", "a_20090818.tfw", "b_20090901.tif.ovr", "notes.txt"):
        (folder / name).touch()
    sheets = rasters.find(str(folder), "year all")
    assert len(sheets) == 3
    for pattern in ("*", "*.*", "[ab]*", "**/*"):
        assert rasters.find(f"{folder}/{pattern}", "year all") == sheets
    # A suffix that is asked for is meant, whatever it is.
    assert rasters.find(f"{folder}/*.txt", "year all") == [str(folder / "notes.txt")]


def test_a_name_that_tells_no_year_is_named(folder):
    with pytest.raises(GeomatchError, match=r"b_20090901.tif tells no year by a_") as caught:
        found(folder, year_from=r"a_(\d{4})")
    assert "glob" in caught.value.hint
    assert list(found(f"{folder}/a*", year_from=r"a_(\d{4})")) == ["2009", "2010"]
    with pytest.raises(UsageError, match="not a regular expression"):
        found(folder, year_from="(")


def test_one_folder_of_many_years_is_one_argument(write_raster, project, tmp_path):
    """With labels of one of them; the years and their tiles are as if each had been named."""
    grey = {"2009": 10, "2010": 20, "2012": 30}
    for year, value in grey.items():
        values = np.full((3, 32, 32), value, np.uint8)
        write_raster(f"ortho/x_{year}_1.tif", values, origin=(LEFT, TOP))
    write_raster("cover/c_2010_.tif", np.full((1, 32, 32), 7, np.uint8), origin=(LEFT, TOP))
    options = ("--size", 32, "--split", "source", "-p", project.root, "--year-from", r"_(\d{4})_")
    done = run_command("tile", tmp_path / "ortho", f":labels={tmp_path / 'cover'}", *options)
    assert done.exit_code == 0, done.output
    manifest = project.tile_manifest()
    assert {year: (y.files, y.labels) for year, y in manifest.years.items()} == {
        "2009": (1, 0),
        "2010": (1, 1),
        "2012": (1, 0),
    }
    tiles = TileStore.open(project.pixels).read(np.arange(3))
    assert [tuple(tile[0, 0]) for tile in tiles] == [
        (10, 10, 10, 0),
        (20, 20, 20, 7),
        (30, 30, 30, 0),
    ]
    # The request is repeated, and sees what is new.
    assert "up to date" in run_command("tile", "-p", project.root).stderr
    values = np.full((3, 32, 32), 40, np.uint8)
    write_raster("ortho/x_2015_1.tif", values, origin=(LEFT, TOP))
    assert run_command("tile", "-p", project.root).exit_code == 0
    assert list(project.tile_manifest().years) == [*grey, "2015"]


def test_class_rasters_of_years_told_by_names(write_raster, project, tmp_path):
    """Values beyond 8 bits are classes in the order of all years; each year has its own sheets."""
    for year, value in (("2009", 700), ("2010", 300)):
        images = np.full((3, 32, 32), 90, np.uint8)
        write_raster(f"ortho/x_{year}_1.tif", images, origin=(LEFT, TOP))
        classes = np.full((1, 32, 32), value, np.uint16)
        write_raster(f"cover/c_{year}_.tif", classes, origin=(LEFT, TOP))
    write_raster("ortho/x_2012_1.tif", images, origin=(LEFT, TOP))
    options = ("--size", 32, "--split", "source", "-p", project.root, "--year-from", r"_(\d{4})_")
    done = run_command("tile", tmp_path / "ortho", f":labels={tmp_path / 'cover'}", *options)
    assert done.exit_code == 0, done.output
    tiles = TileStore.open(project.pixels).read(np.arange(3))
    assert [np.unique(tile[..., 3]).tolist() for tile in tiles] == [[2], [1], [0]]
    assert list(project.tile_manifest().label_classes) == ["300", "700"]


def test_real_names_tell_their_dates(data):
    dates = list(found(data / "naip", year_from=r"_(\d{4})(\d\d)(\d\d)\."))
    assert len(dates) == 10
    assert (dates[0], dates[-1]) == ("2009-08-18", "2020-08-31")
    years = found(data / "oscd" / "p[ai]*" / "*.jp2", year_from=r"_(\d{4})")
    counts = {year: len(paths) for year, paths in years.items()}
    assert counts == {"2015": 1, "2016": 1, "2017": 1, "2018": 1}


# Tile indexes


def write_index(path, names):
    """A tile index over squares side by side."""
    boxes = [shapely.box(LEFT + 32 * i, TOP - 32, LEFT + 32 * i + 32, TOP) for i in range(5)]
    columns = {"location": names}
    frame = geopandas.GeoDataFrame(columns, geometry=boxes[: len(names)], crs=32631)
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_file(path)
    return path


@pytest.mark.parametrize("name", ["i.gpkg", "i.shp", "i.geojson", "i.fgb"])
def test_a_tile_index_names_its_rasters_in_order(tmp_path, name):
    names = ["../z_2010.tif", str(tmp_path / "a_2009.tif"), "b_2010.tif"]
    index = write_index(tmp_path / "index" / name, names)
    expected = ["../z_2010.tif", "../a_2009.tif", "b_2010.tif"]
    if name.endswith(".fgb"):  # whose features are in the order of their spatial index
        expected = sorted(expected)
        assert sorted(found(index, year="2010")["2010"]) == expected
        return
    assert found(index, year="2010") == {"2010": expected}
    assert found(index, year_from=r"_(\d+)") == {"2009": expected[1:2], "2010": expected[::2]}


def test_an_index_whose_name_is_not_utf8(tmp_path):
    index = write_index(tmp_path / "i.geojson", ["b_2010.tif"])
    renamed = index.rename(tmp_path / os.fsdecode(b"b\xe9.geojson"))
    assert found(renamed, year="2010") == {"2010": ["b_2010.tif"]}


@pytest.mark.parametrize("name", ["index.gpkg", "index.gti.gpkg"])
def test_tiles_of_a_tile_index(write_raster, project, tmp_path, name):
    """Sheets of a plain one are opened one by one; GDAL reads the other as one raster."""
    for i in range(2):
        values = np.full((3, 32, 32), 50 + i, np.uint8)
        write_raster(f"ortho/{i}.tif", values, origin=(LEFT + 32 * i, TOP))
    index = write_index(
        tmp_path / "ortho" / name, [str(tmp_path / f"ortho/{i}.tif") for i in (0, 1)]
    )
    table = tile_sources(project, {"2010": index})
    tiles = TileStore.open(project.pixels).read(table.store_row)
    order = np.argsort(table.col)
    assert [np.unique(tiles[i]).tolist() for i in order] == [[50], [51]]
    whole = name.endswith(".gti.gpkg")
    assert sorted(table.sources) == ([name] if whole else ["0.tif", "1.tif"])


def test_a_raster_missing_from_a_tile_index_is_named(project, tmp_path):
    index = write_index(tmp_path / "i.gpkg", ["gone.tif"])
    with pytest.raises(GeomatchError, match=r"gone\.tif cannot be opened"):
        tile_sources(project, {"2010": index})


# STAC


def item(name, date, assets, **properties):
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": name,
        "geometry": None,
        "properties": {"datetime": date, **properties},
        "links": [],
        "assets": assets,
    }


def asset(href, *roles, kind="image/tiff; application=geotiff"):
    return {"href": href, "type": kind, "roles": list(roles)}


def write_items(path, *items):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(items)}))
    return path


def test_items_tell_files_and_years(tmp_path):
    items = write_items(
        tmp_path / "stac" / "items.json",
        item("a", "2020-06-03T10:00:00Z", {"image": asset("../my%20a.tif", "data")}),
        item(
            "b",
            None,
            {
                "image": asset(f"file://{tmp_path}/my%20b.tif"),
                "small": asset("b.png", "thumbnail", kind="image/png"),
                "info": asset("b.xml", kind="application/xml"),
            },
            start_datetime="2018-01-01T00:00:00Z",
        ),
        item("c", "2020-07-01T00:00:00Z", {"image": asset(str(tmp_path / "c.tif"))}),
    )
    expected = {"2018": ["../my b.tif"], "2020": ["../my%20a.tif", "../c.tif"]}
    assert found(items, year_from=r"\d{4}") == expected
    assert found(items, year_from=r"\d{4}", asset="image") == expected
    assert list(found(items, year_from=r"\d{4}-\d{2}")) == ["2018-01", "2020-06", "2020-07"]
    single = tmp_path / "stac" / "a.json"
    single.write_text(json.dumps(item("a", "2020-06-03", {"x": asset("a.tif")})))
    assert found(single, year_from=r"\d{4}") == {"2020": ["a.tif"]}


def test_assets_are_chosen_by_key(tmp_path):
    assets = {"visual": asset("v.tif", "visual"), "nir": asset("n.tif", "data")}
    items = write_items(tmp_path / "items.json", item("a", "2020-01-01", assets))
    assert found(items, year_from=r"\d+", asset="nir") == {"2020": ["n.tif"]}
    with pytest.raises(GeomatchError, match="2 assets") as caught:
        found(items, year_from=r"\d+")
    assert caught.value.hint == "Give --asset KEY, one of: visual, nir."
    with pytest.raises(GeomatchError, match="item a has no asset 'red'"):
        found(items, year_from=r"\d+", asset="red")


@pytest.mark.parametrize(
    ("document", "named"),
    [
        (item("a", None, {"image": asset("a.tif")}), "item a has no datetime"),
        (item("a", "2020", {"image": asset("https://host/a.tif")}), "is at https://host/a.tif"),
        (item("a", "2020", {"image": {"roles": []}}), "item a has no href"),
        ({"type": "Collection", "id": "x", "assets": {}}, "STAC collection"),
        ({"type": "Catalog", "id": "x"}, "STAC catalog"),
        ({"type": "FeatureCollection", "features": []}, "no items"),
        (item("a", "2020", {"image": "a.tif"}), "no STAC items"),
        (item("a", "2020", {}) | {"properties": None}, "no STAC items"),
        ({"type": "Feature"}, "no STAC items"),
        ([1], "no STAC items"),
    ],
)
def test_items_that_cannot_be_used_are_refused(tmp_path, document, named):
    path = tmp_path / "items.json"
    path.write_text(json.dumps(document))
    with pytest.raises(GeomatchError, match=named):
        found(path, year_from=r"\d{4}", asset="image")


def test_other_json_is_refused(tmp_path):
    path = tmp_path / "items_2010.json"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [{"type": "Feature"}]}))
    with pytest.raises(GeomatchError, match="neither a STAC item collection nor a tile index"):
        found(path, year_from=r"\d{4}")


def test_the_key_of_an_asset_needs_items(folder):
    with pytest.raises(UsageError, match="no STAC items"):
        found(folder, year="2009", asset="image")


def test_tiles_of_items(write_raster, project, tmp_path):
    for value in (10, 20):
        values = np.full((3, 32, 32), value, np.uint8)
        write_raster(f"sheets/{value}.tif", values, origin=(LEFT, TOP))
    write_items(
        tmp_path / "items.json",
        *(
            item(year, f"{year}-05-01T00:00:00Z", {"image": asset(f"./sheets/{value}.tif")})
            for year, value in (("2020", 20), ("2018", 10))
        ),
    )
    options = ("--size", 32, "--split", "source", "-p", project.root)
    done = run_command("tile", f"stac={tmp_path / 'items.json'}", *options)
    assert done.exit_code == 0, done.output
    assert list(project.tile_manifest().years) == ["2018", "2020"]
    tiles = TileStore.open(project.pixels).read(np.arange(2))
    assert [np.unique(tile).tolist() for tile in tiles] == [[10], [20]]
    asked = read_json(project.tiles_manifest, "")["asked"]["source"]
    assert (asked[0]["images"], asked[0]["year_from"]) == (str(tmp_path / "items.json"), r"\d{4}")

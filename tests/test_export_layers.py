"""Tiles and matches for GIS programs, read again by GDAL and by geomatch itself."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import geopandas
import numpy as np
import pyogrio
import pytest
import rasterio
from command_line import run_command
from small_project import retile, tile_sources, write_imagery

from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.errors import StaleError, UsageError
from geomatch.evaluate import evaluate
from geomatch.export_matches import export_matches
from geomatch.export_tiles import export_tiles
from geomatch.project import Project


def test_footprints_are_those_of_the_catalogue(tiled, tmp_path):
    made = export_tiles(tiled.project, gpkg=tmp_path / "a.gpkg", geojson=tmp_path / "a.geojson")
    assert made.files == (tmp_path / "a.gpkg", tmp_path / "a.geojson")
    catalogue = geopandas.read_parquet(tiled.project.catalogue)
    found = geopandas.read_file(tmp_path / "a.gpkg")
    assert found.crs == catalogue.crs
    assert found.geometry.geom_equals(catalogue.geometry).all()
    for name in ("id", "cell", "year", "split", "source", "valid"):
        assert found[name].tolist() == catalogue[name].tolist()
    in_degrees = geopandas.read_file(tmp_path / "a.geojson")
    assert in_degrees.crs == "EPSG:4326"
    centres = in_degrees.to_crs(catalogue.crs).centroid
    assert (centres.distance(catalogue.centroid) < 0.01).all()


def test_years_and_splits_choose_tiles(tiled, tmp_path):
    path = tmp_path / "a.gpkg"
    made = export_tiles(tiled.project, years=["2020"], splits=["test", "validation"], gpkg=path)
    found = geopandas.read_file(path)
    assert len(found) == made.tiles == 20
    assert set(found["year"]) == {"2020"}
    assert set(found["split"]) == {"test", "validation"}


def test_pixels_are_placed_on_the_ground(tiled, tmp_path):
    export_tiles(tiled.project, splits=["test"], cogs=tmp_path / "cogs")
    tiles = tiled.tiles.select(tiled.tiles.split == SPLITS.index("test"))
    wanted = TileStore.open(tiled.project.pixels).read(tiles.store_row)
    files = sorted((tmp_path / "cogs").rglob("*.tif"))
    assert len(files) == len(tiles) == 24
    for cell, year, pixels, bounds in zip(
        tiles.cells(), tiles.year, wanted, tiles.bounds(), strict=True
    ):
        with rasterio.open(tmp_path / "cogs" / tiles.years[year] / f"{cell}.tif") as source:
            assert source.crs == "EPSG:32630"
            assert source.bounds == tuple(bounds)
            assert source.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            np.testing.assert_array_equal(source.read(), np.moveaxis(pixels, -1, 0))


def test_a_collection_of_items_is_tiled_again_to_the_same_pixels(tiled, tmp_path):
    export_tiles(tiled.project, stac=tmp_path / "stac")
    items = json.loads((tmp_path / "stac" / "items.json").read_text())["features"]
    assert [item["id"] for item in items] == tiled.tiles.ids()
    assert items[0]["properties"]["datetime"] == "2010-01-01T00:00:00.000Z"
    root, listed = tmp_path / "again", tmp_path / "stac" / "items.json"
    root.mkdir()
    (root / "geomatch.toml").write_text("")
    project = Project.open(root)
    given = ["-p", root, f"stac={listed}", "--year-from", r"^\d{4}", "--size", 32]
    assert run_command("tile", *given, "--split", "source", "--workers", 1, "-q").exit_code == 0
    again = TileTable.load(project.catalogue)
    assert sorted(again.ids()) == sorted(tiled.tiles.ids())
    rows = dict(zip(again.ids(), again.store_row, strict=True))
    np.testing.assert_array_equal(
        TileStore.open(project.pixels).read(np.array([rows[i] for i in tiled.tiles.ids()])),
        TileStore.open(tiled.project.pixels).read(tiled.tiles.store_row),
    )


def test_an_interrupted_export_goes_on(tiled, tmp_path):
    folder = tmp_path / "cogs"
    export_tiles(tiled.project, splits=["test"], cogs=folder)
    first, *others = sorted(folder.rglob("*.tif"))
    first.unlink()
    before = {path: path.stat().st_mtime_ns for path in others}
    export_tiles(tiled.project, splits=["test"], cogs=folder)
    assert first.exists()
    assert {path: path.stat().st_mtime_ns for path in others} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no file to write"),
        ({"gpkg": "a.gpkg", "years": ["1999"]}, "no tiles of 1999"),
    ],
)
def test_what_cannot_be_exported_is_said(tiled, options, message):
    with pytest.raises(UsageError, match=message):
        export_tiles(tiled.project, **options)


def test_stac_needs_dates(tmp_path, write_raster):
    path = write_raster("a.tif", np.full((3, 32, 32), 90, np.uint8))
    root = tmp_path / "p"
    root.mkdir()
    (root / "geomatch.toml").write_text("")
    project = Project.open(root)
    tile_sources(project, {"pre": path, "post": path})
    with pytest.raises(UsageError, match="pre is none"):
        export_tiles(project, stac=tmp_path / "stac")
    assert not (tmp_path / "stac").exists()


def test_matches_have_ranks_and_lines_to_wrong_answers(indexed, copied, tmp_path):
    project, path = copied(indexed), tmp_path / "m.gpkg"
    report = evaluate(project, html=False)
    made = export_matches(project, gpkg=path, geojson=tmp_path / "m.geojson")
    assert made.report == report.name
    queries = geopandas.read_file(path, layer="queries")
    assert len(queries) == made.queries == sum(part.queries for part in report.splits.values())
    for split, part in report.splits.items():
        ranks = queries[queries["split"] == split]["rank"]
        assert (ranks == 1).mean() == pytest.approx(part.recall1)
    catalogue = geopandas.read_parquet(project.catalogue).set_index("id").geometry
    places = catalogue.loc[queries["id"]].reset_index(drop=True)
    assert queries.geometry.geom_equals(places).all()
    links = geopandas.read_file(path, layer="links")
    assert (links.length > 0).all()
    np.testing.assert_allclose(links.length, links["distance_m"])
    for link in links.head(5).itertuples():
        for tile, at in zip((link.query, link.answer), link.geometry.coords, strict=True):
            assert catalogue[tile].centroid.coords[0] == pytest.approx(at)
    wrong = queries[queries["rank"] > 1]
    first = links[links["rank"] == 1]
    assert sorted(wrong["id"]) == sorted(first["query"])
    assert len(pyogrio.read_info(tmp_path / "m.geojson")["fields"]) == len(queries.columns) - 1
    style = ElementTree.parse(path.with_suffix(".qml")).getroot()
    assert style.find("renderer-v2").get("attr") == "rank"
    assert len(style.findall(".//range")) == len(style.findall(".//symbol")) == 4


def test_matches_of_other_tiles_are_stale(indexed, copied, tmp_path):
    project = copied(indexed)
    evaluate(project, html=False)
    write_imagery(tmp_path / "imagery", seed=1)
    retile(project, tmp_path / "imagery")
    with pytest.raises(StaleError, match="the tiles changed"):
        export_matches(project, gpkg=tmp_path / "m.gpkg")


def test_the_commands_name_what_they_wrote(tiled, tmp_path):
    path = tmp_path / "a.gpkg"
    done = run_command("export", "tiles", "-p", str(tiled.root), "--gpkg", str(path))
    assert (done.exit_code, path.exists()) == (0, True)
    assert "88 tiles: " in done.stderr
    done = run_command("export", "matches", "-p", str(tiled.root), "--gpkg", str(path))
    assert done.exit_code == 1
    assert "geomatch eval" in done.stderr

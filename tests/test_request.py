"""`tile_arguments`: what a caller names, combined with `geomatch.toml` and the last request."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest

from geomatch import config
from geomatch.errors import UsageError
from geomatch.manifests import TileRequest
from geomatch.tile import tile
from geomatch.tiling.request import last_request, tile_arguments

IN_FILE = """\
[[source]]
year = "2000"
images = "ortho/2000"

[grid]
size = 64
gsd = 2.0
"""


def years(settings):
    return [source.year for source in settings.source]


def test_sources_become_settings_with_absolute_paths(project, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = ["2020=b/*.tif", "2010=~/a.tif", "2010:labels=a.gpkg", "2010:changed=/c.tif"]
    request = tile_arguments(project, given, fictitious=True, overrides=["grid.size=32"])
    assert request.overrides == ("grid.size=32",)
    assert request.settings.grid.size == 32
    assert request.settings.source == (
        config.SourceConfig("2020", f"{tmp_path}/b/*.tif", placement="fictitious"),
        config.SourceConfig(
            "2010", str(Path.home() / "a.tif"), f"{tmp_path}/a.gpkg", "/c.tif", "fictitious"
        ),
    )


@pytest.mark.parametrize("text", ["2010", "=a", "2010=", "2010:lables=a", ":labels=a"])
def test_a_source_of_another_form_is_refused(project, text):
    with pytest.raises(UsageError, match="YEAR=PATH"):
        tile_arguments(project, [text])


def test_two_folders_of_one_year_are_two_sources(project):
    request = tile_arguments(project, ["2010=/a", "2010:labels=/l", "2020=/c", "2010=/b"])
    assert request.settings.source == (
        config.SourceConfig("2010", "/a", "/l"),
        config.SourceConfig("2020", "/c"),
        config.SourceConfig("2010", "/b"),
    )


def test_labels_of_a_year_named_twice_are_refused(project):
    with pytest.raises(UsageError, match="2010:labels is named twice"):
        tile_arguments(project, ["2010=a", "2010:labels=b", "2010:labels=c"])


def test_years_told_by_names_need_no_year(project, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = ["ortho=new/*.tif", ":labels=a", ":changed=/c"]
    request = tile_arguments(project, given, year_from=r"_(\d{4})_")
    assert request.settings.source == (
        config.SourceConfig(
            images=f"{tmp_path}/ortho=new/*.tif",
            labels=f"{tmp_path}/a",
            changed="/c",
            year_from=r"_(\d{4})_",
        ),
    )


def test_a_stac_collection_tells_the_years_itself(project, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    items = f"{tmp_path}/items.json"
    request = tile_arguments(project, ["stac=items.json", "2030=a"], asset="image")
    assert request.settings.source == (
        config.SourceConfig(images=items, year_from=r"\d{4}", asset="image"),
        config.SourceConfig("2030", f"{tmp_path}/a"),
    )
    request = tile_arguments(project, ["stac=items.json"], year_from=r"\d{4}-\d\d")
    assert request.settings.source == (config.SourceConfig(images=items, year_from=r"\d{4}-\d\d"),)


@pytest.mark.parametrize(
    ("sources", "options", "named"),
    [
        ([], {"year_from": "x"}, "need georeferenced imagery"),
        ([], {"asset": "x"}, "need georeferenced imagery"),
        (["test=a"], {"folders": "train=b", "year_from": "x"}, "need georeferenced imagery"),
        (["2010=a"], {"asset": "x"}, "STAC"),
        (["a", ":lables=b"], {"year_from": "x"}, ":lables=b"),
        (["stac:labels=a"], {}, "named|form"),
    ],
)
def test_what_tells_no_year_is_refused(project, sources, options, named):
    with pytest.raises(UsageError, match=named):
        tile_arguments(project, sources, **options)


def test_overrides_beat_the_file_and_sources_replace_its_sources(project):
    project.config.write_text(IN_FILE)
    request = tile_arguments(project, overrides=["grid.gsd=1"])
    assert years(request.settings) == ["2000"]
    assert (request.settings.grid.size, request.settings.grid.gsd) == (64, 1.0)
    assert years(tile_arguments(project, ["2010=a"]).settings) == ["2010"]
    assert years(tile_arguments(project, folders="set").settings) == []


def test_sources_replace_the_folders_of_the_file(project):
    project.config.write_text('[images]\nfolders = ["set"]\n')
    assert tile_arguments(project).settings.images.folders == ("set",)
    assert tile_arguments(project, ["2010=a"]).settings.images.folders == ()


def test_folders_and_pairs_are_absolute(project, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    images = tile_arguments(project, folders="set").settings.images
    assert (images.folders, images.pairs) == ((f"{tmp_path}/set",), ())
    images = tile_arguments(project, ["test=b", "c=d"], folders="train=a").settings.images
    assert images.folders == (f"train={tmp_path}/a", f"test={tmp_path}/b", f"{tmp_path}/c=d")
    images = tile_arguments(project, pairs=("a", "/b")).settings.images
    assert (images.folders, images.pairs) == ((), (f"{tmp_path}/a", "/b"))


@pytest.mark.parametrize("more", [{"folders": "a"}, {"sources": ["2010=a"]}])
def test_pairs_come_alone(project, more):
    with pytest.raises(UsageError, match="--pairs"):
        tile_arguments(project, pairs=("a", "b"), **more)


def test_areas_are_globs_or_polygon_files(project, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for rule, expected in (("source", "a*"), ("file", f"{tmp_path}/a*")):
        request = tile_arguments(project, ["2010=x"], test=["a*"], overrides=[f"split.by={rule}"])
        assert request.settings.split.test == (expected,)
        assert request.settings.split.validation == ()
    with pytest.raises(UsageError, match="by blocks"):
        tile_arguments(project, ["2010=x"], validation=["a*"])


def test_the_file_is_parsed_once(project, monkeypatch):
    project.config.write_text(IN_FILE)
    parsed = []
    loads = tomllib.loads
    monkeypatch.setattr(tomllib, "loads", lambda text: (parsed.append(text), loads(text))[1])
    tile_arguments(project, ["2010=a"], test=["x"], overrides=["split.by=source"])
    assert parsed.count(IN_FILE) == 1


def test_nothing_named_repeats_the_last_request(project, write_raster):
    path = write_raster("a.tif", np.full((3, 64, 64), 90, np.uint8))
    assert last_request(project) == TileRequest(source=(), set=())
    first = tile_arguments(project, [f"2010={path}"], overrides=["grid.size=16", "split.by=source"])
    made = tile(project, first.settings, overrides=first.overrides, workers=1)
    assert (made.grid, made.skipped) == (made.table.grid.id, 0)
    assert made.splits == {"train": 16, "validation": 0, "test": 0}
    assert tile_arguments(project) == first
    # What is named beside it comes on top, and its split rule is known.
    again = tile_arguments(project, test=["a*"], overrides=["grid.size=32"])
    assert again.settings.grid.size == 32
    assert again.settings.split == config.SplitConfig(by="source", test=("a*",))
    assert again.settings.source == first.settings.source


def test_skipped_tiles_are_counted(project, write_raster):
    values = np.full((3, 64, 64), 90, np.uint8)
    values[:, :32, :32] = 0
    request = tile_arguments(
        project,
        [f"2010={write_raster('a.tif', values, nodata=0)}"],
        overrides=["grid.size=32", "split.by=source"],
    )
    made = tile(project, request.settings, overrides=request.overrides, workers=1)
    assert (len(made.table), made.skipped) == (3, 1)

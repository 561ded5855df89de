"""Headers are remembered for as long as what they were read from stays as it was."""

from __future__ import annotations

import json
import os
import shutil
import time

import numpy as np
import pytest
import rasterio.shutil
from small_project import tile_sources

from geomatch.errors import BadFileError
from geomatch.geo import rasters
from geomatch.geo.headers import Headers
from geomatch.geo.views import Reading
from geomatch.tiling.usable import usable

VALUES = np.full((3, 32, 32), 9, np.uint8)


@pytest.fixture
def opened(monkeypatch):
    """Paths whose headers are read from now on."""
    found: list[str] = []
    read = rasters.read_header

    def told(path, *given):
        found.append(path)
        return read(path, *given)

    monkeypatch.setattr(rasters, "read_header", told)
    return found


@pytest.fixture
def remembered(tmp_path, opened):
    """A function that inspects files as a new run does, and returns which of them it opened."""

    def inspect(*paths, reading=None):
        opened.clear()
        known = Headers(tmp_path / "headers.json")
        found = [rasters.placed(known.read(str(path), reading)) for path in paths]
        known.remember(found, reading)
        known.save()
        assert found == [rasters.inspect(str(path), reading) for path in paths]
        return opened[: len(opened) - len(paths)]

    return inspect


def test_a_second_run_opens_nothing(write_raster, remembered):
    a, b = write_raster("a.tif", VALUES), write_raster("b.tif", VALUES, crs="EPSG:2154")
    assert remembered(a, b) == [str(a), str(b)]
    assert remembered(a, b) == []
    assert remembered(a, b, reading=Reading(bands=(2,))) == [str(a), str(b)], "read otherwise"


@pytest.mark.parametrize("what", ["pixels", "time", "sidecar", "sidecar of another suffix"])
def test_a_file_that_changed_is_opened_again(write_raster, remembered, what):
    a, b = write_raster("a.tif", VALUES), write_raster("b.tif", VALUES)
    remembered(a, b)
    if what == "pixels":
        write_raster("a.tif", np.concatenate([VALUES, VALUES]))
    elif what == "time":
        later = time.time() + 10
        os.utime(a, (later, later))
    else:
        a.with_name("a.tif.msk" if what == "sidecar" else "a.tfw").write_text("")
    assert remembered(a, b) == [str(a)]
    assert remembered(a, b) == []


def test_a_file_behind_a_vrt_that_changed(write_raster, remembered, tmp_path):
    path = write_raster("deep/a.tif", VALUES)
    rasterio.shutil.copy(path, tmp_path / "a.vrt", driver="VRT")
    remembered(tmp_path / "a.vrt")
    assert remembered(tmp_path / "a.vrt") == []
    later = time.time() + 10
    os.utime(path, (later, later))
    assert remembered(tmp_path / "a.vrt") == [str(tmp_path / "a.vrt")]


@pytest.mark.parametrize("damage", ["", "{}", '{"by": 1, "files": [], "crs": 0}', "gone"])
def test_what_is_remembered_may_be_lost(write_raster, remembered, tmp_path, damage):
    a = write_raster("a.tif", VALUES)
    remembered(a)
    if damage == "gone":
        (tmp_path / "headers.json").unlink()
    else:
        (tmp_path / "headers.json").write_text(damage)
    assert remembered(a) == [str(a)]
    assert remembered(a) == []


def test_an_entry_that_makes_no_sense_is_not_trusted(write_raster, remembered, tmp_path):
    a = write_raster("a.tif", VALUES)
    remembered(a)
    kept = json.loads((tmp_path / "headers.json").read_text())
    (entry,) = kept["files"].values()
    del entry[2]["layout"]["bands"]
    (tmp_path / "headers.json").write_text(json.dumps(kept))
    assert remembered(a) == [str(a)]


def test_tiling_again_opens_no_header(write_raster, project, opened):
    for year in ("2010", "2020"):
        write_raster(f"{year}/a.tif", np.full((3, 128, 128), 9, np.uint8))
    paths = {year: project.root.parent / year for year in ("2010", "2020")}
    tile_sources(project, paths)
    assert len(opened) == 2
    opened.clear()
    tile_sources(project, paths, "grid.size=16")
    assert opened == []
    shutil.copy(paths["2010"] / "a.tif", paths["2010"] / "b.tif")
    tile_sources(project, paths)
    assert opened == [str(paths["2010"] / "b.tif")]


def test_the_first_bad_file_is_named_whatever_thread_finds_it(tmp_path):
    """And those after it stay unread."""
    paths = [f"{number}" for number in range(1000)]
    asked = []

    def inspect(path):
        asked.append(path)
        if path == "7":
            time.sleep(0.1)
        if path in ("7", "8"):
            raise BadFileError(path, "is bad", "")
        return rasters.Raster(path, "", (0, 0, 1, 1), (0, 0, 1, 1), None, ())

    with pytest.raises(BadFileError, match=r"^7 "):
        usable(paths, inspect, None)
    assert len(asked) < 200
    unreadable: dict[str, str] = {}
    counts: list[int] = []
    found = usable(paths, inspect, unreadable, counts.append)
    assert [raster.path for raster in found] == [p for p in paths if p not in unreadable]
    assert list(unreadable) == ["7", "8"]
    assert counts == list(range(1, 1001))

"""Labels by class: files, layers and conditions of `[[labels]]`, class rasters, BD TOPO."""

from __future__ import annotations

import json
import os

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyogrio
import pytest
import shapely
from command_line import run_command
from small_project import settings, tile_sources

from geomatch import config
from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.errors import GeomatchError
from geomatch.geo.labels import LayerReader
from geomatch.runs import load_encoder
from geomatch.tiling import bdtopo
from geomatch.tiling.request import tile_arguments

LEFT, TOP = 500_000, 5_000_000


@pytest.fixture
def image(write_raster):
    """2 x 2 cells of one band."""
    return write_raster("image.tif", np.full((1, 64, 64), 90, np.uint8), origin=(LEFT, TOP))


def drawn(project, table, year="2010"):
    """(64, 64) labels of a year, its four tiles put together."""
    canvas = np.zeros((64, 64), np.uint8)
    bounds = table.bounds().astype(int)
    for i in np.flatnonzero(table.year == table.years.index(year)):
        pixels = TileStore.open(project.pixels).read(table.store_row[[i]])[0]
        x, y = bounds[i, 0] - LEFT, TOP - bounds[i, 3]
        canvas[y : y + 32, x : x + 32] = pixels[..., 1]
    return canvas


def box(left, top, right, bottom):
    """From LEFT and TOP, y downward."""
    return shapely.box(LEFT + left, TOP - bottom, LEFT + right, TOP - top)


def line(*points):
    return shapely.LineString([(LEFT + x, TOP - y) for x, y in points])


def write(path, shapes, layer=None, crs="EPSG:32631", **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = geopandas.GeoDataFrame(columns, geometry=shapes, crs="EPSG:32631").to_crs(crs)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_file(path, **({"layer": layer} if layer else {}))
    return path


def classes_of(project):
    return tuple(project.tile_manifest().label_classes)


def tile_with(project, image, *tables, years=("2010",), labels=None, **options):
    images = dict.fromkeys(years, image)
    return tile_sources(project, images, labels=labels, tables=tables, **options)


# Vectors


def test_later_tables_lie_over_earlier_ones(project, image, tmp_path):
    """Of several files in several systems; lines and points as wide as their buffer."""
    write(tmp_path / "woods.gpkg", [box(0, 0, 64, 40)], crs="EPSG:2154")
    write(tmp_path / "roads.geojson", [line((-50, 20), (100, 20))], crs="EPSG:4326")
    write(tmp_path / "more/trees.shp", [shapely.Point(LEFT + 32, TOP - 52)])
    table = tile_with(
        project,
        image,
        {"file": str(tmp_path / "woods.gpkg"), "class": "wood"},
        {"file": str(tmp_path / "roads.geojson"), "class": "road", "buffer": 3},
        {"file": str(tmp_path / "more/trees.shp"), "class": "tree", "buffer": 5.0},
    )
    assert classes_of(project) == ("wood", "road", "tree")
    got = drawn(project, table)
    expected = np.zeros((64, 64), np.uint8)
    expected[:40] = 1
    expected[17:23] = 2
    y, x = np.mgrid[:64, :64] + 0.5
    expected[np.hypot(x - 32, y - 52) < 5] = 3
    assert (got != expected).mean() < 0.01  # the circle is a polygon of 32 corners
    np.testing.assert_array_equal(got[:40], expected[:40])


def test_a_table_may_come_twice(project, image, tmp_path):
    """Below and above another."""
    low, high = box(0, 0, 20, 20), box(10, 0, 30, 20)
    rules = [
        {"file": str(write(tmp_path / f"{name}.gpkg", [shape])), "class": name}
        for name, shape in (("a", low), ("b", high))
    ]
    got = drawn(project, tile_with(project, image, *rules, rules[0]))
    assert got[5, [5, 15, 25]].tolist() == [1, 1, 2]


@pytest.mark.parametrize("ending", ["shp", "gpkg", "geojson", "fgb", "parquet"])
def test_a_condition_chooses_features_of_any_format(project, image, tmp_path, ending):
    """GDAL would take attributes that are not read for null, and find nothing."""
    shapes = [box(0, 0, 10, 10), box(20, 0, 30, 10), box(40, 0, 50, 10)]
    path = write(
        tmp_path / f"land.{ending}", shapes, kind=["wood", "water", "wood"], level=[1, 2, 3]
    )
    table = tile_with(
        project,
        image,
        {"file": str(path), "class": "wood", "where": "kind = 'wood' AND level < 3"},
        {"file": str(path), "class": "water", "where": "KIND = 'water'"},
    )
    got = drawn(project, table)
    expected = np.zeros((64, 64), np.uint8)
    expected[:10, :10] = 1
    expected[:10, 20:30] = 2
    np.testing.assert_array_equal(got, expected)


def test_geoparquet_in_degrees_with_lists_and_without_some_geometries(project, image, tmp_path):
    """Read by several processes."""
    shapes = [box(0, 0, 10, 10), None, box(20, 0, 30, 10)]
    path = write(tmp_path / "land.parquet", shapes, crs="EPSG:4326", names=[["a"], [], ["b", "c"]])
    table = tile_with(project, image, {"file": str(path), "class": "wood"}, workers=2)
    got = drawn(project, table)
    assert got[2:8, 2:8].all()
    assert got[2:8, 22:28].all()
    assert not got[:, 12:18].any()


def test_parquet_without_geometries_is_told_from_geoparquet(project, image, tmp_path):
    path = tmp_path / "land.parquet"
    pq.write_table(pa.table({"a": [1, 2]}), path)
    with pytest.raises(GeomatchError, match=r"land\.parquet is Parquet, but no GeoParquet"):
        tile_with(project, image, {"file": str(path), "class": "wood"})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(GeomatchError, match=r"land\.parquet cannot be read as GeoParquet"):
        tile_with(project, image, {"file": str(path), "class": "wood"})


@pytest.mark.parametrize("ending", ["shp", "gpkg"])
def test_values_of_an_attribute_are_classes(project, image, tmp_path, ending):
    """Each its own, in their order, or those of rules; features of no value stay unknown."""
    shapes = [box(10 * i, 0, 10 * i + 10, 10) for i in range(4)]
    uses = ["wood", "d'eau", "meadow", None]
    path = str(write(tmp_path / f"land.{ending}", shapes, use=uses, code=[1, 2, 5, 9]))
    own = {"file": path, "attribute": "use", "where": "code < 5"}
    table = tile_with(project, image, own)
    assert classes_of(project) == ("d'eau", "wood")
    assert drawn(project, table)[5, 5:40:10].tolist() == [2, 1, 0, 0]
    named = {
        "file": path,
        "attribute": "use",
        "classes": ["wood=green", "d'eau=blue", "meadow=green"],
    }
    table = tile_with(project, image, named)
    assert classes_of(project) == ("green", "blue")
    assert drawn(project, table)[5, 5:40:10].tolist() == [1, 2, 1, 0]
    numbers = {"file": path, "attribute": "code", "classes": ["2..8=some", "9=last"]}
    table = tile_with(project, image, numbers)
    assert classes_of(project) == ("some", "last")
    assert drawn(project, table)[5, 5:40:10].tolist() == [0, 1, 1, 2]
    table = tile_with(project, image, {"file": path, "attribute": "code"})
    assert classes_of(project) == ("1", "2", "5", "9")
    assert drawn(project, table)[5, 5:40:10].tolist() == [1, 2, 3, 4]


def test_layers_and_years_of_tables(project, image, tmp_path):
    """A year without a layer is unknown; a table without a year is of all."""
    path = tmp_path / "land.gpkg"
    write(path, [box(0, 0, 10, 10)], layer="woods")
    write(path, [box(20, 0, 30, 10)], layer="water")
    other = write(tmp_path / "new.gpkg", [box(40, 0, 50, 10)])
    table = tile_with(
        project,
        image,
        {"file": str(path), "layer": "water", "class": "water", "year": "2010"},
        {"file": str(other), "class": "house", "year": "2020"},
        years=("2010", "2020", "2030"),
    )
    for year, (start, value) in {"2010": (20, 1), "2020": (40, 2), "2030": (0, 0)}.items():
        expected = np.zeros((64, 64), np.uint8)
        expected[:10, start : start + 10] = value
        np.testing.assert_array_equal(drawn(project, table, year), expected)
    years = project.tile_manifest().years
    assert [years[year].labels for year in table.years] == [1, 1, 0]


def test_a_glob_of_files_has_one_class(project, image, tmp_path):
    for i in range(3):
        write(tmp_path / f"roads/{i}.gpkg", [box(20 * i, 0, 20 * i + 10, 10)])
    table = tile_with(project, image, {"file": f"{tmp_path}/roads/*.gpkg", "class": "road"})
    assert (drawn(project, table) == 1).sum() == 300


# Rasters


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "uint32"])
def test_values_of_a_raster_are_classes_by_rule(write_raster, project, image, dtype):
    rng = np.random.default_rng(0)
    values = rng.choice([0, 1, 2, 3, 4, 7, 99, 111], (1, 64, 64)).astype(dtype)
    path = write_raster("cover.tif", values, origin=(LEFT, TOP), nodata=99)
    rules = ["111=forest", "1..3=water", "4 = forest", "0=sea", "99=ice"]
    table = tile_with(project, image, {"file": str(path), "classes": rules})
    assert classes_of(project) == ("forest", "water", "sea", "ice")
    names = {0: 3, 1: 2, 2: 2, 3: 2, 4: 1, 7: 0, 99: 0, 111: 1}  # 99 is not valid, 7 has no rule
    expected = np.vectorize(names.get)(values[0])
    np.testing.assert_array_equal(drawn(project, table), expected)
    shares = project.tile_manifest().label_classes
    for code, name in enumerate(shares, 1):
        assert shares[name] == pytest.approx((expected == code).mean(), rel=0.01)


def test_negative_values_are_classes_too(write_raster, project, image):
    values = np.random.default_rng(0).choice([-5, -1, 3], (1, 64, 64)).astype(np.int16)
    path = write_raster("cover.tif", values, origin=(LEFT, TOP))
    table = tile_with(project, image, {"file": str(path), "classes": ["-5..-2=low", "3=high"]})
    expected = np.select([values[0] == -5, values[0] == 3], [1, 2], 0)
    np.testing.assert_array_equal(drawn(project, table), expected)


def test_values_without_a_rule_are_classes_in_their_own_order(write_raster, project, image):
    """The same in every year, though each year has others; 0 and nodata stay unknown."""
    rng = np.random.default_rng(0)
    values = {
        "2010": rng.choice([0, 300, 5, 999], (1, 64, 64)).astype(np.uint16),
        "2020": rng.choice([7, 300], (1, 64, 64)).astype(np.uint16),
    }
    paths = {
        year: write_raster(f"{year}.tif", values[year], origin=(LEFT, TOP), nodata=999)
        for year in values
    }
    table = tile_with(project, image, years=tuple(values), labels=paths)
    assert classes_of(project) == ("5", "7", "300")
    codes = {0: 0, 999: 0, 5: 1, 7: 2, 300: 3}
    for year in values:
        expected = np.vectorize(codes.get)(values[year][0])
        np.testing.assert_array_equal(drawn(project, table, year), expected)


def test_colours_of_a_raster_are_classes_by_palette(write_raster, project, image):
    colours = np.array([[255, 0, 0], [0, 128, 255], [1, 2, 3]], np.uint8)
    chosen = np.random.default_rng(0).integers(0, 3, (64, 64))
    path = write_raster("cover.tif", np.moveaxis(colours[chosen], -1, 0), origin=(LEFT, TOP))
    rules = ["#ff0000=road", "#0080FF=water"]
    table = tile_with(project, image, {"file": str(path), "classes": rules})
    np.testing.assert_array_equal(drawn(project, table), np.array([1, 2, 0])[chosen])


def test_a_mask_is_of_one_class_and_leaves_what_is_below(write_raster, project, image, tmp_path):
    woods = write(tmp_path / "woods.gpkg", [box(0, 0, 64, 64)])
    values = np.zeros((1, 64, 64), np.uint8)
    values[:, 10:20] = 255
    values[:, 20:30] = 1
    mask = write_raster("houses.tif", values, origin=(LEFT, TOP))
    table = tile_with(
        project,
        image,
        {"file": str(woods), "class": "wood"},
        {"file": str(mask), "class": "house"},
    )
    np.testing.assert_array_equal(drawn(project, table), np.where(values[0] > 0, 2, 1))


def test_sheets_of_a_class_raster(write_raster, project, image, tmp_path):
    for i in range(4):
        values = np.full((1, 64, 16), 1000 + i, np.uint16)
        write_raster(f"cover/{i}.tif", values, origin=(LEFT + 16 * i, TOP))
    table = tile_with(project, image, {"file": str(tmp_path / "cover")})
    assert classes_of(project) == ("1000", "1001", "1002", "1003")
    np.testing.assert_array_equal(drawn(project, table), np.tile(1 + np.arange(64) // 16, (64, 1)))


def test_a_shard_is_cut_from_the_sheets_near_it(
    write_raster, project, image, tmp_path, monkeypatch
):
    """Else each of many shards would open and be identified by all sheets."""
    monkeypatch.setattr("geomatch.tiling.batches.shard_rows", lambda size, channels: 1)
    for i in range(2):
        write_raster(f"cover/{i}.tif", np.full((1, 64, 32), 7 + i), origin=(LEFT + 32 * i, TOP))
    tables = [{"file": str(tmp_path / "cover")}, {"file": str(tmp_path / "cover/0.tif")}]
    read, real = [], LayerReader.__init__

    def recorded(self, layers, *more):
        read.append([[raster.name for raster in layer.rasters] for layer in layers])
        real(self, layers, *more)

    monkeypatch.setattr(LayerReader, "__init__", recorded)
    table = tile_with(project, image, *tables)
    assert sorted(read) == [*[[["0.tif"], ["0.tif"]]] * 2, *[[["1.tif"]]] * 2]
    np.testing.assert_array_equal(drawn(project, table), np.tile(1 + np.arange(64) // 32, (64, 1)))


# From the command line


def test_tables_of_the_file_are_found_from_the_project(project, image, tmp_path, monkeypatch):
    write(project.root / "roads.gpkg", [box(0, 0, 10, 10)])
    project.config.write_text(
        '[[labels]]\nfile = "roads.gpkg"\nclass = "road"\n[grid]\nsize = 32\ngsd = 1.0\n'
        '[split]\nby = "source"\n'
    )
    monkeypatch.chdir("/")
    arguments = ["tile", "-p", project.root, f"2010={image}", "--workers", 1]
    result = run_command(*map(str, arguments))
    assert result.exit_code == 0, result.stderr
    assert (drawn_last(project) == 1).sum() == 100
    shown = run_command("info", "-p", str(project.root))
    assert "road 2.44%" in shown.stdout  # 100 of 4096 pixels
    values = json.loads(run_command("info", "-p", str(project.root), "--json").stdout)
    assert values["tiles"]["label_classes"] == {"road": 0.0244}
    # What is drawn belongs to the request: another condition cuts again.
    again = run_command(*map(str, arguments))
    assert "up to date" in again.stderr
    project.config.write_text(project.config.read_text().replace('"road"', '"road"\nbuffer = 5'))
    again = run_command(*map(str, arguments))
    assert "up to date" not in again.stderr
    assert (drawn_last(project) == 1).sum() > 200


def drawn_last(project):
    return drawn(project, TileTable.load(project.catalogue))


def test_attributes_that_changed_are_read_again(project, image, tmp_path):
    """They are in another file than the shapes."""
    path = write(tmp_path / "land.shp", [box(0, 0, 10, 10)], kind=["wood"])
    rule = {"file": str(path), "class": "wood", "where": "kind = 'wood'"}
    assert (drawn(project, tile_with(project, image, rule)) == 1).sum() == 100
    stat = path.stat()
    write(path, [box(0, 0, 10, 10)], kind=["sand"])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not drawn(project, tile_with(project, image, rule)).any()


def test_a_class_that_no_pixel_has_is_said(project, image, tmp_path):
    path = write(tmp_path / "far.gpkg", [box(9000, 0, 9010, 10)])
    seen = []
    tile_with(
        project,
        image,
        {"file": str(path), "class": "road"},
        progress=lambda text, *_: seen.append(text),
    )
    assert "labels: no pixel of any tile is road" in seen


SITE = 'LOCAL_CS["site",LOCAL_DATUM["d",32767],UNIT["metre",1]]'


@pytest.mark.parametrize(
    ("keys", "message", "hint"),
    [
        ({"file": "land.gpkg"}, "land.gpkg has no class", 'class = "NAME"'),
        ({"class": "a"}, "without file", "file ="),
        ({"file": "none.gpkg", "class": "a"}, "no file matches .*none.gpkg", "file"),
        ({"file": "land.gpkg", "class": "a", "layer": "b"}, "no layer 'b'", "It has: land"),
        ({"file": "land.gpkg", "class": "a", "where": "sort = 1"}, "sort = 1", "attributes: kind"),
        ({"file": "land.geojson", "class": "a", "where": "kind ="}, "kind =", "attributes: kind"),
        ({"file": "land.gpkg", "class": "a", "year": "1999"}, "year 1999", "2010"),
        ({"file": "land.gpkg", "class": "a", "classes": ["1=b"]}, "both class and classes", "one"),
        ({"file": "land.gpkg", "attribute": "sort"}, "no attribute 'sort'", "attributes: kind"),
        ({"file": "land.gpkg", "attribute": "kind", "class": "a"}, "class and attribute", "one"),
        ({"file": "land.gpkg", "attribute": "kind", "classes": ["a"]}, "'a'", "forest=wood"),
        ({"file": "cover.tif", "attribute": "kind"}, "has no attribute", "Remove"),
        ({"file": "cover.tif", "class": "a", "where": "x"}, "is a raster, .* no where", "Remove"),
        ({"file": "cover.tif", "class": "a", "buffer": 1}, "has no buffer", "Remove"),
        ({"file": "cover.tif", "classes": ["1..5=a", "3=b"]}, "a and b overlap", "one class"),
        ({"file": "cover.tif", "classes": ["one=a"]}, "'one=a'", "VALUE|For example"),
        ({"file": "cover.tif", "classes": ["1="]}, "'1='", "For example"),
        ({"file": "cover.tif", "classes": ["#ff0000=a"]}, "cover.tif has 1 bands", "1=road"),
        ({"file": "rgb.tif", "classes": ["1=a"]}, "rgb.tif has 3 bands", "#ff0000=road"),
        ({"file": "wide.tif"}, "4096 classes, from 1 to 4096", "classes ="),
        ({"file": "zero.tif"}, "no value but 0", "0=sea"),
        ({"file": "PG:host=nowhere dbname=x", "class": "a"}, "database", "conda-forge"),
        ({"file": "text.gpkg", "class": "a"}, "text.gpkg cannot be opened", "ogrinfo"),
        ({"file": "site.gpkg", "class": "a"}, "site.gpkg .* which has no place", "-a_srs"),
        ({"file": "moon.gpkg", "class": "a"}, "moon.gpkg .* which has no place", "-a_srs"),
    ],
)
def test_tables_that_make_no_sense(write_raster, project, image, tmp_path, keys, message, hint):
    write(tmp_path / "land.gpkg", [box(0, 0, 10, 10)], kind=["a"])
    write(tmp_path / "land.geojson", [box(0, 0, 10, 10)], crs="EPSG:4326", kind=["a"])
    write_raster("cover.tif", np.full((1, 64, 64), 3, np.uint8), origin=(LEFT, TOP))
    write_raster("rgb.tif", np.full((3, 64, 64), 3, np.uint8), origin=(LEFT, TOP))
    values = np.arange(1, 4097, dtype=np.uint16).reshape(1, 64, 64)
    write_raster("wide.tif", values, origin=(LEFT, TOP))
    write_raster("zero.tif", np.zeros((1, 64, 64), np.uint8), origin=(LEFT, TOP))
    (tmp_path / "text.gpkg").write_text("no map")
    for name, crs in (("site", SITE), ("moon", "+proj=longlat +R=1737400")):
        shape = np.array([shapely.to_wkb(box(0, 0, 9, 9))], object)
        path = tmp_path / f"{name}.gpkg"
        pyogrio.raw.write(path, shape, [], [], geometry_type="Polygon", crs=crs)
    if "file" in keys and ":" not in keys["file"]:
        keys = {**keys, "file": str(tmp_path / keys["file"])}
    with pytest.raises(GeomatchError, match=message) as caught:
        tile_with(project, image, keys)
    assert any(part in caught.value.hint for part in hint.split("|"))
    assert not project.catalogue.exists()


def test_greys_and_classes_do_not_mix(project, image, tmp_path):
    path = write(tmp_path / "land.gpkg", [box(0, 0, 10, 10)])
    with pytest.raises(GeomatchError, match="labels of 2010 are greys"):
        tile_with(project, image, {"file": str(path), "class": "a"}, labels={"2010": path})


def test_tables_are_not_set(project):
    with pytest.raises(GeomatchError, match="labels are not set") as caught:
        tile_arguments(project, ["2010=a"], overrides=["labels.file=x"])
    assert "geomatch.toml" in caught.value.hint


# BD TOPO

ROADS = [line((-50, 5), (100, 5)), line((5, -50), (5, 100)), line((60, -50), (60, 100))]
THEMES = {
    # Shapes, and attributes: natures, position to the ground and state.
    "zone_de_vegetation": ([box(0, 30, 64, 64)], ["Bois"], None, None),
    "troncon_de_route": (
        ROADS, ["Route à 1 chaussée", "Route à 1 chaussée", "Sentier"], ["0", "-1", "0"],
        ["En service"] * 3,
    ),
    "batiment": ([box(0, 0, 20, 4)], ["Indifférenciée"], None, ["En service"]),
    "surface_hydrographique": ([box(30, 20, 50, 40)], ["Retenue"], ["0"], None),
    "troncon_hydrographique": (
        [line((0, 50), (64, 50))], ["Ecoulement naturel"], ["Gué ou radier"], None,
    ),
    "troncon_de_voie_ferree": ([line((-50, 60), (100, 60))], ["LGV"], ["1"], ["En projet"]),
    "cimetiere": ([box(40, 8, 50, 18)], ["Civil"], None, None),
    "terrain_de_sport": ([box(24, 8, 34, 18)], ["Terrain de tennis"], None, None),
    "commune": ([box(0, 0, 64, 64)], ["Commune"], None, None),
}  # fmt: skip
FIELDS = {
    "shp": ("NATURE", "POS_SOL", "ETAT"),
    "gpkg": ("nature", "position_par_rapport_au_sol", "etat_de_l_objet"),
}


def write_delivery(folder, form):
    """A delivery in the form of a GeoPackage, or of shapefiles in folders; returns its path."""
    folder.mkdir()
    for name, (shapes, *values) in THEMES.items():
        named = zip(FIELDS[form], values, strict=True)
        columns = {field: value for field, value in named if value is not None}
        if form == "gpkg":
            write(folder / "BDT_3-3_GPKG.gpkg", shapes, layer=name, **columns)
        else:
            write(folder / f"THEME_{name[:3]}" / f"{name.upper()}.shp", shapes, **columns)
    return folder / "BDT_3-3_GPKG.gpkg" if form == "gpkg" else folder


@pytest.mark.parametrize("form", ["shp", "gpkg"])
def test_themes_of_bd_topo_are_classes(project, image, tmp_path, form):
    """Tunnels, footpaths and what is only planned are not seen from above."""
    path = write_delivery(tmp_path / form, form)
    seen = []
    table = tile_with(
        project, image, labels={"2010": f"bdtopo:{path}"}, years=("2010", "2020"),
        progress=lambda text, *_: seen.append(text),
    )  # fmt: skip
    names = classes_of(project)
    assert names == bdtopo.CLASSES
    assert "labels of 2010: no layer of aerodrome" in seen
    assert "labels: no pixel of any tile is railway" in seen
    code = {name: i for i, name in enumerate(names, 1)}
    expected = np.zeros((64, 64), np.uint8)
    expected[30:] = code["vegetation"]
    expected[8:18, 40:50] = code["cemetery"]
    expected[8:18, 24:34] = code["sport ground"]
    expected[20:40, 30:50] = code["water"]
    expected[49:51] = code["water"]  # 3 m wide: the centres of two or three rows
    expected[2:8] = code["road"]
    expected[:4, :20] = code["building"]
    got = drawn(project, table)
    rows = np.r_[:48, 52:64]
    np.testing.assert_array_equal(got[rows], expected[rows])
    assert (got[49:51, 1:-1] == code["water"]).all()
    assert not drawn(project, table, "2020").any()


def test_bd_topo_of_two_versions_has_the_same_classes(project, image, tmp_path):
    old = write(tmp_path / "v2" / "E_BATI" / "BATI_INDIFFERENCIE.SHP", [box(0, 0, 20, 4)])
    write(tmp_path / "v2" / "A_RESEAU_ROUTIER" / "ROUTE.SHP", [ROADS[0]], POS_SOL=[0])
    new = write_delivery(tmp_path / "v3", "gpkg")
    table = tile_with(
        project, image, years=("2010", "2020"),
        labels={"2010": f"bdtopo:{old.parent.parent}", "2020": f"bdtopo:{new}"},
    )  # fmt: skip
    found = {year: drawn(project, table, year)[:8] for year in ("2010", "2020")}
    np.testing.assert_array_equal(found["2010"], found["2020"])
    codes = {1 + bdtopo.CLASSES.index(name) for name in ("road", "building")}
    assert set(np.unique(found["2010"]).tolist()) == {0} | codes


def test_tables_lie_over_bd_topo(project, image, tmp_path):
    path = write_delivery(tmp_path / "v3", "gpkg")
    own = write(tmp_path / "own.gpkg", [box(0, 0, 64, 2)])
    rule = {"file": str(own), "class": "building"}
    table = tile_with(project, image, rule, labels={"2010": f"bdtopo:{path}"})
    assert (drawn(project, table)[:2] == 1 + bdtopo.CLASSES.index("building")).all()


def test_a_folder_without_bd_topo(project, image, tmp_path):
    write(tmp_path / "other" / "roads.gpkg", [box(0, 0, 64, 2)])
    with pytest.raises(GeomatchError, match="no layer of BD TOPO"):
        tile_with(project, image, labels={"2010": f"bdtopo:{tmp_path}/other"})


@pytest.mark.parametrize("path", ["delivery", "bdtopo:delivery"])
def test_paths_on_the_command_line(project, monkeypatch, tmp_path, path):
    monkeypatch.chdir(tmp_path)
    request = tile_arguments(project, ["2010=a", f"2010:labels={path}"])
    prefix = "bdtopo:" if path.startswith("bdtopo:") else ""
    assert request.settings.source[0].labels == f"{prefix}{tmp_path}/delivery"
    monkeypatch.setenv("HOME", "/somewhere")
    for given, wanted in (
        ("PG:dbname=x user=y", "PG:dbname=x user=y"),
        (f"{prefix}~/delivery", f"{prefix}/somewhere/delivery"),
        ("/vsizip//a.zip/b.shp", "/vsizip//a.zip/b.shp"),
    ):
        known = tile_arguments(project, ["2010=a", f"2010:labels={given}"]).settings
        assert known.source[0].labels == wanted
        assert config.located(known, project.root).source[0].labels == wanted


# What a run makes of them


def test_a_run_has_the_classes_of_its_tiles(project, image, tmp_path):
    """As many planes; other tiles with other classes are not embedded with it."""
    from geomatch.embed import embed
    from geomatch.train import train

    path = write(tmp_path / "land.gpkg", [box(0, 0, 30, 30)])
    rules = [{"file": str(path), "class": name} for name in ("wood", "road", "house")]
    years = ("2010", "2020")
    tile_with(project, image, *rules, years=years)
    wanted = settings("train.epochs=0", "split.by=blocks")
    with pytest.raises(GeomatchError, match=r"label_classes = 2, but .* have 3 classes"):
        train(project, config.with_overrides(wanted, ["model.label_classes=2"]))
    train(project, wanted)
    chosen = json.loads((project.run("run1") / "config.json").read_text())
    assert chosen["settings"]["model"]["label_classes"] == 3
    assert chosen["label_classes"] == ["wood", "road", "house"]
    assert load_encoder(project, None, None).variables["params"]["encoder"]["fusion"][
        "kernel"
    ].shape == (1 + 3, 3)
    train(project, wanted)  # again: it is the same run
    embed(project, settings=wanted)
    tile_with(project, image, *rules[::-1], years=years)
    with pytest.raises(GeomatchError, match=r"house, road, wood, but run1@0 .* wood, road, house"):
        embed(project, settings=wanted)

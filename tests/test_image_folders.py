"""`tile` of images without georeference: class folders, MNIST files, pairs of folders."""

from __future__ import annotations

import gzip
import json
import os
import warnings
from collections import Counter
from dataclasses import replace

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
from command_line import run_command
from hand_made import hand_made_classes, hand_made_embedding_manifest, hand_made_tile_manifest
from image_sets import class_folders, draw_noise, tile_folders
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning
from small_project import SIZE, new_project, settings

from geomatch import image_input, index, query
from geomatch.data import store
from geomatch.data.embeddings import Embeddings
from geomatch.data.ground_truth import are_neutral, overlapping, tasks
from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.embed import embed
from geomatch.errors import GeomatchError, UsageError
from geomatch.geo.grid import Grid
from geomatch.info import info
from geomatch.manifests import Channels
from geomatch.tiling import image_files
from geomatch.train import train


def pixels(project, table):
    """Each tile's pixels, by id."""
    held = TileStore.open(project.pixels).read(table.store_row)
    return dict(zip(table.ids(), held, strict=True))


def splits(table):
    return dict(zip(table.ids(), table.split.tolist(), strict=True))


def write_idx(path, values):
    """An idx file of unsigned bytes, as MNIST's."""
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes()))
    return path


def digits(n, seed=0, size=6):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, size, size)).astype(np.uint8), np.arange(n).astype(np.uint8) % 3


def test_tiles_are_the_images(tmp_path, project):
    drawn = {}
    for name in ("b/x", "a/y", "a/deep/er/z"):
        drawn[f"{name}.png"] = draw_noise(tmp_path / "set" / f"{name}.png")
    draw_noise(tmp_path / "set" / "b" / "w.png")
    (tmp_path / "set" / "README.txt").write_text("no image")
    (tmp_path / "set" / "a" / "notes.txt").write_text("nor this")
    table = tile_folders(project, tmp_path / "set")
    assert table.ids() == ["a/deep/er/z.png", "a/y.png", "b/w.png", "b/x.png"]
    assert table.cells() == ["a", "a", "b", "b"]
    assert table.classes == ("a", "b")
    assert table.label.tolist() == table.places().tolist() == [0, 0, 1, 1]
    assert table.grid is None
    assert not table.dated
    held = pixels(project, table)
    for name, values in drawn.items():
        np.testing.assert_array_equal(held[name], values)


def test_a_tile_is_the_centre_square_resized_as_a_query_is(tmp_path, project):
    wide = draw_noise(tmp_path / "set" / "a" / "wide.png", 12, 20)
    tall = draw_noise(tmp_path / "set" / "a" / "tall.png", 31, 12)
    draw_noise(tmp_path / "set" / "a" / "big.png", 40, 64)
    held = pixels(project, tile_folders(project, tmp_path / "set", **{"grid.size": 12}))
    np.testing.assert_array_equal(held["a/wide.png"], wide[:, 4:16])
    np.testing.assert_array_equal(held["a/tall.png"], tall[9:21])
    on_the_ground = hand_made_tile_manifest(Grid("EPSG:32630", 12, 1.0, 12), tiles=3)
    for name in ("wide", "tall", "big"):
        path = tmp_path / "set" / "a" / f"{name}.png"
        asked = image_input.cut(str(path), on_the_ground)
        np.testing.assert_array_equal(held[f"a/{name}.png"], asked.pixels)


def test_shrinking_leaves_no_moire(tmp_path, project):
    """Lines a pixel wide become their mean, which taking every eighth pixel would not give."""
    for name in ("x", "y"):
        (tmp_path / "set" / "a").mkdir(parents=True, exist_ok=True)
        lines = np.tile(np.array([[0, 200]], np.uint8), (64, 32))
        Image.fromarray(lines).save(tmp_path / "set" / "a" / f"{name}.png")
    held = pixels(project, tile_folders(project, tmp_path / "set", **{"grid.size": 8}))
    assert np.abs(held["a/x.png"].astype(int) - 100).max() <= 12


@pytest.mark.parametrize(
    ("shapes", "asked", "size"),
    [
        ([(12, 12), (12, 12)], None, 12),
        ([(12, 12), (12, 12)], 8, 8),
        ([(12, 12), (12, 12)], 256, 256),
        ([(12, 14), (12, 14)], None, 256),
        ([(12, 12), (14, 14)], None, 256),
    ],
)
def test_the_side_is_the_images_own_unless_it_is_named(tmp_path, project, shapes, asked, size):
    for i, (height, width) in enumerate(shapes):
        draw_noise(tmp_path / "set" / "a" / f"{i}.png", height, width)
    if asked is not None:
        project.config.write_text(f"[grid]\nsize = {asked}\n")
    done = run_command("tile", "-p", str(project.root), "--folders", str(tmp_path / "set"))
    assert done.exit_code == 0, done.stderr
    assert project.tile_manifest().size == size


def test_splits_are_drawn_within_each_class(tmp_path, project):
    sizes = {"a": 40, "b": 20, "c": 10}
    table = tile_folders(project, class_folders(tmp_path / "set", sizes))
    for code, n in enumerate(sizes.values()):
        counts = np.bincount(table.split[table.label == code], minlength=3).tolist()
        assert counts == [0.7 * n, 0.2 * n, 0.1 * n]
    assert project.tile_manifest().splits == {"train": 49, "validation": 14, "test": 7}


def test_the_draw_is_of_the_seed_and_of_the_class_alone(tmp_path, project):
    root = class_folders(tmp_path / "set", {"a": 30, "b": 30})
    first = splits(tile_folders(project, root))
    other = splits(tile_folders(project, root, **{"split.seed": 1}))
    assert first != other
    class_folders(root, {"0": 30, "c": 5})
    again = splits(tile_folders(project, root))
    assert {name: again[name] for name in first} == first
    assert [again[f"0/0_{i:03d}.png"] for i in range(30)] != [
        first[f"a/a_{i:03d}.png"] for i in range(30)
    ]


def test_splits_by_count(tmp_path, project):
    table = tile_folders(
        project, class_folders(tmp_path / "set", {"a": 9, "b": 30}), validation=3, test=2
    )
    for code, n in enumerate((9, 30)):
        assert np.bincount(table.split[table.label == code]).tolist() == [n - 5, 3, 2]


def test_given_splits_are_kept_and_the_rest_is_drawn_from_train(tmp_path, project):
    """The same file names in both folders make other tiles."""
    train = class_folders(tmp_path / "one", {"a": 10, "b": 20})
    test = class_folders(tmp_path / "two", {"a": 10, "b": 5}, seed=7)
    table = tile_folders(project, f"train={train}", f"test={test}")
    assert len(set(table.ids())) == len(table) == 45
    found = Counter(
        (name.split("/")[0], SPLITS[code], name.split("/")[1])
        for name, code in splits(table).items()
    )
    assert found == {
        ("train", "train", "a"): 8,
        ("train", "validation", "a"): 2,
        ("train", "train", "b"): 16,
        ("train", "validation", "b"): 4,
        ("test", "test", "a"): 10,
        ("test", "test", "b"): 5,
    }


def test_mnist_files(tmp_path, project):
    images_of, labels = digits(30)
    np.savez(tmp_path / "train.npz", x=images_of, y=labels)
    asked, names = digits(12, seed=1)
    write_idx(tmp_path / "t-images-idx3-ubyte.gz", asked)
    write_idx(tmp_path / "t-labels-idx1-ubyte.gz", names)
    table = tile_folders(
        project,
        f"train={tmp_path / 'train.npz'}",
        f"test={tmp_path / 't-images-idx3-ubyte.gz'}",
    )
    assert len(set(table.ids())) == len(table) == 42
    assert table.classes == ("0", "1", "2")
    assert project.tile_manifest().channels == Channels(1, 0)
    held = pixels(project, table)
    for i in range(30):
        np.testing.assert_array_equal(held[f"train/{i % 3}/{i:05d}"][..., 0], images_of[i])
    for i in range(12):
        np.testing.assert_array_equal(held[f"test/{i % 3}/{i:05d}"][..., 0], asked[i])
        assert splits(table)[f"test/{i % 3}/{i:05d}"] == SPLITS.index("test")


def test_colour_arrays_with_names_of_classes(tmp_path, project):
    values = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3)).astype(np.uint8)
    np.savez(tmp_path / "set.npz", images=values, labels=np.array(["cat", "dog", "cat", "dog"]))
    held = pixels(project, tile_folders(project, tmp_path / "set.npz"))
    assert sorted(held) == ["cat/00000", "cat/00002", "dog/00001", "dog/00003"]
    np.testing.assert_array_equal(held["dog/00003"], values[3])


def test_channels(tmp_path, project):
    grey = class_folders(tmp_path / "set", {"a": 3}, bands=1)
    table = tile_folders(project, grey)
    assert project.tile_manifest().channels.image == 1
    before = pixels(project, table)
    seen = draw_noise(grey / "a" / "veiled.png", bands=4)
    table = tile_folders(project, grey)
    assert project.tile_manifest().channels.image == 3
    after = pixels(project, table)
    np.testing.assert_array_equal(after["a/veiled.png"], seen[..., :3])
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values.repeat(3, axis=2))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_images_are_upright_as_their_exif_orientation_says(tmp_path, project, suffix, dtype):
    """What is stored, by orientation, is the definition of the tag: where row 0, column 0 lie."""
    upright = np.random.default_rng(0).integers(0, 256, (12, 15)).astype(dtype)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }
    (tmp_path / "set" / "a").mkdir(parents=True)
    for orientation, values in stored.items():
        exif = Image.Exif()
        exif[0x112] = orientation
        path = tmp_path / "set" / "a" / f"{orientation}.{suffix}"
        Image.fromarray(np.ascontiguousarray(values)).save(path, exif=exif)
    said = {"grid.size": 12} | ({"grid.stretch": "0,255"} if dtype == "uint16" else {})
    held = pixels(project, tile_folders(project, tmp_path / "set", **said))
    assert len(held) == 8
    for name, values in held.items():
        np.testing.assert_array_equal(values[..., 0], upright[:, 1:13], name)


def write_deep(path, values, *kinds):
    """An image of any bands and dtype, as GDAL writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    form = {"count": len(values), "height": values.shape[1], "width": values.shape[2]}
    driver = {"png": "PNG", "tif": "GTiff", "jp2": "JP2OpenJPEG"}[path.suffix[1:]]
    lossless = {"quality": 100, "reversible": True} if driver == "JP2OpenJPEG" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        target = rasterio.open(path, "w", driver=driver, dtype=values.dtype, **form, **lossless)
    with target:
        if kinds:
            target.colorinterp = [ColorInterp[kind] for kind in kinds]
        target.write(values)
    return values


@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [("png", "uint16"), ("tif", "uint16"), ("jp2", "uint16"), ("tif", "int16"), ("tif", "float32")],
)
def test_deep_images_are_stretched(tmp_path, project, suffix, dtype, bands):
    """Between two values; the stretch is in the manifest, for queries."""
    rng = np.random.default_rng(0)
    for i in range(3):
        values = rng.integers(0, 5000, (bands, 12, 12)).astype(dtype)
        write_deep(tmp_path / "set" / "a" / f"{i}.{suffix}", values)
    table = tile_folders(project, tmp_path / "set", **{"grid.stretch": "1000,4000"})
    got = pixels(project, table)[f"a/2.{suffix}"]
    wanted = np.clip((values - 1000.0) / 3000 * 255, 0, 255)
    assert got.shape == (12, 12, bands)
    np.testing.assert_allclose(np.moveaxis(got, -1, 0), wanted, atol=0.501)
    assert project.tile_manifest().stretch == {"low": [1000] * bands, "high": [4000] * bands}
    again = tile_folders(project, tmp_path / "set", **{"grid.stretch": "0,5000"})
    assert not np.array_equal(pixels(project, again)[f"a/2.{suffix}"], got)


def test_deep_pairs_are_stretched_by_year(tmp_path, project):
    """One year may be of 8 bits, and grey images become colour beside those that are."""
    for name in "abc":
        draw_noise(tmp_path / "2020" / f"{name}.png")
        values = np.arange(144, dtype=np.uint16).reshape(1, 12, 12) * 100
        write_deep(tmp_path / "2010" / f"{name}.tif", values)
    folders = [tmp_path / "2010", tmp_path / "2020"]
    table = tile_folders(project, pairs=folders, **{"grid.stretch": "0%,100%"})
    years = project.tile_manifest().years
    assert years["2010"].stretch == {"low": [0] * 3, "high": [14300] * 3}
    assert years["2020"].stretch is None
    held = pixels(project, table)["a@2010"]
    np.testing.assert_allclose(held[..., 1], np.arange(144).reshape(12, 12) * 255 / 143, atol=0.51)


def test_deep_images_without_a_stretch_or_beside_others(tmp_path, project):
    values = np.full((3, 12, 12), 5000, np.uint16)
    write_deep(tmp_path / "set" / "a" / "deep.png", values)
    with pytest.raises(UsageError, match=r"deep\.png has values of uint16") as raised:
        tile_folders(project, tmp_path / "set", least=1)
    assert "--stretch" in raised.value.hint
    class_folders(tmp_path / "set", {"b": 7})
    said = r"uint16 \(a/deep\.png\), but others of uint8 \(b/b_000\.png, .* and 2 more\)"
    with pytest.raises(GeomatchError, match=said) as raised:
        tile_folders(project, tmp_path / "set", least=1, **{"grid.stretch": "0,5000"})
    assert "gdal_translate" in raised.value.hint


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_alpha_of_an_image_is_dropped_wherever_it_is(tmp_path, project, dtype):
    values = np.random.default_rng(0).integers(0, 256, (4, 12, 12)).astype(dtype)
    values[0] = 255
    colours = ("red", "green", "blue")
    write_deep(tmp_path / "set" / "a" / "0.tif", values, "alpha", *colours)
    write_deep(tmp_path / "set" / "a" / "1.tif", values[[1, 2, 3, 0]], *colours, "alpha")
    said = {"grid.stretch": "0,255"} if dtype == "uint16" else {}
    for held in pixels(project, tile_folders(project, tmp_path / "set", **said)).values():
        np.testing.assert_array_equal(held, np.moveaxis(values[1:], 0, -1))


def test_bands_of_images_are_chosen_by_number(tmp_path, project):
    values = np.random.default_rng(0).integers(0, 256, (5, 12, 12)).astype(np.uint8)
    for i in range(2):
        write_deep(tmp_path / "set" / "a" / f"{i}.tif", values)
    for bands in ([5, 1, 2], [4]):
        table = tile_folders(project, tmp_path / "set", **{"grid.bands": bands})
        held = pixels(project, table)["a/1.tif"]
        np.testing.assert_array_equal(np.moveaxis(held, -1, 0), values[np.array(bands) - 1])
        assert project.tile_manifest().reading["bands"] == bands
    with pytest.raises(GeomatchError, match=r"none .* can be read; a/0\.tif: .* no band 7"):
        tile_folders(project, tmp_path / "set", **{"grid.bands": [1, 2, 7]})


@pytest.mark.parametrize("option", [{"grid.collar": True}, {"grid.nodata": 0.0}])
def test_validity_is_of_georeferenced_imagery(tmp_path, project, option):
    root = class_folders(tmp_path / "set", {"a": 2})
    with pytest.raises(UsageError, match="for georeferenced imagery"):
        tile_folders(project, root, **option)


def test_small_and_ignored_classes_are_left_out_and_listed(tmp_path, project):
    root = class_folders(tmp_path / "set", {"a": 6, "b": 4, "c": 3, "d": 9})
    notes = []
    table = tile_folders(project, root, least=4, ignore=["d"], notes=notes)
    assert table.classes == ("a", "b")
    assert notes[:2] == [
        "left out, ignored (1): d",
        "left out, classes with fewer than 4 images (1): c (3)",
    ]
    with pytest.raises(UsageError, match="no class aa to ignore") as raised:
        tile_folders(project, root, ignore=["aa"])
    assert "Did you mean a?" in raised.value.hint
    with pytest.raises(GeomatchError, match="the largest has 9"):
        tile_folders(project, root, least=10)


def test_unreadable_images_are_left_out_and_named(tmp_path, project):
    root = class_folders(tmp_path / "set", {"a": 8, "b": 4}, height=40, width=40)
    (root / "a" / "text.png").write_text("no image at all")
    (root / "b" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    whole = (root / "a" / "a_000.png").read_bytes()
    (root / "a" / "cut.png").write_bytes(whole[: len(whole) // 2])
    notes = []
    table = tile_folders(project, root, notes=notes)
    broken = {"a/text.png", "a/cut.png", "b/gone.jpg"}
    assert len(table) == 12
    assert not broken & set(table.ids())
    manifest = project.tile_manifest()
    assert set(manifest.unreadable) == broken
    assert manifest.tiles == 12
    told = next(note for note in notes if "unreadable" in note)
    assert "unreadable (3): " in told
    assert all(name in told for name in broken)
    held = pixels(project, table)
    np.testing.assert_array_equal(
        held["b/b_003.png"], np.asarray(Image.open(root / "b" / "b_003.png"))
    )


def test_names_that_are_not_utf_8(tmp_path, project):
    root = class_folders(tmp_path / "set", {"a": 8, "b": 4}, height=40, width=40)
    os.rename(root / "a", os.fsencode(root) + b"/\xe9")
    os.rename(root / "b" / "b_003.png", os.fsencode(root) + b"/b/\xe8.png")
    table = tile_folders(project, root)
    assert table.classes == (r"\xe9", "b") or table.classes == ("b", r"\xe9")
    assert len(table) == 12
    assert {r"\xe9/a_000.png", r"b/\xe8.png"} <= set(table.ids())


def test_only_the_first_unreadable_images_are_named(tmp_path, project):
    root = class_folders(tmp_path / "set", {"a": 8})
    for i in range(30):
        (root / "a" / f"z{i}.png").write_text("")
    notes = []
    tile_folders(project, root, notes=notes)
    told = next(note for note in notes if "unreadable" in note)
    assert "unreadable (30): " in told
    assert told.count(".png") == 5


@pytest.mark.parametrize("cut", [0, 30])
def test_nothing_but_broken_images_is_an_error(tmp_path, project, cut):
    """Whether the header tells, or only the pixels."""
    root = class_folders(tmp_path / "set", {"a": 4}, height=30, width=30)
    for path in (root / "a").iterdir():
        path.write_bytes(path.read_bytes()[: cut and len(path.read_bytes()) // 2])
    with pytest.raises(GeomatchError, match="none of the images can be read; a/a_000"):
        tile_folders(project, root)
    assert not project.tiles.exists()


def empty(tmp_path):
    (tmp_path / "set").mkdir()


def loose(tmp_path):
    draw_noise(tmp_path / "set" / "x.png")


def empty_class(tmp_path):
    class_folders(tmp_path / "set", {"a": 3})
    (tmp_path / "set" / "b").mkdir()


def npz(**arrays):
    return lambda tmp_path: np.savez(tmp_path / "set.npz", **arrays)


def cut_gz(tmp_path):
    path = write_idx(tmp_path / "x-images-idx3-ubyte.gz", digits(9)[0])
    write_idx(tmp_path / "x-labels-idx1-ubyte.gz", digits(9)[1])
    path.write_bytes(path.read_bytes()[:-40])


def no_labels(tmp_path):
    write_idx(tmp_path / "x-images-idx3-ubyte.gz", digits(9)[0])


def short_idx(tmp_path):
    path = tmp_path / "x-images-idx3-ubyte"
    path.write_bytes(bytes([0, 0, 8, 3]) + np.array([2, 4, 4], ">u4").tobytes() + b"\1" * 31)
    (tmp_path / "x-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 1, 1]))


GREY = np.zeros((4, 5, 5), np.uint8)


@pytest.mark.parametrize(
    ("prepare", "name", "message", "hint"),
    [
        (lambda tmp_path: None, "set", "set does not exist", "geomatch tile"),
        (empty, "set", "has no class folders", "DIR/CLASS/"),
        (loose, "set", "has no class folders", "DIR/CLASS/"),
        (empty_class, "set", "class b holds no images", "--ignore b"),
        (npz(pictures=GREY, y=np.arange(4)), "set.npz", "holds pictures, y", "x and y"),
        (npz(x=GREY, y=np.arange(3)), "set.npz", "4 images, but 3 labels", "One label"),
        (npz(x=GREY / 255, y=np.arange(4)), "set.npz", "of float64", "uint8"),
        (npz(x=GREY, y=np.arange(4) / 2), "set.npz", "labels of dtype float64", "integers"),
        (cut_gz, "x-images-idx3-ubyte.gz", "cannot be read", "Copy it again"),
        (no_labels, "x-images-idx3-ubyte.gz", "no label file beside it", "x-labels-idx1-ubyte.gz"),
        (short_idx, "x-images-idx3-ubyte", "shorter or longer", "Copy it again"),
        (lambda tmp_path: (tmp_path / "set").write_text("hello"), "set", "neither a folder", ""),
    ],
)
def test_bad_sets(tmp_path, project, prepare, name, message, hint):
    prepare(tmp_path)
    with pytest.raises(GeomatchError, match=message) as raised:
        tile_folders(project, tmp_path / name)
    assert hint in raised.value.hint
    assert not project.tiles.exists()


def test_an_empty_class_that_is_ignored_does_not_stand_in_the_way(tmp_path, project):
    empty_class(tmp_path)
    assert tile_folders(project, tmp_path / "set", ignore=["b"]).classes == ("a",)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["test={}"], "no training images"),
        (["train={}", "train={}"], "train is given twice"),
        (["{}", "{}"], "train is given twice"),
    ],
)
def test_splits_that_cannot_be_meant(tmp_path, project, paths, message):
    root = class_folders(tmp_path / "set", {"a": 3})
    with pytest.raises(UsageError, match=message):
        tile_folders(project, *(path.format(root) for path in paths))


def test_splits_that_leave_nothing_to_train_on(tmp_path, project):
    root = class_folders(tmp_path / "set", {"a": 9, "b": 5})
    with pytest.raises(UsageError, match="take all 5 of b"):
        tile_folders(project, root, validation=3, test=2)


# Pairs


def pair_folders(tmp_path, names, years=("2010", "2020")):
    for year in years:
        for name in names:
            draw_noise(tmp_path / year / f"{name}.png", seed=sum(map(ord, year + name)))
    return [tmp_path / year for year in years]


def test_pairs_are_places_of_two_years(tmp_path, project):
    older, newer = pair_folders(tmp_path, ["b", "sub/a"])
    (newer / "b.png").unlink()
    changed = draw_noise(newer / "b.bmp", seed=3)
    table = tile_folders(project, pairs=[newer, older])
    assert table.years == ("2010", "2020")
    assert table.dated
    assert table.ids() == ["b@2010", "b@2020", "sub/a@2010", "sub/a@2020"]
    assert table.classes == ("b", "sub/a")
    held = pixels(project, table)
    np.testing.assert_array_equal(held["b@2020"], changed)
    np.testing.assert_array_equal(
        held["sub/a@2010"], np.asarray(Image.open(older / "sub" / "a.png"))
    )
    everything = np.ones(4, bool)
    forward, back = tasks(table, everything, everything)
    assert forward.queries.tolist() == back.database.tolist() == [0, 2]
    assert forward.database[forward.truth].tolist() == [1, 3]
    assert back.database[back.truth].tolist() == [0, 2]
    assert forward.query_place.tolist() == forward.database_place.tolist() == [0, 1]


def test_pairs_that_are_alike_in_name_are_told_apart_by_their_parents(tmp_path, project):
    names = ["a", "b", "c"]
    folders = pair_folders(tmp_path, names, ("before/img", "after/img"))
    assert tile_folders(project, pairs=folders).years == ("before/img", "after/img")
    with pytest.raises(UsageError, match="two folders"):
        tile_folders(project, pairs=[folders[0], folders[0]])


def test_a_pair_is_in_one_split(tmp_path, project):
    folders = pair_folders(tmp_path, [f"p{i}" for i in range(30)])
    table = tile_folders(project, pairs=folders)
    of = {}
    for place, split in zip(table.cells(), table.split.tolist(), strict=True):
        assert of.setdefault(place, split) == split
    assert Counter(of.values()) == {0: 21, 1: 6, 2: 3}


def test_images_without_a_partner_are_left_out_and_listed(tmp_path, project):
    older, newer = pair_folders(tmp_path, ["a", "b", "c"])
    draw_noise(older / "lonely.png")
    (newer / "c.png").unlink()
    notes = []
    assert tile_folders(project, pairs=[older, newer], notes=notes).classes == ("a", "b")
    assert notes[0] == "left out, only in 2010 (2): c, lonely"


def test_unreadable_images_leave_the_order_of_years(tmp_path, project):
    before, after = pair_folders(tmp_path, ["a", "b"], ("before", "after"))
    (before / "a.png").write_text("")
    table = tile_folders(project, pairs=[before, after])
    assert table.years == ("before", "after")
    assert table.ids() == ["a@after", "b@before", "b@after"]
    assert {k: v.files for k, v in project.tile_manifest().years.items()} == {
        "before": 1,
        "after": 2,
    }


def test_bad_pairs(tmp_path, project):
    older, newer = pair_folders(tmp_path, ["a"])
    (newer / "a.png").rename(newer / "z.png")
    with pytest.raises(GeomatchError, match="has the same name as one of"):
        tile_folders(project, pairs=[older, newer])
    draw_noise(older / "a.bmp")
    with pytest.raises(GeomatchError, match=r"holds a\.bmp and a\.png"):
        tile_folders(project, pairs=[older, newer])
    (tmp_path / "empty").mkdir()
    with pytest.raises(GeomatchError, match="empty holds no images"):
        tile_folders(project, pairs=[newer, tmp_path / "empty"])


# Again, and after a break


def test_again_is_up_to_date_until_a_file_changes(tmp_path, project):
    root = class_folders(tmp_path / "set", {"a": 4, "b": 4})
    tile_folders(project, root)
    written = project.tiles_manifest.stat().st_mtime_ns
    before = project.tile_manifest()
    notes = []
    tile_folders(project, root, notes=notes)
    assert notes == ["tiles are up to date"]
    assert project.tiles_manifest.stat().st_mtime_ns == written
    changed = draw_noise(root / "a" / "a_001.png", seed=99)
    os.utime(root / "a" / "a_001.png", ns=(0, 0))
    held = pixels(project, tile_folders(project, root))
    np.testing.assert_array_equal(held["a/a_001.png"], changed)
    assert project.tile_manifest().fingerprint != before.fingerprint


def test_the_last_images_are_taken_again_without_arguments(tmp_path, project, monkeypatch):
    """Found from any folder, and with what is said now on top of what was said then."""
    class_folders(tmp_path / "set", {"a": 4, "b": 4, "c": 9})
    monkeypatch.chdir(tmp_path)
    root = str(project.root)
    done = run_command("tile", "-p", root, "--folders", "set", "--ignore", "c")
    assert done.exit_code == 0, done.stderr
    assert "8 tiles of 12px in 2 classes" in done.stderr
    monkeypatch.chdir("/")
    done = run_command("tile", "-p", root)
    assert "tiles are up to date" in done.stderr
    done = run_command("tile", "-p", root, "--size", "8")
    assert "8 tiles of 8px in 2 classes" in done.stderr


def test_images_of_the_configuration_are_relative_to_the_project(tmp_path, project, monkeypatch):
    class_folders(project.root / "data" / "train", {"a": 4, "b": 4})
    class_folders(project.root / "data" / "test", {"a": 4, "b": 1})
    project.config.write_text('[images]\nfolders = ["train=data/train", "test=data/test"]\n')
    monkeypatch.chdir(tmp_path)
    done = run_command("tile", "-p", str(project.root))
    assert done.exit_code == 0, done.stderr
    assert project.tile_manifest().splits == {"train": 6, "validation": 2, "test": 5}


def test_pairs_and_splits_on_the_command_line(tmp_path, project, monkeypatch):
    older, newer = pair_folders(tmp_path, list("abcdefghij"))
    monkeypatch.chdir(tmp_path)
    root = str(project.root)
    done = run_command("tile", "-p", root, "--pairs", older.name, newer.name)
    assert "20 tiles of 12px in 10 places" in done.stderr
    class_folders(tmp_path / "one", {"a": 10})
    class_folders(tmp_path / "two", {"a": 3})
    done = run_command("tile", "-p", root, "--folders", "train=one", "test=two")
    assert project.tile_manifest().splits == {"train": 8, "validation": 2, "test": 3}
    done = run_command("tile", "-p", root, "--pairs", "one", "two", "2010=x")
    assert done.exit_code == 2
    assert "two folders and nothing else" in done.stderr


def test_two_kinds_of_images_are_refused(tmp_path, project):
    root = class_folders(tmp_path / "set", {"a": 4})
    with pytest.raises(UsageError, match="more than one kind of source"):
        tile_folders(project, root, pairs=[root, root])


def test_after_a_break_it_goes_on_to_the_same_tiles(tmp_path, monkeypatch):
    """A shard has 16 rows here, of 50 in all."""
    root = class_folders(tmp_path / "set", {"a": 30, "b": 20})
    whole, broken = new_project(tmp_path / "whole"), new_project(tmp_path / "broken")
    monkeypatch.setattr(store, "SHARD_BYTES", 1)
    expected = tile_folders(whole, root)
    read, count = image_files.read, Counter()

    def counted(*how):
        count["read"] += 1
        if count["read"] > count["allowed"] > 0:
            raise KeyboardInterrupt
        return read(*how)

    monkeypatch.setattr(image_files, "read", counted)
    count["allowed"] = 40
    with pytest.raises(KeyboardInterrupt):
        tile_folders(broken, root)
    assert not broken.tiles.exists()
    assert info(broken)["unfinished"] == "tiles"
    count.clear()
    notes = []
    table = tile_folders(broken, root, notes=notes)
    assert "resuming: 32 of 50 tiles are already cut" in notes
    assert count["read"] == 18
    assert table.ids() == expected.ids()
    made = broken.tile_manifest()
    assert made == replace(whole.tile_manifest(), request=made.request)
    for name, values in pixels(whole, expected).items():
        np.testing.assert_array_equal(pixels(broken, table)[name], values)
    assert not (broken.root / "tiles.partial").exists()


def test_what_was_read_of_files_that_changed_is_read_again(tmp_path, project, monkeypatch):
    root = class_folders(tmp_path / "set", {"a": 30})
    monkeypatch.setattr(store, "SHARD_BYTES", 1)
    with monkeypatch.context() as patched:
        patched.setattr("geomatch.tiling.shards.finish", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tile_folders(project, root)
    changed = draw_noise(root / "a" / "a_020.png", seed=5)
    os.utime(root / "a" / "a_020.png", ns=(0, 0))
    notes = []
    held = pixels(project, tile_folders(project, root, notes=notes))
    assert "resuming: 16 of 30 tiles are already cut" in notes
    np.testing.assert_array_equal(held["a/a_020.png"], changed)


# The catalogue and what a match is


@pytest.mark.parametrize("kind", ["folders", "pairs"])
def test_the_catalogue_is_read_as_it_was_written(tmp_path, project, kind):
    if kind == "folders":
        table = tile_folders(project, class_folders(tmp_path / "set", {"b": 6, "a": 6}))
    else:
        table = tile_folders(project, pairs=pair_folders(tmp_path, [f"n{i}" for i in range(9)]))
    loaded = TileTable.load(project.catalogue)
    for name, value in vars(loaded).items():
        np.testing.assert_array_equal(value, getattr(table, name), err_msg=name)
    assert loaded.ids() == table.ids()
    frame = geopandas.read_parquet(project.catalogue)
    assert frame.geometry.isna().all()
    assert frame["class"].tolist() == frame["cell"].tolist() == table.cells()
    assert frame[["col", "row"]].isna().all(axis=None)
    assert frame["year"].isna().all() == (kind == "folders")
    assert pq.read_metadata(project.catalogue).metadata[b"geomatch"]
    manifest = project.tile_manifest()
    assert manifest.placement == "none"
    assert (manifest.crs, manifest.gsd, manifest.stride) == (None, None, None)
    assert manifest.classes == len(table.classes)


def test_tasks_of_classes_are_those_of_plain_loops():
    rng = np.random.default_rng(0)
    tiles = hand_made_classes(rng.integers(0, 6, 40).tolist())
    asking, searched = rng.random(40) < 0.5, rng.random(40) < 0.3
    (task,) = tasks(tiles, asking, searched)
    assert task.years == (0, 0)
    assert task.truth is None
    database = [j for j in range(40) if searched[j]]
    assert task.database.tolist() == database
    queries = [
        i
        for i in range(40)
        if asking[i] and any(tiles.label[i] == tiles.label[j] for j in database if i != j)
    ]
    assert task.queries.tolist() == queries
    assert 0 < len(queries) < asking.sum()
    neutral = {(q, p) for q, i in enumerate(queries) for p, j in enumerate(database) if i == j}
    assert set(zip(*(a.tolist() for a in task.neutral), strict=True)) == neutral
    assert neutral
    assert task.query_place.tolist() == tiles.label[queries].tolist()
    assert task.database_place.tolist() == tiles.label[database].tolist()


def test_without_another_of_a_class_there_is_no_task():
    tiles = hand_made_classes([0, 1, 2])
    assert tasks(tiles, np.ones(3, bool), np.ones(3, bool)) == []


def test_images_of_one_class_are_neutral_and_nothing_overlaps():
    tiles = hand_made_classes([0, 1, 0])
    one, all_tiles = np.asarray(0), np.arange(3)
    assert are_neutral(tiles, one, all_tiles).tolist() == [True, False, True]
    assert [len(part) for part in overlapping(tiles, all_tiles, all_tiles)] == [0, 0]


# Query and info


def searchable(project, table):
    """An index of made-up descriptors, and their cosines (n, n)."""
    vectors = np.random.default_rng(0).normal(size=(len(table), 4)).astype(np.float32)
    tiles = project.tile_manifest().fingerprint
    manifest = hand_made_embedding_manifest(4, name="hand@0", run="runs/hand", tiles=tiles)
    project.embeddings.mkdir()
    Embeddings(vectors, manifest).save(project.embeddings / "hand@0.parquet", table, None, None)
    index.index(project)
    rows = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return rows @ rows.T


def test_a_query_searches_every_class_but_never_finds_itself(tmp_path, project):
    table = tile_folders(project, class_folders(tmp_path / "set", {"a": 6, "b": 6}))
    cosines = searchable(project, table)
    names = table.ids()
    for i, name in enumerate(names):
        found = query.query(project, name, top=20).matches
        nearest = [names[j] for j in np.argsort(-cosines[i]) if j != i]
        assert [match.tile for match in found] == nearest
        assert {(m.year, m.lon, m.lat, m.distance_m) for m in found} == {(None,) * 4}
    rows = pq.read_table(project.indexes / "hand@0" / "tiles.parquet")
    assert all(rows[key].null_count == 12 for key in ("year", "lon", "lat", "epsg", "x", "y"))


def test_a_query_of_a_pair_searches_the_other_year(tmp_path, project):
    table = tile_folders(project, pairs=pair_folders(tmp_path, list("abcdef")))
    cosines = searchable(project, table)
    found = query.query(project, "b@2010", top=3).matches
    nearest = [table.ids()[1 + 2 * j] for j in np.argsort(-cosines[2, 1::2])[:3]]
    assert [match.tile for match in found] == nearest
    assert {(m.year, m.lon, m.distance_m) for m in found} == {("2020", None, None)}


def test_columns_that_images_do_not_have_are_not_shown(tmp_path, project):
    table = tile_folders(project, class_folders(tmp_path / "set", {"a": 3, "b": 3}))
    searchable(project, table)
    root = str(project.root)
    shown = run_command("query", "-p", root, "a/a_000.png").stdout
    assert "score" in shown
    assert not any(word in shown for word in ("year", "lon", "lat", "distance"))
    done = run_command("query", "-p", root, "a/a_000.png", "--json")
    assert json.loads(done.stdout)[0]["year"] is None
    done = run_command("query", "-p", root, "3.1,45")
    assert done.exit_code == 2
    assert "no georeference" in done.stderr
    done = run_command("query", "-p", root, "a/a_000.png", "--year", "2010")
    assert "images have no years" in done.stderr
    done = run_command("info", "-p", root)
    assert "classes" in done.stdout
    assert "without georeference" in done.stdout
    assert "years" not in done.stdout
    assert info(project)["tiles"]["classes"] == 2


def test_from_images_to_an_answer(tmp_path, project):
    """An untrained run, whose descriptors are asked for by id and by file."""
    root = tmp_path / "set"
    for i in range(20):
        path = root / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Coarse patches: of noise, an untrained network tells one from another no better.
        patches = np.random.default_rng(i).integers(0, 256, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(patches).resize((32, 32), Image.Resampling.NEAREST).save(path)
    table = tile_folders(project, root)
    untrained = settings("train.epochs=0", "train.loss=contrastive", "mining.rule=none")
    train(project, untrained)
    embed(project, settings=untrained)
    index.index(project)
    name = table.ids()[3]
    by_id = query.query(project, name, top=4).matches
    assert name not in [match.tile for match in by_id]
    by_file = query.query(project, str(root / name), top=5).matches
    assert by_file[0].tile == name
    assert by_file[0].score == pytest.approx(0, abs=1e-3)  # a distance, as is the loss
    assert [m.tile for m in by_file[1:]] == [m.tile for m in by_id]
    assert info(project)["next"].startswith("geomatch query")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(GeomatchError, match=r"text\.png cannot be read as an image"):
        query.query(project, str(tmp_path / "text.png"))


def test_an_encoder_of_the_ground_does_not_fit_images_without(tmp_path, project, trained):
    root = class_folders(tmp_path / "set", {"a": 10, "b": 10}, height=SIZE, width=SIZE)
    tile_folders(project, root)
    with pytest.raises(
        GeomatchError, match=r"no georeference, but project-run1@.* on 1\.0 m per pixel"
    ):
        embed(project, model=trained.project.run("run1"))

"""Configuration: TOML, `--set`, defaults, and what is said about mistakes."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomatch import config
from geomatch.config import Config
from geomatch.data.tiles import SPLITS
from geomatch.errors import UsageError


def write(tmp_path, text):
    path = tmp_path / "geomatch.toml"
    path.write_text(text)
    return path


def test_absent_file_gives_the_defaults(tmp_path):
    assert config.load(tmp_path / "none.toml") == Config()


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("[grid]\nsise = 3", "grid.size"),
        ("[gird]\nsize = 3", "grid"),
        ("[train]\nepoch = 3", "train.epochs"),
        ('[[source]]\nyear = "1"\nimage = "a.tif"', "source.images"),
        ("[mining]\nthruth_within = 3", "mining.truth_within"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path, text, nearest):
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        config.load(path)
    assert str(path) in caught.value.message
    assert f"{nearest}?" in caught.value.hint


def test_unknown_key_far_from_all_lists_the_known(tmp_path):
    with pytest.raises(UsageError) as caught:
        config.load(write(tmp_path, "[grid]\nxyzzy = 3"))
    assert "grid.size" in caught.value.hint


@pytest.mark.parametrize(
    ("override", "nearest"),
    [("grid.sise=3", "grid.size"), ("girt.size=3", "grid"), ("train.loss_=3", "train.loss")],
)
def test_unknown_set_names_the_nearest(override, nearest):
    with pytest.raises(UsageError) as caught:
        config.with_overrides(Config(), [override])
    assert "--set" in caught.value.message
    assert f"{nearest}?" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[grid]\nsize = "big"', "grid.size"),
        ("[grid]\nsize = 256.5", "grid.size"),
        ("[grid]\nsize = true", "grid.size"),
        ('[grid]\ngsd = "half"', "grid.gsd"),
        ("[grid]\ncrs = [1]", "grid.crs"),
        ("[augment]\nflips = 1", "augment.flips"),
        ('[split]\nby = "colour"', "split.by"),
        ("[split]\nyears = 3", "split.years"),
        ("grid = 3", "grid"),
        ("source = 3", "source"),
        ('[[source]]\nyear = "1"\nimages = 3.5', "source.images"),
        ('[[source]]\nyear = "1"\nplacement = "guessed"', "source.placement"),
        ("[train]\nlr = [0.1]", "train.lr"),
    ],
)
def test_wrong_type_or_choice_names_the_key(tmp_path, text, key):
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        config.load(path)
    assert str(path) in caught.value.message
    assert key in caught.value.message
    assert "\n" not in caught.value.message


def test_wrong_choice_lists_the_right_ones(tmp_path):
    with pytest.raises(UsageError) as caught:
        config.load(write(tmp_path, '[model]\ntrunk = "resnet12"'))
    assert "resnet50" in caught.value.hint


@pytest.mark.parametrize("text", ["[grid\nsize = 3", "size ===", b"\xff\xfe"])
def test_toml_that_does_not_parse_names_the_file(tmp_path, text):
    path = tmp_path / "geomatch.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=r"geomatch\.toml"):
        config.load(path)


@pytest.mark.parametrize("text", ["grid.size", "size=3", "a.b.c=3", "=3", "source.year=2010", ""])
def test_set_of_another_form_is_refused(text):
    with pytest.raises(UsageError, match="--set"):
        config.with_overrides(Config(), [text])


def test_set_beats_the_file_which_beats_the_default(tmp_path):
    path = write(tmp_path, "[grid]\nsize = 64\nmin_valid = 0.5\n")
    assert Config().grid.size is None
    loaded = config.load(path, ["grid.size=32", "train.lr=1"])
    assert loaded.grid.size == 32
    assert loaded.grid.min_valid == 0.5
    assert loaded.grid.crs == "auto"
    assert loaded.train.lr == 1.0
    assert isinstance(loaded.train.lr, float)
    assert config.load(path, ["grid.size=32", "grid.size=16"]).grid.size == 16


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("grid.crs=utm", "utm"),
        ('grid.crs="utm"', "utm"),
        ("grid.crs=2154", "2154"),
        ("grid.crs=EPSG:2154", "EPSG:2154"),
        ("grid.stretch=0,255", "0,255"),
        ("grid.stretch=2%,98%", "2%,98%"),
        ("grid.gsd = 0.5", 0.5),
        ("split.test=a*.tif", ("a*.tif",)),
        ('split.test=["a.tif", "b.tif"]', ("a.tif", "b.tif")),
        ("split.years=[2010, 2020]", ("2010", "2020")),
        ("augment.flips=false", False),
    ],
)
def test_set_reads_toml_or_bare_strings(override, value):
    table, key = override.split("=")[0].strip().split(".")
    loaded = config.with_overrides(Config(), [override])
    assert getattr(getattr(loaded, table), key) == value


def test_years_may_be_bare_numbers(tmp_path):
    loaded = config.load(write(tmp_path, '[[source]]\nyear = 2010\nimages = "a.tif"'))
    assert loaded.source == (config.SourceConfig(year="2010", images="a.tif"),)


def test_template_parses_and_is_the_defaults(tmp_path):
    assert config.load(write(tmp_path, config.template())) == Config()


def test_template_shows_every_key_with_its_default():
    """Uncommented, it still is the defaults, but for those it shows as unset."""
    lines = []
    for line in config.template().splitlines():
        text = line.removeprefix("# ")
        if line.startswith(("# A geomatch", "# One table", "# Labels by class")):
            continue
        lines.append("" if " = ..." in text else text)
    values = tomllib.loads("\n".join(lines))
    del values["source"], values["labels"]
    assert config.from_dict(values, "template") == Config()
    for table in dataclasses.fields(Config):
        if table.name in LISTS:
            continue
        for key in dataclasses.fields(getattr(Config(), table.name)):
            assert f"# {key.name} = " in config.template()


def test_round_trip_through_json():
    wanted = config.with_overrides(
        Config(
            source=(
                config.SourceConfig("2010", "a/*.tif", "l.gpkg"),
                config.SourceConfig("2020", "b"),
            )
        ),
        ["grid.gsd=0.25", "split.test=a.tif", "grid.stride=64", "model.normalise=true"],
    )
    values = json.loads(json.dumps(config.as_dict(wanted)))
    assert config.from_dict(values, "config.json") == wanted
    assert config.from_dict(config.as_dict(Config()), "config.json") == Config()


def test_from_dict_names_its_file():
    with pytest.raises(UsageError, match=r"runs/a/config\.json"):
        config.from_dict({"grid": {"sise": 3}}, "runs/a/config.json")


def test_differences_name_keys_of_the_given_tables():
    other = config.with_overrides(Config(), ["train.epochs=7", "train.lr=1.0", "grid.size=32"])
    assert config.differences(Config(), other, ["train"]) == ["train.epochs", "train.lr"]
    assert config.differences(Config(), other, ["model"]) == []


def test_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().grid.size = 3


@pytest.mark.parametrize(
    "override",
    [
        "train.batch=0",
        "train.batch=-2",
        "train.epochs=-1",
        "train.lr=nan",
        "mining.every=0",
        "mining.k=0",
        "model.descriptor=0",
        "train.save_minutes=-1.0",
    ],
)
def test_numbers_below_their_least_are_refused(override):
    with pytest.raises(UsageError, match=override.split("=")[0]) as caught:
        config.with_overrides(config.Config(), [override])
    assert caught.value.hint.startswith("At least")


EXAMPLES = Path(__file__).parent.parent / "examples"
WRITTEN = [
    "grid.size=48",
    "train.seed=7",
    "train.freeze=[]",
    'split.validation=["a # b", "ü*"]',
    "eval.database=all",
    "train.clip=inf",
]


@pytest.mark.parametrize(
    "path", sorted(EXAMPLES.glob("*/geomatch.toml")), ids=lambda p: p.parent.name
)
def test_overrides_are_written_into_a_file_in_their_place(path):
    text = path.read_text()
    assert config.edited(text, []) == text
    edited = config.edited(text, WRITTEN)
    assert config.from_dict(tomllib.loads(edited), "") == config.load(path, WRITTEN)
    assert edited.count("[train]") == 1
    # Comments that do not belong to a value stay.
    assert edited.splitlines()[0] == text.splitlines()[0]
    assert config.edited(edited, WRITTEN) == edited


def test_an_array_over_several_lines_is_replaced():
    text = '[train]\nfreeze = [\n  "trunk",  # all\n  "head",\n]\nlr = 1.0\n'
    assert config.edited(text, ["train.freeze=trunk"]) == '[train]\nfreeze = ["trunk"]\nlr = 1.0\n'


def test_the_template_holds_what_is_set_and_comments_out_the_rest():
    text = config.template(WRITTEN)
    assert config.from_dict(tomllib.loads(text), "") == config.with_overrides(Config(), WRITTEN)
    keys = [line for line in text.splitlines() if line[:1].isalpha()]
    assert len(keys) == len(WRITTEN)
    assert keys[0].startswith("size = 48 ")
    assert "# tile side in pixels" in keys[0]
    assert len(text.splitlines()) == len(config.template().splitlines())


@pytest.mark.parametrize("write", [config.template, lambda given: config.edited("", given)])
@pytest.mark.parametrize("override", ["grid.sise=3", "grid.size=big", "grid.size"])
def test_wrong_overrides_are_not_written(write, override):
    with pytest.raises(UsageError, match="--set"):
        write([override])


def test_splits_have_one_order_and_one_set_of_names():
    assert typing.get_args(config.Split) == SPLITS


# Properties of any configuration


def values_of(hint, least):
    """Values that a key of this type may have; unset is None."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(values_of(arguments[0], least), max_size=3).map(tuple)
    if origin is types.UnionType:
        return st.none() | values_of(arguments[0], least)
    return {
        bool: st.booleans(),
        int: st.integers(least, 2**53),
        float: st.floats(least, allow_nan=False, allow_infinity=False),
        str: st.text(max_size=8),
    }[hint]


LISTS = {"source": config.SourceConfig, "labels": config.LabelsConfig}
"""Tables of which a file may hold several."""


def tables(cls):
    hints = typing.get_type_hints(cls)
    keys = {
        key.name: values_of(hints[key.name], key.metadata.get("least"))
        for key in dataclasses.fields(cls)
    }
    return st.builds(cls, **keys)


def configurations():
    """The defaults but for the sources, the labels or one other table."""
    lists = {name: st.lists(tables(kind), max_size=2).map(tuple) for name, kind in LISTS.items()}
    others = {
        table.name: tables(type(table.default))
        for table in dataclasses.fields(Config)
        if table.name not in LISTS
    }
    return st.one_of(
        st.builds(Config, **{name: values}) for name, values in {**lists, **others}.items()
    )


def keys_of(table):
    """The keys that are set, as TOML."""
    values = config.as_dict(table)
    return {key: config.toml(value) for key, value in values.items() if value is not None}


def as_toml(wanted):
    lines = []
    for name in LISTS:
        for table in getattr(wanted, name):
            lines += [f"[[{name}]]", *(f"{key} = {value}" for key, value in keys_of(table).items())]
    for table in dataclasses.fields(Config):
        if table.name not in LISTS:
            keys = keys_of(getattr(wanted, table.name))
            lines += [f"[{table.name}]", *(f"{key} = {value}" for key, value in keys.items())]
    return "\n".join(lines)


@given(configurations())
def test_any_configuration_is_read_again_from_json(wanted):
    values = json.loads(json.dumps(config.as_dict(wanted)))
    assert config.from_dict(values, "config.json") == wanted


@given(configurations())
def test_any_configuration_is_read_again_from_toml(tmp_path_factory, wanted):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(as_toml(wanted), encoding="utf-8")
    assert config.load(path) == wanted


@given(configurations())
def test_any_configuration_can_be_set_key_by_key(wanted):
    overrides = [
        f"{table.name}.{key}={value}"
        for table in dataclasses.fields(Config)
        if table.name not in LISTS
        for key, value in keys_of(getattr(wanted, table.name)).items()
    ]
    lists = {name: getattr(wanted, name) for name in LISTS}
    assert config.with_overrides(Config(**lists), overrides) == wanted

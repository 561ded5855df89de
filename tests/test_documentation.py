"""What the README, the guides and the examples say: commands, settings and links as they are."""

from __future__ import annotations

import gzip
import json
import re
import struct
import tomllib
from functools import cache
from pathlib import Path

import command_reference
import numpy as np
import pytest
import typer
from command_line import run_command
from documents import DOCUMENTS, GUIDES, ROOT, Command, anchors, blocks, commands, links, spans
from PIL import Image
from small_project import QUICK, SIZE, SPLIT, YEARS

from geomatch import config
from geomatch.cli.commands import app
from geomatch.geo.footprints import lonlat
from geomatch.tune import Parameter, _space

README = ROOT / "README.md"
COMMANDS = [command for document in DOCUMENTS for command in commands(document)]
OURS = [command for command in COMMANDS if command.words[0] == "geomatch"]
SETTINGS = config.as_dict(config.Config())
TABLES = "|".join(SETTINGS)
PROSE = [
    path
    for path in (README, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("examples/*/*.md")))
    if path != command_reference.REFERENCE
]
OTHERS = {
    "cd",
    "curl",
    "dask",
    "ln",
    "mypy",
    "nox",
    "ruff",
    "sbatch",
    "source",
    "ssh",
    "tensorboard",
}
"""Programs that documents call beside geomatch, pip, pytest and python."""


def name(document):
    return str(document.relative_to(ROOT))


@cache
def program():
    """The command line, and the context around its commands."""
    group = typer.main.get_command(app)
    return group, group.make_context("geomatch", [], resilient_parsing=True)


def command_of(words):
    """The command that words name, the context around it, and the words left for it."""
    command, context = program()
    left = list(words[1:])
    while hasattr(command, "list_commands") and left and not left[0].startswith("-"):
        assert left[0] in command.list_commands(context), f"no command {left[0]}"
        command = command.get_command(context, left.pop(0))
        if hasattr(command, "list_commands"):
            context = command.make_context(command.name, [], context, resilient_parsing=True)
    return command, context, left


def options_of(command):
    found = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    return {*found, "--help"}


def check_settings(values):
    """See that `--set` takes these."""
    settings = config.with_overrides(config.Config(), values)
    if settings.tune.space:
        assert all(isinstance(each, Parameter) for each in _space(settings))


# Commands and settings


@pytest.mark.parametrize("command", OURS, ids=str)
def test_the_command_exists(command):
    found, context, left = command_of(command.words)
    if hasattr(found, "list_commands"):
        assert set(left) <= options_of(found)
        return
    values = found.make_context(found.name, left, context).params
    given = [v if isinstance(v, (list, tuple)) else [v] for v in values.values()]
    texts = [text for several in given for text in several if isinstance(text, str)]
    assert not [text for text in texts if text.startswith("--")]
    check_settings(values.get("settings") or [])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in OURS], ids=str)
def test_another_program_is_called_as_it_can_be(command):
    program, *arguments = command.words
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        named = re.findall(r"\[([\w,]+)\]", " ".join(arguments))
        known = set(extras["optional-dependencies"])
        assert {extra for text in named for extra in text.split(",")} <= known
    elif program in ("python", "pytest"):
        for argument in arguments:
            assert not argument.endswith(".py") or (ROOT / argument).is_file()
    else:
        assert program in OTHERS or (ROOT / program).is_file()


@pytest.mark.parametrize("document", PROSE, ids=name)
def test_commands_options_and_settings_in_the_prose_exist(document):
    every = {"--install-completion"}
    for command, _ in command_reference.commands(*program()):
        every |= options_of(command)
    for span in spans(document):
        if re.match(r"geomatch [a-z-]", span):
            found, _, left = command_of(tuple(span.split()))
            assert {word for word in left if word.startswith("-")} <= options_of(found), span
        elif re.match(r"--?\w", span):
            assert span.split()[0] in every, span
        if setting := re.fullmatch(r".*--set (?!table\.key)('?)(.+)\1", span):
            check_settings(setting[2].split(" --set "))
        if setting := re.fullmatch(rf"({TABLES})\.(\w+)(\s*=.+)?", span):
            assert setting[2] in SETTINGS[setting[1]], span
            check_settings([span] if setting[3] else [])


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_toml_of_a_document_is_a_configuration(document, tmp_path):
    for _, text in blocks(document, "toml"):
        path = tmp_path / "geomatch.toml"
        path.write_text(text)
        assert config.load(path) != config.Config()


def test_the_reference_is_current():
    """Else: python tests/command_reference.py"""
    assert command_reference.REFERENCE.read_text(encoding="utf-8") == command_reference.markdown()


def test_the_checks_see_mistakes(tmp_path):
    """Else the tests above could not fail."""
    document = tmp_path / "a.md"
    document.write_text("```sh\ncd x && geomatch tile 'a b' \\\n  --size 3 > y  # z\n```\n")
    cd, tile = commands(document)
    assert cd.words == ("cd", "x")
    assert tile.words == ("geomatch", "tile", "a b", "--size", "3")
    for wrong in (
        ("geomatch", "fly"),
        ("geomatch", "tile", "--wings"),
        ("geomatch", "query", "--wings"),
        ("geomatch", "tile", "--size", "big"),
        ("geomatch", "train", "--set", "train.epoch=3"),
        ("geomatch", "train", "--set", "train.loss=big"),
        ("geomatch", "tune", "--set", 'tune.space=["train.lr = 1 .. 0"]'),
        ("geomatch", "init", "x", "--preset", "y"),
    ):
        with pytest.raises(Exception, match=r".+"):
            test_the_command_exists(Command(document, 1, wrong))


# Links and the front page


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document):
    for link in links(document):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_the_front_page_is_short_and_names_nothing_outside():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert "://" not in text
    for line in ("pip install . && geomatch demo", "pip install '.[test]' && pytest"):
        assert text.splitlines().count(line) == 1
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert picture.startswith("examples/")
    assert (ROOT / picture).stat().st_size < 300_000


def test_the_front_page_leads_to_every_guide_and_example():
    linked = {link.partition("#")[0] for link in links(README)}
    assert linked >= {str(path.relative_to(ROOT)) for path in ROOT.glob("examples/*/*.md")}


# What is run


def run(command, replaced):
    words = [replaced.get(word, word) for word in command.words[1:]]
    done = run_command(*words)
    assert done.exit_code == 0, f"{command}\n{done.output}"


INIT = [command for command in OURS if command.words[1] == "init"]


@pytest.mark.parametrize("command", INIT, ids=str)
def test_a_project_begins_as_said(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(command, {})
    assert config.load(tmp_path / command.words[2] / "geomatch.toml")


@pytest.fixture
def small(indexed, copied, monkeypatch):
    """The small project as the current folder; what stands in it for the words of the guides."""
    project = copied(indexed)
    # Dotted keys are TOML as they are; a bare word is a string there.
    pairs = [text.partition("=") for text in (*QUICK, *SPLIT, f"grid.size={SIZE}")]
    lines = [f"{key} = {config.toml(config.literal(value))}" for key, _, value in pairs]
    for year in YEARS:
        images = config.toml(str(indexed.imagery / f"[!l]*_{year}.tif"))
        lines += ["[[source]]", f'year = "{year}"', f"images = {images}"]
    project.config.write_text("\n".join(lines))
    monkeypatch.chdir(project.root)
    tiles = indexed.tiles
    test = tiles.select((tiles.split == 2) & (tiles.year == 1))
    lon, lat = lonlat(test.epsg[:1], test.centres()[:1])[0]
    box = f"{lon - 1e-4},{lat - 1e-4},{lon + 1e-4},{lat + 1e-4}"
    area = {"type": "Polygon", "coordinates": [[[-9, 40], [9, 40], [9, 50], [-9, 50], [-9, 40]]]}
    Path("districts.geojson").write_text(
        json.dumps({"type": "Feature", "properties": {}, "geometry": area})
    )
    photo, other = (str(indexed.imagery / f"test_{year}.tif") for year in ("2010", "2020"))
    return {
        "4823_62451@2020": test.ids()[0],
        "2.3514,48.8575": f"{lon},{lat}",
        "2.3480,48.8550,2.3560,48.8600": box,
        "2.30,48.80,2.40,48.90": box,
        "districts.gpkg": "districts.geojson",
        "photo.tif": photo,
        "other.tif": other,
        "scan.tif": other,
        "0.5": "1",
        "0.25,0.5,1": "1",
        "2009": "2010",
    }


def test_the_guide_to_searching_runs(small):
    for command in commands(GUIDES / "searching.md"):
        # `test_pgvector` has a server, and `test_xfeat` weights.
        elsewhere = any(each in str(command.words) for each in ("postgresql://", "xfeat"))
        if command.words[0] == "geomatch" and not elsewhere:
            run(command, small)
    for form in ("png", "csv", "geojson", "gpkg"):
        assert Path(f"answers.{form}").is_file()


@pytest.mark.slow
def test_the_guide_to_evaluation_runs(small, indexed):
    asked, answer = indexed.tiles.ids()[0], indexed.tiles.ids()[1]
    Path("grades.csv").write_text(f"query,tile,grade\n{asked},{answer},easy\n")
    for command in commands(GUIDES / "evaluation.md"):
        if "--baselines" not in command.words:  # needs ImageNet weights
            run(command, {**small, "run2": "run1"})
    assert list(Path("reports").glob("*/report.html"))


def test_the_guide_to_images_without_georeference_runs(project, monkeypatch):
    monkeypatch.chdir(project.root)
    draw = np.random.default_rng(0)
    for folder in ("photos/a", "photos/b", "photos/unsorted", "before", "after"):
        Path(folder).mkdir(parents=True)
        for i in range(40):
            pixels = draw.integers(0, 256, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(f"{folder}/{i}.png")
    digits = draw.integers(0, 256, (20, 8, 8)).astype(np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 2
    np.savez("digits.npz", x=digits, y=labels)
    for stem, values in (("images-idx3", digits), ("labels-idx1", labels)):
        head = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
        Path(f"t10k-{stem}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
    for command in commands(GUIDES / "images.md"):
        if command.words[1] == "tile":
            run(command, {})


@pytest.mark.slow
def test_the_guide_to_python_runs(small, capsys):
    text = "".join(text for _, text in blocks(GUIDES / "python.md", "python"))
    for word, meant in {**small, "myproject": "."}.items():
        text = text.replace(f'"{word}"', f'"{meant}"')
    exec(compile(text, str(GUIDES / "python.md"), "exec"), {})
    assert "1 " in capsys.readouterr().out

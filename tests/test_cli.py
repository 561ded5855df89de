"""The command line: exit codes, streams, import time, and how failures are told."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest
import typer.main
from command_line import run_command
from typer.testing import CliRunner

from geomatch import __version__, config
from geomatch.cli.commands import app
from geomatch.init import START
from geomatch.project import Project

EXAMPLES = Path(__file__).parent.parent / "examples"
COMMANDS = ["init", "tile", "train", "tune", "embed", "index", "query", "eval", "info", "demo"]


def invoke(*arguments):
    result = run_command(*arguments)
    return result.exit_code, result.stdout, result.stderr


def geomatch(*arguments, **options):
    command = [sys.executable, "-m", "geomatch", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, **options
    )


@pytest.fixture
def project(tmp_path):
    code, _, stderr = invoke("init", tmp_path / "project")
    assert code == 0, stderr
    return Project.open(tmp_path / "project")


@pytest.fixture
def imagery(write_raster):
    return write_raster("a.tif", np.full((3, 64, 64), 90, np.uint8))


def test_version():
    assert invoke("--version") == (0, f"geomatch {__version__}\n", "")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_of_every_command(command):
    code, stdout, stderr = invoke(*command, "--help")
    assert code == 0
    assert "Usage" in stdout
    assert stderr == ""


def test_help_lists_the_commands_in_the_order_of_the_pipeline():
    _, stdout, _ = invoke("--help")
    listed = [
        next((i for i, line in enumerate(stdout.splitlines()) if name in line.split()), -1)
        for name in COMMANDS
    ]
    assert -1 not in listed
    assert listed == sorted(listed)


def commands(group, name=""):
    """Every command by its full name, as Typer has it."""
    for part, command in group.commands.items():
        full = f"{name} {part}".strip()
        if hasattr(command, "commands"):
            yield from commands(command, full)
        else:
            yield full, command


ALL = dict(commands(typer.main.get_command(app)))
CHOICES = {
    "init --preset": {path.parent.name for path in EXAMPLES.glob("*/geomatch.toml")},
    "tile --split": {"blocks", "source", "file"},
    "embed --engine": {"auto", "jax", "openvino", "onnxruntime"},
    "embed --dtype": {"auto", "float32", "bfloat16", "int8"},
    "eval --database": {"split", "all", "train"},
    "project2d --split": {"train", "validation", "test"},
    "project2d --method": {"pca", "tsne"},
    "weights import --trunk": set(get_args(config.Trunk)),
}
"""Options with a fixed set of values."""


def options(command):
    return {name: parameter for parameter in ALL[command].params for name in parameter.opts}


@pytest.mark.parametrize("command", ALL)
def test_every_command_takes_settings_and_a_project(command):
    assert "--set" in options(command)
    if command not in ("init", "demo"):  # which make the project that they name
        assert {"-p", "--project"} <= set(options(command))


@pytest.mark.parametrize("option", CHOICES)
def test_choices_are_listed_and_completed(option):
    command, _, name = option.rpartition(" ")
    words = f"geomatch {command} {name} "
    environment = {"_GEOMATCH_COMPLETE": "complete_bash", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split()))
    done = CliRunner().invoke(app, [], env=environment, prog_name="geomatch")
    assert set(done.stdout.split()) == CHOICES[option]
    shown = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "300"}).stdout
    (line,) = (line for line in shown.splitlines() if name in line.split())
    assert all(value in line for value in CHOICES[option])


@pytest.mark.parametrize("option", CHOICES)
def test_another_value_is_refused_in_one_line(tmp_path, option):
    command, _, name = option.rpartition(" ")
    given = [tmp_path / "x"] if command in ("init", "weights import") else []
    code, stdout, stderr = invoke(*command.split(), *given, name, "other")
    assert (code, stdout) == (2, "")
    error, hint = stderr.splitlines()
    assert error.startswith(f"error: invalid value for '{name}': 'other' is not one of ")
    assert all(repr(value) in error for value in CHOICES[option])
    assert hint.endswith(f" {command} --help")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fly",), "no such command 'fly'"),
        (("tile", "--wings"), "no such option: --wings"),
        (("query",), "missing argument 'TARGET'"),
        (("weights", "import", "a.pth"), "missing option '--trunk'"),
        (("export",), "missing command"),
    ],
)
def test_wrong_use_ends_in_one_line(arguments, words):
    code, stdout, stderr = invoke(*arguments)
    assert (code, stdout) == (2, "")
    error, hint = stderr.splitlines()
    assert error.startswith(f"error: {words}")
    assert hint.endswith("--help")


def test_help_imports_nothing_heavy():
    heavy = ["jax", "numpy", "rasterio", "sklearn", "faiss", "orbax", "pyarrow", "tensorstore"]
    code = (
        "import sys\n"
        "from geomatch.cli.commands import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Usage" in done.stdout
    assert done.stderr.strip() == "[]"


def test_help_is_quick():
    """Half a second of processor time, which other work on the machine takes none of; or twice."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert geomatch("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert 0 < min(seconds) < 1.0


@pytest.mark.parametrize(
    "arguments",
    [
        ("fly",),
        ("tile", "--wings"),
        ("tile", "--size", "big"),
        ("tile", "--workers", "0", "2010=a"),
        ("query",),
        ("init",),
    ],
)
def test_wrong_use_is_2(project, arguments):
    done = geomatch(*arguments, cwd=project.root)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["train", "tune", "embed", "index", "eval", "query"])
def test_without_tiles_the_next_command_is_named(project, command):
    """Failed, not wrong: 1. One line of error, one of hint."""
    target = ["1_2@2010"] if command == "query" else []
    code, stdout, stderr = invoke(command, *target, "-p", project.root)
    assert code == 1
    assert stdout == ""
    error, hint = stderr.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert "geomatch" in hint


@pytest.mark.parametrize("command", ["tile", "train", "tune", "embed", "index", "eval", "info"])
def test_outside_a_project_init_is_named(tmp_path, command):
    code, stdout, stderr = invoke(command, "-p", tmp_path)
    assert code == 2
    assert stdout == ""
    error, hint = stderr.splitlines()
    assert str(tmp_path) in error
    assert "geomatch init" in hint


@pytest.mark.parametrize("command", ["tile", "train", "tune", "embed", "index", "eval", "info"])
def test_unknown_keys_are_refused_by_every_command(project, command):
    code, _, stderr = invoke(command, "-p", project.root, "--set", "grid.sise=3")
    assert code == 2
    assert "grid.size" in stderr
    project.config.write_text("[grid]\nsise = 3\n")
    code, _, stderr = invoke(command, "-p", project.root)
    assert code == 2
    assert "geomatch.toml" in stderr
    assert "grid.size" in stderr


def test_init_makes_a_project_that_starts_with_what_found_most_places(tmp_path):
    root = tmp_path / "deep" / "project"
    code, _, stderr = invoke("init", root)
    assert code == 0, stderr
    settings = config.load(root / "geomatch.toml")
    assert settings == config.with_overrides(config.Config(), START)
    assert (settings.model.trunk, settings.train.loss) == ("resnet50", "infonce")


@pytest.mark.parametrize("preset", sorted(CHOICES["init --preset"]))
def test_init_with_a_preset_begins_with_its_settings(tmp_path, preset):
    code, _, stderr = invoke("init", tmp_path / "project", "--preset", preset)
    assert code == 0, stderr
    settings = config.load(tmp_path / "project" / "geomatch.toml")
    assert settings == config.load(EXAMPLES / preset / "geomatch.toml")
    assert bool(settings.source or settings.images.folders) == ("put the data" in stderr)


def test_an_unknown_preset_is_reported_with_the_known_ones(tmp_path):
    code, _, stderr = invoke("init", tmp_path / "project", "--preset", "nowhere")
    assert code == 2
    assert "nowhere" in stderr
    assert "levir" in stderr
    assert not (tmp_path / "project").exists()


def test_init_writes_what_is_set(tmp_path):
    chosen = ["--set", "grid.size=48", "--set", 'split.test=["a*"]']
    code, _, stderr = invoke("init", tmp_path / "new", *chosen)
    assert code == 0, stderr
    text = (tmp_path / "new" / "geomatch.toml").read_text()
    assert "\nsize = 48 " in text
    assert '\ntest = ["a*"] ' in text
    code, _, stderr = invoke("init", tmp_path / "levir", "--preset", "levir", *chosen)
    assert code == 0, stderr
    settings = config.load(tmp_path / "levir" / "geomatch.toml")
    assert settings == config.load(EXAMPLES / "levir" / "geomatch.toml", chosen[1::2])


@pytest.mark.parametrize("override", ["grid.sise=3", "grid.size=big", "source.year=2010"])
def test_init_refuses_wrong_settings(tmp_path, override):
    code, _, stderr = invoke("init", tmp_path / "project", "--set", override)
    assert code == 2
    assert "--set" in stderr
    assert not (tmp_path / "project").exists()


def test_init_refuses_an_existing_project(project):
    project.config.write_text("[grid]\nsize = 32\n")
    code, stdout, stderr = invoke("init", project.root)
    assert code == 2
    assert stdout == ""
    assert "geomatch.toml" in stderr
    assert project.config.read_text() == "[grid]\nsize = 32\n"


def test_only_data_go_to_stdout(project, imagery):
    options = ["-p", project.root, "--size", 16, "--split", "source", "--workers", 1]
    code, stdout, stderr = invoke("tile", f"2010={imagery}", *options)
    assert code == 0, stderr
    assert stdout == ""
    assert "16 tiles" in stderr
    code, stdout, _ = invoke("info", "-p", project.root, "--json")
    assert code == 0
    assert json.loads(stdout)["tiles"]["tiles"] == 16
    assert json.loads(stdout)["devices"] == [str(device) for device in jax.devices()]


def test_splits_without_tiles_are_told(project, imagery):
    options = ["-p", project.root, f"2010={imagery}", "--workers", 1]
    assert (
        "no tiles for train and validation: the ground" in invoke("tile", *options, "--size", 32)[2]
    )
    assert "no tiles for" not in invoke("tile", *options, "--size", 16)[2]


def test_quiet_has_no_progress(project, imagery):
    options = ["-p", project.root, "--size", 16, "--split", "source", "--workers", 1]
    code, _, stderr = invoke("tile", f"2010={imagery}", *options, "-q")
    assert code == 0
    assert len(stderr.splitlines()) <= 1


def test_the_project_is_the_current_folder_or_the_environments(
    project, imagery, tmp_path, monkeypatch
):
    options = [f"2010={imagery}", "--size", 16, "--split", "source", "--workers", 1]
    monkeypatch.chdir(project.root)
    assert invoke("tile", *options)[0] == 0
    first = project.catalogue.stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    assert invoke("tile", *options)[0] == 2
    monkeypatch.setenv("GEOMATCH_PROJECT", str(project.root))
    assert invoke("tile", *options, "--force")[0] == 0
    assert project.catalogue.stat().st_mtime_ns > first


def test_options_and_set_beat_the_file(project, imagery):
    before = '[grid]\nsize = 32\n[split]\nby = "source"\n'
    project.config.write_text(before)
    command = ["tile", f"2010={imagery}", "-p", project.root, "--workers", 1]
    assert invoke(*command)[0] == 0
    assert project.tile_manifest().size == 32
    assert invoke(*command, "--set", "grid.size=16")[0] == 0
    assert project.tile_manifest().size == 16
    assert invoke(*command, "--size", 8)[0] == 0
    assert project.tile_manifest().size == 8
    assert project.config.read_text() == before, "the command line never rewrites the file"


def test_markup_in_names_is_shown_as_it_is(project, tmp_path):
    """Rich would take [red] for a colour."""
    code, _, stderr = invoke("tile", "-p", project.root, f"2010={tmp_path}/[red]none[x].tif")
    assert code == 1
    assert "[red]none[x].tif" in stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(project, imagery):
    project.root.chmod(0o500)
    try:
        code, _, stderr = invoke("tile", "-p", project.root, f"2010={imagery}")
    finally:
        project.root.chmod(0o700)
    assert code == 1
    assert "Permission" in stderr
    assert "Traceback" not in stderr


def test_a_reader_that_goes_away_is_no_traceback(project):
    """As in `geomatch info | head -0`."""
    command = [sys.executable, "-m", "geomatch", "info", "-p", str(project.root), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        stderr = process.stderr.read().decode()
    assert "Traceback" not in stderr
    assert "Error" not in stderr


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "a@5", ".hidden"])
def test_a_run_has_a_plain_name(project, imagery, name):
    options = ["-p", project.root, "--size", 16, "--split", "source", "--workers", 1, "-q"]
    assert invoke("tile", f"2010={imagery}", f"2020={imagery}", *options)[0] == 0
    code, _, stderr = invoke("train", "-p", project.root, "--run", name, "-q")
    assert code == 2
    assert "name" in stderr
    assert not (project.root / "runs").exists()


def test_areas_need_a_split_that_takes_them(project, imagery):
    code, _, stderr = invoke("tile", "-p", project.root, f"2010={imagery}", "--test", "a*")
    assert code == 2
    assert "--split source" in stderr


def test_a_name_that_is_not_utf_8_is_printed(tmp_path):
    """Whatever the terminal's encoding does not hold is spelled out."""
    folder = os.fsencode(tmp_path) + b"/\xe9"
    command = [sys.executable, "-m", "geomatch"]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    for arguments in (["init", folder], ["info", "-p", folder]):
        done = subprocess.run([*command, *arguments], capture_output=True, env=strict, check=False)
        assert done.returncode == 0, done.stderr
    assert b"udce9" in done.stdout

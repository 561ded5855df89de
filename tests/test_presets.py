"""The examples' documents, and the large form of one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from geomatch.cli.commands import app

EXAMPLES = Path(__file__).parent.parent / "examples"
PRESETS = sorted(path.parent.name for path in EXAMPLES.glob("*/geomatch.toml"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_s_document_begins_with_its_command(name):
    text = (EXAMPLES / name / "README.md").read_text()
    assert re.search(rf"^geomatch init \w+ --preset {name}$", text, re.MULTILINE)


@pytest.mark.slow
def test_the_vgg16_form_of_ranked_triplets_takes_its_steps(tmp_path, data):
    """From random weights: those of ImageNet are imported by who has them."""
    run, root = CliRunner(), tmp_path / "project"
    run.invoke(app, ["init", str(root), "--preset", "ranked-triplets"], catch_exceptions=False)
    (root / "aid").symlink_to(data / "aid")
    options = {
        "model.trunk": "vgg16",
        "train.init": "",
        "train.freeze": '["trunk/stage1", "trunk/stage2", "trunk/stage3", "trunk/stage4"]',
        "train.batch": "6",
        "train.epochs": "2",
        "mining.hardest": "60",
        "grid.size": "64",
    }
    settings = [f"--set={key}={value}" for key, value in options.items()]
    for command in ("tile", "train"):
        done = run.invoke(app, [command, "-p", str(root), *settings])
        assert done.exit_code == 0, done.output
    lines = (root / "runs" / "run1" / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines]
    assert last[-1]["step"] == 20
    assert sorted(p.stem for p in (root / "runs" / "run1" / "mining").iterdir()) == [
        "00000000",
        "00000010",
    ]

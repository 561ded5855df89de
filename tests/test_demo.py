"""`demo`: whose folder it takes, and with which settings. The chain itself is the stages'."""

from __future__ import annotations

import pytest
from command_line import run_command

from geomatch import config, demo
from geomatch.errors import UsageError


@pytest.fixture(autouse=True)
def chained(monkeypatch):
    """The settings of each chain that was run, of which there is nothing but a result."""
    found = []

    def chain(project, *_):
        found.append(config.load(project.config))
        return demo.Shown(1, 0.5, 0.25, project.root / "demo.png", 1.0)

    monkeypatch.setattr(demo, "_chain", chain)
    monkeypatch.setattr(demo, "write_landscape", lambda folder, seed: None)
    return found


def test_settings_are_laid_over_the_demo_s_and_kept(tmp_path, chained):
    folder = tmp_path / "demo"
    chosen = ["--set", "train.epochs=2", "--set", "embed.engine=jax"]
    done = run_command("demo", folder, "-q", *chosen)
    assert done.exit_code == 0, done.stderr
    assert "untrained    0.250" in done.stdout
    (settings,) = chained
    assert (settings.train.epochs, settings.embed.engine) == (2, "jax")
    assert settings.train.loss == "infonce"
    assert settings == config.load(folder / "geomatch.toml")
    demo.demo(folder, overrides=["train.epochs = 2", "embed.engine = 'jax'"])
    assert chained == [settings, settings]


@pytest.mark.parametrize("override", ["train.epohcs=2", "train.epochs=many"])
def test_wrong_settings_leave_no_folder(tmp_path, override):
    with pytest.raises(UsageError, match="--set"):
        demo.demo(tmp_path / "demo", overrides=[override])
    assert not (tmp_path / "demo").exists()


def test_a_demo_goes_on_as_it_was_begun(tmp_path, chained):
    folder = tmp_path / "demo"
    demo.demo(folder, overrides=["train.epochs=2"])
    before = (folder / "geomatch.toml").read_text()
    with pytest.raises(UsageError, match=r"other settings: train\.epochs"):
        demo.demo(folder)
    with pytest.raises(UsageError, match=r"grid\.size, train\.epochs"):
        demo.demo(folder, overrides=["grid.size=32"])
    with pytest.raises(UsageError, match="seed 0"):
        demo.demo(folder, seed=1, overrides=["train.epochs=2"])
    assert (folder / "geomatch.toml").read_text() == before
    assert len(chained) == 1


def test_another_s_folder_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        demo.demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]

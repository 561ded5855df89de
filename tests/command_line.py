"""Commands of geomatch, run within the process of the tests."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from geomatch.cli.commands import app


def run_command(*arguments: object, stdin: str = "") -> Any:
    """The result of a command line: its `exit_code`, `stdout`, `stderr` and `output`, both."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

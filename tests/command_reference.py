"""The reference of commands and settings, as Markdown made from the program itself.

`python tests/command_reference.py` writes it again; `test_documentation` checks that it is current.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from geomatch import config
from geomatch.cli.commands import app

REFERENCE = Path(__file__).parent.parent / "examples" / "guides" / "commands.md"
BEGINNING = """\
# Commands and settings

This page is made from the program by `python tests/command_reference.py`. `geomatch COMMAND --help`
shows the same in a terminal. Options without a default take their value from the settings.
"""
SETTINGS = """\
## Settings

The tables of `geomatch.toml`. `--set table.key=value` beats the file, and the file beats these
defaults; the value is TOML or a bare word. Later stages take those of the run.
A `[[source]]` table names the imagery of a year and a `[[labels]]` table a class of labels, which
`--set` cannot change; see [tiling](tiling.md#sources-in-geomatchtoml).
"""


def markdown() -> str:
    """The whole page."""
    root = typer.main.get_command(app)
    context = root.make_context("geomatch", [], resilient_parsing=True)
    sections = [BEGINNING, *_sections(root, context), SETTINGS, *_tables()]
    return "\n".join(sections)


def commands(group: Any, context: Any) -> Iterator[tuple[Any, Any]]:
    """Every command below a group with its context, those of groups within it too."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        if hasattr(command, "list_commands"):
            yield from commands(command, inner)
        else:
            yield command, inner


def _sections(root: Any, context: Any) -> Iterator[str]:
    for command, inner in commands(root, context):
        usage = " ".join([inner.command_path, *command.collect_usage_pieces(inner)])
        lines = [f"## {inner.command_path}", "", command.help, "", f"    {usage}", ""]
        records = [parameter.get_help_record(inner) for parameter in command.get_params(inner)]
        rows = [(f"`{name}`", text) for name, text in filter(None, records)]
        yield "\n".join([*lines, *_table(("", ""), rows)])


def _tables() -> Iterator[str]:
    for table in dataclasses.fields(config.Config):
        if isinstance(table.default, tuple):
            continue
        hints = typing.get_type_hints(type(table.default))
        rows = []
        for key in dataclasses.fields(table.default):  # type: ignore[arg-type]
            default = "unset" if key.default is None else f"`{config.toml(key.default)}`"
            rows.append((f"`{key.name}`", default, _values(hints[key.name]), key.metadata["doc"]))
        head = ("key", "default", "values", "")
        yield "\n".join([f"### [{table.name}]", "", *_table(head, rows)])


def _values(hint: Any) -> str:
    """What a key may be: its choices, or its type in a user's words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{config.toml(value)}`" for value in arguments)
    if origin is tuple:
        return f"list of {_values(arguments[0])}"
    if arguments:  # or unset
        return _values(arguments[0])
    names = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    return names[hint]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    rule = tuple("---" for _ in head)
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, rule, *rows)]
    return [f"| {' | '.join(row)} |" for row in cells] + [""]


if __name__ == "__main__":
    REFERENCE.write_text(markdown(), encoding="utf-8")

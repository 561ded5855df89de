"""Frozen dataclasses that are kept as JSON."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

OPTIONAL = {"optional": True}
"""Metadata of a field that is left out of the JSON where it is None."""
INLINED = {"optional": True, "inlined": True}
"""The same, of a record whose fields stand among those of its owner in JSON."""


def named(name: str) -> dict[str, str]:
    """Metadata of a field with another name in JSON, such as "map@5"."""
    return {"name": name}


@dataclass(frozen=True)
class Record:
    """A dataclass whose fields are JSON values, further records, or tuples and dicts of them."""

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values by name."""
        values: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is None and item.metadata.get("optional"):
                continue
            if item.metadata.get("inlined"):
                values |= value.as_json()
            else:
                values[item.metadata.get("name", item.name)] = _as_json(value)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `as_json`; unknown names are ignored.

        Raises:
            KeyError: a value is missing.
        """
        hints = typing.get_type_hints(cls)
        found: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            name, hint = item.metadata.get("name", item.name), hints[item.name]
            if item.metadata.get("inlined"):
                record = typing.get_args(hint)[0]
                if dataclasses.fields(record)[0].name in values:
                    found[item.name] = record.from_json(values)
            elif name in values or not item.metadata.get("optional"):
                found[item.name] = _from_json(values[name], hint)
        return cls(**found)


def _as_json(value: Any) -> Any:
    if isinstance(value, Record):
        return value.as_json()
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return value


def _from_json(value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return None
    if origin is types.UnionType:
        return _from_json(value, arguments[0])
    if origin is tuple:
        return tuple(_from_json(item, arguments[0]) for item in value)
    if origin is dict:
        return {key: _from_json(item, arguments[1]) for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_json(value)
    return value

"""Frozen dataclasses that are kept as JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

OPTIONAL = {"optional": True}
"""Metadata of a field that is left out of the JSON where it is None."""
INLINED = {"optional": True, "inlined": True}
"""Metadata of an optional record whose fields are written among those of its owner."""


def named(name: str) -> dict[str, str]:
    """Metadata of a field with another name in JSON, such as "map@5"."""
    return {"name": name}


@dataclass(frozen=True)
class Record:
    """A dataclass whose fields are JSON values, records, or tuples, lists and dicts of them."""

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
                values[_name(item)] = _as_json(value)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `as_json`; unknown names are ignored.

        Raises:
            KeyError: a value is missing.
            TypeError: a value has another type than its field.
        """
        hints = typing.get_type_hints(cls)
        found: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            name, hint = _name(item), hints[item.name]
            if item.metadata.get("inlined"):
                record = typing.get_args(hint)[0]
                first = dataclasses.fields(record)[0]
                if _name(first) in values:
                    found[item.name] = record.from_json(values)
            elif name in values or not item.metadata.get("optional"):
                found[item.name] = _from_json(values[name], hint)
        return cls(**found)


def _name(item: dataclasses.Field[Any]) -> str:
    name: str = item.metadata.get("name", item.name)
    return name


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
    if hint is Any:
        return value
    if origin is types.UnionType:
        for option in arguments:
            with contextlib.suppress(TypeError):
                return _from_json(value, option)
    elif origin is typing.Literal:
        if value in arguments:
            return value
    elif origin in (tuple, list) and isinstance(value, (list, tuple)):
        return origin(_from_json(item, arguments[0]) for item in value)
    elif origin is dict and isinstance(value, Mapping):
        return {key: _from_json(item, arguments[1]) for key, item in value.items()}
    elif isinstance(hint, type) and issubclass(hint, Record) and isinstance(value, Mapping):
        return hint.from_json(value)
    elif type(value) is hint or (hint is float and type(value) is int):
        return value
    raise TypeError(f"{value!r} is not {getattr(hint, '__name__', hint)}")

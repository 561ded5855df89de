"""The parameters of a request: what they mean, which values they take, and the options they make.

One table serves for reading them and for their description in OpenAPI.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from geomatch.errors import UsageError
from geomatch.querying.options import Options

BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a URL.

    Attributes:
        field: of `Options` that it sets; "" for another use.
        least, most: of a number.
        choices: of a text; any by default.
        several: whether it may be repeated.
    """

    name: str
    kind: Literal["string", "integer", "number", "boolean"]
    about: str
    field: str = ""
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    several: bool = False

    def schema(self) -> dict[str, Any]:
        """As OpenAPI describes it."""
        bounds = {"minimum": self.least, "maximum": self.most, "enum": self.choices or None}
        one = {"type": self.kind} | {k: v for k, v in bounds.items() if v is not None}
        return {
            "name": self.name,
            "in": "query",
            "description": self.about,
            "schema": {"type": "array", "items": one} if self.several else one,
        }

    def value(self, text: str) -> Any:
        """What a text stands for.

        Raises:
            UsageError: it is none of its values.
        """
        try:
            if self.kind == "boolean":
                return BOOLEANS[text.lower()]
            value = {"string": str, "integer": int, "number": float}[self.kind](text)
        except (KeyError, ValueError) as error:
            raise UsageError(f"{self.name}={text}: no {self.kind}", self.about) from error
        if self.choices and text not in self.choices:
            raise UsageError(f"{self.name}={text}", f"One of: {', '.join(self.choices)}.")
        low = -float("inf") if self.least is None else self.least
        high = float("inf") if self.most is None else self.most
        if self.kind != "string" and not low <= value <= high:
            raise UsageError(f"{self.name}={text} is not from {low:g} to {high:g}", self.about)
        return value


TARGET = (
    Parameter("tile", "string", "Id of the tile to ask for."),
    Parameter("lon", "number", "Longitude of the point to ask for.", least=-180, most=180),
    Parameter("lat", "number", "Latitude of that point.", least=-90, most=90),
)
IMAGE = (
    Parameter("name", "string", "Name of the image, for messages."),
    Parameter(
        "gsd",
        "number",
        "Metres per pixel of an image that is a scan of a larger area; where that is unknown, "
        "several are tried.",
        "scales",
        0.001,
        1000,
        several=True,
    ),
)
ASKED = (
    Parameter("top", "integer", "Number of answers, 5 by default.", "top", 1, 200),
    Parameter("year", "string", "Search this year only.", "years", several=True),
    Parameter("same_year", "boolean", "Search the query's own year too.", "same_year"),
    Parameter(
        "split",
        "string",
        "Search this split only.",
        "split",
        choices=("train", "validation", "test"),
    ),
    Parameter("bbox", "string", "Search the tiles in W,S,E,N, in degrees.", "box"),
    Parameter(
        "exclude_radius",
        "number",
        "Leave out tiles less than so many metres from the query.",
        "exclude_radius",
        0,
    ),
    Parameter(
        "from_year",
        "string",
        "Year of the tile at a point, or of an image; by default the newest.",
        "from_year",
    ),
    Parameter(
        "rotate",
        "number",
        "Search the query turned every so many degrees as well; 90 for quarter turns.",
        "rotate",
        5,
        180,
    ),
    Parameter(
        "expand",
        "integer",
        "Search again with the query averaged with so many first answers.",
        "expand",
        0,
        100,
    ),
    Parameter("like", "string", "Id of an answer that is right.", "like", several=True),
    Parameter("unlike", "string", "Id of an answer that is wrong.", "unlike", several=True),
    Parameter(
        "verify",
        "integer",
        "Look for the query in so many first answers by local features.",
        "verify",
        0,
        50,
    ),
    Parameter(
        "fpr",
        "number",
        "Share of queries without a match that may get one, 0.01 by default.",
        "fpr",
        0,
        1,
    ),
    Parameter(
        "format",
        "string",
        "What to answer with; json by default.",
        choices=("json", "gpkg", "geojson", "csv"),
    ),
)
TILES = (
    Parameter("bbox", "string", "Tiles whose centres are in W,S,E,N, in degrees."),
    Parameter("search", "string", "Tiles whose ids have this in them."),
    Parameter("year", "string", "Tiles of this year; by default of the newest."),
    Parameter("limit", "integer", "Number of tiles, 500 by default.", least=1, most=5000),
)
SIDE = Parameter("side", "integer", "Pixels along its side, 256 by default.", least=16, most=1024)


def read(given: Sequence[tuple[str, str]], known: Sequence[Parameter]) -> dict[str, Any]:
    """The values of parameters by name; a tuple for one that may be repeated.

    Raises:
        UsageError: one is unknown or repeated, or has no such value.
    """
    by_name = {each.name: each for each in known}
    values: dict[str, Any] = {}
    for name, text in given:
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, 1)
            raise UsageError(f"there is no parameter {name}", f"{near[0]}?" if near else "")
        if by_name[name].several:
            values[name] = (*values.get(name, ()), by_name[name].value(text))
        elif name in values:
            raise UsageError(f"{name} is given twice")
        else:
            values[name] = by_name[name].value(text)
    return values


def options_of(values: Mapping[str, Any]) -> Options:
    """The options of a query.

    Raises:
        UsageError: a value makes no sense.
    """
    known = [each for each in (*ASKED, *IMAGE) if each.field]
    fields = {each.field: values[each.name] for each in known if each.name in values}
    if "box" in fields:
        fields["box"] = box_of(fields["box"])
    return Options(**fields, build=False)


def box_of(text: str) -> tuple[float, float, float, float]:
    """A box W,S,E,N.

    Raises:
        UsageError: it is none.
    """
    try:
        west, south, east, north = map(float, text.split(","))
    except ValueError as error:
        raise UsageError(f"bbox={text}: no box", "Give W,S,E,N in degrees.") from error
    return west, south, east, north

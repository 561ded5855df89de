"""The API in OpenAPI 3.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from geomatch import __version__
from geomatch.serving import uploads
from geomatch.serving.parameters import ASKED, IMAGE, SIDE, TARGET, TILES, Parameter

TEXT, NUMBER, WHOLE, FLAG = ({"type": t} for t in ("string", "number", "integer", "boolean"))
RING = {
    "type": "array",
    "items": {"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 2},
    "description": "Closed ring of longitude and latitude.",
}


def _or_null(kind: dict[str, Any]) -> dict[str, Any]:
    return {"oneOf": [kind, {"type": "null"}]}


def _object(optional: Sequence[str] = (), **properties: dict[str, Any]) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


MATCH = _object(
    (
        *("turn", "gsd", "confidence", "agreeing", "windows", "confirmed", "inliers"),
        *("query_lon", "query_lat", "footprint"),
    ),
    query=TEXT,
    rank=WHOLE,
    tile=TEXT,
    year=_or_null(TEXT),
    score=NUMBER | {"description": "Cosine similarity or negative distance; higher is better."},
    lon=_or_null(NUMBER),
    lat=_or_null(NUMBER),
    distance_m=_or_null(NUMBER) | {"description": "Metres between tile centres."},
    probability=_or_null(NUMBER) | {"description": "That it shows the query's place."},
    match=_or_null(FLAG) | {"description": "False where the query has no match."},
    turn=NUMBER | {"description": "Degrees service-clockwise by which the query is turned."},
    gsd=NUMBER | {"description": "Of a scan, metres per pixel."},
    confidence=NUMBER | {"description": "Of a scan, how far this place is ahead of others, to 1."},
    agreeing=WHOLE | {"description": "Of a scan, windows that vote for this place."},
    windows=WHOLE | {"description": "Of how many."},
    confirmed=FLAG | {"description": "Whether local features agree, where asked for by verify."},
    inliers=WHOLE | {"description": "Local features that agree with one transform."},
    query_lon=NUMBER | {"description": "Where the query's centre lies, if that is confirmed."},
    query_lat=NUMBER,
    footprint=RING,
)
TILE = {
    "id": TEXT,
    "year": _or_null(TEXT),
    "lon": _or_null(NUMBER),
    "lat": _or_null(NUMBER),
    "footprint": RING,
}
SCHEMAS = {
    "Match": MATCH,
    "Answer": _object(
        ("picture",),
        picture=TEXT | {"description": "What was cut from the image, as a data: URL."},
        query=TEXT,
        tile=_or_null(TEXT),
        year=_or_null(TEXT),
        footprint=_or_null(RING),
        matches={"type": "array", "items": {"$ref": "#/components/schemas/Match"}},
        remarks={"type": "array", "items": TEXT},
    ),
    "Tile": _object(("footprint",), **TILE),
    "TileDetails": _object(
        ("footprint",), **TILE, split=TEXT, others={"type": "array", "items": TEXT}
    ),
    "Tiles": _object(
        total=_or_null(WHOLE),
        tiles={"type": "array", "items": {"$ref": "#/components/schemas/Tile"}},
    ),
    "Error": _object(error=TEXT, hint=TEXT),
}


def described() -> dict[str, Any]:
    """The document."""
    answer = _answers("Answer", "The answers.")
    for media in ("application/geopackage+sqlite3", "application/geo+json", "text/csv"):
        answer["200"]["content"][media] = {}
    image = {
        "required": True,
        "description": f"An image file as it is, at most {uploads.MOST_BYTES >> 20} MB.",
        "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
    }
    tile_id = {"name": "id", "in": "path", "required": True, "schema": TEXT}
    picture = {"200": {"description": "The tile.", "content": {"image/jpeg": {}}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "geomatch", "version": __version__},
        "paths": {
            "/query": {
                "get": _operation("Find a tile or a point.", [*TARGET, *ASKED], answer),
                "post": _operation("Find an image.", [*IMAGE, *ASKED], answer)
                | {"requestBody": image},
            },
            "/tiles": {"get": _operation("List tiles.", TILES, _answers("Tiles", "Tiles."))},
            "/tiles/{id}": {
                "get": _operation("A tile.", (), _answers("TileDetails", "The tile.")),
                "parameters": [tile_id],
            },
            "/thumbnail/{id}": {
                "get": _operation("A picture of a tile.", [SIDE], picture),
                "parameters": [tile_id],
            },
            "/project": {
                "get": _operation(
                    "What the project has.",
                    (),
                    {"200": {"description": "Years, tiles, extent.", "content": _json({})}},
                )
            },
        },
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}, {}],
    }


def _operation(
    summary: str, parameters: Sequence[Parameter], responses: dict[str, Any]
) -> dict[str, Any]:
    error = {
        "description": "What is wrong, and what to do.",
        "content": _json({"$ref": "#/components/schemas/Error"}),
    }
    return {
        "summary": summary,
        "parameters": [each.schema() for each in parameters],
        "responses": {**responses, "default": error},
    }


def _answers(schema: str, description: str) -> dict[str, Any]:
    content = _json({"$ref": f"#/components/schemas/{schema}"})
    return {"200": {"description": description, "content": content}}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}

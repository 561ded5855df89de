"""An index in PostgreSQL with pgvector, for sharing and for what outgrows one machine.

Schema `geomatch` has a table `indexes` of manifests, and for each of them a table with a row per
tile: the columns of `data.index_rows`, the descriptor in half precision under an HNSW index, and
the box of the footprint in degrees; with PostGIS also its polygon.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from geomatch.data.filters import Box, Filter
from geomatch.data.index_rows import ROW
from geomatch.data.tiles import SPLITS
from geomatch.errors import GeomatchError, StaleError, UsageError
from geomatch.manifests import IndexEngine, IndexManifest
from geomatch.search.exact import Metric

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Part = tuple[pa.Table, Float64Array | None, Float32Array]
"""Rows of some tiles as `index_rows.ROW`, their footprints (n, 5, 2) in degrees, or None without
georeference, and their descriptors (n, d)."""

ENGINE = IndexEngine(
    kind="pgvector", dtype="float16", segments=(), parts=(), effort=0, recall=1.0, queries=0
)
SCHEME = re.compile(r"postgres(ql)?://")
EFFORT = 1000
"""Answers that pgvector's walk through its graph keeps in view, at most."""
SPARSE = 0.05
"""Share of the tiles below which those that pass a filter are searched exactly."""
INDEXED = 4000
"""Dimensions that pgvector indexes in half precision."""
SECRETS = {"password", "sslpassword"}
"""Parameters of a URL that nobody may read."""
# Distance operators, and the classes of their indexes.
OPERATORS: dict[Metric, tuple[Literal["<=>", "<->"], Literal["cosine", "l2"]]] = {
    "cosine": ("<=>", "cosine"),
    "euclidean": ("<->", "l2"),
}
SCHEMA = """
CREATE SCHEMA IF NOT EXISTS geomatch;
CREATE TABLE IF NOT EXISTS geomatch.indexes (
    table_name text PRIMARY KEY,
    name text NOT NULL,
    tiles text NOT NULL,
    manifest jsonb NOT NULL,
    made timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (name, tiles)
)
"""
COLUMNS = {
    "position": "bigint PRIMARY KEY",
    "id": "text NOT NULL",
    "year": "text",
    "split": "text",
    "lon": "double precision",
    "lat": "double precision",
    "epsg": "bigint",
    "x": "double precision",
    "y": "double precision",
    "store_row": "bigint NOT NULL",
    "footprint": "box",
}
"""Those of a tile: its position in the index, `index_rows.ROW`, and the box of its footprint."""
AWAY = """
CASE WHEN epsg = %s THEN sqrt(power(x - %s, 2) + power(y - %s, 2))
ELSE 2 * 6371008.8 * asin(sqrt(
    power(sin(radians(lat - %s) / 2), 2)
    + cos(radians(%s)) * cos(radians(lat)) * power(sin(radians(lon - %s) / 2), 2)
)) END >= %s
"""
"""As `filters.Filter.passing` has it: metres in the plane, else on the mean sphere."""


def is_url(name: str) -> bool:
    """Whether the name of an index is the URL of a database."""
    return SCHEME.match(name) is not None


def shown(url: str) -> str:
    """A URL without its password and parameters, for people to see."""
    before, _, rest = url.partition("://")
    account, at, place = rest.rpartition("@")
    return f"{before}://{account.partition(':')[0]}{at}{re.split('[?#]', place)[0]}"


@contextlib.contextmanager
def connect(url: str) -> Iterator[Any]:
    """A connection, in a transaction that is committed if the block ends without an exception.

    Args:
        url: "postgresql://USER@HOST:PORT/NAME"; what it lacks is taken from libpq's environment
            variables and password file.

    Raises:
        GeomatchError: psycopg is not installed, the database refuses, or a statement fails there.
            The message is without the password.
    """
    try:
        import psycopg
    except ImportError as error:
        raise GeomatchError(
            "PostgreSQL needs psycopg", "Run: pip install 'geomatch[postgres]'"
        ) from error
    hidden = _secrets(url)
    try:
        with psycopg.connect(url, connect_timeout=10) as connection:
            yield connection
    except psycopg.Error as error:
        text = " ".join(str(error).split())
        for secret in hidden:
            text = text.replace(secret, "***")
        # The original error would tell the password in a traceback.
        raise GeomatchError(f"{shown(url)}: {text}", "Check the URL and the server.") from None


def _secrets(url: str) -> set[str]:
    """The passwords of a URL, as written and as meant.

    Raises:
        UsageError: the URL cannot be taken apart, so that its password would be shown.
    """
    try:
        parts = urlsplit(url)
        parameters = parse_qsl(parts.query, strict_parsing=bool(parts.query))
        wrong = "@" in f"{parts.path}{parts.query}{parts.fragment}" or parts.port == 0
    except ValueError:
        wrong = True
    if wrong or not is_url(url) or parts.fragment:
        raise UsageError(
            "the URL of the database cannot be read",
            "Write postgresql://USER@HOST:PORT/NAME, and special characters of a password as %40"
            " and the like; better, keep it in ~/.pgpass or PGPASSWORD.",
        )
    found = {value for key, value in parameters if key in SECRETS} | {parts.password or ""}
    return {form for each in found if each for form in (each, unquote(each))}


def write(connection: Any, manifest: IndexManifest, parts: Iterable[Part]) -> None:
    """Write an index, which replaces that of the same embeddings when the transaction ends.

    Raises:
        GeomatchError: the server lacks pgvector.
    """
    name = f"index_{secrets.token_hex(8)}"
    cursor = connection.cursor()
    mapped = "postgis" in _extensions(cursor)
    columns = COLUMNS | ({"geometry": "geometry(Polygon, 4326)"} if mapped else {})
    cursor.execute(SCHEMA)
    position, size = 0, 0
    for rows, rings, vectors in parts:
        if not position:
            size = vectors.shape[1]
            kinds = ", ".join(f"{key} {kind}" for key, kind in columns.items())
            cursor.execute(_with(f"CREATE TABLE {{}} ({kinds}, embedding halfvec({size}))", name))
        into = ", ".join((*columns, "embedding"))
        with cursor.copy(_with(f"COPY {{}} ({into}) FROM STDIN", name)) as copy:
            for line in _lines(rows, rings, vectors, mapped):
                copy.write_row((position, *line))
                position += 1
    _make_indexes(cursor, name, manifest.metric, size, mapped)
    # One at a time, so that of two that write the same index the later one stays.
    cursor.execute("SELECT pg_advisory_xact_lock(hashtext('geomatch'))")
    same = (manifest.name, manifest.tiles)
    cursor.execute(
        "DELETE FROM geomatch.indexes WHERE name = %s AND tiles = %s RETURNING table_name", same
    )
    for (old,) in cursor.fetchall():
        cursor.execute(_with("DROP TABLE IF EXISTS {}", old))
    cursor.execute(
        "INSERT INTO geomatch.indexes VALUES (%s, %s, %s, %s)",
        (name, *same, json.dumps(manifest.as_json())),
    )


def _with(statement: str, table: str) -> Any:
    """A statement with the name of a table of the schema in place of {}."""
    from psycopg import sql

    return sql.SQL(statement).format(sql.Identifier("geomatch", table))


def _extensions(cursor: Any) -> set[str]:
    """The extensions of the database, in which pgvector is put where the server has it."""
    cursor.execute("SELECT name, installed_version FROM pg_available_extensions")
    available = dict(cursor.fetchall())
    if "vector" not in available:
        raise GeomatchError(
            "the PostgreSQL server has no pgvector", "Install its extension pgvector, 0.7 or later."
        )
    if available["vector"] is None:
        cursor.execute("CREATE EXTENSION vector")
    return {name for name, version in available.items() if version is not None} | {"vector"}


def _lines(
    rows: pa.Table, rings: Float64Array | None, vectors: Float32Array, mapped: bool
) -> Iterator[tuple[Any, ...]]:
    """Rows of a table without their positions, as COPY reads them."""
    columns = [rows[name].to_pylist() for name in ROW.names]
    split = ROW.get_field_index("split")
    columns[split] = [SPLITS[code] for code in columns[split]]
    boxes: list[str | None] = [None] * len(vectors)
    shapes: list[str | None] = [None] * len(vectors)
    if rings is not None:
        low, high = rings.min(axis=1).tolist(), rings.max(axis=1).tolist()
        boxes = [f"({a},{b}),({c},{d})" for (a, b), (c, d) in zip(low, high, strict=True)]
        polygons = shapely.set_srid(shapely.polygons(rings), 4326)
        shapes = shapely.to_wkb(polygons, hex=True, include_srid=True).tolist()
    halves = (_text(vector) for vector in vectors)
    more = (boxes, shapes) if mapped else (boxes,)
    yield from zip(*columns, *more, halves, strict=True)


def _text(vector: Float32Array) -> str:
    """A vector as pgvector reads it; half precision has no more digits."""
    return f"[{','.join([f'{value:.5g}' for value in vector.tolist()])}]"


def _make_indexes(cursor: Any, name: str, metric: Metric, size: int, mapped: bool) -> None:
    for columns in ("(id)", "(year)", "(epsg, x, y)", "USING gist (footprint)"):
        cursor.execute(_with(f"CREATE INDEX ON {{}} {columns}", name))
    if size <= INDEXED:
        kind = OPERATORS[metric][1]
        cursor.execute(
            _with(f"CREATE INDEX ON {{}} USING hnsw (embedding halfvec_{kind}_ops)", name)
        )
    if mapped:
        cursor.execute(_with("CREATE INDEX ON {} USING gist (geometry)", name))
    cursor.execute(_with("ANALYZE {}", name))


class PostgresIndex:
    """The rows and vectors of an index in a database: `index_rows.Rows` and `engines.Vectors`.

    Args:
        tiles: fingerprint of the project's tiles.

    Attributes:
        manifest: of the latest index of these tiles.

    Raises:
        StaleError: the database has none.
    """

    def __init__(self, connection: Any, tiles: str, url: str) -> None:
        self._cursor = connection.cursor()
        self._cursor.execute("SELECT to_regclass('geomatch.indexes')")
        found = None
        if self._cursor.fetchone()[0] is not None:
            self._cursor.execute(
                "SELECT table_name, manifest FROM geomatch.indexes WHERE tiles = %s"
                " ORDER BY made DESC LIMIT 1",
                (tiles,),
            )
            found = self._cursor.fetchone()
        command = f"geomatch index --to {shown(url)}"
        if found is None:
            raise StaleError(
                f"{shown(url)} has no index of the tiles of this project", f"Run: {command}"
            )
        self._table = found[0]
        try:
            self.manifest = IndexManifest.from_json(found[1])
        except (KeyError, TypeError) as error:
            raise StaleError(
                f"the index in {shown(url)} is of another version of geomatch", f"Run: {command}"
            ) from error
        self._mapped = bool(self._fetch("SELECT 1 FROM pg_extension WHERE extname = 'postgis'"))
        self._operator = OPERATORS[self.manifest.metric][0]

    def _fetch(self, statement: str, *values: Any) -> list[Any]:
        self._cursor.execute(_with(statement, self._table), values)
        rows: list[Any] = self._cursor.fetchall()
        return rows

    def find(self, name: str) -> int | None:
        """See `Rows.find`."""
        # No id has a NUL, which a text of PostgreSQL cannot have.
        found = [] if "\0" in name else self._fetch("SELECT position FROM {} WHERE id = %s", name)
        return found[0][0] if found else None

    def take(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """See `Rows.take`."""
        names = ["position", *ROW.names]
        found = self._fetch(
            f"SELECT {', '.join(names)} FROM {{}} WHERE position = ANY(%s)", list(rows)
        )
        by_position = {row[0]: dict(zip(names[1:], row[1:], strict=True)) for row in found}
        return [by_position[row] for row in rows]

    def within(self, point: Callable[[int], tuple[float, float]], reach: float) -> list[int]:
        """See `Rows.within`."""
        found = []
        for (code,) in self._fetch("SELECT DISTINCT epsg FROM {} WHERE epsg IS NOT NULL"):
            x, y = point(code)
            found += self._fetch(
                "SELECT position FROM {} WHERE epsg = %s AND x BETWEEN %s AND %s"
                " AND y BETWEEN %s AND %s ORDER BY position",
                *(code, x - reach, x + reach, y - reach, y + reach),
            )
        return [position for (position,) in found]

    def passing(self, wanted: Filter) -> list[int]:
        """See `Rows.passing`."""
        condition, values = self._condition(wanted)
        found = self._fetch(f"SELECT position FROM {{}} WHERE {condition} ORDER BY 1", *values)
        return [position for (position,) in found]

    def extent(self) -> Box:
        """See `Rows.extent`."""
        (found,) = self._fetch("SELECT min(lon), min(lat), max(lon), max(lat) FROM {}")
        west, south, east, north = found
        return west, south, east, north

    def vector(self, position: int) -> Float32Array:
        """See `Vectors.vector`."""
        ((text,),) = self._fetch("SELECT embedding::text FROM {} WHERE position = %s", position)
        return np.array(json.loads(text), np.float32)

    def search(self, queries: Float32Array, k: int, wanted: Filter) -> tuple[Float32Array, Ints]:
        """See `Vectors.search`.

        Where a filter leaves few tiles, or the graph too few answers, they are searched exactly.
        """
        condition, values = self._condition(wanted)
        ((passing,),) = self._fetch(f"SELECT count(*) FROM {{}} WHERE {condition}", *values)
        total = sum(self.manifest.counts)
        count = min(k, passing)
        scores, positions = np.empty((len(queries), count)), np.empty((len(queries), count))
        effort = 4 * k * total // max(1, passing)
        sparse = passing < SPARSE * total or effort > EFFORT
        for i, query in enumerate(queries):
            asked = _text(query)
            found: list[Any] = []
            if not sparse:
                self._cursor.execute(
                    "SELECT set_config('hnsw.ef_search', %s, true)", (str(max(effort, 100)),)
                )
                found = self._nearest(f"{{}} WHERE {condition}", asked, values, count)
            if len(found) < count:
                # A table of its own has no graph.
                found = self._nearest(
                    f"(SELECT * FROM {{}} WHERE {condition} OFFSET 0) AS chosen",
                    *(asked, values, count),
                )
            positions[i], scores[i] = zip(*found, strict=True) if found else ((), ())
        scores = 1 - scores if self.manifest.metric == "cosine" else -scores
        return scores.astype(np.float32), positions.astype(np.int64)

    def _nearest(self, among: str, asked: str, values: list[Any], count: int) -> list[Any]:
        return self._fetch(
            f"SELECT position, embedding {self._operator} %s::halfvec AS away FROM {among}"
            " ORDER BY away LIMIT %s",
            *(asked, *values, count),
        )

    def _condition(self, wanted: Filter) -> tuple[str, list[Any]]:
        """A filter as a condition with placeholders, and their values."""
        parts: list[tuple[str, list[Any]]] = [("TRUE", [])]
        if wanted.years is not None and self.manifest.years != ("",):
            years = [self.manifest.years[code] for code in wanted.years]
            parts.append(("year = ANY(%s)", [years]))
        if wanted.split is not None:
            parts.append(("split = %s", [SPLITS[wanted.split]]))
        if wanted.box:
            parts.append(_in_box(wanted.box))
        if wanted.area is not None:
            parts.append(self._in_area(wanted.area))
        if wanted.away:
            place, metres = wanted.away
            parts.append(
                (AWAY, [place.epsg, place.x, place.y, *[place.lat] * 2, place.lon, metres])
            )
        if wanted.without:
            parts.append(("position <> ALL(%s)", [list(wanted.without)]))
        return " AND ".join(f"({text})" for text, _ in parts), [v for _, vs in parts for v in vs]

    def _in_area(self, area: shapely.Geometry) -> tuple[str, list[Any]]:
        west, south, east, north = shapely.bounds(area).tolist()
        if not np.isfinite(west):
            return "FALSE", []
        condition, values = _in_box((west, south, east, north))
        if self._mapped:
            inside = (
                "ST_Contains(ST_GeomFromWKB(%s, 4326), ST_SetSRID(ST_MakePoint(lon, lat), 4326))"
            )
            return f"{condition} AND {inside}", [*values, shapely.to_wkb(area)]
        near = self._fetch(f"SELECT position, lon, lat FROM {{}} WHERE {condition}", *values)
        places = np.array(near, np.float64).reshape(-1, 3)
        within = shapely.contains_xy(area, places[:, 1], places[:, 2])
        return "position = ANY(%s)", [places[within, 0].astype(np.int64).tolist()]


def _in_box(box: Box) -> tuple[str, list[Any]]:
    """The condition that a centre lies in a box, and its values; see `filters.in_box`."""
    west, south, east, north = box
    halves = [(west, east)] if west <= east else [(west, 180.0), (-180.0, east)]
    # The index of footprints finds those that touch the box.
    one = "footprint && box(point(%s, %s), point(%s, %s)) AND lon BETWEEN %s AND %s"
    either = " OR ".join(f"({one})" for _ in halves)
    values = [v for a, b in halves for v in (a, south, b, north, a, b)]
    return f"({either}) AND lat BETWEEN %s AND %s", [*values, south, north]

"""The routes of the server."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from importlib.resources import files
from pathlib import PurePath
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from geomatch.errors import GeomatchError, UsageError
from geomatch.querying import turns
from geomatch.querying.options import Options
from geomatch.querying.targets import Query, reach_of
from geomatch.serving import openapi, parameters, uploads
from geomatch.serving.access import AccessControl, refused
from geomatch.serving.service import Service, UnknownTileError
from geomatch.serving.uploads import Decoder
from geomatch.serving.work_queue import BusyError, WorkQueue

T = TypeVar("T")

TOGETHER = 4
"""Images that are received, read and answered at a time: so many are in memory."""
RECEIVE_SECONDS = 60.0
PAGE = "page.html"
STATIC = {
    PAGE: "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "leaflet/leaflet.css": "text/css",
    "leaflet/leaflet.js": "text/javascript",
}
FILES = {
    "gpkg": "application/geopackage+sqlite3",
    "geojson": "application/geo+json",
    "csv": "text/csv",
}


class TooLargeError(GeomatchError):
    """What is sent is larger than allowed."""


class SlowError(GeomatchError):
    """What is sent does not arrive in time."""


STATUS: dict[type[Exception], int] = {
    UnknownTileError: 404,
    TooLargeError: 413,
    SlowError: 408,
    UsageError: 400,
    GeomatchError: 422,
}
"""Of errors, the first that fits."""


class App:
    """Answers requests by work for the service, which waits in the queue."""

    def __init__(self, service: Service, queue: WorkQueue, decoder: Decoder) -> None:
        self._service, self._queue, self._decoder = service, queue, decoder
        self._images = asyncio.Semaphore(TOGETHER)

    def routes(self) -> list[Route]:
        """What there is."""
        return [
            Route("/", self.page),
            Route("/static/{name:path}", self.static),
            Route("/openapi.json", self.openapi),
            Route("/project", self.project),
            Route("/query", self.query, methods=["GET", "POST"]),
            Route("/tiles", self.tiles),
            Route("/tiles/{id:path}", self.tile),
            Route("/thumbnail/{id:path}", self.thumbnail),
        ]

    async def page(self, request: Request) -> Response:
        """The page."""
        return _static(PAGE)

    async def static(self, request: Request) -> Response:
        """A file of the page."""
        name = request.path_params["name"]
        if name not in STATIC:
            raise HTTPException(404)
        return _static(name)

    async def openapi(self, request: Request) -> Response:
        """The description of the API."""
        return JSONResponse(openapi.described())

    async def project(self, request: Request) -> Response:
        """What the project has."""
        return JSONResponse(await self._do(self._service.about))

    async def tiles(self, request: Request) -> Response:
        """Some tiles."""
        values = parameters.read(request.query_params.multi_items(), parameters.TILES)
        return JSONResponse(await self._do(lambda: self._service.tiles(values)))

    async def tile(self, request: Request) -> Response:
        """A tile."""
        parameters.read(request.query_params.multi_items(), ())
        name = request.path_params["id"]
        return JSONResponse(await self._do(lambda: self._service.tile(name)))

    async def thumbnail(self, request: Request) -> Response:
        """A picture of a tile."""
        values = parameters.read(request.query_params.multi_items(), [parameters.SIDE])
        name, side = request.path_params["id"], values.get("side", 256)
        data = await self._do(lambda: self._service.thumbnail(name, side))
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "max-age=60"})

    async def query(self, request: Request) -> Response:
        """Answers to a query."""
        is_image = request.method == "POST"
        known = parameters.IMAGE if is_image else parameters.TARGET
        values = parameters.read(request.query_params.multi_items(), [*known, *parameters.ASKED])
        options = parameters.options_of(values)
        form = values.get("format", "json")
        async with self._images if is_image else contextlib.nullcontext():
            image = await self._image(request, values, options) if is_image else None

            def answer() -> dict[str, Any] | bytes:
                found, said = self._service.ask(values, options, image)
                if form == "json":
                    return self._service.as_json(found, said)
                return self._service.as_file(found, form)

            found = await self._do(answer)
        if isinstance(found, bytes):
            named = {"Content-Disposition": f'attachment; filename="answers.{form}"'}
            return Response(found, media_type=FILES[form], headers=named)
        return JSONResponse(found)

    async def _image(
        self, request: Request, values: dict[str, Any], options: Options
    ) -> tuple[Query, list[str]]:
        """The image that is sent as a query, and remarks on how it was made one."""
        name = _name(values.get("name", ""))
        reach = reach_of(turns.angles(options.rotate))
        try:
            async with asyncio.timeout(RECEIVE_SECONDS):
                data = await _received(request)
        except TimeoutError as error:
            raise SlowError(
                f"{name} did not arrive in {RECEIVE_SECONDS:g} s", "Send a smaller image."
            ) from error
        year = options.from_year
        if options.scales:
            pixels, remark = await run_in_threadpool(self._decoder.scan, data, name, year)
            return Query(name, pixels=pixels, is_scan=True), [remark]
        cut = await run_in_threadpool(self._decoder.cut, data, name, year, reach)
        return Query.of_image(name, cut), self._service.remarks(cut)

    async def _do(self, work: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._queue.submit(work))


def build(service: Service, queue: WorkQueue, decoder: Decoder, token: str | None) -> Starlette:
    """The application."""
    handlers: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
        GeomatchError: _explained,
        BusyError: _busy,
        HTTPException: _missing,
        ClientDisconnect: _gone,
        Exception: _unforeseen,
    }
    return Starlette(
        routes=App(service, queue, decoder).routes(),
        middleware=[Middleware(AccessControl, token=token)],
        exception_handlers=handlers,
    )


async def _received(request: Request) -> bytes:
    """The body of a request.

    Raises:
        TooLargeError: it is larger than allowed.
    """
    megabytes = uploads.MOST_BYTES >> 20
    error = TooLargeError(f"an image of more than {megabytes} MB", "Send a smaller one.")
    announced = request.headers.get("content-length", "0")
    if not announced.isdigit() or int(announced) > uploads.MOST_BYTES:
        raise error
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > uploads.MOST_BYTES:
            raise error
    return bytes(data)


def _name(text: str) -> str:
    """The name of an image without folders and control characters, to be shown."""
    shown = re.sub(r"[\x00-\x1f\x7f]", "", PurePath(text.replace("\\", "/")).name)
    return shown[:200] or "the image"


def _static(name: str) -> Response:
    data = (files("geomatch.serving") / "static" / name).read_bytes()
    return Response(data, media_type=STATIC[name], headers={"Cache-Control": "no-cache"})


async def _explained(request: Request, error: GeomatchError) -> Response:
    status = next(status for kind, status in STATUS.items() if isinstance(error, kind))
    return refused(status, error.message, error.hint)


async def _busy(request: Request, error: BusyError) -> Response:
    return refused(503, "too many requests are waiting", "Ask again in a moment.")


async def _missing(request: Request, error: HTTPException) -> Response:
    return refused(error.status_code, error.detail, "See /openapi.json for what there is.")


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=400)


async def _unforeseen(request: Request, error: Exception) -> Response:
    return refused(500, f"unforeseen {type(error).__name__}", "This is a bug in geomatch.")

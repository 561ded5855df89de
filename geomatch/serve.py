"""Serve: a page and an API on this machine, to ask for places without a terminal."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from geomatch import config
from geomatch.errors import GeomatchError, UsageError
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project
from geomatch.query import made
from geomatch.querying.opened import OpenIndex
from geomatch.querying.targets import Targets

TOKEN = re.compile(r"[\w.~-]{16,}", re.ASCII)
CONNECTIONS = 512
"""Connections at a time, at most."""


def serve(
    project: Project,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    index: str | None = None,
    build: bool = True,
    settings: config.Config | None = None,
    ready: Callable[[str], None],
    progress: ProgressCallback = silent,
) -> None:
    """Serve the page and the API until Ctrl-C or SIGTERM; in the main thread.

    Args:
        host: address to listen on; one that other machines reach needs a token.
        port: 0 for any that is free.
        token: that every request has to know; one is made where it is needed.
        index, build, settings: as in `query.query_each`.
        ready: is called with the URL of the page, once it answers.

    Raises:
        GeomatchError: there is no index and nothing to make it of, or the port is in use.
        UsageError: the token is too short, or the address is none.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise GeomatchError("the server needs uvicorn", "pip install 'geomatch[serve]'") from error
    from geomatch.serving.app import build as build_app
    from geomatch.serving.service import Service
    from geomatch.serving.uploads import Decoder
    from geomatch.serving.work_queue import WorkQueue

    if token is not None and not TOKEN.fullmatch(token):
        raise UsageError(
            "--token has less than 16 letters, digits, _ . ~ and -, or others",
            "Leave it out: where one is needed, it is made.",
        )
    with _listening(host, port) as listener:
        address, port = listener.getsockname()[:2]
        if token is None and not ipaddress.ip_address(address).is_loopback:
            token = secrets.token_urlsafe(24)
        name = made(project, index, settings, progress) if build else index
        with OpenIndex.open(project, name) as opened, contextlib.ExitStack() as stack:
            progress("loading the encoder")
            # Before the first image, which would else wait for it to be compiled.
            side, channels = opened.tiles.size, opened.tiles.channels.image
            blank = np.zeros((1, side, side, channels), np.uint8)
            Targets(opened, None, (0.0,), False, silent).describe(blank)
            queue, decoder = WorkQueue(), Decoder(opened.tiles)
            stack.callback(decoder.close)
            app = build_app(Service(opened), queue, decoder, token)
            server = uvicorn.Server(
                uvicorn.Config(
                    app,
                    log_config=None,
                    access_log=False,
                    server_header=False,
                    limit_concurrency=CONNECTIONS,
                    timeout_graceful_shutdown=1,
                )
            )
            thread = threading.Thread(target=_run, args=(server, listener, queue), daemon=True)
            thread.start()
            shown = f"[{host}]" if ":" in host else host
            ready(f"http://{shown}:{port}/" + (f"?token={token}" if token else ""))
            with _until_stopped():
                queue.run()
            server.should_exit = True
            thread.join(timeout=3)


def _run(server: Any, listener: socket.socket, queue: Any) -> None:
    try:
        server.run(sockets=[listener])
    finally:
        queue.close()


@contextlib.contextmanager
def _until_stopped() -> Iterator[None]:
    """End the block at Ctrl-C or SIGTERM."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UsageError: there is no such address.
        GeomatchError: the port is in use, or not allowed.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, OverflowError, UnicodeError) as error:
        raise UsageError(f"--host {host} --port {port}: no such address", "See: ip addr") from error
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise GeomatchError(
            f"port {port} of {host}: {(error.strerror or str(error)).lower()}",
            "Choose another with --port, or any that is free with --port 0.",
        ) from error

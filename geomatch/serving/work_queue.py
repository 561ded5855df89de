"""One thread that does all the work of the server, a piece at a time, in the order of asking.

It is the main thread: an index, JAX and PROJ are each used by the thread that started them alone.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

WAITING = 256
"""Pieces of work that may wait."""


class BusyError(Exception):
    """Too much is waiting."""


class WorkQueue:
    """Takes work from any thread."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(WAITING)

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Have work done.

        Raises:
            BusyError: too much is waiting.
        """
        future: Future[Any] = Future()

        def do() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

        try:
            self._waiting.put_nowait(do)
        except queue.Full as error:
            raise BusyError from error
        return future

    def close(self) -> None:
        """End `run` once what waits is done."""
        self._waiting.put(None)

    def run(self) -> None:
        """Do what is asked for, until it is closed."""
        while (do := self._waiting.get()) is not None:
            do()

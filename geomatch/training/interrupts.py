"""Ctrl-C and SIGTERM, held back while a step changes the state of a run."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax

from geomatch.training import hosts


class Interrupts:
    """Makes SIGTERM (pre-emption) a KeyboardInterrupt, as Ctrl-C is, and holds both back at times.

    The first signal counts, and a second Ctrl-C, which is never held back. A context manager;
    outside the main thread, where Python runs no handlers, it changes nothing.

    Several processes have to end after the same step: there a signal waits for `agree`.
    """

    def __init__(self) -> None:
        self._several = jax.process_count() > 1
        self._received = False
        self._asked: Callable[[], bool] | None = None
        self._before: dict[int, Any] = {}
        self.holding = False
        """Whether a block of `held` is under way, or was broken off."""

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # None is a handler that Python cannot put back.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Raise KeyboardInterrupt after the block if a signal came during it, or got lost before.

        Python drops what a handler raises within a callback, such as that of a garbage collection.
        """
        self.holding = True
        yield
        self.holding = False
        if self._received and not self._several:
            raise KeyboardInterrupt

    def agree(self) -> None:
        """Raise AllInterrupted in all of several processes if a signal came to one.

        All call this at the same points, and learn there what was so at the point before: waiting
        for the others would keep the device idle.
        """
        if self._several:
            before, self._asked = self._asked, hosts.in_any(self._received)
            if before is not None and before():
                raise hosts.AllInterrupted

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        first, self._received = not self._received, True
        # Launchers may send SIGTERM twice: the second must not disturb saving.
        now = first and not self.holding and not self._several
        if now or (not first and number == signal.SIGINT):
            raise KeyboardInterrupt

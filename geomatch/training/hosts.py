"""Several processes that train one run together, on one host or on several.

All run the same program. What depends on the disk, the clock or the processor (where to resume,
mAP@5) is decided by the first process and told to the others, so that all do the same steps.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import pickle
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import NDArray

from geomatch.errors import GeomatchError, UsageError

T = TypeVar("T")
Float32Array = NDArray[np.float32]

TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
"""Where SLURM and Open MPI say how many processes they started.

Not SLURM_NTASKS: a batch script has it, too, which is no task of its own.
"""
CONNECT_SECONDS = 300
"""Time for all processes to start."""
HEARTBEAT_SECONDS = 45
"""Time after which JAX gives up a host that is silent, where the watch noticed nothing."""
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""Of the watch's connections: a host that loses its power is noticed after 30 seconds."""
GRACE_SECONDS = 10
"""Time to explain a failed collective by the end of a process, and to let the others end first."""
PIECE = 2**24
"""Bytes sent at a time."""
GATHERED_PARTS = 16
"""Parts of each process that are exchanged at a time."""


class AllInterrupted(KeyboardInterrupt):
    """A signal to one of several processes, raised in all of them after the same step."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run; what is None, JAX finds in the environment (SLURM, Open MPI).

    Attributes:
        coordinator: HOST:PORT where the first process listens.
        count: number of processes.
        index: of this process, from 0.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None

    @property
    def are_several(self) -> bool:
        """Whether options or the environment ask for more than this process."""
        if self.coordinator is not None or self.index is not None or self.count not in (None, 1):
            return True
        return self.count is None and _tasks() > 1

    def check(self) -> None:
        """Check the options that were given.

        Raises:
            UsageError: one is out of range, or missing where the environment does not have it.
        """
        example = "Give each --coordinator HOST:PORT --processes N --process-id I, from 0."
        if None in (self.coordinator, self.count, self.index) and _tasks() < 2:
            raise UsageError("which processes train together is unknown", example)
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdecimal():
                raise UsageError(f"--coordinator {self.coordinator} is not HOST:PORT", example)
        if self.index is not None and not 0 <= self.index < (self.count or sys.maxsize):
            raise UsageError(f"--process-id {self.index} of --processes {self.count}", example)


def _tasks() -> int:
    """Number of processes that SLURM or Open MPI started."""
    return max(int(os.environ.get(name, 1)) for name in TASKS)


def is_first() -> bool:
    """Whether this process writes the run."""
    return jax.process_index() == 0


def devices() -> tuple[int, slice]:
    """Number of devices of all processes, and which of them are this one's."""
    own = jax.local_device_count()
    return jax.device_count(), slice(jax.process_index() * own, (jax.process_index() + 1) * own)


@contextlib.contextmanager
def joined(processes: Processes) -> Iterator[None]:
    """Train together with the other processes; no effect if there are none.

    When a process ends without having finished, the others end within a minute and say so.

    Raises:
        UsageError: the options do not say which processes there are.
        GeomatchError: the processes do not find one another.
    """
    if not processes.are_several:
        yield
        return
    processes.check()
    _connect(processes)
    try:
        watch = _Watch(processes)
    except OSError as error:
        atexit.register(os._exit, 1)
        raise GeomatchError(
            f"process {jax.process_index()} and the first one cannot connect: {error}",
            "Open the ports between the hosts, or name the first by an address that all reach.",
        ) from error
    try:
        yield
    except AllInterrupted:
        watch.close()
        raise
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            # A collective fails where another process ended: the watch ends this one, saying so.
            time.sleep(GRACE_SECONDS)
        # JAX would wait for the others at exit, which wait for this process.
        atexit.register(watch.leave, getattr(error, "exit_code", 1))
        watch.failing = True
        raise
    else:
        watch.close()


def _connect(processes: Processes) -> None:
    # Its handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            processes.coordinator,
            processes.count,
            processes.index,
            # Not None, for which JAX takes one device where SLURM or MPI started it: all of them.
            local_device_ids=[],
            initialization_timeout=CONNECT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except jax.errors.JaxRuntimeError as error:
        raise GeomatchError(
            f"the processes did not find one another: {str(error).splitlines()[0]}",
            "Start all of them with the same --coordinator, which each must reach.",
        ) from error
    counts = multihost_utils.process_allgather(np.int32(jax.local_device_count()))
    if len(set(counts.tolist())) > 1:
        raise UsageError(
            f"the processes have {', '.join(map(str, counts.tolist()))} devices",
            "Give each the same number of devices (CUDA_VISIBLE_DEVICES).",
        )


# Decisions and data

_deciding = False
"""Whether this process, the first, is within `of_first`, where the others wait for it."""


def _are_together() -> bool:
    """Whether all processes run what this one does now."""
    return jax.process_count() > 1 and not _deciding


def of_first(function: Callable[[], T]) -> T:
    """What a function returns, or the error it raises, in the first process: in all of them."""
    global _deciding
    if not _are_together():
        return function()
    if not is_first():
        result, error = pickle.loads(_told(b""))
        if error is not None:
            raise error
        return result
    _deciding = True
    try:
        result = function()
    except GeomatchError as error:
        _told(pickle.dumps((None, error)))
        raise
    finally:
        _deciding = False
    _told(pickle.dumps((result, None)))
    return result


def _told(message: bytes) -> bytes:
    """The first process's bytes."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    # Sizes of few values, since each is a program of its own.
    room = min(PIECE, max(256, 1 << (size - 1).bit_length()))
    pieces = []
    for start in range(0, size, room):
        piece = np.zeros(room, np.uint8)
        part = np.frombuffer(message[start : start + room], np.uint8)
        piece[: len(part)] = part
        pieces.append(np.asarray(multihost_utils.broadcast_one_to_all(piece)).tobytes())
    return b"".join(pieces)[:size]


def share(count: int) -> slice:
    """This process's share of `count` rows; see `gather`."""
    if not _are_together():
        return slice(0, count)
    each = -(-count // jax.process_count())
    return slice(jax.process_index() * each, min((jax.process_index() + 1) * each, count))


def gather(rows: NDArray[Any], count: int) -> NDArray[Any]:
    """All of `count` rows, of which each process has its `share`."""
    if not _are_together() or not count:
        return rows
    each = -(-count // jax.process_count())
    room = np.zeros((each, *rows.shape[1:]), rows.dtype)
    room[: len(rows)] = rows
    # As bytes, since JAX would make 64 bits 32.
    gathered = multihost_utils.process_allgather(room.reshape(-1).view(np.uint8), tiled=True)
    everything: NDArray[Any] = np.asarray(gathered).view(rows.dtype)
    return everything.reshape(-1, *rows.shape[1:])[:count]


def turns() -> slice:
    """Which of a sequence of parts this process computes; see `in_turn`."""
    return slice(jax.process_index(), None, jax.process_count()) if _are_together() else slice(None)


def in_turn(parts: Iterator[Float32Array], rows: int) -> Iterator[Float32Array]:
    """The parts of all processes: the first of each, then the second of each, and so on.

    Args:
        parts: of this process, (n, d) with n at most `rows`.
    """
    if not _are_together():
        yield from parts
        return
    while True:
        own = list(itertools.islice(parts, GATHERED_PARTS))
        width = own[0].shape[1] if own else 0
        sizes = np.zeros(GATHERED_PARTS + 1, np.int32)
        sizes[: len(own)], sizes[-1] = [len(part) for part in own], width
        all_sizes = np.asarray(multihost_utils.process_allgather(sizes))
        width = int(all_sizes[:, -1].max())
        if not width:
            return
        room = np.zeros((GATHERED_PARTS, rows, width), np.float32)
        for target, part in zip(room, own, strict=False):
            target[: len(part)] = part
        gathered = np.asarray(multihost_utils.process_allgather(room))
        for turn in range(GATHERED_PARTS):
            for process, size in enumerate(all_sizes[:, turn].tolist()):
                if size:
                    yield gathered[process, turn, :size]


def in_any(flag: bool) -> Callable[[], bool]:
    """Whether `flag` is set in any process: a function that waits for the answer."""
    flags = np.full(jax.local_device_count(), flag)
    result = _maximum(flags)
    return lambda: bool(np.asarray(result)[0])


_maximum = jax.pmap(lambda flag: jax.lax.pmax(flag.astype(np.int32), "hosts"), axis_name="hosts")


# The end of a process


class _Watch:
    """Notices at once when a process ends, by connections that end with it.

    The first process holds one to each other process. A process that is left behind would wait in a
    collective for ever, or until JAX misses its heartbeats and aborts it with a stack trace.
    """

    def __init__(self, processes: Processes) -> None:
        self.failing = False
        """Whether this process ends by an error of its own, so that it need not tell another's."""
        self._closed = False
        self._peers: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        given = (processes.coordinator or "").rpartition(":")[0].strip("[]")
        server = _listening() if is_first() else None
        address = of_first(lambda: _address(server, given))
        for index, connection in _connections(server, address):
            for name, value in KEEPALIVE.items():
                if hasattr(socket, name):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._peers[index] = connection
            self._selector.register(connection, selectors.EVENT_READ, index)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select(1):
                try:
                    message = key.fileobj.recv(16)  # type: ignore[union-attr]
                except OSError:
                    message = b""
                if message == b"finished":
                    self._selector.unregister(key.fileobj)
                elif not self._closed and not self.failing:
                    self._end(int(message) if message else key.data)

    def _end(self, index: int) -> None:
        """End this process because another one ended."""
        print(
            f"\nerror: process {index} of {jax.process_count()} ended, and so does this one\n"
            "hint: See what it says. The same command in all processes goes on from the last "
            "checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        self.leave(1, index)

    def leave(self, exit_code: int, ended: int | None = None) -> None:
        """End this process without JAX's farewell, after telling the others who began it."""
        self.failing = True
        if is_first():
            self._send(str(ended or 0).encode())
            # JAX aborts processes that outlive the first one, with a stack trace.
            end = time.monotonic() + GRACE_SECONDS
            for index, connection in self._peers.items():
                if index != ended:
                    connection.settimeout(max(0.1, end - time.monotonic()))
                    with contextlib.suppress(OSError):
                        while connection.recv(16):
                            pass
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(exit_code)

    def close(self) -> None:
        """This process ends as it should: the others need not."""
        self._send(b"finished")
        self._closed = True

    def _send(self, message: bytes) -> None:
        for connection in self._peers.values():
            with contextlib.suppress(OSError):
                connection.sendall(message)


def _listening() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _address(server: socket.socket | None, host: str) -> tuple[str, int, bytes]:
    """Host, port and password of the watch."""
    assert server is not None
    return host or socket.gethostname(), server.getsockname()[1], secrets.token_bytes(16)


def _connections(
    server: socket.socket | None, address: tuple[str, int, bytes]
) -> Iterator[tuple[int, socket.socket]]:
    """Connections by process: with every other one in the first, with the first in the others."""
    host, port, password = address
    if server is None:
        connection = socket.create_connection((host, port), CONNECT_SECONDS)
        connection.sendall(password + jax.process_index().to_bytes(4, "big"))
        connection.settimeout(None)
        yield 0, connection
        return
    server.settimeout(CONNECT_SECONDS)
    missing = set(range(1, jax.process_count()))
    while missing:
        connection, _ = server.accept()
        connection.settimeout(GRACE_SECONDS)
        hello = connection.recv(20, socket.MSG_WAITALL)
        index = int.from_bytes(hello[16:], "big")
        if secrets.compare_digest(hello[:16], password) and index in missing:
            connection.settimeout(None)
            missing.remove(index)
            yield index, connection
    server.close()

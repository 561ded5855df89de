"""Work on a dask.distributed cluster, whose workers see the project and the imagery as we do.

What a piece of work makes is written to the shared folder; a worker returns little.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from geomatch import __version__
from geomatch.errors import GeomatchError, UsageError
from geomatch.progress import ProgressCallback

TRIES = 3
"""Workers that a piece of work is tried on, if it fails."""
QUEUED = 1_000
"""Pieces of work that the scheduler has at most: a large area has many thousands."""
PATIENCE = 30
"""Seconds in which a scheduler has to answer."""

W = TypeVar("W")
R = TypeVar("R")


class Cluster:
    """The workers of a scheduler."""

    def __init__(self, client: Any) -> None:
        self._client = client

    @property
    def threads(self) -> int:
        """How many pieces of work are done at once, for now."""
        return sum(self._client.nthreads().values())

    def run(
        self,
        task: Callable[[W], R],
        work: Iterable[W],
        named: Callable[[W], str],
        progress: ProgressCallback,
    ) -> Iterator[tuple[W, R]]:
        """Do each piece of work on some worker; each comes with its result when it is done.

        Work of a worker that died is done by another, and so is work that failed there.

        Args:
            named: what to call a piece of work.

        Raises:
            GeomatchError: one failed on `TRIES` workers, or as many died of it as the scheduler
                allows.
        """
        from distributed import KilledWorker, as_completed

        waiting = iter(work)
        running: dict[Any, tuple[W, list[str]]] = {}

        def begin(item: W, failed_on: list[str]) -> Any:
            others = [each for each in self._client.nthreads() if each not in failed_on]
            where = {"workers": others, "allow_other_workers": True} if failed_on and others else {}
            future = self._client.submit(_tried, task, item, pure=False, **where)
            running[future] = item, failed_on
            return future

        first = [begin(item, []) for item in itertools.islice(waiting, QUEUED)]
        done = as_completed(first, loop=self._client.loop)
        for future in done:
            item, failed_on = running.pop(future)
            try:
                worker, result, error = future.result()
            except KilledWorker as killed:
                raise GeomatchError(
                    f"{named(item)}: every worker that tried it died, most likely because memory "
                    "ran out",
                    "Start workers with fewer threads or more memory, then run the same command.",
                ) from killed
            if error is None:
                yield item, result
                done.update(begin(item, []) for item in itertools.islice(waiting, 1))
                continue
            failed_on = [*failed_on, worker]
            if len(failed_on) == TRIES:
                raise error
            progress(f"{named(item)} failed on {worker}, and is tried on another worker: {error}")
            done.add(begin(item, failed_on))


@contextlib.contextmanager
def connect(address: str, folder: Path, progress: ProgressCallback) -> Iterator[Cluster]:
    """Connect to a scheduler, and wait until it has a worker.

    Args:
        address: such as "tcp://host:8786".
        folder: that all workers have to see.

    Raises:
        GeomatchError: no scheduler answers, or its workers cannot do the work.
        UsageError: dask.distributed is not installed.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise UsageError(
            "--scheduler needs dask.distributed", "Run: pip install 'geomatch[cluster]'"
        ) from error
    try:
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise GeomatchError(
            f"no Dask scheduler answers at {address}",
            "Start one with: dask scheduler, and give its address, such as tcp://host:8786",
        ) from error
    with client:
        if not client.nthreads():
            progress(f"waiting for workers of {address}")
            client.wait_for_workers(1)
        _check_workers(client, folder)
        yield Cluster(client)


def _check_workers(client: Any, folder: Path) -> None:
    try:
        found = client.run(_look, str(folder))
    except Exception as error:
        raise GeomatchError(
            f"the workers cannot run geomatch: {error}",
            f"Install geomatch {__version__} where they run.",
        ) from error
    for worker, (version, is_there) in found.items():
        if version != __version__:
            raise GeomatchError(
                f"worker {worker} has geomatch {version}, here it is {__version__}",
                "Install the same version everywhere.",
            )
        if not is_there:
            raise GeomatchError(
                f"worker {worker} does not see {folder}",
                "Keep the project and the imagery in folders that all machines mount alike.",
            )


def _look(folder: str) -> tuple[str, bool]:
    """What a worker has: its version of geomatch, and whether it sees a folder."""
    return __version__, Path(folder).is_dir()


def _tried(task: Callable[[W], R], item: W) -> tuple[str, R | None, Exception | None]:
    """On a worker: its address, with the result or the failure."""
    from distributed import get_worker

    worker = get_worker().address
    try:
        return worker, task(item), None
    except Exception as error:
        return worker, None, error

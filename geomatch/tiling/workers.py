"""Worker processes, which cut batches of shards."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from geomatch.errors import GeomatchError
from geomatch.tiling import cells
from geomatch.tiling.batches import Sheets, batches
from geomatch.tiling.cells import Batch, CellShard
from geomatch.tiling.shards import ShardRecord

BLOCK_CACHE = "256"
"""Megabytes of decoded blocks that GDAL keeps in each worker; its own default is 5 % of memory."""


def cut_all(
    missing: list[CellShard], sheets: Sheets, workers: int
) -> Iterator[tuple[CellShard, ShardRecord]]:
    """Cut shards in up to so many processes; each comes with its record when it is done.

    Raises:
        GeomatchError: a process died, or as for `cells.cut`.
    """
    work = batches(missing, sheets, workers)
    workers = min(workers, len(work))
    if workers <= 1:
        for batch in work:
            yield from zip(batch.shards, cells.cut(batch), strict=True)
        return
    # One process imports what workers need, of which they are copies.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([cells.__name__])
    pool = ProcessPoolExecutor(workers, context, initializer=_begin)
    try:
        # A large area has many thousands of batches: keep only a few queued.
        waiting = iter(work)
        running: dict[Future[list[ShardRecord]], Batch] = {}
        with _interrupts_held():
            for batch in itertools.islice(waiting, 2 * workers):
                running[pool.submit(cells.cut, batch)] = batch
        while running:
            future = next(as_completed(running))
            yield from zip(running.pop(future).shards, future.result(), strict=True)
            for batch in itertools.islice(waiting, 1):
                running[pool.submit(cells.cut, batch)] = batch
    except BrokenProcessPool as error:
        raise GeomatchError(
            "a worker process died, most likely because memory ran out",
            "Run the same command again with --workers 1; finished shards are kept.",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Put off Ctrl-C until the block ends; processes that are started within never see it.

    Workers that are half started would else be left behind.
    """
    held: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    before = (
        signal.signal(signal.SIGINT, lambda number, _: held.append(number)) if is_main else None
    )
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which they inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_main:
            signal.signal(signal.SIGINT, before)
    for number in held:
        signal.raise_signal(number)


def _begin() -> None:
    """Bound a worker's memory, and make it exit with the command, even if that is killed."""
    os.environ.setdefault("GDAL_CACHEMAX", BLOCK_CACHE)
    command = multiprocessing.parent_process()
    assert command is not None

    def watch() -> None:
        command.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

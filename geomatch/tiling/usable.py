"""Files that can be used, and those that are left out on request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from geomatch.errors import BadFileError
from geomatch.geo.rasters import Raster, placed

Unreadable = dict[str, str] | None
"""Files that are left out, with the reason; None where a bad file is an error."""


THREADS, QUEUED = 8, 64
"""Headers that are read at once, since files are often far away on a network, and in advance."""


def usable(
    paths: Sequence[str],
    read: Callable[[str], Raster],
    unreadable: Unreadable,
    done: Callable[[int], None] = lambda count: None,
) -> tuple[Raster, ...]:
    """Inspect files; bad ones are left out.

    Args:
        read: reads a header, such as `rasters.read_header`; it is called by several threads.
        done: takes the number of files that are inspected, after each.

    Raises:
        BadFileError: a file is bad and `unreadable` is None, or all are.
    """
    found = []
    failure: BadFileError | None = None
    with ThreadPoolExecutor(THREADS) as threads:
        for start in range(0, len(paths), QUEUED):
            waiting = [threads.submit(read, path) for path in paths[start : start + QUEUED]]
            for count, future in enumerate(waiting, start + 1):
                try:
                    found.append(placed(future.result()))
                except BadFileError as error:
                    if unreadable is None:
                        threads.shutdown(cancel_futures=True)
                        raise
                    failure = failure or error
                    unreadable[error.path] = error.reason
                done(count)
    if failure and not found:
        raise failure
    return tuple(found)

"""Files that can be used, and those that are left out on request."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from geomatch.errors import BadFileError
from geomatch.geo.rasters import Raster

Unreadable = dict[str, str] | None
"""Files that are left out, with the reason; None where a bad file is an error."""


def usable(
    paths: Sequence[str], inspect: Callable[[str], Raster], unreadable: Unreadable
) -> tuple[Raster, ...]:
    """Inspect files; bad ones are left out.

    Raises:
        BadFileError: a file is bad and `unreadable` is None, or all are.
    """
    found = []
    failure: BadFileError | None = None
    for path in paths:
        try:
            found.append(inspect(path))
        except BadFileError as error:
            if unreadable is None:
                raise
            failure = failure or error
            unreadable[error.path] = error.reason
    if failure and not found:
        raise failure
    return tuple(found)

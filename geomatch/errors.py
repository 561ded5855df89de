"""Errors that users can meet: what went wrong, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence


def listed(names: Sequence[str], most: int) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


class GeomatchError(Exception):
    """A failure that one line explains.

    Args:
        message: what is wrong, with the file or key.
        hint: the remedy, as a command or an edit; empty if there is none.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        # Worker processes pickle errors, which would drop the hint.
        return type(self), (self.message, self.hint)


class UsageError(GeomatchError):
    """A command line or configuration that makes no sense: exit code 2."""

    exit_code = 2


class BadFileError(GeomatchError):
    """A file that cannot be used.

    Args:
        path: of the file, with which the message begins.
        reason: the rest of the message.
        hint: see `GeomatchError`.
    """

    def __init__(self, path: str, reason: str, hint: str) -> None:
        super().__init__(f"{path} {reason}", hint)
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return type(self), (self.path, self.reason, self.hint)


class StaleError(GeomatchError):
    """An artefact whose origin has changed since it was made."""


class DivergedError(GeomatchError):
    """The training loss became NaN or infinite, usually because of the settings."""

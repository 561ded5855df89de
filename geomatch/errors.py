"""Errors that users can meet: what went wrong, and what to do about it."""


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

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # Worker processes pickle errors, which would drop the hint.
        return type(self), (self.message, self.hint)


class UsageError(GeomatchError):
    """A command line or configuration that makes no sense: exit code 2."""

    exit_code = 2


class StaleError(GeomatchError):
    """An artefact whose origin has changed since it was made."""


class DivergedError(GeomatchError):
    """The training loss became NaN or infinite, usually because of the settings."""

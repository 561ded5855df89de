"""The errors a user can meet: what went wrong, and what to do about it."""


class GeomatchError(Exception):
    """A failure that is explained in one line.

    Args:
        message: what is wrong, naming the file or key.
        hint: the remedy, as a command or an edit; empty where there is none to give.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # Worker processes send errors home by pickle, which would drop the hint.
        return type(self), (self.message, self.hint)


class UsageError(GeomatchError):
    """A command line or configuration that cannot be meant: exit code 2."""

    exit_code = 2


class StaleError(GeomatchError):
    """An artefact made from something that has changed since."""


class DivergedError(GeomatchError):
    """Training whose loss became no number: its settings are at fault."""

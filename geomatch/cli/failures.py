"""How failures end: a line on what is wrong, a line on what to do, and the exit code."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from geomatch.errors import GeomatchError, UsageError


class Commands(TyperGroup):
    """Commands whose failures are explained in a line or two instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GeomatchError as error:
            failure = error
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:
            # The reader of our output is gone (as with `head`), so there is nobody to tell.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except OSError as error:
            failure = _explain(error)
        except Exception as error:
            if os.environ.get("GEOMATCH_TRACEBACK"):
                raise
            failure = _wrong_use(error) or _unforeseen(error)
        except KeyboardInterrupt:
            failure = GeomatchError(
                "interrupted", "Finished work is kept: run the same command again to continue."
            )
        from geomatch.cli import console

        console.failure(failure)
        raise typer.Exit(failure.exit_code)


def _wrong_use(error: Any) -> UsageError | None:
    """What Typer says about wrong options and arguments; None if `error` is something else."""
    if not hasattr(error, "format_message"):
        return None
    message = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")
    command = error.ctx.command_path if getattr(error, "ctx", None) else "geomatch"
    return UsageError(message[:1].lower() + message[1:], f"See: {command} --help")


def _unforeseen(error: Exception) -> GeomatchError:
    text = (str(error).splitlines() or [""])[0]
    if "No space left" in str(error):
        return _explain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return GeomatchError(
            f"out of memory: {text}",
            "Raise train.accumulate, lower train.batch, or use smaller tiles or a smaller trunk.",
        )
    return GeomatchError(
        f"unforeseen {type(error).__name__}: {text}",
        "This is a bug in geomatch: set GEOMATCH_TRACEBACK=1 to see where, and report it.",
    )


def _explain(error: OSError) -> GeomatchError:
    where = f"{error.filename}: " if error.filename else ""
    return GeomatchError(
        f"{where}{error.strerror or error}",
        "Free space or check permissions, then run the same command: finished work is kept.",
    )

"""Shares of work: `--shard i/n`, of which each process of a job array does one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from geomatch.errors import GeomatchError, UsageError


@dataclass(frozen=True)
class Share:
    """The share `number`, from 1 on, `of` so many equal ones."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Share:
        """A share from "i/n".

        Raises:
            UsageError: the text has another form, or i is not one of 1 to n.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        share = cls(*map(int, match.groups())) if match else cls(0, 0)
        if not 1 <= share.number <= share.of:
            raise UsageError(
                f"--shard {text} is not one of 1/n to n/n",
                "For example: --shard 3/100, in a job array --shard $SLURM_ARRAY_TASK_ID/100",
            )
        return share

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def lock(self) -> str:
        """Its part of a lock's name."""
        return f"shard-{self.number}-of-{self.of}"

    def part(self, count: int) -> range:
        """Which of `count` pieces of work, that follow each other, are in it."""
        return range((self.number - 1) * count // self.of, self.number * count // self.of)


def check_same(share: Share, of: int, command: str) -> None:
    """Check that a share is one of as many as those that were begun.

    Raises:
        UsageError: it is not, and so could overlap with others.
    """
    if share.of != of:
        raise UsageError(
            f"--shard {share}: the work was begun in {of} shards",
            f"Give --shard i/{of}, or finish it on this machine alone: {command}",
        )


def missing(pieces: Iterable[int], count: int, of: int, command: str) -> GeomatchError:
    """The error that some of `count` pieces of work are not done.

    Args:
        of: number of shares, or 0 if the work was not begun in shares.
        command: does the work.
    """
    wanted = set(pieces)
    shares = [Share(i, of) for i in range(1, of + 1)]
    texts = [f"{command} --shard {each}" for each in shares if wanted & {*each.part(count)}]
    shown = "; ".join(texts[:SHOWN]) if texts else command
    more = f"; and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    then = f", then {command} --join" if texts else ""
    lacking = f"{len(texts)} of {of} shards are" if texts else "some work is"
    return GeomatchError(f"{lacking} not done", f"Run, with the same options: {shown}{more}{then}")


SHOWN = 20
"""The largest number of shares that an error names."""

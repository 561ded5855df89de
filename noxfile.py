"""The test suite on every Python that `pyproject.toml` names.

    pip install '.[dev]'
    nox                                         all of them
    nox -s tests-3.12 -- tests/test_grid.py     one, with arguments for pytest
    nox -r                                      in the environments of the last time

`python3.11`, `python3.12` and so on must be on PATH, as after `pyenv global 3.11 3.12 3.13`.
"""

import nox

nox.options.error_on_missing_interpreters = True


@nox.session(python=nox.project.python_versions(nox.project.load_toml("pyproject.toml")))
def tests(session: nox.Session) -> None:
    """Install with the test requirements and run pytest."""
    session.install(".[test]")
    session.run("pytest", *session.posargs)

"""Names in a project."""

from __future__ import annotations

import pytest

from geomatch.errors import GeomatchError
from geomatch.project import latest

NAMES = ["run1@20", "run2@5", "run1@40", "run10@7"]


@pytest.mark.parametrize(
    ("wanted", "name"),
    [(None, "run10@7"), ("run1@20", "run1@20"), ("run1", "run1@40"), ("run2", "run2@5")],
)
def test_a_run_stands_for_its_latest(wanted, name):
    assert latest(NAMES, wanted, "embeddings", "geomatch embed") == name


def test_missing_things_are_reported():
    with pytest.raises(GeomatchError) as failed:
        latest(NAMES, "run", "index", "geomatch index")
    assert "run1@20, run2@5" in failed.value.hint
    with pytest.raises(GeomatchError) as failed:
        latest([], "run", "index", "geomatch index")
    assert failed.value.hint == "Run: geomatch index"

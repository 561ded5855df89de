"""Scores of pairs of tiles, from which a threshold and probabilities come."""

from __future__ import annotations

import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomatch.errors import StaleError


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs of one split, kept beside the embeddings that scored them.

    Attributes:
        same: (n,) scores of pairs of the same place.
        other: (n,) of pairs of other places.
        split: that they were drawn from.
        embeddings: fingerprint.
    """

    same: NDArray[np.float32]
    other: NDArray[np.float32]
    split: str
    embeddings: str

    @staticmethod
    def beside(embeddings: Path) -> Path:
        """Where the pairs of an embeddings file are."""
        return embeddings.with_suffix(".npz")

    def save(self, path: Path) -> None:
        """Write NumPy's format."""
        with path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **asdict(self))

    @classmethod
    def load(cls, path: Path) -> ScoredPairs:
        """Read what `save` wrote.

        Raises:
            StaleError: the file is damaged, or not there.
        """
        try:
            with np.load(path) as found:
                split, embeddings = str(found["split"]), str(found["embeddings"])
                return cls(found["same"], found["other"], split, embeddings)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise StaleError(f"{path} cannot be read: {error}", "Run: geomatch eval") from error

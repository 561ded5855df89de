"""Scores of pairs of tiles, from which thresholds and probabilities are estimated."""

from __future__ import annotations

import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomatch.errors import StaleError


@dataclass(frozen=True)
class ScoredPairs:
    """Scores of pairs of one split, stored beside the embeddings they were computed from.

    Attributes:
        same: (n,) scores of pairs of the same place.
        other: (n,) scores of pairs of different places.
        split: the split that the pairs were drawn from.
        embeddings: fingerprint of the embeddings.
    """

    same: NDArray[np.float32]
    other: NDArray[np.float32]
    split: str
    embeddings: str

    @staticmethod
    def beside(embeddings: Path) -> Path:
        """The path of the pairs of an embeddings file."""
        return embeddings.with_suffix(".npz")

    def save(self, path: Path) -> None:
        """Write a compressed .npz file."""
        with path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **asdict(self))

    @classmethod
    def load(cls, path: Path) -> ScoredPairs:
        """Read what `save` wrote.

        Raises:
            StaleError: the file is damaged or missing.
        """
        try:
            with np.load(path) as found:
                split, embeddings = str(found["split"]), str(found["embeddings"])
                return cls(found["same"], found["other"], split, embeddings)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise StaleError(f"{path} cannot be read: {error}", "Run: geomatch eval") from error

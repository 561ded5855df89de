"""PCA-whitening of descriptors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from geomatch.errors import GeomatchError, StaleError
from geomatch.search.exact import Rows

WHITENING = "whitening.npz"
"""File of the whitening of an index."""


@dataclass(frozen=True)
class Whitening:
    """A projection of descriptors (n, d) to uncorrelated values of unit variance (n, size).

    Attributes:
        kernel, bias: (d, size) and (size,); see `whitening`.
    """

    kernel: NDArray[np.float32]
    bias: NDArray[np.float32]

    @property
    def size(self) -> int:
        return len(self.bias)

    def __call__(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        projected: NDArray[np.float32] = vectors @ self.kernel + self.bias
        return projected

    @classmethod
    def fit(cls, vectors: NDArray[np.float32], groups: NDArray[np.int64], size: int) -> Self:
        """See `whitening`."""
        return cls(*whitening(vectors, groups, size))

    def save(self, path: Path) -> None:
        """Write an npz file."""
        np.savez(path, kernel=self.kernel, bias=self.bias)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            StaleError: the file is damaged or missing.
        """
        try:
            with np.load(path) as file:
                return cls(file["kernel"], file["bias"])
        except (OSError, ValueError, KeyError) as error:
            raise StaleError(f"{path} cannot be read: {error}", "Run: geomatch index") from error


@dataclass(frozen=True)
class Whitened:
    """Rows of a file through a whitening."""

    rows: Rows
    whitening: Whitening

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | NDArray[np.int64], /) -> NDArray[np.float32]:
        return self.whitening(self.rows[rows])


def whitening(
    vectors: NDArray[np.float32], groups: NDArray[np.int64], size: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A projection to `size` uncorrelated values of unit variance.

    Jegou and Chum 2012, "Negative evidences and co-occurences in image retrieval".

    Args:
        vectors: (n, d).
        groups: (n,) such as years. Each is centred by its own mean first: what all tiles of a year
            have in common says nothing about the place.

    Returns:
        Kernel (d, size) and bias (size,); the bias centres by the mean of all vectors.

    Raises:
        GeomatchError: there are too few vectors, or fewer than `size` values in each.
    """
    # Imported here, since queries read whitenings too, and it takes seconds.
    from sklearn.decomposition import PCA

    most = min(len(vectors) - 1, vectors.shape[1])
    if size > most:
        raise GeomatchError(
            f"a PCA to {size} values needs more than {len(vectors)} training descriptors "
            f"of {vectors.shape[1]} values",
            f"--set model.descriptor={max(most, 1)}, or more training tiles.",
        )
    mean = vectors.mean(axis=0)
    centred = vectors.copy()
    for group in np.unique(groups):
        # In float64: rounding errors of the mean would become a component and be amplified.
        centred[groups == group] -= vectors[groups == group].mean(axis=0, dtype=np.float64)
    fitted = PCA(size, svd_solver="randomized", random_state=0).fit(centred)
    # A component without variance becomes zero instead of being amplified.
    deviation = np.sqrt(fitted.explained_variance_)
    inverse = np.where(deviation > 1e-6 * deviation[0], 1 / np.maximum(deviation, 1e-30), 0.0)
    kernel = (fitted.components_.T * inverse).astype(np.float32)
    return kernel, -(mean @ kernel)

"""PCA-whitening of descriptors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from geomatch.errors import GeomatchError


def whitening(
    vectors: NDArray[np.float32], groups: NDArray[np.int64], size: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A projection to `size` uncorrelated values of unit variance.

    Jegou and Chum 2012, "Negative evidences and co-occurences in image retrieval".

    Args:
        vectors: (n, d).
        groups: (n,) each is centred by its own mean first: what all tiles of a year share is no
            property of a place.

    Returns:
        Kernel (d, size) and bias (size,), which centres by the mean of all.

    Raises:
        GeomatchError: there are fewer vectors, or fewer values in each, than `size`.
    """
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
        # In float64: what rounding leaves of a mean would pass for a direction, and be blown up.
        centred[groups == group] -= vectors[groups == group].mean(axis=0, dtype=np.float64)
    fitted = PCA(size, svd_solver="randomized", random_state=0).fit(centred)
    # A value that never varies is left at zero rather than blown up.
    deviation = np.sqrt(fitted.explained_variance_)
    inverse = np.where(deviation > 1e-6 * deviation[0], 1 / np.maximum(deviation, 1e-30), 0.0)
    kernel = (fitted.components_.T * inverse).astype(np.float32)
    return kernel, -(mean @ kernel)

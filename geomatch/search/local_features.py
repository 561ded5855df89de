"""Local features: whether, and how, one image lies within another.

SIFT (Lowe, "Distinctive image features from scale-invariant keypoints", 2004) as RootSIFT
(Arandjelović and Zisserman, 2012). A SIFT feature has a place, a size and a direction, so that one
pair of features fixes a similarity (Philbin et al., "Object retrieval with large vocabularies and
fast spatial matching", 2007): the similarity that most pairs agree with is found without chance. It
guides a second search for pairs, near where it puts each feature, and an affine transform is fitted
to these by RANSAC. How improbable so many agreeing pairs are by chance is the evidence (the number
of false alarms of Moisan and Stival, "A probabilistic criterion to detect rigid point matches",
2004).

Points are in pixels from the upper left corner of the image, x before y; the centre of its first
pixel is (0.5, 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Pixels = NDArray[np.uint8]

CONTRAST, EDGE = 0.01, 15.0
"""Thresholds of SIFT: fainter features than Lowe's 0.03, since aerial images are often hazy."""
MOST = 6000
"""Features of an image at most, the strongest."""
BORDER = 3
"""Pixels from what is invalid within which no feature is taken."""
RATIO = 0.95
"""Lowe's ratio test: the nearest feature must be nearer than the second by this factor."""
SCALES = 1 / 4, 4.0
"""Least and largest scale of a similarity."""
TURN, SIZE = math.radians(30), math.log(1.6)
"""How far the direction and the size of a pair of features may be from those of the similarity."""
REACH = 4.0
"""An inlier lies within this many pixels of where the transform puts it."""
WINDOW = 14.0
"""A guided pair lies within this many pixels of where the earlier transform put it."""
HYPOTHESES, GUIDED = 400, 4
"""Pairs whose similarity is tried, and similarities that guide a search."""
RANSAC = 2000
"""Iterations of RANSAC at most."""
SLACK = 0.15
"""By how much of its distance a point may miss the similarity of one pair of features."""
ROUNDS = 4
"""Guided searches for one similarity at most."""
LEAST = 4
"""Inliers of an alignment at least."""


@dataclass(frozen=True)
class Features:
    """SIFT features of an image.

    Attributes:
        points: (n, 2) places.
        frames: (n,) complex: the feature's size times its direction.
        descriptors: (n, 128) of unit length.
    """

    points: Float64Array
    frames: NDArray[np.complex128]
    descriptors: Float32Array

    def __len__(self) -> int:
        return len(self.points)


@dataclass(frozen=True)
class Alignment:
    """How a query lies in a reference image.

    Attributes:
        matrix: (2, 3) affine transform from points of the query to points of the reference.
        query, reference: (n, 2) points of the inliers.
        evidence: minus the decimal logarithm of how many so good alignments chance would give.
    """

    matrix: Float64Array
    query: Float64Array
    reference: Float64Array
    evidence: float

    @property
    def inliers(self) -> int:
        return len(self.query)

    @property
    def turn(self) -> float:
        """Degrees by which the query is to be turned clockwise to lie as the reference, 0 to 360."""
        a, b = self.matrix[:, 0], self.matrix[:, 1]
        return float(np.degrees(np.arctan2(a[1] - b[0], a[0] + b[1])) % 360)

    @property
    def scale(self) -> float:
        """Pixels of the reference for each pixel of the query, along a side."""
        return float(np.sqrt(abs(np.linalg.det(self.matrix[:, :2]))))

    @property
    def residuals(self) -> Float64Array:
        """(n, 2) from where the transform puts the inliers to where they are in the reference."""
        return self.reference - transformed(self.query, self.matrix)


def transformed(points: Float64Array, matrix: Float64Array) -> Float64Array:
    """Points (n, 2) under an affine transform (2, 3)."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def features(image: Pixels, valid: NDArray[np.bool_] | None = None) -> Features:
    """SIFT features of an image (h, w) or (h, w, c); of more bands, those of the mean of all.

    Args:
        valid: (h, w), where the image shows something; by default everywhere.
    """
    import cv2

    grey = image if image.ndim == 2 else np.rint(image.mean(axis=-1)).astype(np.uint8)
    mask = None
    if valid is not None:
        kernel = np.ones((2 * BORDER + 1, 2 * BORDER + 1), np.uint8)
        mask = cv2.erode(valid.astype(np.uint8), kernel, borderValue=1)
    sift = cv2.SIFT.create(
        nfeatures=MOST, contrastThreshold=CONTRAST, edgeThreshold=EDGE, enable_precise_upscale=True
    )
    keys, descriptors = sift.detectAndCompute(np.ascontiguousarray(grey), mask)
    if not keys:
        return Features(np.zeros((0, 2)), np.zeros(0, complex), np.zeros((0, 128), np.float32))
    found = np.asarray(descriptors, np.float32)
    found = np.sqrt(found / np.maximum(found.sum(axis=1, keepdims=True), 1e-9))
    direction = np.radians([key.angle for key in keys])
    size = np.array([key.size for key in keys])
    return Features(
        points=np.array([key.pt for key in keys]) + 0.5,
        frames=size * np.exp(1j * direction),
        descriptors=found,
    )


def align(
    query: Features, reference: Features, guesses: Sequence[Float64Array] = ()
) -> Alignment | None:
    """The best alignment of a query's features with those of a reference; None if there is none.

    Args:
        guesses: transforms (2, 3) that may hold, such as that of an upright tile.
    """
    if min(len(query), len(reference)) < LEAST:
        return None
    pairs = _nearest(query, reference)
    starts = [*guesses, *_voted(query, reference, pairs)]
    found = [_guided(query, reference, start, pairs) for start in starts]
    return max((each for each in found if each), key=lambda each: each.evidence, default=None)


def _nearest(query: Features, reference: Features) -> Ints:
    """Pairs (m, 2) that pass the ratio test, the most distinctive first."""
    import faiss

    far, nearest = faiss.knn(query.descriptors, reference.descriptors, 2)
    ratio = far[:, 0] / np.maximum(far[:, 1], 1e-12)
    order = np.argsort(ratio, kind="stable")
    chosen = order[ratio[order] < RATIO**2]
    return np.stack([chosen, nearest[chosen, 0]], axis=1).astype(np.int64)


def _voted(query: Features, reference: Features, pairs: Ints) -> list[Float64Array]:
    """Up to `GUIDED` similarities that most pairs agree with, each unlike those before."""
    q, r = pairs.T
    at, to = _complex(query.points[q]), _complex(reference.points[r])
    turn = reference.frames[r] / query.frames[q]
    tried = np.flatnonzero((np.abs(turn) > SCALES[0]) & (np.abs(turn) < SCALES[1]))[:HYPOTHESES]
    # The frame of one feature is not exact: the farther a point is from it, the less is asked.
    away = at - at[tried, None]
    miss = np.abs(turn[tried, None] * away + to[tried, None] - to)
    agree = _like(turn, turn[tried, None]) & (
        miss < 2 * REACH + SLACK * np.abs(turn[tried, None] * away)
    )
    found: list[tuple[int, Float64Array]] = []
    for _ in range(GUIDED):
        if not agree.any():
            break
        best = agree[np.argmax(agree.sum(axis=1))].copy()
        agree &= ~best
        if best.sum() >= 2:
            matrix, inside = _similarity(query.points[q[best]], reference.points[r[best]])
            found.append((int(inside.sum()), matrix))
    return [matrix for _, matrix in sorted(found, key=lambda each: -each[0])]


def _like(turn: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether two changes of frames agree in direction and size."""
    apart = turn / other
    return (np.abs(np.angle(apart)) < TURN) & (np.abs(np.log(np.abs(apart))) < SIZE)


def _similarity(at: Float64Array, to: Float64Array) -> tuple[Float64Array, NDArray[np.bool_]]:
    """The similarity (2, 3) of points (n, 2) by RANSAC, and which of them are inliers (n,)."""
    import cv2

    matrix, inside = cv2.estimateAffinePartial2D(
        at, to, method=cv2.RANSAC, ransacReprojThreshold=REACH, maxIters=RANSAC
    )
    if matrix is None:
        return np.zeros((2, 3)), np.zeros(len(at), bool)
    return matrix, inside.ravel() > 0


def _guided(
    query: Features, reference: Features, start: Float64Array, free: Ints
) -> Alignment | None:
    """Refine a transform by searching for pairs near where it puts the query's features.

    Args:
        free: pairs (m, 2) that were found without a transform, which are the evidence.
    """
    matrix, best = start, None
    for _ in range(ROUNDS):
        if not SCALES[0] < abs(np.linalg.det(matrix[:, :2])) ** 0.5 < SCALES[1]:
            break
        pairs = _within_window(query, reference, matrix)
        if len(pairs) < LEAST:
            break
        at, to = query.points[pairs[:, 0]], reference.points[pairs[:, 1]]
        matrix, inside = _similarity(at, to)
        if inside.sum() < LEAST:
            break
        evidence = _evidence(query, reference, matrix, free)
        if best and evidence <= best.evidence:
            break
        best = Alignment(matrix, at[inside], to[inside], evidence)
    return best


def _within_window(query: Features, reference: Features, matrix: Float64Array) -> Ints:
    """Pairs (m, 2), each the other's nearest within `WINDOW` pixels of where `matrix` puts them."""
    turn = complex(matrix[0, 0] + matrix[1, 1], matrix[1, 0] - matrix[0, 1]) / 2
    at, to = (
        points.astype(np.float32)
        for points in (transformed(query.points, matrix), reference.points)
    )
    found = []
    for start in range(0, len(at), 500):
        part = at[start : start + 500]
        near = np.abs(part[:, None, 0] - to[:, 0]) < WINDOW
        near &= np.abs(part[:, None, 1] - to[:, 1]) < WINDOW
        found.append(np.argwhere(near) + (start, 0))
    pairs = np.concatenate(found)
    q, r = pairs.T
    pairs = pairs[_like(reference.frames[r], query.frames[q] * turn)]
    q, r = pairs.T
    cosine = np.einsum("ij,ij->i", query.descriptors[q], reference.descriptors[r])
    order = np.argsort(-cosine, kind="stable")
    first = [np.zeros(len(pairs), bool) for _ in range(2)]
    for side, of in zip(first, (q, r), strict=True):
        side[order[np.unique(of[order], return_index=True)[1]]] = True
    return pairs[first[0] & first[1]]


def _distinct(at: Float64Array, to: Float64Array) -> int:
    """Pairs that differ in their places: several features may lie on one point."""
    return min(len(np.unique(np.rint(points / 2), axis=0)) for points in (at, to))


def _evidence(query: Features, reference: Features, matrix: Float64Array, pairs: Ints) -> float:
    """Minus the decimal logarithm of the number of false alarms: `Alignment.evidence`.

    A pair drawn by chance agrees with a transform with the probability of the share of the
    reference, of directions and of sizes that is within reach; two pairs are spent on the
    transform.
    """
    q, r = pairs.T
    turn = complex(matrix[0, 0] + matrix[1, 1], matrix[1, 0] - matrix[0, 1]) / 2
    away = np.hypot(*(transformed(query.points[q], matrix) - reference.points[r]).T)
    agree = (away < REACH) & _like(reference.frames[r], query.frames[q] * turn)
    n, k = len(pairs), _distinct(query.points[q[agree]], reference.points[r[agree]])
    if k <= 2:
        return 0.0
    area = np.prod(np.ptp(reference.points, axis=0))
    chance = min(math.pi * REACH**2 / area, 1.0) * TURN / math.pi * SIZE / math.log(SCALES[1])
    ways = _log_choose(n, k) + _log_choose(k, 2) + math.log(max(n - 2, 1))
    return -(ways + (k - 2) * math.log(chance)) / math.log(10)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _complex(points: Float64Array) -> NDArray[np.complex128]:
    return points[:, 0] + 1j * points[:, 1]

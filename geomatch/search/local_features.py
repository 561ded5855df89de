"""Local features: whether, and how, one image lies within another.

The usual features are SIFT (Lowe, "Distinctive image features from scale-invariant keypoints",
2004) as RootSIFT (Arandjelović and Zisserman, "Three things everyone should know to improve object
retrieval", 2012). A SIFT feature has a place, a size and a direction, so that one pair of them
fixes a similarity, if roughly (Philbin et al., "Object retrieval with large vocabularies and fast
spatial matching", 2007). The similarities that most pairs agree with guide a second search, for
pairs that are near each other; RANSAC fits a similarity to these, to whose inliers an affine
transform may be fitted.

Features that a network learned have no direction of their own: an image is looked for in steps of a
turn, and RANSAC fits the similarity to pairs that are each other's nearest, step by step.

Some pairs agree by chance, the more the richer in detail the images are. A mirrored image has as
much detail and never lies in the reference: what it finds there is chance, and the query is found
if it finds clearly more.

Points are in pixels from the upper left corner of an image, x before y; the centre of its first
pixel is (0.5, 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Pixels = NDArray[np.uint8]

CONTRAST, EDGE = 0.01, 15.0
"""Thresholds of SIFT: features may be fainter than Lowe's 0.03, since aerial images are hazy."""
MOST = 6000
"""Features of an image at most, the strongest."""
BORDER = 3
"""Pixels from what is invalid within which no feature is taken."""
RATIO = 0.95
"""Lowe's ratio test: the nearest feature must be nearer than the second by this factor."""
TURN, SIZE = math.radians(30), math.log(1.6)
"""How far the direction and the size of a pair of features may be from those of the similarity."""
SLACK = 0.15
"""By how much of its distance a point may miss the similarity of one pair of features."""
REACH = 4.0
"""An inlier lies within this many pixels of where the transform puts it."""
WINDOW = 14.0
"""A guided pair lies within this many pixels of where the earlier transform put it, in x and y."""
HYPOTHESES, GUIDED = 400, 4
"""Pairs whose similarity is tried, and similarities that guide a search."""
ROUNDS = 4
"""Guided searches from one similarity at most."""
RANSAC = 2000
"""Iterations of RANSAC at most."""
LEAST = 4
"""Inliers of an alignment at least."""
AFFINE = 20
"""Inliers for an affine transform at least; its six numbers follow the noise of fewer."""
CONFIRMED, CONFIRMED_BY_STEPS = 2.0, 2.5
"""`Finding.score` from which on an image is found, with features that have a direction and with
those that are found in steps; see tests/benchmarks/README.md."""


@dataclass(frozen=True)
class Features:
    """Features of an image.

    Attributes:
        points: (n, 2) places.
        frames: (n,) complex: the feature's size times its direction.
        descriptors: (n, d) of unit length.
        least: cosine of a pair at least, of features whose directions are those of steps; None for
            those that have one of their own.
    """

    points: Float64Array
    frames: NDArray[np.complex128]
    descriptors: Float32Array
    least: float | None = None

    def __len__(self) -> int:
        return len(self.points)


Detect = Callable[[Pixels, NDArray[np.bool_] | None], Features]
"""Finds features of an image, as `features` does."""


@dataclass(frozen=True)
class Sought:
    """Features of an image that is looked for, and of its mirror image."""

    features: Features
    mirrored: Features

    @classmethod
    def of(
        cls, image: Pixels, valid: NDArray[np.bool_] | None = None, detect: Detect | None = None
    ) -> Self:
        """Those that `detect` finds, or else `features`; arguments as there."""
        detect = detect or features
        mirrored = None if valid is None else valid[:, ::-1]
        return cls(detect(image, valid), detect(image[:, ::-1], mirrored))


@dataclass(frozen=True)
class Alignment:
    """How a query lies in a reference image.

    Attributes:
        matrix: (2, 3) transform from points of the query to points of the reference.
        query, reference: (n, 2) points of the inliers.
    """

    matrix: Float64Array
    query: Float64Array
    reference: Float64Array

    @property
    def turn(self) -> float:
        """Degrees by which the query is turned counter-clockwise to lie as the reference: 0 to 360.

        That of the nearest similarity.
        """
        return float(np.degrees(-np.angle(_frame(self.matrix))) % 360)

    @property
    def scale(self) -> float:
        """Pixels of the reference for each pixel along a side of the query."""
        return scale_of(self.matrix)

    @property
    def residuals(self) -> Float64Array:
        """(n, 2) from where the transform puts the inliers to where they are in the reference."""
        return self.reference - transformed(self.query, self.matrix)


@dataclass(frozen=True)
class Finding:
    """What looking for an image gave.

    Attributes:
        alignment: None without any.
        chance: inliers of the mirrored image.
        needed: score from which on it is found.
    """

    alignment: Alignment | None
    chance: int
    needed: float = CONFIRMED

    @property
    def inliers(self) -> int:
        return 0 if self.alignment is None else len(self.alignment.query)

    @property
    def score(self) -> float:
        """Inliers beyond those of chance, in about its standard deviations."""
        return (self.inliers - self.chance) / math.sqrt(self.chance + 3)

    @property
    def is_confirmed(self) -> bool:
        return self.score >= self.needed


def transformed(points: Float64Array, matrix: Float64Array) -> Float64Array:
    """Points (n, 2) under an affine transform (2, 3)."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def warped(
    image: Pixels, valid: NDArray[np.bool_], matrix: Float64Array, shape: tuple[int, ...]
) -> tuple[Pixels, NDArray[np.bool_]]:
    """An image and where it is valid, as they lie in a reference (h, w) by a transform (2, 3)."""
    import cv2

    # OpenCV counts from the centre of the first pixel.
    centred = np.column_stack([matrix[:, :2], matrix[:, 2] + matrix[:, :2].sum(axis=1) / 2 - 0.5])
    size = shape[1], shape[0]
    moved = cv2.warpAffine(np.ascontiguousarray(image), centred, size, flags=cv2.INTER_LINEAR)
    shown = cv2.warpAffine(valid.astype(np.uint8), centred, size, flags=cv2.INTER_NEAREST)
    return moved.reshape(*shape, -1).astype(np.uint8, copy=False), shown > 0


def scale_of(matrix: Float64Array) -> float:
    """The scale of an affine transform (2, 3): the root of how it changes areas."""
    return float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))


def features(image: Pixels, valid: NDArray[np.bool_] | None = None) -> Features:
    """SIFT features of an image (h, w) or (h, w, c); of several bands, those of their mean.

    Args:
        valid: (h, w), where the image shows something; by default everywhere.
    """
    import cv2

    grey = image if image.ndim == 2 else np.rint(image.mean(axis=-1)).astype(np.uint8)
    mask = None
    if valid is not None:
        kernel = np.ones((2 * BORDER + 1, 2 * BORDER + 1), np.uint8)
        mask = cv2.erode(valid.astype(np.uint8), kernel)
    sift = cv2.SIFT.create(
        nfeatures=MOST, contrastThreshold=CONTRAST, edgeThreshold=EDGE, enable_precise_upscale=True
    )
    keys, found = sift.detectAndCompute(np.ascontiguousarray(grey), mask)
    if not keys:
        return Features(np.zeros((0, 2)), np.zeros(0, complex), np.zeros((0, 128), np.float32))
    descriptors = np.asarray(found, np.float32)
    sums = np.maximum(descriptors.sum(axis=1, keepdims=True), np.float32(1e-9))
    sizes, angles = (np.array([getattr(key, name) for key in keys]) for name in ("size", "angle"))
    return Features(
        points=np.array([key.pt for key in keys]) + 0.5,
        frames=sizes * np.exp(1j * np.radians(angles)),
        descriptors=np.sqrt(descriptors / sums),
    )


@dataclass(frozen=True)
class Detector:
    """A kind of features.

    Attributes:
        any_turn: finds those of an image that may be turned.
        upright: finds those of one that lies as it is, or nearly so.
    """

    any_turn: Detect
    upright: Detect


SIFT = Detector(features, features)


def find(
    query: Sought,
    reference: Features,
    guesses: Sequence[Float64Array] = (),
    scales: tuple[float, float] = (1 / 4, 4.0),
) -> Finding:
    """Look for an image in another one.

    Args:
        guesses: transforms (2, 3) that may hold, such as that of a tile which is upright.
        scales: the least and the largest scale that is possible.
    """
    found, chance = (
        align(each, reference, guesses, scales) for each in (query.features, query.mirrored)
    )
    needed = CONFIRMED if query.features.least is None else CONFIRMED_BY_STEPS
    return Finding(found, 0 if chance is None else len(chance.query), needed)


def align(
    query: Features,
    reference: Features,
    guesses: Sequence[Float64Array] = (),
    scales: tuple[float, float] = (1 / 4, 4.0),
) -> Alignment | None:
    """The similarity of most inliers, if any has enough; arguments as for `find`."""
    if min(len(query), len(reference)) < LEAST:
        return None
    if query.least is not None:
        found = _by_steps(query, reference, query.least, scales)
        return max(found, key=lambda each: len(each.query), default=None)
    starts = [*guesses, *_voted(query, reference, scales)]
    guided = [_guided(query, reference, start, scales) for start in starts]
    return max((each for each in guided if each), key=lambda each: len(each.query), default=None)


def affine(alignment: Alignment) -> Alignment:
    """The affine transform of least squares of an alignment's inliers; a few stay as they are."""
    if len(alignment.query) < AFFINE:
        return alignment
    points = np.column_stack([alignment.query, np.ones(len(alignment.query))])
    solved: Any = np.linalg.lstsq(points, alignment.reference, rcond=None)[0]
    return replace(alignment, matrix=solved.T)


def _voted(query: Features, reference: Features, scales: tuple[float, float]) -> list[Float64Array]:
    """Up to `GUIDED` similarities that most pairs agree with, each unlike those before."""
    q, r = _nearest(query, reference).T
    at, to = _complex(query.points[q]), _complex(reference.points[r])
    turn = reference.frames[r] / query.frames[q]
    possible = (np.abs(turn) > scales[0]) & (np.abs(turn) < scales[1])
    tried = np.flatnonzero(possible)[:HYPOTHESES]
    # The frame of one feature is not exact: the farther a point is from it, the less is asked.
    away = turn[tried, None] * (at - at[tried, None])
    agree = np.abs(away + to[tried, None] - to) < 2 * REACH + SLACK * np.abs(away)
    agree &= _like(turn, turn[tried, None])
    found = []
    for _ in range(GUIDED):
        best = agree[np.argmax(agree.sum(axis=1))].copy() if len(agree) else np.zeros(0, bool)
        if best.sum() < 2:
            break
        agree &= ~best
        matrix, _ = _similarity(query.points[q[best]], reference.points[r[best]])
        found += [] if matrix is None else [matrix]
    return found


def _nearest(query: Features, reference: Features) -> Ints:
    """Pairs (m, 2) that pass the ratio test, the most distinctive first."""
    import faiss

    far, nearest = faiss.knn(query.descriptors, reference.descriptors, 2)
    ratio = far[:, 0] / np.maximum(far[:, 1], 1e-12)
    order = np.argsort(ratio, kind="stable")
    chosen = order[ratio[order] < RATIO**2]
    return np.stack([chosen, nearest[chosen, 0]], axis=1).astype(np.int64)


def _by_steps(
    query: Features, reference: Features, least: float, scales: tuple[float, float]
) -> list[Alignment]:
    """The alignment of each direction that has one, from pairs that are each other's nearest."""
    found = []
    for direction in np.unique(query.frames):
        here = np.flatnonzero(query.frames == direction)
        cosines = query.descriptors[here] @ reference.descriptors.T
        there = cosines.argmax(axis=1)
        mutual = cosines.argmax(axis=0)[there] == np.arange(len(here))
        mutual &= cosines[np.arange(len(here)), there] > least
        at, to = query.points[here[mutual]], reference.points[there[mutual]]
        matrix, inside = _similarity(at, to)
        if matrix is None or inside.sum() < LEAST or not scales[0] < scale_of(matrix) < scales[1]:
            continue
        if abs(np.angle(_frame(matrix) * direction)) < TURN:
            found.append(Alignment(matrix, at[inside], to[inside]))
    return found


def _guided(
    query: Features, reference: Features, start: Float64Array, scales: tuple[float, float]
) -> Alignment | None:
    """Refine a transform by pairs near where it puts the query's features."""
    matrix, best = start, None
    for _ in range(ROUNDS):
        if not scales[0] < scale_of(matrix) < scales[1]:
            break
        pairs = _within_window(query, reference, matrix)
        at, to = query.points[pairs[:, 0]], reference.points[pairs[:, 1]]
        fitted, inside = _similarity(at, to)
        if fitted is None or inside.sum() < max(LEAST, 1 + (len(best.query) if best else 0)):
            break
        matrix, best = fitted, Alignment(fitted, at[inside], to[inside])
    return best


def _similarity(
    at: Float64Array, to: Float64Array
) -> tuple[Float64Array | None, NDArray[np.bool_]]:
    """The similarity (2, 3) of points (n, 2) by RANSAC, and which of them are inliers (n,)."""
    import cv2

    if len(at) < 2:
        return None, np.zeros(len(at), bool)
    fitted: Any = cv2.estimateAffinePartial2D(
        at, to, method=cv2.RANSAC, ransacReprojThreshold=REACH, maxIters=RANSAC
    )
    matrix, inside = fitted
    if matrix is None or not np.isfinite(matrix).all():  # points that coincide
        return None, np.zeros(len(at), bool)
    return matrix, inside.ravel() > 0


def _within_window(query: Features, reference: Features, matrix: Float64Array) -> Ints:
    """Pairs (m, 2) that are each other's nearest within `WINDOW` of where `matrix` puts them."""
    at, to = transformed(query.points, matrix), reference.points
    along = np.argsort(to[:, 0], kind="stable")
    low, high = (np.searchsorted(to[along, 0], at[:, 0] + side * WINDOW) for side in (-1, 1))
    counts = high - low
    q = np.repeat(np.arange(len(at)), counts)
    r = along[np.arange(len(q)) - np.repeat(counts.cumsum() - counts - low, counts)]
    near = np.abs(at[q, 1] - to[r, 1]) < WINDOW
    pairs = np.stack([q[near], r[near]], axis=1)
    q, r = pairs.T
    pairs = pairs[_like(reference.frames[r], query.frames[q] * _frame(matrix))]
    q, r = pairs.T
    cosine = np.einsum("ij,ij->i", query.descriptors[q], reference.descriptors[r])
    order = np.argsort(-cosine, kind="stable")
    first = [np.zeros(len(pairs), bool) for _ in range(2)]
    for is_first, of in zip(first, (q, r), strict=True):
        is_first[order[np.unique(of[order], return_index=True)[1]]] = True
    return pairs[first[0] & first[1]]


def _like(turn: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether two changes of frames agree in direction and size."""
    apart = turn / other
    return (np.abs(np.angle(apart)) < TURN) & (np.abs(np.log(np.abs(apart))) < SIZE)


def _frame(matrix: Float64Array) -> complex:
    """The change of frames of a transform's nearest similarity."""
    return complex(matrix[0, 0] + matrix[1, 1], matrix[1, 0] - matrix[0, 1]) / 2


def _complex(points: Float64Array) -> NDArray[np.complex128]:
    return points[:, 0] + 1j * points[:, 1]

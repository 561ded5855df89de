"""How sure the answers to a query are; an index keeps what that is told by as `confidence.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from geomatch.project import read_record, write_record
from geomatch.records import Record

ANSWERS = 64
"""First answers to a query, which tell what scores its ground has."""
LEAST = 8
"""Others that an answer has to be compared with at least."""

Float64Array = NDArray[np.float64]


def standard_scores(scores: NDArray[np.floating], years: int) -> Float64Array:
    """How far answers stand out: standard deviations above the mean of those that come later.

    The score of a match depends on the ground, since fields and rows of houses look alike
    everywhere; by how much it exceeds the scores of other places does so less. This is the test
    normalisation of Auckenthaler, Carey and Lloyd-Thomas 2000, "Score Normalization for
    Text-Independent Speaker Verification Systems", with the first answers as the cohort.

    Args:
        scores: (q, k) of the answers to each query in order of rank; NaN for none.
        years: that are searched. So many answers may show the query's place; the others, up to
            `ANSWERS`, are those after them.

    Returns:
        (q, k), NaN where there are fewer than `LEAST` others.
    """
    others = scores[:, years:ANSWERS].astype(np.float64)
    is_there = np.isfinite(others)
    count = is_there.sum(axis=1, keepdims=True)
    mean = np.where(is_there, others, 0).sum(axis=1, keepdims=True) / np.maximum(count, 1)
    squares = np.where(is_there, (others - mean) ** 2, 0).sum(axis=1, keepdims=True)
    spread = np.sqrt(squares / np.maximum(count, 1))
    standing: Float64Array = (scores - mean) / np.maximum(spread, 1e-6)
    return np.where(count < LEAST, np.nan, standing)


class Judgement(NamedTuple):
    """How sure the answers to a query are.

    Attributes:
        probability: (k,) that an answer is right.
        is_match: whether the first answer passes for a match; None where that is unknown.
    """

    probability: tuple[float, ...]
    is_match: bool | None


@dataclass(frozen=True)
class Confidence(Record):
    """What standard scores are worth, told by tiles of one split as queries.

    Attributes:
        split: the split.
        years: as for `standard_scores`.
        slope, intercept: of the logit of the probability that an answer is right, as a function of
            its standard score.
        first: of the first answer to each query while the tiles of its place are left out.
    """

    split: str
    years: int
    slope: float
    intercept: float
    first: tuple[float, ...]

    def judge(self, scores: NDArray[np.float32], fpr: float) -> Judgement | None:
        """How sure the answers to a query are; None where too few tiles are searched to tell.

        Args:
            scores: (k,) of the first answers in order of rank, `ANSWERS` of them if there are.
            fpr: share of queries without a match whose first answer may pass.
        """
        standing = standard_scores(scores[None], self.years)[0].tolist()
        if not standing or math.isnan(standing[0]):
            return None
        probabilities = tuple(map(self.probability, standing))
        threshold = self.threshold(fpr)
        return Judgement(probabilities, None if threshold is None else standing[0] >= threshold)

    def probability(self, standard_score: float) -> float:
        """The probability that an answer is right, if half of all queries have a match."""
        logit = self.slope * standard_score + self.intercept
        return 1 / (1 + math.exp(-max(min(logit, 700.0), -700.0)))

    def threshold(self, fpr: float) -> float | None:
        """The least standard score that at most `fpr` of queries without a match reach.

        None where there were so few queries that not one of them might have.
        """
        if fpr * len(self.first) < 1:
            return None
        values, counts = np.unique(self.first, return_counts=True)
        passing = values[counts[::-1].cumsum()[::-1] <= fpr * len(self.first)]
        return float(passing[0] if len(passing) else np.nextafter(values[-1], np.inf))

    def save(self, folder: Path) -> None:
        """Write JSON into the folder of an index."""
        write_record(folder / "confidence.json", self)

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read what `save` wrote; None where there is none.

        Raises:
            StaleError: the file is damaged or of another version.
        """
        path = folder / "confidence.json"
        return read_record(path, cls, "geomatch index") if path.exists() else None

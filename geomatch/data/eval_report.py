"""What `eval` measured: the metrics of each split, as `report.json` holds them.

Undefined metrics are None. Recall@k is the share of queries with a match among the first k.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from geomatch.project import read_record, write_record
from geomatch.records import INLINED, OPTIONAL, Record, named

Interval = tuple[float, ...]
"""Low and high end of a 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Queries(Record):
    """How many queries there are."""

    queries: int


@dataclass(frozen=True, kw_only=True)
class SearchedQueries(Queries):
    """How many queries there are, and how many tiles they were searched in."""

    database: int


@dataclass(frozen=True, kw_only=True)
class Ranks(Record):
    """How high matches rank."""

    map5: float | None = field(metadata=named("map@5"))
    recall1: float | None = field(metadata=named("recall@1"))
    recall5: float | None = field(metadata=named("recall@5"))
    recall10: float | None = field(metadata=named("recall@10"))
    median_rank: float | None


@dataclass(frozen=True, kw_only=True)
class RankMetrics(Ranks, Queries):
    """How high the matches of some queries rank."""


@dataclass(frozen=True, kw_only=True)
class DistanceMetrics(Ranks, SearchedQueries):
    """How high the matches of some queries rank, and how far off the first answers lie.

    Attributes:
        median_error_m: metres from the query to its first answer, between tile centres.
        mrr: mean reciprocal rank.
        within_1_tiles: share of queries whose first answer lies within 1 side of a tile; so on.
    """

    median_error_m: float | None
    mean_rank: float | None
    mrr: float | None
    within_1_tiles: float | None
    within_2_tiles: float | None
    within_5_tiles: float | None


@dataclass(frozen=True, kw_only=True)
class YearPairMetrics(DistanceMetrics):
    """Queries of one year in the database of another."""

    query_year: str
    database_year: str


@dataclass(frozen=True, kw_only=True)
class ContentMetrics(RankMetrics):
    """Queries by whether their descriptors can tell their place from others.

    Attributes:
        content: "blank" (the query's descriptor equals that of another place, as of tiles without
            content), "ambiguous" (the first two answers are of different places and score the
            same) or "distinct".
    """

    content: str


@dataclass(frozen=True, kw_only=True)
class ChangeMetrics(RankMetrics):
    """Queries by how much of the ground changed in their tile or their match's.

    Attributes:
        changed: "0", "up to 10%" or "above 10%".
    """

    changed: str


@dataclass(frozen=True, kw_only=True)
class RegionMetrics(RankMetrics):
    """Queries of one source sheet, or of one block."""

    region: str


@dataclass(frozen=True, kw_only=True)
class ClassMetrics(Record):
    """Queries of one class.

    Attributes:
        map: mean average precision over the whole ranking.
    """

    label: str = field(metadata=named("class"))
    queries: int
    hit5: float | None = field(metadata=named("hit@5"))
    map: float | None
    map5: float | None = field(metadata=named("map@5"))


@dataclass(frozen=True, kw_only=True)
class ClassFolderMetrics(Record):
    """What class folders have beside all other metrics: several items are relevant to a query.

    Attributes:
        map: mean average precision over the whole ranking.
        precision1: precision@1, and so on.
        relevant_recall1: share of the relevant items that are among the first 1, and so on.
    """

    map: float | None
    precision1: float | None = field(metadata=named("mp@1"))
    precision5: float | None = field(metadata=named("mp@5"))
    precision10: float | None = field(metadata=named("mp@10"))
    relevant_recall1: float | None = field(metadata=named("relevant_recall@1"))
    relevant_recall5: float | None = field(metadata=named("relevant_recall@5"))
    relevant_recall10: float | None = field(metadata=named("relevant_recall@10"))
    classes: tuple[ClassMetrics, ...]


@dataclass(frozen=True, kw_only=True)
class CalibrationMetrics(Record):
    """How probabilities of pairs hold.

    Attributes:
        slope, intercept: of a score's logit, as fitted on the validation split.
        error: expected calibration error.
        probability, share, pairs: of each bin of the probability, its mean, the share of pairs of
            the same place, and how many pairs there are.
    """

    slope: float
    intercept: float
    error: float
    probability: tuple[float, ...]
    share: tuple[float, ...]
    pairs: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class VerificationMetrics(Record):
    """How well pairs of tiles of the same place are told from pairs of other places.

    Attributes:
        auc: area under the ROC curve.
        eer: equal error rate.
        threshold: of the score; a pair passes from there on.
        fpr, tpr: shares of pairs of other places, and of the same place, that pass.
        confusion: [[true negatives, false positives], [false negatives, true positives]].
        curve: "fpr", "tpr" and "threshold" of at most 200 points, from the strictest threshold on.
        pr: "recall" and "precision", alike.
        histogram: "edges" of bins of the score, and counts of pairs of the "same" and of the
            "other" place in them.
    """

    auc: float
    eer: float
    threshold: float
    fpr: float
    tpr: float
    confusion: tuple[tuple[int, ...], ...]
    curve: dict[str, tuple[float, ...]]
    pr: dict[str, tuple[float, ...]]
    histogram: dict[str, tuple[float, ...]]
    calibration: CalibrationMetrics


@dataclass(frozen=True, kw_only=True)
class SplitMetrics(DistanceMetrics):
    """The metrics of a split.

    Attributes:
        intervals: 95 % bootstrap intervals over places, of "map@5" and "recall@1" and so on.
        content: by what tells a tile from others.
        changed: by the share of changed ground, where a mask says it.
        class_folders: of class folders alone.
        regions: by sheet or block; empty without a ground, None without years.
        pairs: of each ordered pair of years.
        roc: of drawn pairs of tiles; None without pairs.
    """

    intervals: dict[str, Interval | None]
    content: tuple[ContentMetrics, ...]
    changed: tuple[ChangeMetrics, ...] | None = field(default=None, metadata=OPTIONAL)
    class_folders: ClassFolderMetrics | None = field(default=None, metadata=INLINED)
    regions: tuple[RegionMetrics, ...] | None = field(default=None, metadata=OPTIONAL)
    pairs: tuple[YearPairMetrics, ...]
    roc: VerificationMetrics | None


@dataclass(frozen=True, kw_only=True)
class RivalMetrics(Record):
    """A baseline, or other embeddings.

    Attributes:
        differences: of each split, of "map@5" and recall: by how much this one is behind, and the
            ends of the paired 95 % interval.
    """

    name: str
    splits: dict[str, SplitMetrics]
    differences: dict[str, dict[str, Interval | None]]


@dataclass(frozen=True, kw_only=True)
class GradedMetrics(Record):
    """Metrics of graded answers by the revisited Oxford and Paris protocol.

    Attributes:
        easy, medium, hard: "trapezoidal map" and "mp@1", "mp@5" and "mp@10".
    """

    queries: int
    database: int
    easy: dict[str, float | None]
    medium: dict[str, float | None]
    hard: dict[str, float | None]


@dataclass(frozen=True)
class Report(Record):
    """What was measured, and on what.

    Attributes:
        embeddings: "RUN@STEP".
        database: "split", "all" or "train": which tiles were searched.
        splits: metrics by split.
        name: of its folder in `reports/`, where `report.json` lies beside `queries.parquet`, a
            `QueryTable` of all splits.
        others: baselines and other embeddings that were measured beside it.
        graded: None without graded answers.
    """

    embeddings: str
    database: str
    splits: dict[str, SplitMetrics]
    name: str = ""
    others: tuple[RivalMetrics, ...] = ()
    graded: GradedMetrics | None = None

    def save(self, path: Path) -> None:
        """Write JSON."""
        write_record(path, self)

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what `save` wrote.

        Raises:
            StaleError: the file is damaged or of another version.
        """
        return read_record(path, cls, "geomatch eval")

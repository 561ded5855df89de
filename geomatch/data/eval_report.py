"""The report of `eval`: the metrics of each split, stored as `report.json`.

Undefined metrics are None. Recall@k is the share of queries with a match among the first k.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from geomatch.project import read_record, write_record
from geomatch.records import INLINED, OPTIONAL, Record, named

Interval = tuple[float, ...]
"""Lower and upper bound of a 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Queries(Record):
    """Number of queries."""

    queries: int


@dataclass(frozen=True, kw_only=True)
class SearchedQueries(Queries):
    """Number of queries and of tiles in their database."""

    database: int


@dataclass(frozen=True, kw_only=True)
class Ranks(Record):
    """Metrics of the ranks of matches."""

    map5: float | None = field(metadata=named("map@5"))
    recall1: float | None = field(metadata=named("recall@1"))
    recall5: float | None = field(metadata=named("recall@5"))
    recall10: float | None = field(metadata=named("recall@10"))
    median_rank: float | None


@dataclass(frozen=True, kw_only=True)
class RankMetrics(Ranks, Queries):
    """Number of queries and metrics of their ranks."""


@dataclass(frozen=True, kw_only=True)
class DistanceMetrics(Ranks, SearchedQueries):
    """Metrics of the ranks of matches and of the distances to the first answers.

    Attributes:
        median_error_m: metres between the tile centres of the query and of its first answer.
        mrr: mean reciprocal rank.
        within_N_tiles: share of queries whose first answer is within N tile sides.
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
    """Queries grouped by whether descriptors distinguish their place from others.

    Attributes:
        content: "blank" (the query's descriptor equals that of another place, as for tiles without
            content), "ambiguous" (the first two answers are of different places and tie) or
            "distinct".
    """

    content: str


@dataclass(frozen=True, kw_only=True)
class ChangeMetrics(RankMetrics):
    """Queries grouped by the share of changed ground in their tile or in their match.

    Attributes:
        changed: "0", "up to 10%" or "above 10%".
    """

    changed: str


@dataclass(frozen=True, kw_only=True)
class RegionMetrics(RankMetrics):
    """Queries of one source file or one block."""

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
    """Additional metrics of class folders, where a query has several relevant items.

    Attributes:
        map: mean average precision over the whole ranking.
        precisionK: precision@K.
        relevant_recallK: share of the relevant items that are among the first K.
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
    """Calibration of the probability that a pair shows the same place.

    Attributes:
        slope, intercept: of the logit as a function of the score, fitted on the validation split.
        error: expected calibration error.
        probability, share, pairs: of each bin, the mean probability, the share of pairs of the same
            place, and the number of pairs.
    """

    slope: float
    intercept: float
    error: float
    probability: tuple[float, ...]
    share: tuple[float, ...]
    pairs: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class VerificationMetrics(Record):
    """How well scores separate pairs of the same place from pairs of different places.

    Attributes:
        auc: area under the ROC curve.
        eer: equal error rate.
        threshold: lowest score of a pair that is accepted.
        threshold_interval: its 95 % interval over places.
        fpr, tpr: false and true positive rate at the threshold.
        fpr_interval: 95 % interval of the former, over the places of this split and of the one that
            the threshold was chosen on.
        holds: whether the rate that was asked for is not below that interval.
        confusion: [[true negatives, false positives], [false negatives, true positives]].
        curve: "fpr", "tpr" and "threshold" of at most 200 points, by falling threshold.
        pr: "recall" and "precision" in the same order.
        histogram: "edges" of bins of the score, and counts of pairs of the "same" place and of
            "other" places in them.
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
    threshold_interval: Interval | None = field(default=None, metadata=OPTIONAL)
    fpr_interval: Interval | None = field(default=None, metadata=OPTIONAL)
    holds: bool | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class NoMatchMetrics(Queries):
    """Tiles as queries among all tiles of the other years, with their places and without.

    Attributes:
        threshold: lowest standard score of a first answer that is taken for a match, chosen on the
            validation split.
        threshold_interval: its 95 % interval over places.
        fpr: share of queries without a match whose first answer passes.
        fpr_interval: its 95 % interval over places, of this split and of the one that the threshold
            was chosen on.
        tpr: share of queries with a match whose first answer is right and passes.
        holds: whether the rate that was asked for is not below the interval.
        error: expected calibration error of the probabilities of answers.
    """

    threshold: float
    threshold_interval: Interval
    fpr: float
    fpr_interval: Interval
    tpr: float
    holds: bool
    error: float


@dataclass(frozen=True, kw_only=True)
class SplitMetrics(DistanceMetrics):
    """The metrics of a split.

    Attributes:
        drawn_from: queries that the split has, where only some of them were drawn and measured.
        intervals: 95 % bootstrap intervals over places, by name of the metric, such as "map@5".
        content: by whether descriptors distinguish places.
        changed: by the share of changed ground; None without masks.
        class_folders: None for tiles with years.
        regions: by source file or block; empty without georeference, None without years.
        pairs: by ordered pair of years.
        roc: verification of drawn pairs of tiles; None without pairs.
        no_match: how well queries without a match are told; None where that is unknown.
    """

    drawn_from: int | None = field(default=None, metadata=OPTIONAL)
    intervals: dict[str, Interval | None]
    content: tuple[ContentMetrics, ...]
    changed: tuple[ChangeMetrics, ...] | None = field(default=None, metadata=OPTIONAL)
    class_folders: ClassFolderMetrics | None = field(default=None, metadata=INLINED)
    regions: tuple[RegionMetrics, ...] | None = field(default=None, metadata=OPTIONAL)
    pairs: tuple[YearPairMetrics, ...]
    roc: VerificationMetrics | None
    no_match: NoMatchMetrics | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class RivalMetrics(Record):
    """A baseline, or other embeddings.

    Attributes:
        differences: by split and metric ("map@5" and recall), how far this one is behind, and the
            bounds of the paired 95 % interval.
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
    """The report of an evaluation.

    Attributes:
        embeddings: "RUN@STEP".
        database: the tiles that were searched: "split", "all" or "train".
        splits: metrics by split.
        name: of its folder in `reports/`, which also has `queries.parquet`, the `QueryTable` of all
            splits.
        others: baselines and other embeddings, evaluated on the same queries.
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

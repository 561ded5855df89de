"""Compare: decide whether two image files show the same place."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geomatch import image_input
from geomatch.data import embeddings
from geomatch.data.pair_scores import ScoredPairs
from geomatch.errors import GeomatchError, StaleError
from geomatch.evaluation.calibration import Calibration
from geomatch.evaluation.verification import ROC, check_fpr
from geomatch.manifests import EmbeddingManifest
from geomatch.progress import ProgressCallback, silent
from geomatch.project import Project
from geomatch.search import exact


@dataclass(frozen=True)
class Comparison:
    """The comparison of images `a` and `b`.

    Attributes:
        score: cosine similarity, or negative distance; higher is better.
        distance: 1 - cosine similarity, or Euclidean distance.
        probability: that both show the same place, for a prior of 0.5.
        threshold: lowest score of a match.
        fpr: accepted share of pairs of different places that count as a match.
        match: whether the score reaches the threshold.
    """

    a: str
    b: str
    score: float
    distance: float
    probability: float
    threshold: float
    fpr: float
    match: bool

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def compare(
    project: Project,
    a: str,
    b: str,
    *,
    run: str | None = None,
    fpr: float = 0.01,
    progress: ProgressCallback = silent,
) -> Comparison:
    """Compare two image files by the encoder that made some embeddings.

    Threshold and probability are estimated from the pairs of validation tiles that `eval` drew.

    Args:
        run: name of the embeddings ("RUN@STEP"); by default the latest.
        fpr: accepted share of pairs of different places that count as a match.

    Raises:
        GeomatchError: an image cannot be read, or `eval` has not drawn pairs yet.
        StaleError: pairs, embeddings and run do not belong together.
    """
    check_fpr(fpr)
    name = project.embeddings_of(run)
    path = project.embeddings / f"{name}.parquet"
    manifest = embeddings.read_manifest(path)
    project.check_fresh(manifest)
    pairs = _pairs(ScoredPairs.beside(path), manifest)
    tiles = project.tile_manifest()
    encoding = image_input.encoder_of(project, manifest, tiles, "eval")
    cuts = [image_input.cut(image, tiles) for image in (a, b)]
    if tiles.on_ground:
        for cut in cuts:
            progress(cut.remark)
    vectors = image_input.describe_cuts(encoding, cuts, manifest)
    metric = manifest.metric
    product = exact.products(vectors, np.array([0]), np.array([1]), metric)
    score = float(exact.scores(product[:, None], vectors[:1], metric)[0, 0])
    probability = Calibration.fit(pairs.same, pairs.other).probability(np.array([score]))
    threshold = ROC.of(pairs.same, pairs.other).threshold(fpr)
    return Comparison(
        a=a,
        b=b,
        score=score,
        distance=1 - score if metric == "cosine" else -score,
        probability=float(probability[0]),
        threshold=threshold,
        fpr=fpr,
        match=score >= threshold,
    )


def _pairs(path: Path, manifest: EmbeddingManifest) -> ScoredPairs:
    """The scored pairs of some embeddings."""
    name = manifest.name
    remedy = f"Run: geomatch eval --run {name}"
    if not path.exists():
        raise GeomatchError(f"{name} has no threshold yet", remedy)
    pairs = ScoredPairs.load(path)
    if pairs.embeddings != manifest.fingerprint:
        raise StaleError(f"{name} was embedded again after its threshold was measured", remedy)
    return pairs

"""Make the references of pytorch-metric-learning's losses and miners: metric_learning.npz here.

    pip install '.[benchmark]'
    python tests/references/make_metric_learning.py

It holds descriptors (24, 8) in clusters with their classes, two of which have one descriptor, and
what the library makes of them. What differs from geomatch is brought to one form:

- Its ContrastiveLoss neither squares nor halves, and adds the means of matching and other pairs:
  stored are its terms, one for each ordered pair.
- Its losses average what is not 0 by default: here all, by MeanReducer.
- NTXent has for each matching pair the negatives of its query: with one match each, InfoNCE.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import (
    ContrastiveLoss,
    MultiSimilarityLoss,
    NTXentLoss,
    TripletMarginLoss,
)
from pytorch_metric_learning.miners import BatchHardMiner, MultiSimilarityMiner, TripletMarginMiner
from pytorch_metric_learning.reducers import DoNothingReducer, MeanReducer

HERE = Path(__file__).parent
CLASSES = [0] * 7 + [1] * 6 + [2] * 5 + [3] * 4 + [4, 5]
MARGIN = 0.3
TEMPERATURE = 0.2


def descriptors() -> torch.Tensor:
    """Clusters that overlap, so that miners find hard ones and easy ones."""
    draws = np.random.Generator(np.random.PCG64(0))
    centres = draws.normal(size=(6, 8))
    rows = centres[CLASSES] + 0.8 * draws.normal(size=(len(CLASSES), 8))
    return torch.from_numpy((rows / 4).astype(np.float32)).requires_grad_()


def main() -> None:
    rows, classes = descriptors(), torch.tensor(CLASSES)
    stored = {"rows": rows.detach().numpy(), "classes": classes.numpy()}
    stored |= {"margin": np.array(MARGIN), "temperature": np.array(TEMPERATURE)}

    def store(name: str, loss: torch.Tensor) -> None:
        """A loss and its gradient by the descriptors."""
        (gradient,) = torch.autograd.grad(loss, rows)
        stored[name] = loss.detach().numpy()
        stored[f"{name}_gradient"] = gradient.numpy()

    plain = LpDistance(normalize_embeddings=False)
    squared = LpDistance(normalize_embeddings=False, power=2)
    terms = ContrastiveLoss(neg_margin=1, distance=plain, reducer=DoNothingReducer())(rows, classes)
    for kind in ("pos", "neg"):
        term = terms[f"{kind}_loss"]
        stored[f"contrastive_{kind}"] = term["losses"].detach().numpy()
        stored[f"contrastive_{kind}_pairs"] = torch.stack(term["indices"]).numpy()
    for name, measure in (("triplet", plain), ("triplet_squared", squared)):
        margin_loss = TripletMarginLoss(MARGIN, distance=measure, reducer=MeanReducer())
        store(name, margin_loss(rows, classes))
    semi_hard = TripletMarginMiner(MARGIN, type_of_triplets="semihard", distance=plain)
    stored["semi_hard"] = torch.stack(semi_hard(rows, classes)).numpy()
    stored["batch_hard"] = torch.stack(BatchHardMiner(distance=plain)(rows, classes)).numpy()
    pairs = MultiSimilarityMiner()(rows, classes)
    store("multi_similarity", MultiSimilarityLoss()(rows, classes, pairs))
    # The first twelve as queries, the others as candidates, of which one matches each; labels that
    # are one object would leave out the diagonal.
    places, half = torch.arange(12), len(rows) // 2
    ntxent = NTXentLoss(TEMPERATURE)
    store("ntxent", ntxent(rows[:half], places, ref_emb=rows[half:], ref_labels=places.clone()))
    np.savez_compressed(HERE / "metric_learning.npz", **stored)
    for name, value in stored.items():
        print(name, value.shape, value if value.ndim == 0 else "")


if __name__ == "__main__":
    main()

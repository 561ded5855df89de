"""The base class of trunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from geomatch.nn.layers import SharedSettings


class TrunkNetwork(nn.Module):
    """A trunk: called as (images (b, h, w, 3), train), it returns a feature map.

    Attributes:
        shared: settings that all layers share.
        stage: the last stage to compute.
        stride_in, outputs: `stride_in` and `descriptor` of `ModelConfig`; not all trunks use them.
    """

    shared: SharedSettings
    stage: int
    stride_in: str
    outputs: int

    def run(
        self, stage: Callable[[Any, jax.Array], jax.Array], x: jax.Array, train: bool
    ) -> jax.Array:
        """`stage(self, x)`; with `train.remat`, training computes its activations again.

        After Chen et al. 2016 (arXiv 1604.06174).
        """
        return (nn.remat(stage) if train and self.shared.remat else stage)(self, x)

"""What all trunks are made from."""

from __future__ import annotations

import flax.linen as nn

from geomatch.nn.layers import Shared


class TrunkNetwork(nn.Module):
    """A trunk; called with images (b, h, w, 3) and whether it trains, it gives a feature map.

    Attributes:
        shared: what its layers have in common.
        stage: the last one to compute.
        stride_in, outputs: `stride_in` and `descriptor` of `ModelConfig`, for trunks that ask.
    """

    shared: Shared
    stage: int
    stride_in: str
    outputs: int

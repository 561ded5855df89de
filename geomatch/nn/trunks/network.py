"""The base class of trunks."""

from __future__ import annotations

import flax.linen as nn

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

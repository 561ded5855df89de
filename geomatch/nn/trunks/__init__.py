"""Convolutional trunks: images to a feature map. A new one is a module and an entry in `TRUNKS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from geomatch.nn.trunks.convnet import ConvNet
from geomatch.nn.trunks.efficientnet import EfficientNetLite
from geomatch.nn.trunks.network import TrunkNetwork
from geomatch.nn.trunks.resnet import BasicBlock, Bottleneck, ResNet
from geomatch.nn.trunks.vgg import VGG


@dataclass(frozen=True)
class Trunk:
    """A trunk and the settings with which its published weights were trained.

    Attributes:
        network: constructor, with the attributes of `TrunkNetwork` as arguments.
        stages: number of stages.
        preprocessing: a key of `encoder.PREPROCESSING`.
        epsilon: of BatchNorm.
    """

    network: Callable[..., TrunkNetwork]
    stages: int
    preprocessing: Literal["torch", "lite"] = "torch"
    epsilon: float = 1e-5


TRUNKS: dict[str, Trunk] = {
    "resnet10": Trunk(partial(ResNet, block=BasicBlock, blocks=(1, 1, 1, 1), width=24), 4),
    "resnet18": Trunk(partial(ResNet, block=BasicBlock, blocks=(2, 2, 2, 2)), 4),
    "resnet34": Trunk(partial(ResNet, block=BasicBlock, blocks=(3, 4, 6, 3)), 4),
    "resnet50": Trunk(partial(ResNet, block=Bottleneck, blocks=(3, 4, 6, 3)), 4),
    "resnet101": Trunk(partial(ResNet, block=Bottleneck, blocks=(3, 4, 23, 3)), 4),
    "vgg16": Trunk(VGG, 5),
    "efficientnet_lite0": Trunk(EfficientNetLite, 8, "lite", 1e-3),
    "convnet": Trunk(ConvNet, 5, "lite"),
}

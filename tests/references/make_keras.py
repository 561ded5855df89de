"""Make the references of Keras's networks: keras_NAME.npz and keras_file.* beside this.

    pip install '.[benchmark]'
    python tests/references/make_keras.py

An .npz holds what Keras writes, as a list of (path, attributes, shape, name) of the groups and
datasets in its `.h5` and `.weights.h5`, where name is what `seeded` makes a dataset of; and the map
(h, w, c) that the network gives of `pixels`. The keras_file.* are small files of both layouts.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
from seeded import pixels, seeded

HERE = Path(__file__).parent
LAYOUTS = (".h5", ".weights.h5")


def fill(model: keras.Model) -> dict[bytes, str]:
    """Give every variable its seeded values; their names, by those values."""
    names = {}
    for layer in model.layers:
        for variable in layer.weights:
            name = f"{layer.name}/{variable.name}"
            values = seeded(name, tuple(variable.shape))
            variable.assign(values)
            names[values.tobytes()] = name
    return names


def save(model: keras.Model, path: Path) -> None:
    """In the layout that the extension names."""
    if path.name.endswith(".weights.h5"):
        model.save_weights(path)
    else:
        model.save(path)


def layout(path: Path, names: dict[bytes, str]) -> list[list[Any]]:
    """Groups and datasets of a file."""
    items: list[list[Any]] = []

    def visit(place: str, item: h5py.Group | h5py.Dataset) -> None:
        attributes = {
            key: value.astype(str).tolist() if isinstance(value, np.ndarray) else value
            for key, value in item.attrs.items()
        }
        data = isinstance(item, h5py.Dataset)
        shape, name = (item.shape, names[item[()].tobytes()]) if data else (None, None)
        items.append([place, attributes, shape, name])

    with h5py.File(path) as file:
        file.visititems(visit)
    return items


def store(name: str, model: keras.Model, preprocess: Any) -> None:
    """Fill `model`, run it on the image, and write the reference."""
    names = fill(model)
    layouts = {}
    with tempfile.TemporaryDirectory() as folder:
        for extension in LAYOUTS:
            path = Path(folder, f"model{extension}")
            save(model, path)
            layouts[extension] = json.dumps(layout(path, names))
    features = model.predict(preprocess(pixels().astype(np.float32)), verbose=0)
    np.savez_compressed(HERE / f"keras_{name}.npz", **layouts, features=features[0])
    print(name, features.shape, np.abs(features).max(), features.std())


def store_files() -> None:
    """A convolution and a BatchNorm under the names that ResNet50 has for its first."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(2, 1, name="conv1_conv"),
            keras.layers.BatchNormalization(name="conv1_bn"),
        ]
    )
    model.compile("sgd", "mse")
    fill(model)
    for extension in LAYOUTS:
        save(model, HERE / f"keras_file{extension}")


if __name__ == "__main__":
    settings = {"weights": None, "include_top": False, "input_shape": (64, 96, 3)}
    applications = keras.applications
    store("resnet50", applications.ResNet50(**settings), applications.resnet.preprocess_input)
    store("vgg16", applications.VGG16(**settings), applications.vgg16.preprocess_input)
    store_files()

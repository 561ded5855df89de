"""Reads weight files to arrays by name: torch's `.pth`, `.safetensors`, Keras's `.h5`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from safetensors import SafetensorError, safe_open

from geomatch.errors import GeomatchError
from geomatch.nn.pretrained.torch_pickle import read_pickled


@dataclass(frozen=True)
class Tensors:
    """The arrays of a file by name.

    Keras's file layouts name variables differently; here they are LAYER/NUMBER, in the order in
    which Keras stores them.
    """

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str] = field(default_factory=dict)


def read_tensors(path: Path) -> Tensors:
    """All arrays of a file, whose format is recognised by content.

    Raises:
        GeomatchError: the file cannot be read, is damaged, or has an unknown format.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(9)
    except OSError as error:
        raise GeomatchError(f"{path} cannot be read: {error.strerror}") from error
    if start.startswith((b"PK", b"\x80")):
        return Tensors(read_pickled(path))
    if start.startswith(b"\x89HDF"):
        return _read_keras(path)
    if start.endswith(b"{"):
        return _read_safetensors(path)
    raise GeomatchError(
        f"{path} is not a weight file",
        "Known: .pth of torch.save, .safetensors, and .h5 of Keras.",
    )


def _read_safetensors(path: Path) -> Tensors:
    try:
        with safe_open(path, "numpy") as file:
            return Tensors(
                {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
                file.metadata() or {},
            )
    except (SafetensorError, TypeError, OSError) as error:
        raise GeomatchError(f"{path} is damaged: {error}") from error


def _read_keras(path: Path) -> Tensors:
    names: dict[str, str] = {}
    arrays: dict[str, np.ndarray] = {}
    size = path.stat().st_size

    def visit(path_in_file: str, item: h5py.Group | h5py.Dataset) -> None:
        layer = path_in_file.removesuffix("/vars").rpartition("/")[2]
        if isinstance(item, h5py.Dataset):
            name = names.get(path_in_file, path_in_file)
            if name in arrays:
                raise ValueError(f"two variables are named {name}")
            if item.nbytes > size:
                raise ValueError(f"{name} is larger than the file")
            arrays[name] = item[()]
        elif "weight_names" in item.attrs:
            for number, weight in enumerate(item.attrs["weight_names"]):
                names[f"{path_in_file}/{_text(weight)}"] = f"{layer}/{number}"
        elif path_in_file.endswith("/vars") and not path_in_file.startswith("optimizer"):
            # Keras 3 stores a layer under its class; newer releases also store its name.
            layer = _text(item.attrs.get("name", layer))
            names.update({f"{path_in_file}/{number}": f"{layer}/{number}" for number in item})

    try:
        with h5py.File(path) as file:
            file.visititems(visit)
    # h5py raises any of these for a truncated or altered file.
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise GeomatchError(f"{path} is damaged: {error}") from error
    return Tensors(arrays)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value

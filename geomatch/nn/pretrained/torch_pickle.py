"""Reads the tensors of `torch.save` files without torch.

A pickle can run code. This unpickler calls only what makes tensors and dictionaries.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from geomatch.errors import GeomatchError

DTYPES = {
    "BFloat16Storage": jnp.bfloat16,
    "BoolStorage": np.bool_,
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
    "ShortStorage": np.int16,
}
OPCODES = {opcode.code for opcode in pickletools.opcodes if opcode.proto < 5}
WRAPPERS = ("state_dict", "model")
HINT = "Store only the tensors: torch.save(model.state_dict(), FILE), or .safetensors."


def read_pickled(path: Path) -> dict[str, np.ndarray]:
    """The state dict of a `.pth` file, or the one under "state_dict" or "model" in it.

    Reads both of torch's formats: a zip archive, and the one before torch 1.6.

    Returns:
        Arrays by name, with the file's dtypes; read-only.

    Raises:
        GeomatchError: the file is damaged, needs more than tensors, or has no state dict.
    """
    try:
        with path.open("rb") as stream:
            archived = stream.read(2) == b"PK"
        saved, storages = (_zipped if archived else _sequential)(path)
        for key in WRAPPERS:
            if isinstance(saved, dict) and isinstance(saved.get(key), dict):
                saved = saved[key]
        if not isinstance(saved, dict):
            raise GeomatchError(f"{path} has no state dict", HINT)
        for name, value in saved.items():
            if not isinstance(name, str):
                raise GeomatchError(f"{path} has no state dict", HINT)
            if not isinstance(value, _Tensor):
                raise GeomatchError(f"{path}: {name} is not a tensor", HINT)
        return {name: value.array(storages) for name, value in saved.items()}
    except GeomatchError:
        raise
    except Exception as error:  # A damaged pickle may raise anything.
        raise GeomatchError(f"{path} is damaged: {str(error) or type(error).__name__}") from error


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype[Any]
    count: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, storages: Mapping[str, bytes]) -> np.ndarray:
        """A view of the storage's bytes."""
        values = np.frombuffer(storages[self.storage.key], self.storage.dtype)
        count = math.prod(self.shape)
        last = self.offset + sum(
            (n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)
        )
        # Strides of 0 would repeat a storage's elements without limit.
        if count > len(values) or (count and last >= len(values)):
            raise ValueError("a tensor is larger than its storage")
        if min((self.offset, *self.shape, *self.strides)) < 0:
            raise ValueError("a tensor has a negative size")
        return np.lib.stride_tricks.as_strided(
            values[self.offset :],
            self.shape,
            [stride * values.itemsize for stride in self.strides],
            writeable=False,
        )


# The unpickler in Python, without protocol 5: the C one, and that protocol's bytearrays, allocate
# whatever size a damaged file states.
class _Unpickler(pickle._Unpickler):
    """Resolves names to inert stand-ins, and refuses those that tensors do not need."""

    dispatch: ClassVar = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if chr(code) in OPCODES
    }

    def __init__(self, stream: io.BytesIO, path: Path) -> None:
        super().__init__(stream)
        self.path = path
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> str | type | Callable[..., Any]:
        # New objects each time, since a pickle can set attributes on what it is given.
        allowed: dict[str, type | Callable[..., Any]] = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": lambda *saved: _Tensor(*saved[:4]),
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        }
        if module == "torch" and name in DTYPES:
            return name
        if f"{module}.{name}" not in allowed:
            raise GeomatchError(
                f"{self.path} needs {module}.{name}, which would run code: refused", HINT
            )
        return allowed[f"{module}.{name}"]

    def persistent_load(self, saved: Any) -> _Storage:
        _, kind, key, _, count, *view = saved
        if view not in ([], [None]):
            raise GeomatchError(f"{self.path} was written by a torch version too old to read", HINT)
        return self.storages.setdefault(key, _Storage(key, np.dtype(DTYPES[kind]), count))


def _zipped(path: Path) -> tuple[Any, dict[str, bytes]]:
    """The object saved in an archive, and the bytes of its storages by key."""
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise GeomatchError(f"{path} is an archive, but not of torch.save", HINT)
        # torch does not compress, so entries larger than the file are not tensors.
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ValueError("its entries are larger than the file")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist():
            _check_order(path, archive.read(f"{folder}byteorder") == b"little")
        unpickler = _Unpickler(io.BytesIO(archive.read(pickles[0])), path)
        saved = unpickler.load()
        return saved, {key: archive.read(f"{folder}data/{key}") for key in unpickler.storages}


def _sequential(path: Path) -> tuple[Any, dict[str, bytes]]:
    """The same for a file from before torch 1.6: pickles, then the storages one after another."""
    # In memory, since reading from a file allocates whatever length a damaged pickle states.
    stream = io.BytesIO(path.read_bytes())
    _magic, _version, system = (_Unpickler(stream, path).load() for _ in range(3))
    _check_order(path, system["little_endian"])
    unpickler = _Unpickler(stream, path)
    saved = unpickler.load()
    storages = {}
    for key in _Unpickler(stream, path).load():
        (count,) = struct.unpack("<q", stream.read(8))
        expected = unpickler.storages[key]
        if count != expected.count:
            raise ValueError("a storage and its tensors differ in size")
        storages[key] = stream.read(count * expected.dtype.itemsize)
    return saved, storages


def _check_order(path: Path, little: bool) -> None:
    if not little:
        raise GeomatchError(f"{path} was written by a big-endian machine", HINT)

"""Import weights: a trunk that was trained elsewhere, converted for `train.init`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from geomatch.errors import GeomatchError
from geomatch.nn.pretrained.conversion import read_weights, write_weights
from geomatch.project import Project, replacing


@dataclass(frozen=True)
class Imported:
    """The result of `import_weights`.

    Attributes:
        path: of the converted weights, relative to the project.
        family: library whose names the file uses.
        preprocessing: how the weights expect colours to be normalised.
        tensors: number of tensors.
        left_out: names in the file that are not part of the trunk, such as a classifier's.
    """

    path: Path
    family: str
    preprocessing: str
    tensors: int
    left_out: tuple[str, ...]


def import_weights(project: Project, file: Path, trunk: str) -> Imported:
    """Convert weights from torchvision, timm, Keras or geomatch, and keep them in the project.

    Raises:
        GeomatchError: the file cannot be read or does not fit the trunk; the error says where.
    """
    if not file.is_file():
        raise GeomatchError(f"there is no file {file}", "Name a .pth, .safetensors or .h5 file.")
    weights = read_weights(file, trunk)
    path = project.weights / f"{file.name.split('.')[0]}.safetensors"
    with replacing(path) as temporary:
        write_weights(temporary, weights)
    modules = [*weights.params.values(), *weights.batch_stats.values()]
    return Imported(
        path.relative_to(project.root),
        weights.family,
        weights.preprocessing,
        sum(_leaves(module) for module in modules),
        weights.left_out,
    )


def _leaves(tree: object) -> int:
    return sum(map(_leaves, tree.values())) if isinstance(tree, dict) else 1

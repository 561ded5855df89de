"""Export: a trained encoder as files for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from geomatch import __version__, config
from geomatch.data.eval_report import Report
from geomatch.errors import UsageError
from geomatch.nn import backend, param_groups
from geomatch.nn.checkpoint import Checkpoints
from geomatch.nn.encoder import with_dtype
from geomatch.nn.onnx_export import to_onnx
from geomatch.project import Project, replacing, write_json
from geomatch.runs import Encoding, load_encoder, read_run


@dataclass(frozen=True)
class Exported:
    """The files that were written, the name of the checkpoint, and `Encoding.remark`."""

    name: str
    files: tuple[Path, ...]
    remark: str


def export(
    project: Project,
    *,
    run: str | None = None,
    model: Path | None = None,
    onnx: Path | None = None,
    safetensors: Path | None = None,
) -> Exported:
    """Write a trained encoder as ONNX, as safetensors with a model card, or as both.

    Args:
        run, model: as for `embed`.
        onnx: file for a graph that preprocesses uint8 tiles (n, h, w, c) and gives descriptors
            (n, d).
        safetensors: file for all weights, named by their paths; the card is a JSON file beside it.

    Raises:
        UsageError: no file is named.
        GeomatchError: there is no such checkpoint, or onnx is not installed.
    """
    if onnx is None and safetensors is None:
        raise UsageError("no file to write", "Add --onnx FILE or --safetensors FILE.")
    backend.prepare()
    encoding = load_encoder(project, run, model)
    files = []
    if onnx is not None:
        form = encoding.form
        forward = partial(with_dtype(encoding.model, "float32").apply, encoding.variables)
        graph = to_onnx(forward, (form.size, form.size, form.channels))
        with replacing(onnx) as temporary:
            temporary.write_bytes(graph)
        files.append(onnx)
    if safetensors is not None:
        leaves = jax.tree_util.tree_leaves_with_path(encoding.variables)
        tensors = {".".join(param_groups.path_of(keys)): np.asarray(leaf) for keys, leaf in leaves}
        with replacing(safetensors) as temporary:
            save_file(tensors, temporary, {"geomatch": __version__, "name": encoding.name})
        card = safetensors.with_suffix(".json")
        write_json(card, _card(project, encoding))
        files += [safetensors, card]
    return Exported(encoding.name, tuple(files), encoding.remark)


def _card(project: Project, encoding: Encoding) -> dict[str, Any]:
    """What users of the weights need to know, and how good they are."""
    _, _, manifest = read_run(encoding.folder)
    form, model = encoding.form, encoding.settings.model
    with Checkpoints(encoding.folder / "checkpoints", read_only=True) as checkpoints:
        validation = checkpoints.metric(encoding.step)
    report = project.reports / encoding.name / "report.json"
    test = Report.load(report).splits["test"].as_json() if report.exists() else None
    return {
        "geomatch": __version__,
        "name": encoding.name,
        "fingerprint": encoding.fingerprint,
        "model": config.as_dict(model),
        "dimension": encoding.dimension,
        "input": {
            "size": form.size,
            "image_channels": form.image_channels,
            "label_channels": form.label_channels,
            "gsd": encoding.gsd,
            "dtype": "uint8",
        },
        "trained_on": manifest.tiles,
        "validation": {"map@5": validation},
        "test": test,
    }

"""Commands for files of weights: weights import, export model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geomatch import config
from geomatch.cli.options import HERE, Checkpoint, ProjectFolder, Settings, open_project


def import_weights(
    file: Annotated[Path, typer.Argument(help="A .pth, .safetensors or .h5 file.")],
    trunk: Annotated[config.Trunk, typer.Option(help="The trunk that the weights belong to.")],
    project: ProjectFolder = HERE,
    settings: Settings = None,
) -> None:
    """Convert a trunk from torchvision, timm or Keras for train.init."""
    from geomatch.cli import console

    opened, _ = open_project(project, settings)
    from geomatch.import_weights import import_weights as stage

    made = stage(opened, file, trunk)
    left = f"; left out: {', '.join(made.left_out)}" if made.left_out else ""
    console.note(
        f"{made.tensors} tensors in the names of {made.family}, preprocessing "
        f"{made.preprocessing!r}{left}"
    )
    console.note(
        f"Next: geomatch train --set model.trunk={trunk} --set train.init={made.path.as_posix()}"
    )


def export_model(
    project: ProjectFolder = HERE,
    run: Checkpoint = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a run or of another project, instead of --run.",
            exists=True,
            metavar="PATH",
        ),
    ] = None,
    onnx: Annotated[
        Path | None, typer.Option(help="Write the encoder as ONNX.", metavar="FILE")
    ] = None,
    safetensors: Annotated[
        Path | None,
        typer.Option(help="Write all weights, and a model card beside them.", metavar="FILE"),
    ] = None,
    settings: Settings = None,
) -> None:
    """Write a trained encoder as ONNX or safetensors."""
    from geomatch.cli import console

    opened, _ = open_project(project, settings)
    from geomatch.export import export as stage

    made = stage(opened, run=run, model=model, onnx=onnx, safetensors=safetensors)
    if made.remark:
        console.note(made.remark)
    console.note(f"{made.name}: {', '.join(map(str, made.files))}")

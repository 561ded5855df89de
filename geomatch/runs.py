"""Trained runs, as the stages after training use them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from geomatch import config
from geomatch.errors import GeomatchError, UsageError
from geomatch.manifests import RunManifest, TileManifest
from geomatch.nn.checkpoint import Checkpoints
from geomatch.nn.encoder import Siamese, TileForm, build
from geomatch.nn.step import abstract_state
from geomatch.project import Project, fingerprint, latest, read_record


@dataclass(frozen=True)
class Encoding:
    """An encoder with the weights of one checkpoint.

    Attributes:
        name: "RUN@STEP", or "PROJECT-RUN@STEP" for a run of another project.
        run_id: see `RunManifest.id`.
        dimension: of the descriptors.
        fingerprint: of the weights, the model settings and the tile form.
        gsd: metres per pixel of the tiles it was trained on; None without georeference.
        label_classes: names of the classes of their labels; None if these have none.
        remark: which better checkpoints are damaged, for the user; empty if none is.
    """

    name: str
    run_id: str
    folder: Path
    step: int
    settings: config.Config
    form: TileForm
    gsd: float | None
    label_classes: tuple[str, ...] | None
    model: Siamese
    variables: dict[str, Any]
    dimension: int
    fingerprint: str
    remark: str = ""

    def check_tiles(self, tiles: TileManifest) -> None:
        """Check that tiles have the size, channels, gsd and label classes of those trained on.

        Raises:
            GeomatchError: one of them differs.
        """
        trained_on = self.form.size, self.form.image_channels, self.form.label_channels, self.gsd
        found = tiles.size, tiles.channels.image, tiles.channels.label, tiles.gsd
        texts = ("{} px", "{} image channels", "{} label channels", "{} m per pixel")
        for need, have, text in zip(trained_on, found, texts, strict=True):
            if need != have:
                needed, got = (
                    "no georeference" if value is None else text.format(value)
                    for value in (need, have)
                )
                raise GeomatchError(
                    f"the tiles have {got}, but {self.name} was trained on {needed}",
                    "Cut such tiles, or train a run on these: geomatch train --run NEW",
                )
        classes = None if tiles.label_classes is None else tuple(tiles.label_classes)
        if classes != self.label_classes:
            here, there = (", ".join(c) if c else "none" for c in (classes, self.label_classes))
            raise GeomatchError(
                f"the labels of the tiles have the classes {here}, but {self.name} was trained on "
                f"{there}",
                "Name the same classes in the same order, or train a run on these tiles: "
                "geomatch train --run NEW",
            )


def read_run(folder: Path) -> tuple[config.Config, TileForm, RunManifest]:
    """Configuration, tile form and manifest in the folder of a run."""
    path = folder / "config.json"
    manifest = read_record(path, RunManifest, "geomatch train --run NEW")
    return config.from_dict(manifest.settings, str(path)), TileForm(**manifest.form), manifest


def load_encoder(
    project: Project,
    run: str | None,
    model: Path | None,
    step: int | None = None,
) -> Encoding:
    """Load the encoder of a run from its best checkpoint, or from the given one.

    If the best one is damaged, it is the newest that is not.

    Args:
        run: "NAME" or "NAME@STEP"; by default the latest run.
        model: folder of a run, or of a project for its latest run, instead of `run`.
        step: of the checkpoint, instead of "@STEP".

    Raises:
        GeomatchError: there is no such run or checkpoint.
        UsageError: `run` and `model` are both given.
    """
    if model is not None:
        if run is not None:
            raise UsageError("--run and --model cannot be combined")
        folder = _run_folder(model)
        name, at = folder.name, ""
        if not folder.absolute().is_relative_to(project.root.absolute()):
            name = f"{folder.parent.parent.absolute().name}-{name}"
    else:
        name, _, at = (run or "").partition("@")
        name = latest(project.run_names(), name or None, "run", "geomatch train")
        folder = project.run(name)
    settings, form, manifest = read_run(folder)
    network = build(settings, form)
    shapes = abstract_state(network, settings, form)
    if not (folder / "checkpoints").exists():
        raise GeomatchError(f"run {name} has no checkpoint yet", "Run: geomatch train")
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        chosen, remark = _step(at if step is None else str(step), checkpoints, name), ""
        if chosen is None:
            chosen, variables, remark = checkpoints.restore_best(shapes)
        else:
            variables = checkpoints.restore_model(chosen, shapes)
    tile = jax.ShapeDtypeStruct((1, form.size, form.size, form.channels), np.uint8)
    output = jax.eval_shape(network.apply, variables, tile)
    leaves = [fingerprint(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(variables)]
    return Encoding(
        name=f"{name}@{chosen}",
        run_id=manifest.id,
        folder=folder,
        step=chosen,
        settings=settings,
        form=form,
        gsd=manifest.gsd,
        label_classes=manifest.label_classes,
        model=network,
        variables=variables,
        dimension=output.shape[1],
        fingerprint=fingerprint([leaves, manifest.settings["model"], manifest.form]),
        remark=remark,
    )


def _run_folder(model: Path) -> Path:
    if (model / "config.json").is_file():
        return model
    if (model / "geomatch.toml").is_file():
        other = Project(model)
        return other.run(latest(other.run_names(), None, f"run in {model}", "geomatch train"))
    raise GeomatchError(
        f"{model} is neither the folder of a run nor a project",
        "Give PROJECT/runs/NAME, PROJECT for its latest run, or imagenet.",
    )


def _step(text: str, checkpoints: Checkpoints, run: str) -> int | None:
    """Parse the step of a checkpoint; "" is None, which stands for the best one.

    Raises:
        GeomatchError: the run has no such checkpoint, or none at all.
    """
    if checkpoints.best is None:
        raise GeomatchError(f"run {run} has no checkpoint yet", "Run: geomatch train")
    if not text:
        return None
    if not text.isdigit() or int(text) not in checkpoints.steps:
        raise GeomatchError(
            f"run {run} has no checkpoint {text}",
            f"Available: {', '.join(map(str, checkpoints.steps))}.",
        )
    return int(text)

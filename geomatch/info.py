"""Info: the artefacts of a project, which of them are stale, and the command to run next."""

from __future__ import annotations

import contextlib
from typing import Any

import jax

from geomatch import config
from geomatch.data import embeddings
from geomatch.errors import StaleError
from geomatch.manage_runs import checkpoint_state
from geomatch.manifests import TileManifest
from geomatch.project import Project
from geomatch.runs import read_run


def info(project: Project) -> dict[str, Any]:
    """Artefacts of a project as JSON-ready values; "next" is the command to run next."""
    found: dict[str, Any] = {
        "project": str(project.root.absolute()),
        "tiles": None,
        "runs": [],
        "embeddings": [],
        "indexes": [],
        "reports": sorted(str(p) for p in project.reports.glob("*/report.json")),
        "next": "geomatch tile YEAR=PATH YEAR=PATH",
        "devices": [str(device) for device in jax.devices()],
    }
    if (project.root / "tiles.partial").exists():
        found["next"] = "geomatch tile"
        found["unfinished"] = "tiles"
    if not project.tiles_manifest.exists():
        return found
    tiles = project.tile_manifest()
    keys = ("grid", "channels", "placement", "years", "tiles", "splits", "fingerprint", "classes")
    values = tiles.as_json()
    found["tiles"] = {key: values[key] for key in keys}
    found["tiles"] |= {key: values.get(key) for key in ("label_classes", "broken")}
    found["runs"] = [_run(project, name, tiles) for name in project.run_names()]
    found["embeddings"] = [_embeddings(project, name) for name in project.embedding_names()]
    found["indexes"] = [_index(project, name) for name in project.index_names()]
    found["next"] = _next(found)
    return found


def _embeddings(project: Project, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "dimension": None, "fingerprint": None, "stale": True}
    with contextlib.suppress(StaleError):
        manifest = embeddings.read_manifest(project.embeddings / f"{name}.parquet")
        found |= {"dimension": manifest.dimension, "fingerprint": manifest.fingerprint}
        project.check_fresh(manifest)
        found["stale"] = False
    return found


def _index(project: Project, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "tiles": None, "stale": True}
    with contextlib.suppress(StaleError):
        manifest = project.index_manifest(name)
        found["tiles"] = sum(manifest.counts)
        project.check_fresh(manifest)
        embeddings.check_index(manifest, project.embeddings / f"{name}.parquet")
        found["stale"] = False
    return found


def _run(project: Project, name: str, tiles: TileManifest) -> dict[str, Any]:
    settings, _, manifest = read_run(project.run(name))
    last, best, map5 = checkpoint_state(project.run(name))
    return {
        "name": name,
        "trunk": settings.model.trunk,
        "head": settings.model.head,
        "epochs": settings.train.epochs,
        "last": last,
        "best": best,
        "map@5": map5,
        "finished": (project.run(name) / "finished.json").exists(),
        "other_tiles": manifest.tiles != tiles.fingerprint,
        "settings": config.as_dict(settings),
    }


def _next(found: dict[str, Any]) -> str:
    """The command of the first stage of the pipeline whose artefact is missing or stale."""
    if found.get("unfinished"):
        return "geomatch tile"
    if not found["runs"] or not found["runs"][-1]["finished"]:
        return "geomatch train"
    run = found["runs"][-1]
    name = f"{run['name']}@{run['best']}"
    for what, command in (("embeddings", "geomatch embed"), ("indexes", "geomatch index")):
        if not any(e["name"] == name and not e["stale"] for e in found[what]):
            return command
    return "geomatch query TARGET --top 5, or geomatch eval"

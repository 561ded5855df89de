"""Info: what a project holds, from what, what is stale and what to run next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from geomatch import config
from geomatch.data import embeddings
from geomatch.errors import StaleError
from geomatch.nn.checkpoint import Checkpoints
from geomatch.project import Project, read_manifest
from geomatch.runs import read_run


def info(project: Project) -> dict[str, Any]:
    """All artefacts of a project as JSON-ready values; "next" is the command to run next."""
    found: dict[str, Any] = {
        "project": str(project.root.absolute()),
        "tiles": None,
        "runs": [],
        "embeddings": [],
        "indexes": [],
        "reports": sorted(str(p) for p in project.reports.glob("*/report.json")),
        "next": "geomatch tile YEAR=PATH YEAR=PATH",
    }
    if (project.root / "tiles.partial").exists():
        found["next"] = "geomatch tile"
        found["unfinished"] = "tiles"
    if not project.tiles_manifest.exists():
        return found
    facts = project.tile_facts()
    found["tiles"] = {
        key: facts[key]
        for key in ("grid", "channels", "placement", "years", "tiles", "splits", "fingerprint")
    }
    found["tiles"]["classes"] = facts.get("classes", 0)  # older tiles do not say
    found["runs"] = [_run(project, name, facts) for name in project.run_names()]
    for name in project.embedding_names():
        about = embeddings.read_facts(project.embeddings / f"{name}.parquet")
        found["embeddings"].append(
            {
                "name": name,
                "dimension": about["dimension"],
                "fingerprint": about["fingerprint"],
                "stale": _is_stale(project, about),
            }
        )
    for name in project.index_names():
        about = read_manifest(project.indexes / name / "manifest.json", "geomatch index")
        source = project.embeddings / f"{name}.parquet"
        found["indexes"].append(
            {
                "name": name,
                "tiles": sum(about["counts"]),
                "stale": _is_stale(project, about, source),
            }
        )
    found["next"] = _next(found)
    return found


def _is_stale(project: Project, about: dict[str, Any], source: Path | None = None) -> bool:
    """Whether what is `about` is outdated; `source` are the embeddings of an index."""
    try:
        project.check_fresh(about)
        if source is not None:
            embeddings.check_index(about, source)
    except StaleError:
        return True
    return False


def _run(project: Project, name: str, facts: dict[str, Any]) -> dict[str, Any]:
    settings, _, manifest = read_run(project.run(name))
    folder = project.run(name) / "checkpoints"
    about: dict[str, Any] = {
        "name": name,
        "trunk": settings.model.trunk,
        "head": settings.model.head,
        "epochs": settings.train.epochs,
        "last": None,
        "best": None,
        "map@5": None,
        "finished": (project.run(name) / "finished.json").exists(),
        "other_tiles": manifest["tiles"] != facts["fingerprint"],
        "settings": config.as_dict(settings),
    }
    if folder.exists():
        with Checkpoints(folder, read_only=True) as checkpoints:
            best = checkpoints.best
            about |= {"last": checkpoints.last, "best": best}
            about["map@5"] = None if best is None else checkpoints.metric(best)
    return about


def _next(found: dict[str, Any]) -> str:
    """The first stage, in the pipeline's order, whose artefact is missing or stale."""
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

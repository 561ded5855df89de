"""Who may import whom: the table of the design, kept by reading the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import geomatch

PACKAGE = Path(geomatch.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
STAGES = {"tile", "train", "embed", "index", "query", "evaluate", "compare"}
HEAVY = {"jax", "numpy", "rasterio", "sklearn", "faiss", "orbax", "pyarrow", "tensorstore"}


def name_of(path: Path) -> str:
    """ "geo.grid" for geomatch/geo/grid.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path, *, top: bool = False) -> set[str]:
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


def at_top(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes outside functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from at_top(child)


def outside(path: Path, *, top: bool = False) -> set[str]:
    """Packages from elsewhere, without the standard library's."""
    roots = {name.split(".")[0] for name in imports(path, top=top)}
    return roots - sys.stdlib_module_names - {"geomatch"}


def inside(path: Path, *, top: bool = False) -> set[str]:
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


def of(*prefixes: str) -> list[Path]:
    """The modules of these names or within packages of these names; there must be some."""
    found = [m for m in MODULES for p in prefixes if (name_of(m) + ".").startswith(p + ".")]
    assert found, prefixes
    return found


def check(paths: list[Path], never_outside: set[str], never_inside: set[str]) -> None:
    for path in paths:
        wrong = outside(path) & never_outside
        wrong |= {name for name in inside(path) if {name, name.split(".")[0]} & never_inside}
        assert not wrong, f"{name_of(path)} imports {', '.join(sorted(wrong))}"


def test_the_reading_of_imports_sees_them() -> None:
    """Else the tests below could not fail."""
    tile = PACKAGE / "tile.py"
    assert "numpy" in outside(tile)
    assert {"project", "config", "geo.rasters", "data.store"} <= inside(tile)
    assert "tile" in inside(PACKAGE / "cli.py")
    assert "tile" not in inside(PACKAGE / "cli.py", top=True)


def test_listing_the_package_shows_the_pipeline() -> None:
    assert {name_of(module) for module in MODULES} >= STAGES


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_stage_is_one_module_with_a_function_of_its_name(stage: str) -> None:
    tree = ast.parse((PACKAGE / f"{stage}.py").read_text(encoding="utf-8"))
    assert stage in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_light_modules_need_the_standard_library_only() -> None:
    for path in of("config", "errors", "project", "progress", "__init__"):
        assert not outside(path), name_of(path)
    check(of("config", "errors", "progress"), set(), {"project", "geo", "data", "nn", "search"})
    check(of("project"), set(), {"config", "geo", "data", "nn", "search", "report"} | STAGES)


def test_the_command_line_imports_stages_inside_commands() -> None:
    path = PACKAGE / "cli.py"
    assert outside(path, top=True) == {"typer"}
    assert inside(path, top=True) <= {"__init__", "config", "errors", "console", "project"}
    assert inside(path) >= STAGES


def test_stages_import_no_other_stage_nor_a_terminal() -> None:
    """`demo` alone runs them all; `runs` and `info` are not stages but keep the rule."""
    for stage in [*STAGES, "runs", "info"]:
        check(
            of(stage), {"typer", "rich", "click"}, (STAGES | {"cli", "console", "demo"}) - {stage}
        )


def test_only_the_command_line_knows_the_terminal() -> None:
    users = {name_of(path) for path in MODULES if outside(path) & {"rich", "typer", "click"}}
    assert users <= {"cli", "console"}
    assert not {name_of(p) for p in MODULES if "console" in inside(p)} - {"cli", "tables"}
    assert not {name_of(p) for p in MODULES if "tables" in inside(p)} - {"cli"}


def test_nn_knows_no_ground_no_files() -> None:
    check(of("nn"), {"rasterio", "pyarrow", "tensorstore"}, {"geo", "data", "project", "search"})
    check(of("nn"), set(), STAGES | {"runs", "report"})
    assert {name_of(p) for p in MODULES if "orbax" in outside(p)} <= {"nn.checkpoint"}


def test_data_knows_no_network_no_rasters() -> None:
    """Of `geo`, only the grid's arithmetic."""
    for path in of("data"):
        assert not outside(path) & {"jax", "flax", "rasterio", "faiss", "sklearn"}, name_of(path)
        within = {name for name in inside(path) if name.split(".")[0] == "geo"}
        assert within <= {"geo.grid"}, name_of(path)
        assert not {"nn", "search", "project"} & {n.split(".")[0] for n in inside(path)}


def test_geo_knows_no_network() -> None:
    """Of `data`, `geo.sources` asks for the order of years only."""
    check(of("geo"), {"jax", "flax", "faiss", "tensorstore"}, {"nn", "search", "project"} | STAGES)
    assert outside(PACKAGE / "geo" / "grid.py") == {"numpy"}
    users = {name_of(path): inside(path) & {"data.tiles"} for path in of("geo")}
    assert {name for name, used in users.items() if used} <= {"geo.sources"}
    for path in of("geo"):
        assert {n for n in inside(path) if n.startswith("data")} <= {"data.tiles"}


def test_only_geo_reads_rasters() -> None:
    users = {name_of(path) for path in MODULES if "rasterio" in outside(path)}
    assert users
    assert all(name.startswith("geo.") for name in users), users


def test_search_knows_no_network() -> None:
    """Metrics come from arrays alone; only the protocol joins them to tiles."""
    check(of("search"), {"jax", "flax", "rasterio"}, {"geo", "nn", "project", "report"} | STAGES)
    for path in of("search"):
        if name_of(path) != "search.protocol":
            assert not {n for n in inside(path) if n.startswith("data")}, name_of(path)
    assert outside(PACKAGE / "search" / "metrics.py") <= {"numpy"}


def test_report_draws_what_it_is_given() -> None:
    check(of("report"), {"jax", "rasterio", "tensorstore"}, {"nn", "geo", "search"} | STAGES)


def test_no_drawer_for_odds_and_ends() -> None:
    names = {part for module in MODULES for part in name_of(module).split(".")}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (("config", "project", "errors", "progress", "cli"), HEAVY),
        (("data.tiles", "data.store", "data.pairs", "data.embeddings"), {"jax", "rasterio"}),
        (("data.batches", "data.mining"), {"jax", "rasterio"}),
        (("search.exact", "search.metrics", "search.flat", "search.protocol"), {"jax", "rasterio"}),
        (("geo.grid",), HEAVY - {"numpy"}),
        (("tile",), {"jax", "flax", "faiss", "sklearn"}),
    ],
)
def test_what_a_module_brings_along(modules: tuple[str, ...], absent: set[str]) -> None:
    """In a fresh interpreter, through whatever it imports in turn."""
    lines = [f"import geomatch.{name}" for name in modules]
    code = "\n".join(["import sys", *lines, f"print(sorted({absent!r} & set(sys.modules)))"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

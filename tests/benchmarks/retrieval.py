"""How well places are found: training recipes, and no training, on the real sets.

    python tests/benchmarks/retrieval.py --data DIR [--sets levir ...] [--recipes pretrained ...]
        [--seeds 0 1 2] [--folder DIR]

Each row is made by the command line: a project for each set, a run for each recipe and seed, then
`embed` and `eval`. What is in the folder already is not made again, so an interrupted benchmark
goes on. The table has mAP@5 with its 95 % interval, and recall, over both directions in time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import geopandas
import shapely

SPLIT_LEVIR = (
    "--split=source",
    *(f"--validation={glob}" for glob in ("scene_029*", "scene_03[0-4]*")),
    *(f"--test={glob}" for glob in ("scene_03[5-9]*", "scene_040*")),
)
RASTERS = "*.[tj][ip][fg]"


@dataclass(frozen=True)
class ImageSet:
    """A set of imagery.

    Attributes:
        tile: the arguments of `geomatch tile`; `{data}` and `{folder}` are the folders of the sets
            and of files made by `prepare`.
        split: the split that is reported.
        years: of the answers that are reported; empty for all.
        prepare: makes files from (data, folder).
    """

    tile: tuple[str, ...]
    split: str = "test"
    years: tuple[str, ...] = ()
    prepare: Callable[[Path, Path], None] = field(default=lambda data, folder: None)


def naip_regions(data: Path, folder: Path) -> None:
    """The west is for training, the east for the test, a strip between for validation."""
    del data
    left, bottom, right, top = 485_900, 5_205_600, 490_600, 5_209_300
    bounds = {"validation": (left + 2000, left + 2600), "test": (left + 2600, right)}
    for split, (west, east) in bounds.items():
        area = geopandas.GeoSeries([shapely.box(west, bottom, east, top)], crs="EPSG:26914")
        area.to_file(folder / f"{split}.gpkg")


def oscd_years(data: Path, folder: Path) -> None:
    """Links to the earlier and to the later image of each city."""
    for city in sorted((data / "oscd").iterdir()):
        for year, image in zip(("before", "after"), sorted(city.glob("*.jp2")), strict=False):
            (folder / year).mkdir(exist_ok=True)
            (folder / year / image.name).symlink_to(image)


LEVIR = ("before={data}/levir/before", "after={data}/levir/after", "--fictitious")
CHANGED = "after:changed={data}/levir/changed_buildings"
SETS = {
    "levir": ImageSet((*LEVIR, CHANGED, "--size=128", "--gsd=0.5", *SPLIT_LEVIR)),
    "levir-256": ImageSet((*LEVIR, CHANGED, "--size=256", "--gsd=0.5", *SPLIT_LEVIR)),
    # Ten times the ground for training, of the same kind, at twice the pixel size.
    "levir-more": ImageSet(
        (
            *(f"{year}={{data}}/levir*/{year}/{RASTERS}" for year in ("before", "after")),
            *(CHANGED, "--fictitious", "--size=128", "--gsd=0.5", *SPLIT_LEVIR),
            "--validation=validation_*",
        )
    ),
    "levir_1m": ImageSet(
        (
            *(f"{year}={{data}}/levir_1m/{year}" for year in ("before", "after")),
            *("--fictitious", "--size=64", "--gsd=1", "--split=source"),
            "--validation=validation_*",
        ),
        split="validation",
    ),
    "sztaki": ImageSet(
        (
            *("date1={data}/sztaki/date1", "date2={data}/sztaki/date2", "--fictitious"),
            *("date2:changed={data}/sztaki/changed", "--size=128", "--split=source"),
            *("--validation=szada_[67]*", "--test=tiszadob*"),
        )
    ),
    "naip": ImageSet(
        (
            *("{data}/naip", r"--year-from=_(\d{4})\d{4}\.", "--bands=1,2,3", "--size=32"),
            *("--split=file", "--validation={folder}/validation.gpkg", "--test={folder}/test.gpkg"),
            'split.years=["2009", "2010", "2012", "2014", "2015", "2016", "2017"]',
        ),
        years=("2018", "2019", "2020"),
        prepare=naip_regions,
    ),
    "oscd": ImageSet(
        (
            *("before={folder}/before", "after={folder}/after", "--size=32", "--gsd=10"),
            *("--crs=utm", "--stretch=2%,98%", "--split=source"),
            *("--validation=mumbai*", "--validation=nantes*"),
            *(f"--test={city}*" for city in ("paris", "pisa", "rennes", "saclay_e")),
        ),
        prepare=oscd_years,
    ),
    "joplin": ImageSet(("pre={data}/joplin/pre", "post={data}/joplin/post", "--size=128")),
}


@dataclass(frozen=True)
class Recipe:
    """A way to descriptors.

    Attributes:
        preset: of `geomatch init`; None for its default.
        settings: `--set` arguments of `train`.
        model: of `geomatch embed`, for no training.
    """

    preset: str | None = None
    settings: tuple[str, ...] = ()
    model: str | None = None


PRETRAINED = Recipe("pretrained")


def without(**keys: object) -> Recipe:
    """The preset `pretrained` with other values, by "table__key"."""
    settings = (f"{name.replace('__', '.')}={json.dumps(keys[name])}" for name in keys)
    return Recipe("pretrained", tuple(settings))


RECIPES = {
    "imagenet": Recipe(model="imagenet"),
    "pretrained": PRETRAINED,
    "pretrained, untrained": without(train__epochs=0),
    "pretrained, no distillation": without(train__distil=0.0),
    "pretrained, no instance norm": without(model__instance_norm=False),
    "pretrained, random batches": without(mining__rule="none"),
    "pretrained, all stages trained": without(train__freeze=["trunk/stem", "batch_norm"]),
    "pretrained, head only": without(train__freeze=["trunk", "batch_norm"]),
    "pretrained, d 128": without(model__descriptor=128),
    "pretrained, lr 1e-3": without(train__lr=1e-3),
    "pretrained, large batches": without(
        train__batch=384, train__accumulate=6, train__lr=1e-3, train__ema=0.98, train__epochs=3
    ),
    "cross-year": Recipe("cross-year"),
    "default": Recipe(),
    "default, resnet18": Recipe(settings=("model.trunk=resnet18",)),
}


def geomatch(project: Path, command: str, *arguments: str) -> str:
    """Run a command in a project; returns what it prints."""
    call = [sys.executable, "-m", "geomatch", command, "-p", str(project), *arguments]
    done = subprocess.run(call, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(call)}\n{done.stderr}")
    return done.stdout


def prepared(name: str, recipe: Recipe, data: Path, folder: Path) -> Path:
    """The tiled project of a set with a recipe's preset."""
    chosen = SETS[name]
    project = folder / f"{name}-{recipe.preset or 'default'}"
    made = project / "made"
    if not (project / "geomatch.toml").exists():
        preset = () if recipe.preset is None else ("--preset", recipe.preset)
        call = [sys.executable, "-m", "geomatch", "init", str(project), *preset]
        subprocess.run(call, check=True, capture_output=True)
        made.mkdir()
        chosen.prepare(data, made)
    texts = [text.format(data=data, folder=made) for text in chosen.tile]
    settings = [f"--set={text}" for text in texts if text.startswith("split.")]
    geomatch(project, "tile", *(t for t in texts if not t.startswith("split.")), *settings, "-q")
    return project


def results(
    name: str, recipe_name: str, seeds: Iterable[int], data: Path, folder: Path
) -> Iterator[dict[str, object]]:
    """The row of each seed, from the folder if it was made before."""
    recipe, chosen = RECIPES[recipe_name], SETS[name]
    for seed in [0] if recipe.model else seeds:
        run = f"{''.join(c if c.isalnum() else '-' for c in recipe_name)}-{seed}"
        path = folder / "results" / f"{name}-{run}.json"
        if not path.exists():
            project = prepared(name, recipe, data, folder)
            started = time.monotonic()
            if recipe.model is None:
                keys = (f"train.seed={seed}", *recipe.settings)
                years = [f"--set={text}" for text in chosen.tile if text.startswith("split.")]
                geomatch(
                    project, "train", f"--run={run}", "-q", *(f"--set={k}" for k in keys), *years
                )
            minutes = (time.monotonic() - started) / 60
            of = f"--model={recipe.model}" if recipe.model else f"--run={run}"
            geomatch(project, "embed", of, "-q")
            years = [f"--year={year}" for year in chosen.years]
            report = json.loads(geomatch(project, "eval", "--json", "--no-html", "-q", *years))
            row = {"set": name, "recipe": recipe_name, "seed": seed, "minutes": minutes}
            row["load"] = os.getloadavg()[0]
            row["metrics"] = report["splits"]
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(row))
        yield json.loads(path.read_text())


def line(row: dict, split: str) -> str:
    """A row of the Markdown table."""
    found = row["metrics"][split]
    low, high = found["intervals"]["map@5"]
    strata = {part["changed"]: part["map@5"] for part in found.get("changed") or ()}
    cells = [row["set"], row["recipe"], row["seed"], found["queries"]]
    cells += [f"{found['map@5']:.3f}", f"{low:.3f} to {high:.3f}"]
    cells += [f"{found[key]:.3f}" for key in ("recall@1", "recall@10")]
    cells += [
        "" if strata.get(key) is None else f"{strata[key]:.3f}"
        for key in ("0", "up to 10%", "above 10%")
    ]
    cells += [f"{row['minutes']:.0f}"]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("GEOMATCH_DATA"))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["levir"])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["imagenet", "pretrained"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--folder", type=Path, help="Where projects and results are kept.")
    args = parser.parse_args()
    if args.data is None:
        parser.error("name the folder of the sets by --data or $GEOMATCH_DATA")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        print(
            "| set | recipe | seed | queries | mAP@5 | 95 % interval | R@1 | R@10 | nothing built "
            "| up to 10 % | above | minutes |\n|" + "---|" * 12
        )
        for name in args.sets:
            for recipe in args.recipes:
                for row in results(name, recipe, args.seeds, args.data.absolute(), folder):
                    print(line(row, SETS[name].split), flush=True)


if __name__ == "__main__":
    main()

"""A job: what a request asks `tile` to cut, and its plan, which is kept in `tiles.partial/`.

Several processes may work on one job, each on some of its shards, also on several machines over a
shared folder. The first one makes the plan; all have to find the same files as it did.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from geomatch import config
from geomatch.data.store_rows import StoreRows
from geomatch.errors import GeomatchError, StaleError
from geomatch.geo.grid import Grid
from geomatch.geo.headers import Headers
from geomatch.manifests import TileRequest
from geomatch.progress import ProgressCallback
from geomatch.project import Project, fingerprint
from geomatch.tiling import shards, sources
from geomatch.tiling.batches import Shards, Sheets
from geomatch.tiling.plan import TilePlan, choose_grid, first_raster, make_plan
from geomatch.tiling.sources import YearSource

HEADERS = ".headers.json"
"""File of the project that remembers what the headers of rasters say; it may be deleted."""
ARRAYS = "plan.npz"
"""File of the folder of unfinished tiles with the plan."""


@dataclass(frozen=True)
class Job:
    """What a request asks for, from headers alone.

    Attributes:
        settings: with absolute paths.
        channels: of image and labels.
        first: path of the raster that decides what the settings of the grid leave open.
        before: the tiles that are there, whose rows are kept where they hold what would be cut;
            None if nothing is to be kept.
        before_fingerprint: of these tiles, "" if there are none.
        fingerprint: of the request and of all files.
    """

    project: Project
    settings: config.Config
    year_sources: Sequence[YearSource]
    channels: tuple[int, int]
    grid: Grid
    first: str
    before: StoreRows | None
    before_fingerprint: str
    fingerprint: str

    @property
    def folder(self) -> Path:
        """That of unfinished tiles, absolute, since other processes work in it."""
        return self.project.unfinished_tiles.absolute()

    @property
    def identity(self) -> dict[str, str]:
        """What the plan depends on."""
        return {"of_request": self.fingerprint, "before": self.before_fingerprint}

    @property
    def is_planned(self) -> bool:
        """Whether its plan is there."""
        needed = self.folder / ARRAYS, self.folder / "tiles" / "pixels.zarr"
        noted = shards.noted_in(self.folder)
        return all(path.exists() for path in needed) and self.identity.items() <= noted.items()

    def plan(
        self, request: TileRequest, force: bool, of: int, progress: ProgressCallback
    ) -> TilePlan:
        """Its plan, which is made if there is none.

        Args:
            request: see `shards.prepare`.
            force: start from scratch.
            of: number of shares that the work is done in, 0 for none.
        """
        path = self.folder / ARRAYS
        is_planned = self.is_planned and not force
        if is_planned:
            plan = TilePlan.load(path)
        else:
            path.unlink(missing_ok=True)
            plan = make_plan(self.settings, self.grid, self.year_sources, progress, self.before)
        if not (is_planned and shards.noted_in(self.folder)["of"] == of):
            shape = [len(plan.col), self.grid.size, sum(self.channels)]
            shards.prepare(self.folder, shape, request, force, of=of, **self.identity)
        if not is_planned:
            plan.save(path)
        return plan

    def shards(self, plan: TilePlan, sheets: Sheets) -> Shards:
        """The shards of its plan."""
        return Shards(
            plan,
            self.folder,
            self.channels,
            sheets,
            self.settings.grid.skip_bad,
            self.before,
            self.project.pixels.absolute(),
        )


def inspect(
    project: Project,
    settings: config.Config,
    progress: ProgressCallback,
    *,
    force: bool = False,
    is_first: bool = True,
) -> Job:
    """Read the headers of all files.

    Args:
        force: keep nothing of the tiles that are there.
        is_first: remember what the headers say; else another process does.

    Raises:
        GeomatchError, UsageError: as for `sources.collect`.
    """
    settings = config.located(settings, project.root)
    headers = Headers(project.root / HEADERS)
    masks = project.unfinished_tiles.absolute() / "collars"
    year_sources = sources.collect(settings, headers, masks, progress)
    if is_first:
        headers.save()
    before, before_fingerprint = (None, "") if force else _before(project)
    first = first_raster(year_sources, before)
    grid = choose_grid(settings.grid, year_sources, first)
    contents: list[Any] = [
        asdict(grid),
        config.as_dict(settings)["split"],
        sources.area_stamps(settings.split),
        settings.grid.min_valid,
        [sources.identity(each) for each in year_sources],
        *(["skip bad"] if settings.grid.skip_bad else []),
    ]
    return Job(
        project,
        settings,
        year_sources,
        sources.channels(year_sources),
        grid,
        first.path,
        before,
        before_fingerprint,
        fingerprint(contents),
    )


def _before(project: Project) -> tuple[StoreRows | None, str]:
    """The tiles that are there, and their fingerprint."""
    with contextlib.suppress(StaleError, GeomatchError):
        return StoreRows.load(project.store_rows), project.tile_manifest().fingerprint
    return None, ""

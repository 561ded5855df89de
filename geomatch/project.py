"""The project folder: the only module that knows where artefacts are and how they are written.

Everything is written to a temporary path beside its place and renamed, so that a killed command
leaves nothing half-valid. Locks are the operating system's and are released with their process.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from geomatch import config
from geomatch.errors import GeomatchError, StaleError, UsageError
from geomatch.manifests import DescriptorManifest, IndexManifest, RunManifest, TileManifest
from geomatch.records import Record
from geomatch.remote import KINDS, Remote

FORMAT = 1
"""Format version of the artefacts, stored in every JSON file."""

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Project:
    """Paths within one project folder.

    Attributes:
        remote: the object storage that its tiles, embeddings and indexes are in, if any.
    """

    root: Path
    remote: Remote | None = None

    @classmethod
    def open(cls, root: Path) -> Project:
        """Open the project in `root`, with what is new in its object storage.

        Raises:
            UsageError: `root` has no `geomatch.toml`, or that cannot be read.
            GeomatchError: the storage cannot be read, or what is new replaces what another process
                uses.
        """
        if not (root / "geomatch.toml").is_file():
            raise UsageError(
                f"{root} is not a geomatch project (it has no geomatch.toml)",
                f"Create one with: geomatch init {root}",
            )
        url = config.load(root / "geomatch.toml").project.remote
        if not url:
            return cls(root)
        project = cls(root, remote := Remote(root, url))
        for artefact in remote.changed():
            with project.lock(artefact):
                remote.fetch(artefact)
        return project

    @property
    def config(self) -> Path:
        return self.root / "geomatch.toml"

    @property
    def tiles(self) -> Path:
        return self.root / "tiles"

    @property
    def catalogue(self) -> Path:
        return self.tiles / "tiles.parquet"

    @property
    def tiles_manifest(self) -> Path:
        return self.tiles / "manifest.json"

    @property
    def store_rows(self) -> Path:
        return self.tiles / "rows.parquet"

    @property
    def unfinished_tiles(self) -> Path:
        return self.root / "tiles.partial"

    @property
    def preview(self) -> Path:
        return self.tiles / "preview.png"

    @property
    def pixels(self) -> Path:
        return self.tiles / "pixels.zarr"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def run(self, name: str) -> Path:
        return self.runs / name

    @property
    def pretrained(self) -> Path:
        return self.root / "pretrained"

    @property
    def weights(self) -> Path:
        return self.root / "weights"

    @property
    def embeddings(self) -> Path:
        return self.root / "embeddings"

    @property
    def indexes(self) -> Path:
        return self.root / "index"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def registration_map(self) -> Path:
        return self.reports / "registration.png"

    def comparison(self, runs: Sequence[str]) -> Path:
        """The page that compares runs."""
        return self.reports / "runs" / f"{'-'.join(runs)}.html"

    @property
    def dry_run_picture(self) -> Path:
        return self.reports / "dry-run.png"

    def tile_manifest(self) -> TileManifest:
        """The manifest of the tiles.

        Raises:
            GeomatchError: there are no tiles yet.
            StaleError: the manifest is damaged or of another version.
        """
        if not self.tiles_manifest.exists():
            raise GeomatchError(
                f"{self.root} has no tiles yet", "Run: geomatch tile YEAR=PATH YEAR=PATH"
            )
        return read_record(self.tiles_manifest, TileManifest, "geomatch tile")

    def index_manifest(self, name: str) -> IndexManifest:
        """The manifest of an index.

        Raises:
            StaleError: the manifest is damaged or of another version.
        """
        return read_record(self.indexes / name / "manifest.json", IndexManifest, "geomatch index")

    def run_names(self) -> list[str]:
        """Names of all runs, the latest last."""
        return [p.parent.name for p in _by_age(self.runs.glob("*/config.json"))]

    def embedding_names(self) -> list[str]:
        """Names of all finished embeddings, the latest last."""
        return [p.stem for p in _by_age(self.embeddings.glob("[!.]*.parquet"))]

    def embeddings_of(self, run: str | None) -> str:
        """The full name of the given or else the latest embeddings; see `latest`."""
        return latest(self.embedding_names(), run, "embeddings", "geomatch embed")

    def index_names(self) -> list[str]:
        """Names of all finished indexes, the latest last."""
        return [p.parent.name for p in _by_age(self.indexes.glob("[!.]*/manifest.json"))]

    def report_names(self) -> list[str]:
        """Names of all reports, the latest last."""
        return [path.parent.name for path in _by_age(self.reports.glob("*/report.json"))]

    def check_fresh(self, manifest: DescriptorManifest) -> None:
        """Check that descriptors still belong to the tiles and the run that they were made from.

        Args:
            manifest: of embeddings or of an index.

        Raises:
            StaleError: the tiles changed since, or the run was started again.
        """
        run = self.run(manifest.name.partition("@")[0])
        if manifest.tiles != self.tile_manifest().fingerprint:
            change = "the tiles changed"
        elif _run_id(run) not in (None, manifest.run_id) and not self._renamed(manifest):
            change = f"run {run.name} was started again"
        else:
            return
        raise StaleError(
            f"{change} since {manifest.name} was embedded",
            "Run: geomatch embed, then geomatch index",
        )

    def run_of(self, manifest: DescriptorManifest) -> Path:
        """The folder of the run that made descriptors, also if it was renamed since."""
        folder = self.root / manifest.run
        if _run_id(folder) == manifest.run_id:
            return folder
        return self._renamed(manifest) or folder

    def _renamed(self, manifest: DescriptorManifest) -> Path | None:
        """The folder of the run that made descriptors, by its id among all runs."""
        for folder in map(self.run, self.run_names()):
            with contextlib.suppress(StaleError):
                if _run_id(folder) == manifest.run_id:
                    return folder
        return None

    @contextlib.contextmanager
    def lock(self, artefact: str, shared: bool = False, wait: bool = False) -> Iterator[None]:
        """Lock `artefact` ("tiles", "runs/NAME", ...) against other processes.

        What was made is then moved to the project's object storage, if it has one.

        Args:
            shared: allow other readers, but no writer.
            wait: until other processes release it, instead of raising an error.

        Raises:
            GeomatchError: another process holds a conflicting lock, or the file system has none.
        """
        path = self.root / ".locks" / (artefact.replace("/", ".") + ".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        # NFS, where flock locks bytes of the file, wants both reading and writing.
        with path.open("a+") as handle:
            try:
                kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise GeomatchError(
                    f"another geomatch is writing {artefact} of {self.root}, or using it",
                    "Wait until it ends, or stop it.",
                ) from error
            except OSError as error:
                raise GeomatchError(
                    f"{path.parent} cannot be locked: {error.strerror}",
                    "Mount its file system with flock, or keep the project on another one.",
                ) from error
            yield
            if self.remote is not None and not shared and artefact.partition("/")[0] in KINDS:
                self.remote.publish(artefact)


def latest(names: list[str], name: str | None, kind: str, command: str) -> str:
    """The given name, or the latest one; "RUN" stands for the latest "RUN@STEP".

    Args:
        names: all names, the latest last.
        kind: of artefact, for messages.
        command: makes such an artefact.

    Raises:
        GeomatchError: there are none, or not that one.
    """
    if not names:
        raise GeomatchError(f"no {kind} yet", f"Run: {command}")
    if name is None:
        return names[-1]
    matching = [each for each in names if name in (each, each.partition("@")[0])]
    if not matching:
        raise GeomatchError(f"no {kind} {name!r}", f"Available: {', '.join(names)}.")
    return name if name in matching else matching[-1]


def check_name(name: str, kind: str = "run name") -> None:
    """Check the name of a run.

    Args:
        kind: of name, for messages.

    Raises:
        UsageError: it is not a plain name.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(
            f"{name!r} is not a valid {kind}", "Use letters, digits, '.', '_' and '-'."
        )


def _run_id(folder: Path) -> str | None:
    """See `RunManifest.id`; None if there is no run."""
    path = folder / "config.json"
    return read_record(path, RunManifest, "geomatch train").id if path.exists() else None


def write_json(path: Path, values: dict[str, Any], shared: bool = False) -> None:
    """Write `values` and the format version to `path`, atomically; `shared` as in `replacing`."""
    with replacing(path, shared) as temporary:
        text = json.dumps({"format": FORMAT, **values}, indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows of values by column as CSV, atomically."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_record(path: Path, record: Record) -> None:
    """Write a record, such as a manifest, as `write_json` does."""
    write_json(path, record.as_json())


def read_record(path: Path, kind: type[R], command: str) -> R:
    """Read what `write_record` wrote.

    Raises:
        StaleError: the file is damaged or of another version; `command` makes it again.
    """
    return to_record(read_json(path, command), kind, path, command)


def to_record(values: dict[str, Any], kind: type[R], path: Path, command: str) -> R:
    """A record from the JSON values that `path` holds.

    Raises:
        StaleError: a value is missing or of another type; `command` makes the file again.
    """
    try:
        return kind.from_json(values)
    except KeyError as error:
        raise StaleError(f"{path} lacks the field {error}", f"Run: {command}") from error
    except TypeError as error:
        raise StaleError(f"{path} is damaged: {error}", f"Run: {command}") from error


def read_json(path: Path, command: str) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        StaleError: the file is damaged or of another version; `command` makes it again.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StaleError(f"{path} cannot be read: {error}", f"Run: {command}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, dict) else None
        raise StaleError(
            f"{path} has format {found}, this geomatch needs {FORMAT}", f"Run: {command}"
        )
    return value


@contextlib.contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """A temporary path that replaces `path` when the block ends without an exception.

    Args:
        shared: another process, perhaps of another machine, may write the same at the same time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f".{secrets.token_hex(4)}" if shared else ""
    temporary = path.with_name(f".{path.name}{own}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def restore_folder(target: Path) -> None:
    """Put back what `replace_folder` had moved away when it was killed."""
    old = _moved(target)
    if old.exists() and not target.exists():
        os.rename(old, target)


def _moved(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def replace_folder(new: Path, target: Path) -> None:
    """Replace the folder `target` by `new`."""
    old = _moved(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)


def fingerprint(value: Any) -> str:
    """A short digest of a JSON-ready value, or of bytes."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def _by_age(paths: Iterator[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name))

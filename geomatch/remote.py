"""Object storage that holds the tiles, embeddings and indexes of a project.

A version of an artefact there is a set of objects that are never changed, and a record that names
them. A new version has new objects; then the record is replaced, on condition that it is still the
one that this project has seen. So a version is complete or not there, and of two writers one is
refused. What is small, or mapped into memory, is copied into the project folder; pixels are not.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geomatch.errors import GeomatchError, UsageError

KINDS = ("tiles", "embeddings", "index")
"""What is kept there; runs and reports stay in the project folder."""
PIXELS, PIXELS_URL = "pixels.zarr", "pixels.url"
"""The folder of pixels, and the file that takes its place where they are in a storage."""
AT_ONCE = 8
"""Objects that are copied at the same time."""


@dataclass(frozen=True)
class Remote:
    """The storage of one project.

    Args:
        root: the project folder.
        url: s3://BUCKET/PREFIX or gs://BUCKET/PREFIX.

    Raises:
        UsageError: the URL is another one.
    """

    root: Path
    url: str

    def __post_init__(self) -> None:
        kvstore(self.url)

    def changed(self) -> list[str]:
        """The artefacts that the project folder lacks, or has in a version that was replaced.

        They are named "tiles", "embeddings/NAME" and "index/NAME".

        Raises:
            GeomatchError: the storage cannot be read.
        """
        with self._reached() as storage:
            names = [key.removesuffix(".json") for key in _keys(storage, "records/")]
            stamps = {name: _at(storage.read(_record(name)).result()) for name in names}
        return [
            name
            for name in names
            if stamps[name] != self._seen(name).get("at") or not self._place(name).exists()
        ]

    def fetch(self, artefact: str) -> None:
        """Copy an artefact into the project folder, in place of what is there.

        Raises:
            GeomatchError: the storage cannot be read.
        """
        place, partial = self._place(artefact), self._own(artefact, ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with self._reached() as storage:
            found = storage.read(_record(artefact)).result()
            record = json.loads(found.value)
            home = _objects(artefact, record["version"])

            def copy(name: str) -> None:
                path = partial / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(storage.read(home + name).result().value)
                # Which of several artefacts is the latest is told by time.
                os.utime(path, ns=(record["times"][name],) * 2)

            _together(copy, [n for n in record["times"] if not n.startswith(f"{PIXELS}/")])
        if artefact == "tiles":
            self._point(partial, home)
        place.parent.mkdir(parents=True, exist_ok=True)
        if _is_file(artefact):
            os.replace(partial / place.name, place)
            partial.rmdir()
        else:
            shutil.rmtree(place, ignore_errors=True)
            os.rename(partial, place)
        self._remember(artefact, found.stamp.generation)

    def publish(self, artefact: str) -> None:
        """Make the project folder's version of an artefact the one in the storage, if it is new.

        Pixels are moved. The version before stays for those who read it; older ones are deleted.

        Raises:
            GeomatchError: another project replaced the artefact, or the storage cannot be written.
        """
        place, seen = self._place(artefact), self._seen(artefact)
        if not place.exists() or seen.get("digest") == _digest(place):
            return
        inside = [place] if _is_file(artefact) else [p for p in place.rglob("*") if p.is_file()]
        home_of = place.parent if _is_file(artefact) else place
        files = {path.relative_to(home_of).as_posix(): path for path in inside}
        version = uuid.uuid4().hex
        home = _objects(artefact, version)
        with self._reached() as storage:
            before = storage.read(_record(artefact)).result()
            if _at(before) != seen.get("at"):
                raise self._refused(artefact)

            def copy(name: str) -> None:
                storage.write(home + name, files[name].read_bytes()).result()

            _together(copy, list(files))
            times = {name: path.stat().st_mtime_ns for name, path in files.items()}
            text = json.dumps({"version": version, "times": times}).encode()
            only_if = before.stamp.generation
            after = storage.write(_record(artefact), text, if_equal=only_if).result()
            if not after.generation:
                _delete(storage, home)
                raise self._refused(artefact)
            kept = {version, *([json.loads(before.value)["version"]] if before.value else [])}
            versions = {key.partition("/")[0] for key in _keys(storage, _objects(artefact))}
            for old in versions - kept:
                _delete(storage, _objects(artefact, old))
        if (place / PIXELS).exists():
            self._point(place, home)
            shutil.rmtree(place / PIXELS)
        self._remember(artefact, after.generation)

    def _place(self, artefact: str) -> Path:
        return self.root / (f"{artefact}.parquet" if _is_file(artefact) else artefact)

    def _point(self, tiles: Path, home: str) -> None:
        """Say where the pixels of tiles are."""
        (tiles / PIXELS_URL).write_text(
            f"{self.url.rstrip('/')}/{home}{PIXELS}\n", encoding="utf-8"
        )

    def _own(self, artefact: str, suffix: str) -> Path:
        """A path for what is known of an artefact; its lock guards it."""
        return self.root / ".remote" / (artefact.replace("/", ".") + suffix)

    def _seen(self, artefact: str) -> dict[str, str]:
        """The stamp of the record last seen, and the digest of the version that it names."""
        try:
            known: dict[str, str] = json.loads(self._own(artefact, ".json").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return known if known.get("url") == self.url else {}

    def _remember(self, artefact: str, generation: bytes) -> None:
        known = {
            "url": self.url,
            "at": generation.hex(),
            "digest": _digest(self._place(artefact)),
        }
        path, temporary = self._own(artefact, ".json"), self._own(artefact, ".json.partial")
        path.parent.mkdir(exist_ok=True)
        temporary.write_text(json.dumps(known), encoding="utf-8")
        os.replace(temporary, path)

    def _refused(self, artefact: str) -> GeomatchError:
        return GeomatchError(
            f"another project replaced {artefact} in {self.url} since this command began",
            "Nothing there was changed. Run the same command again: it starts from what is there.",
        )

    @contextlib.contextmanager
    def _reached(self) -> Iterator[Any]:
        """The storage, as a key-value store of tensorstore."""
        try:
            yield _storage(self.url)
        except (ValueError, OSError, RuntimeError) as error:
            raise GeomatchError(
                f"{self.url} cannot be used: {str(error).split(' [', 1)[0]}",
                "Check its address, AWS_ENDPOINT_URL or AWS_REGION, and the credentials.",
            ) from error


def kvstore(url: str) -> dict[str, Any]:
    """The tensorstore specification of an s3:// or gs:// URL.

    Credentials, region and endpoint come from the environment, by the names that boto3 has.

    Raises:
        UsageError: it is another URL.
    """
    match = re.fullmatch(r"(s3|gs)://([^/]+)/(.+)", url)
    if match is None:
        raise UsageError(
            f"project.remote = {url!r} is no object storage",
            "Give s3://BUCKET/PREFIX or gs://BUCKET/PREFIX.",
        )
    kind, bucket, prefix = match.groups()
    spec = {"bucket": bucket, "path": f"{prefix.rstrip('/')}/"}
    if kind == "gs":
        return {"driver": "gcs", **spec}
    named = os.environ.get
    if named("AWS_ACCESS_KEY_ID"):  # else a profile, or the machine's role
        spec["aws_credentials"] = {"type": "environment"}
    region = named("AWS_REGION") or named("AWS_DEFAULT_REGION")
    if endpoint := named("AWS_ENDPOINT_URL_S3") or named("AWS_ENDPOINT_URL"):
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        spec["aws_region"] = region
    retries = {"max_retries": 5, "initial_delay": "500ms", "max_delay": "4s"}
    return {"driver": "s3", **spec, "context": {"s3_request_retries": retries}}


@functools.cache
def _storage(url: str) -> Any:
    import tensorstore

    return tensorstore.KvStore.open(kvstore(url)).result()


def _is_file(artefact: str) -> bool:
    """Whether it is a file, and not a folder."""
    return artefact.startswith("embeddings/")


def _record(artefact: str) -> str:
    return f"records/{artefact}.json"


def _objects(artefact: str, version: str = "") -> str:
    return f"objects/{artefact}/" + (f"{version}/" if version else "")


def _at(found: Any) -> str | None:
    """The stamp of a record that was read, None if there is none."""
    return found.stamp.generation.hex() if found.state == "value" else None


def _range(prefix: str) -> Any:
    import tensorstore

    return tensorstore.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))


def _keys(storage: Any, prefix: str) -> list[str]:
    """The keys that begin so, without this beginning."""
    found = storage.list(_range(prefix), strip_prefix_length=len(prefix)).result()
    return [key.decode() for key in found]


def _delete(storage: Any, prefix: str) -> None:
    storage.delete_range(_range(prefix)).result()


def _digest(place: Path) -> str:
    """A digest of what tells one version of an artefact from another; of a folder, its manifest."""
    path = place / "manifest.json" if place.is_dir() else place
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _together(copy: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(copy, names):
            pass

"""Engines of an index beside their peers, on descriptors with the spread of real ones.

    python tests/benchmarks/search.py EMBEDDINGS.parquet [--count 200000] [--only NAME ...]
    python tests/benchmarks/search.py EMBEDDINGS.parquet --count 10000000 --only "ours ivfpq"

EMBEDDINGS.parquet is what `geomatch embed` wrote of a project of two years. Its descriptors are
reduced to `--size` values, and new places drawn between each of them and its neighbours; what
differs from year to year is that of real places. Queries are places in the other year. Every
contender is a process, which searches on one core, by one query at a time unless it says "batch".
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

QUERIES = 200
BATCH = 1000
NEAR = 10
"""Neighbours of a descriptor, between which and it new ones are drawn."""
PART = 16_384
FRANCE = 33_000_000
"""Tiles of 256 px at 0.5 m that cover France."""
Search = Callable[[np.ndarray, int], np.ndarray]


class Stored:
    """Descriptors (n, d) in half precision in a file, of which no page stays mapped."""

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size = path, size

    def __len__(self) -> int:
        return self._path.stat().st_size // (2 * self._size)

    def __getitem__(self, rows) -> np.ndarray:
        shape = len(self), self._size
        return np.memmap(self._path, np.float16, "r", shape=shape)[rows].astype(np.float32)


def draw(embeddings: Path, folder: Path, count: int, size: int) -> None:
    """Write `database` and `queries`, and the true neighbours of the latter."""
    import faiss
    import pyarrow.parquet as pq
    from sklearn.decomposition import PCA

    table = pq.read_table(embeddings, columns=["id", "year", "embedding"])
    real = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    reduced = PCA(size, random_state=0).fit_transform(real).astype(np.float32)
    reduced /= np.linalg.norm(reduced, axis=1, keepdims=True)
    cells = [name.partition("@")[0] for name in table["id"].to_pylist()]
    first, second = sorted(set(table["year"].to_pylist()))[:2]
    at = {(c, y): i for i, (c, y) in enumerate(zip(cells, table["year"].to_pylist(), strict=True))}
    pairs = [
        (at[c, first], at[c, second]) for c in set(cells) if {(c, first), (c, second)} <= {*at}
    ]
    before, after = np.array(sorted(pairs)).T
    change = reduced[after] - reduced[before]
    near = faiss.knn(reduced[before], reduced[before], NEAR + 1)[1][:, 1:]

    def places(start: int, count: int) -> np.ndarray:
        rng = np.random.default_rng([1, start])
        a = rng.integers(len(before), size=count)
        b = near[a, rng.integers(NEAR, size=count)]
        share = rng.random((count, 1))
        between = reduced[before[a]] * (1 - share) + reduced[before[b]] * share
        # What places have of their own, as large as half of what a year changes.
        own = rng.normal(size=(count, size)) * change.std(axis=0) / 2
        return (between + own).astype(np.float32)

    chosen = np.random.default_rng(2).integers(count, size=BATCH)
    queries = np.empty((BATCH, size), np.float32)
    best = np.full((QUERIES, 5), -np.inf, np.float32), np.zeros((QUERIES, 5), np.int64)
    with (folder / "database").open("wb") as file:
        for start in range(0, count, PART):
            part = places(start, min(PART, count - start))
            file.write(part.astype(np.float16).tobytes())
            here = np.flatnonzero((chosen >= start) & (chosen < start + len(part)))
            drawn = np.random.default_rng([3, start]).integers(len(change), size=len(here))
            queries[here] = part[chosen[here] - start] + change[drawn]
    np.save(folder / "queries.npy", queries)
    stored = Stored(folder / "database", size)
    for start in range(0, count, PART):
        part = unit(stored[start : start + PART])
        found, where = faiss.knn(
            unit(queries[:QUERIES]), part, min(5, len(part)), faiss.METRIC_INNER_PRODUCT
        )
        scores = np.concatenate([best[0], found], axis=1)
        rows = np.concatenate([best[1], where + start], axis=1)
        order = np.argsort(-scores, axis=1)[:, :5]
        best = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
    np.save(folder / "truth.npy", best[1])


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# Contenders: each builds an index of unit vectors in a folder, and returns how it is searched


def ours(kind: str, dtype: str, memory: float) -> Callable[[Stored, Path], Search]:
    def build(stored: Stored, folder: Path) -> Search:
        from geomatch.search import engines

        half = len(stored) // 2
        wanted = engines.Wanted(kind, dtype, "cosine", memory, 0.95)
        counts = (half, len(stored) - half)
        order = np.arange(len(stored))
        engine = engines.build(folder, stored, order, counts, wanted, lambda *_: None)
        searcher = engines.searcher(folder, engine, len(stored), "cosine")
        everything = np.ones(len(stored), bool)
        return lambda queries, k: searcher.search(queries, k, everything)[1]

    return build


def plain_faiss(factory: str, **parameters: int) -> Callable[[Stored, Path], Search]:
    def build(stored: Stored, folder: Path) -> Search:
        import faiss

        index = faiss.index_factory(stored[:1].shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index.train(unit(stored[: 40 * 4096]))
        for start in range(0, len(stored), PART):
            index.add(unit(stored[start : start + PART]))
        for name, value in parameters.items():
            faiss.ParameterSpace().set_index_parameter(index, name, value)
        faiss.write_index(index, str(folder / "index"))
        return lambda queries, k: index.search(queries, k)[1]

    return build


def sklearn(stored: Stored, folder: Path) -> Search:
    from sklearn.neighbors import NearestNeighbors

    fitted = NearestNeighbors(algorithm="brute").fit(unit(stored[:]))
    return lambda queries, k: fitted.kneighbors(queries, k, return_distance=False)


def usearch(dtype: str) -> Callable[[Stored, Path], Search]:
    def build(stored: Stored, folder: Path) -> Search:
        from usearch.index import Index

        index = Index(
            ndim=stored[:1].shape[1],
            metric="cos",
            dtype=dtype,
            connectivity=32,
            expansion_search=64,
        )
        for start in range(0, len(stored), PART):
            part = unit(stored[start : start + PART])
            index.add(start + np.arange(len(part)), part)
        index.save(folder / "index")
        # Keys of one query alone are (k,).
        return lambda queries, k: index.search(queries, k, threads=1).keys.reshape(-1, k)

    return build


def hnswlib(stored: Stored, folder: Path) -> Search:
    import hnswlib as library

    index = library.Index("ip", stored[:1].shape[1])
    index.init_index(len(stored), ef_construction=100, M=32)
    for start in range(0, len(stored), PART):
        part = unit(stored[start : start + PART])
        index.add_items(part, start + np.arange(len(part)))
    index.set_ef(64)
    index.set_num_threads(1)
    index.save_index(str(folder / "index"))
    return lambda queries, k: index.knn_query(queries, k)[0].astype(np.int64)


def pgvector(stored: Stored, folder: Path) -> Search:
    import psycopg

    connection = psycopg.connect(os.environ["BENCHMARK_DATABASE"])
    connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    connection.execute(f"CREATE TABLE t (i bigint, e halfvec({stored[:1].shape[1]}))")
    with connection.cursor().copy("COPY t FROM STDIN") as copy:
        for start in range(0, len(stored), PART):
            for i, row in enumerate(unit(stored[start : start + PART]).tolist()):
                copy.write_row((start + i, "[" + ",".join(f"{v:.5g}" for v in row) + "]"))
    connection.execute("SET maintenance_work_mem = '1GB'")
    connection.execute("CREATE INDEX ON t USING hnsw (e halfvec_cosine_ops)")
    connection.execute("SET hnsw.ef_search = 100")

    def search(queries: np.ndarray, k: int) -> np.ndarray:
        statement = "SELECT i FROM t ORDER BY e <=> %s::halfvec LIMIT %s"
        found = [connection.execute(statement, (str(q), k)).fetchall() for q in queries.tolist()]
        return np.array(found)[:, :, 0]

    return search


def contenders(memory: float) -> dict[str, Callable[[Stored, Path], Search]]:
    return {
        "ours exact float32": ours("exact", "float32", memory),
        "ours exact float16": ours("exact", "float16", memory),
        "ours exact int8": ours("exact", "int8", memory),
        "FAISS Flat": plain_faiss("Flat"),
        "scikit-learn brute": sklearn,
        "ours ivfpq": ours("ivfpq", "int8", memory),
        "FAISS IVF4096,SQ8": plain_faiss("IVF4096,SQ8", nprobe=32),
        "ours hnsw": ours("hnsw", "int8", memory),
        "FAISS HNSW32": plain_faiss("HNSW32", efSearch=64),
        "usearch i8": usearch("i8"),
        "hnswlib": hnswlib,
        "pgvector": pgvector,
    }


def measure(name: str, data: Path, size: int, memory: float) -> None:
    """Print the figures of one contender as JSON."""
    stored, queries = Stored(data / "database", size), unit(np.load(data / "queries.npy"))
    truth = np.load(data / "truth.npy")
    with tempfile.TemporaryDirectory(dir=data) as folder:
        start, used = time.perf_counter(), time.process_time()
        search = contenders(memory)[name](stored, Path(folder))
        built, worked = time.perf_counter() - start, time.process_time() - used
        import faiss

        faiss.omp_set_num_threads(1)
        rss = peak()
        search(queries[:1], 5)
        found, times = [], []
        for query in queries[:QUERIES]:
            start = time.thread_time() if name != "pgvector" else time.perf_counter()
            found.append(search(query[None], 5)[0])
            now = time.thread_time() if name != "pgvector" else time.perf_counter()
            times.append(now - start)
        start = time.process_time()
        search(queries, 5) if name != "pgvector" else None
        batch = time.process_time() - start
        disk = sum(path.stat().st_size for path in Path(folder).iterdir())
    hits = [len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)]
    figures = {
        "build": built,
        "build_processor": worked,
        "ms": 1000 * float(np.median(times)),
        "batch": 1000 * batch / len(queries),
        "recall": float(np.mean(hits)) / 5,
        "gigabytes": rss / 2**20,
        "disk": disk / 1e9,
    }
    print(json.dumps(figures))


def peak() -> int:
    """Most KB of memory of this process, which `ru_maxrss` mixes up with its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("embeddings", type=Path)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--memory", type=float, default=2.0, help="index.memory, in GB")
    parser.add_argument("--folder", type=Path, help="for what is written; by default temporary")
    parser.add_argument("--only", nargs="*", help="contenders")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(args.one, args.folder, args.size, args.memory * 1e9)
        return
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from postgres import server

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        draw(args.embeddings, folder, args.count, args.size)
        load = os.getloadavg()[0]
        print(f"{args.count} x {args.size}; {os.cpu_count()} cores, load {load:.1f}")
        print(
            "| | recall@5 | ms a query | ms a query in a batch | build s (of processor time) |"
            " GB to build | GB on disk | GB on disk at 33 million |"
        )
        print("|---" * 8 + "|")
        for each in args.only or contenders(0):
            command = [sys.executable, __file__, str(args.embeddings), "--one", each]
            command += ["--folder", name, "--size", str(args.size), "--memory", str(args.memory)]
            if each == "pgvector":
                with server() as url:
                    done = run(command, {"BENCHMARK_DATABASE": url})
            else:
                done = run(command, {})
            if isinstance(done, str):
                print(f"| {each} | {done} |", flush=True)
                continue
            print(
                f"| {each} | {done['recall']:.3f} | {done['ms']:.2f} | {done['batch']:.2f} |"
                f" {done['build']:.0f} ({done['build_processor']:.0f}) | {done['gigabytes']:.2f} |"
                f" {done['disk']:.2f} | {done['disk'] / args.count * FRANCE:.1f} |",
                flush=True,
            )


def run(command: list[str], environment: dict[str, str]) -> dict[str, float] | str:
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it was killed"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()

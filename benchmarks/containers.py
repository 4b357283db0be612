"""Containers to records: MB of content per second and core, beside the shortest program with the same library.

    python benchmarks/containers.py

Documents of 3 kB of text, in tables with a picture of 20 kB beside each. The baseline reads the same file and makes
the same dictionaries, and checks nothing: not UTF-8 in escapes, not checksums, not that a stream was cut off, not
what an Arrow file's offsets point at; JSON lists it holds whole in memory. Both run in turn, by CPU time.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from preprocess.sources.records import read_records

Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for path, size, baseline in write_files(Path(folder), options.documents):
            rounds = [(seconds(ours, path), seconds(baseline, path)) for _ in range(options.rounds)]
            figures[path.name] = {
                "mb_per_s": size / 1e6 / statistics.median(first for first, _ in rounds),
                "baseline_mb_per_s": size / 1e6 / statistics.median(second for _, second in rounds),
                "ratio": statistics.median(second / first for first, second in rounds),
            }
            line = figures[path.name]
            print(
                f"{path.name:14} {line['mb_per_s']:6.0f} MB/s, baseline {line['baseline_mb_per_s']:6.0f} MB/s, "
                f"ratio {line['ratio']:.2f}"
            )
    if options.json:
        print(json.dumps(figures))


def make_rows(count: int, picture_bytes: int) -> Rows:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij\u00e9\u00fc", k=rng.randint(2, 9))) for _ in range(5000)]
    return [
        {
            "name": f"{number:08d}",
            "text": " ".join(rng.choices(words, k=500)),
            "image": rng.randbytes(picture_bytes),
        }
        for number in range(count)
    ]


def write_files(folder: Path, count: int) -> Iterable[tuple[Path, int, Callable[[Path], Iterable[Any]]]]:
    """Each file with the bytes of its values and its baseline."""
    rows = make_rows(count, 20_000)
    table = pa.Table.from_pylist(rows)
    size = table.nbytes
    pq.write_table(table, folder / "a.parquet", row_group_size=1000, write_page_checksum=True)
    yield folder / "a.parquet", size, parquet_baseline
    with pa.ipc.new_stream(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    yield folder / "a.arrow", size, arrow_baseline
    texts = [{"name": row["name"], "text": row["text"]} for row in rows]
    size = sum(len(row["text"].encode()) for row in texts)
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in texts).encode()
    escaped = "\n".join(json.dumps(row) for row in texts).encode()
    for name, content in (
        ("a.jsonl", lines),
        ("escaped.jsonl", escaped),
        ("a.jsonl.gz", gzip.compress(lines)),
        ("a.jsonl.zst", zstandard.compress(lines)),
    ):
        (folder / name).write_bytes(content)
        yield folder / name, size, lines_baseline
    (folder / "a.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    yield folder / "a.json", size, list_baseline
    with (folder / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("name", "text"), *(tuple(row.values()) for row in texts)])
    yield folder / "a.csv", size, csv_baseline


def parquet_baseline(path: Path) -> Iterable[Any]:
    for batch in pq.ParquetFile(path).iter_batches(1000, use_threads=False):
        yield from batch.to_pylist()


def arrow_baseline(path: Path) -> Iterable[Any]:
    with pa.OSFile(str(path)) as file:
        for batch in pa.ipc.open_stream(file):
            yield from batch.to_pylist()


def lines_baseline(path: Path) -> Iterable[Any]:
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".zst": zstandard.open}
    with openers.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def list_baseline(path: Path) -> Iterable[Any]:
    with path.open("rb") as file:
        return json.load(file)


def csv_baseline(path: Path) -> Iterable[Any]:
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def ours(path: Path) -> Iterable[Any]:
    return read_records(str(path))


def seconds(read: Callable[[Path], Iterable[Any]], path: Path) -> float:
    start = time.process_time()
    deque(read(path), maxlen=0)
    return time.process_time() - start


if __name__ == "__main__":
    main()

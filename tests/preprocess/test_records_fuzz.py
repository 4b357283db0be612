"""Mutated containers: no crash, no hang, no runaway memory, and every row is a record or counted as lost.

The reading is done by a child process, as a damaged table might take the process with it: pyarrow is C++. The last
input is then still in its directory.
"""

from __future__ import annotations

import gzip
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, seed, settings

from preprocess.samples import RawSample, Reject
from preprocess.sources import open_source
from preprocess.sources.base import BadFileError, SourceContext
from preprocess.sources.interleaved import InterleavedConfig
from preprocess.sources.record import Damage, Record
from preprocess.sources.records import read_records
from shared.tokens import TokenNames
from tests.preprocess.mutations import mutated, run_child

ROWS: list[dict[str, Any]] = [
    {"texts": ["é" * number, None, "x"], "images": [None, f"{number}.png", None], "n": number}
    for number in range(20)
]


def good_files() -> dict[str, bytes]:
    table = pa.Table.from_pylist(ROWS)

    def parquet(**options: Any) -> bytes:
        file = io.BytesIO()
        pq.write_table(table, file, row_group_size=7, **options)
        return file.getvalue()

    def arrow(new: Any, **options: Any) -> bytes:
        file = io.BytesIO()
        with new(file, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
            writer.write_table(table, max_chunksize=7)
        return file.getvalue()

    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
    values = "texts,images,n\n" + "".join(f'"é ""q"", y\n{n}",{n}.png,{n}\n' for n in range(20))
    return {
        "plain.parquet": parquet(compression="none", use_dictionary=False),
        "zstd.parquet": parquet(compression="zstd"),
        "checked.parquet": parquet(compression="snappy", write_page_checksum=True),
        "stream.arrow": arrow(pa.ipc.new_stream),
        "file.arrow": arrow(pa.ipc.new_file, compression="zstd"),
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": zstandard.compress(lines),
        "a.json": json.dumps(ROWS, ensure_ascii=False, indent=1).encode(),
        "a.csv": values.encode(),
        "a.tsv": values.replace(",", "\t").encode(),
    }


def check_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    begin = time.process_time()  # of this process: other work on the machine is no hang
    try:
        found = list(read_records(str(path)))
    except BadFileError as error:
        assert path.name in str(error) and "\n" not in str(error)
        return
    assert time.process_time() - begin < 5
    numbers = [entry.number for entry in found]
    assert numbers == sorted(set(numbers)), "a row is there twice"
    reasons = {entry.reason for entry in found if isinstance(entry, Damage)}
    assert all(isinstance(entry, (Record, Damage)) for entry in found) and "" not in reasons
    if path.suffix == ".parquet" and "rest_unreadable" not in reasons:
        assert len(found) == pq.read_metadata(path).num_rows
    if path.suffix == ".jsonl":
        assert len(found) == sum(bool(line.strip(b" \t\n\r\x0b\x0c")) for line in content.split(b"\n"))
    _scan(path, len(found))


def _scan(path: Path, count: int) -> None:
    """A source makes one sample or reject of each row, or one reject of the file."""
    config = InterleavedConfig(paths=(str(path),), bad_file="reject")
    entries = list(open_source(config, SourceContext("web", Path("unused"), TokenNames())).scan(str(path)))
    assert all(isinstance(entry, (RawSample, Reject)) for entry in entries)
    lost = [entry for entry in entries if isinstance(entry, Reject) and entry.key == f"{path.name}#file"]
    # Without all columns a table may be found damaged elsewhere than with them.
    assert lost or path.suffix in (".parquet", ".arrow", ".gz", ".zst") or len(entries) == count


def read_mutated(directory: str, names: Sequence[str], examples: int) -> None:
    """In a child process: its exit code tells what it was like."""
    rules = settings(
        max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    for number, name in enumerate(names):
        path, content = Path(directory, name), good_files()[name]
        check_file(path, content)
        if path.suffix == ".arrow":  # no checksums, and sizes of 8 aligned bytes: the highest of each
            for place in range(7, len(content), 8):
                check_file(path, content[:place] + b"\x7f" + content[place + 1 :])
        # Arguments that are not given are passed on by the call.
        seed(number)(rules(given(content=mutated(content))(check_file)))(path=path)


def test_mutated_files_lose_rows_and_nothing_else(tmp_path: Path) -> None:
    run_child(read_mutated, tmp_path, list(good_files()), 25)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(good_files()))
def test_many_mutated_files_lose_rows_and_nothing_else(tmp_path: Path, name: str) -> None:
    run_child(read_mutated, tmp_path, [name], 1500)

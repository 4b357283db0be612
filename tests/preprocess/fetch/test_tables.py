"""Tables of URLs in every format: the same rows, in the same chunks, and what is no row says why."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocess.fetch import tables
from preprocess.fetch.config import CaptionsInput, DocumentsInput
from preprocess.fetch.tables import RowError, iter_chunks, key_of, list_inputs
from shared import remote
from shared.errors import UserError
from shared.remote import StoreError
from tests.preprocess.stores import BUCKET, put, s3_server, use_s3

ROWS = [
    {"url": "http://h/1", "caption": 'a "red" cat'},
    {"url": "http://h/2", "caption": "zwei\nZeilen, ein Komma"},
    {"url": "http://h/3", "caption": "猫 \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")},
]
PLAIN = [{**row, "caption": row["caption"].replace("\n", " ")} for row in ROWS]


def zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


def csv_of(rows: list[dict[str, str]]) -> bytes:
    lines = ['"' + row["url"] + '","' + row["caption"].replace('"', '""') + '"\r\n' for row in rows]
    return ("url,caption\r\n" + "".join(lines)).encode()


def tsv_of(rows: list[dict[str, str]]) -> bytes:
    return "".join(
        f"{url}\t{caption}\n" for url, caption in [("url", "caption"), *(r.values() for r in rows)]
    ).encode()


def jsonl_of(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FORMATS: dict[str, tuple[Callable[[Path], object], list[dict[str, str]]]] = {
    "a.parquet": (lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2), ROWS),
    "a.csv": (lambda path: path.write_bytes(csv_of(ROWS)), ROWS),
    "bom.csv": (lambda path: path.write_bytes(b"\xef\xbb\xbf" + csv_of(ROWS)), ROWS),
    "a.csv.gz": (lambda path: path.write_bytes(gzip.compress(csv_of(ROWS))), ROWS),
    "B.CSV.GZ": (lambda path: path.write_bytes(gzip.compress(csv_of(ROWS))), ROWS),
    "a.tsv": (lambda path: path.write_bytes(tsv_of(PLAIN)), PLAIN),
    "a.TSV.zst": (lambda path: path.write_bytes(zstd(tsv_of(PLAIN))), PLAIN),
    "a.jsonl": (lambda path: path.write_bytes(jsonl_of(ROWS)), ROWS),
    "a.ndjson.gz": (
        lambda path: path.write_bytes(gzip.compress(jsonl_of(ROWS[:1])) + gzip.compress(jsonl_of(ROWS[1:]))),
        ROWS,
    ),
    "a.jsonl.zst": (lambda path: path.write_bytes(zstd(jsonl_of(ROWS) + b"\n \n")), ROWS),
}


def captions(*paths: Path, **options: Any) -> CaptionsInput:
    return CaptionsInput(kind="captions", paths=tuple(map(str, paths)), **options)


def documents(*paths: Path) -> DocumentsInput:
    return DocumentsInput(kind="interleaved", paths=tuple(map(str, paths)))


def read(config: CaptionsInput | DocumentsInput, rows: int = 100) -> list[dict[str, Any] | tuple[str, str]]:
    """Every row of every chunk: its values, or (reason, detail)."""
    found: list[dict[str, Any] | tuple[str, str]] = []
    for chunk in iter_chunks(list_inputs(config), config, rows):
        for row in chunk.rows:
            try:
                found.append(row())
            except RowError as error:
                found.append((error.reason, error.detail))
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_rows_that_were_written(tmp_path: Path, name: str) -> None:
    write, expected = FORMATS[name]
    write(tmp_path / name)
    assert read(captions(tmp_path / name)) == expected


def test_a_table_without_a_header_has_the_columns_of_the_config(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("a cat\thttp://h/1\n")
    assert read(captions(path, columns=("caption", "url"))) == [{"caption": "a cat", "url": "http://h/1"}]


def test_chunks_are_cut_within_files_and_numbered_across_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 2)
    for name, count in (("b.jsonl", 3), ("a.parquet", 7), ("c.jsonl", 0)):
        rows = [{"url": f"{name}{number}", "caption": ""} for number in range(count)]
        if name == "a.parquet":
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / name, row_group_size=5)
        else:
            (tmp_path / name).write_bytes(jsonl_of(rows))
    config = captions(tmp_path / "*.parquet", tmp_path / "*.jsonl", tmp_path / "b.jsonl")
    chunks = list(iter_chunks(list_inputs(config), config, 3))
    assert [(chunk.number, chunk.first_row, len(chunk.rows)) for chunk in chunks] == [
        (0, 0, 3),
        (1, 3, 3),
        (2, 6, 1),
        (3, 7, 3),
    ]
    assert [row()["url"] for row in chunks[1].rows] == ["a.parquet3", "a.parquet4", "a.parquet5"]
    assert [row()["url"] for row in chunks[3].rows] == ["b.jsonl0", "b.jsonl1", "b.jsonl2"]


@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        ("a.jsonl", b'{"url": "h"', "json_invalid"),
        ("a.jsonl", b'{"url": "\xff"}', "json_invalid"),
        ("a.jsonl", b'["h"]', "row_malformed"),
        ("a.jsonl", b'{"url": "\\ud800"}', "row_malformed"),
        ("a.jsonl", b"[" * 100_000, "json_invalid"),
        ("a.csv", b"h", "row_malformed"),
        ("a.csv", b"h,c,more", "row_malformed"),
        ("a.csv", b"h,caf\xe9", "row_malformed"),
        ("a.tsv", b"h", "row_malformed"),
    ],
)
def test_a_bad_row_is_one_failure_and_the_next_row_is_read(
    tmp_path: Path, name: str, line: bytes, reason: str
) -> None:
    head, good = {
        "a.csv": (b"url,caption\n", b"h,c"),
        "a.tsv": (b"url\tcaption\n", b"h\tc"),
        "a.jsonl": (b"", b'{"url": "h", "caption": "c"}'),
    }[name]
    (tmp_path / name).write_bytes(head + line + b"\n" + good + b"\n")
    bad, row = read(captions(tmp_path / name))
    assert isinstance(bad, tuple) and bad[0] == reason and bad[1]
    assert row == {"url": "h", "caption": "c"}


def test_an_escaped_pair_of_surrogates_is_one_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"url": "\\ud83d\\ude00"}\n')
    assert read(captions(tmp_path / "a.jsonl")) == [{"url": "\N{GRINNING FACE}"}]


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "cut gzip": ("a.jsonl.gz", gzip.compress(jsonl_of(ROWS))[:-5], "cannot be read to its end"),
    "cut zstd": ("a.jsonl.zst", zstd(jsonl_of(ROWS))[:-5], "cannot be read to its end"),
    "not gzip": ("a.csv.gz", b"url,caption\n", "cannot be read to its end"),
    "open quote": ("a.csv", b'url,caption\n"h,c\n', "cannot be read to its end"),
    "no column": ("a.csv", b"URL,caption\n", "no column 'url'; known: URL, caption"),
    "empty": ("a.csv", b"", "no column 'url'; known: none"),
    "not parquet": ("a.parquet", b"PAR1", "not a readable Parquet file"),
    "no format": ("a.txt", b"", "the name says no format; expected .parquet, .csv"),
    "packed parquet": ("a.parquet.gz", b"", "the name says no format"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_cannot_be_read_to_its_end_stops_the_job_by_name(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read(captions(tmp_path / name))
    assert name in str(error.value)


def test_a_parquet_file_with_a_damaged_page_stops_the_job_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"url": f"http://host/{number}", "caption": "c"} for number in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), path, compression="none", write_page_checksum=True)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"http://host/50", b"http://hOst/50"))
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read to its end"):
        read(captions(path))


def test_a_parquet_row_of_text_that_is_not_utf8_fails_alone(tmp_path: Path) -> None:
    good = pa.array(["http://h/1", "http://h/2"])
    bad = pa.array([b"a", b"\xff"])
    bad = pa.StringArray.from_buffers(2, bad.buffers()[1], bad.buffers()[2])
    pq.write_table(pa.table({"url": good, "caption": bad}), tmp_path / "a.parquet")
    first, second = read(captions(tmp_path / "a.parquet"))
    assert first == {"url": "http://h/1", "caption": "a"}
    assert second == ("row_malformed", "text that is not UTF-8")


def test_a_line_without_an_end_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(b"x" * (2 << 20))
    with pytest.raises(UserError, match="a line of more than 1 MiB"):
        read(captions(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"texts": [["a"]], "images": [[b"bytes"]]},
            "column 'images' is list<.*binary>, expected lists of text",
        ),
        ({"texts": ["a"], "images": [["h"]]}, "column 'texts' is string, expected lists of text"),
        ({"texts": [["a"]]}, "no column 'images'"),
    ],
)
def test_documents_of_another_schema_are_refused(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        read(documents(tmp_path / "a.parquet"))


def test_documents_are_no_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("texts,images\n")
    with pytest.raises(UserError, match="lists of texts and images need"):
        read(documents(tmp_path / "a.csv"))


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    for path, message in (("x.csv", "x.csv: no such file"), ("*.csv", "pattern .* matches no file")):
        with pytest.raises(UserError, match=rf"^input: .*{message}; correct input\.paths$"):
            list_inputs(captions(tmp_path / path))


def test_a_file_that_two_paths_name_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_bytes(csv_of(ROWS))
    assert list_inputs(CaptionsInput(kind="captions", paths=("a.csv", "./a.csv", "*.csv"))) == ["a.csv"]


def test_tables_in_a_store_are_read_as_those_of_this_machine(tmp_path: Path) -> None:
    with s3_server():
        for name, (write, _) in FORMATS.items():
            write(tmp_path / name)
            put(f"tables/{name}", (tmp_path / name).read_bytes())
        pattern = f"s3://{BUCKET}/tables/*"
        assert list_inputs(CaptionsInput(kind="captions", paths=(pattern,))) == [
            f"s3://{BUCKET}/tables/{name}" for name in sorted(FORMATS)
        ]
        config = CaptionsInput(kind="captions", paths=(pattern,))
        assert read(config) == [row for name in sorted(FORMATS) for row in FORMATS[name][1]]


def test_a_store_that_does_not_answer_is_no_fault_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    with s3_server():
        paths = [put(f"gone/{name}", csv_of(ROWS)) for name in ("a.csv", "a.csv.gz", "a.parquet")]
    use_s3(monkeypatch, "http://127.0.0.1:9")  # nobody listens there
    for path in paths:
        with pytest.raises(StoreError):
            list(iter_chunks([path], CaptionsInput(kind="captions", paths=(path,)), 3))


def test_a_key_is_the_columns_value_or_the_rows_number() -> None:
    assert key_of({"id": "x"}, "", 42) == "0000000042"
    assert key_of({"id": "x"}, "id", 42) == "x" and key_of({"id": 7}, "id", 42) == "7"
    assert key_of({"id": 0}, "id", 42) == "0"
    for value in (None, "", ["x"], {}):
        with pytest.raises(RowError, match="no_key"):
            key_of({"id": value}, "id", 42)

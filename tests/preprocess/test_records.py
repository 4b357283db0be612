"""Containers: every kind gives the same records, and what is lost of a file is lost by name and counted."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from preprocess.sources import lines, records, tables
from preprocess.sources.base import BadFileError
from preprocess.sources.record import Damage, Record
from preprocess.sources.records import container_of, keyed_records, read_records

ROWS = [
    {"name": f"n{number}", "text": text}
    for number, text in enumerate(["a", 'é, "q"', "漢\n字", " ", "z" * 99])
]
TABLE = pa.Table.from_pylist(ROWS)


def parquet(table: pa.Table = TABLE, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def arrow(new: Callable[..., Any], table: pa.Table = TABLE, rows: int = 2) -> bytes:
    file = io.BytesIO()
    with new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return file.getvalue()


def json_lines(rows: list[dict[str, Any]] = ROWS) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


CSV = 'name,text\nn0,a\nn1,"é, ""q"""\nn2,"漢\n字"\nn3, \nn4,' + "z" * 99 + "\n"
CONTAINERS: Mapping[str, bytes] = {
    "a.parquet": parquet(row_group_size=2),
    "large_strings.parquet": parquet(
        TABLE.cast(pa.schema([(name, pa.large_string()) for name in TABLE.column_names]))
    ),
    "stream.arrow": arrow(pa.ipc.new_stream),
    "file.arrow": arrow(pa.ipc.new_file),
    "a.jsonl": json_lines(),
    "windows.jsonl": b"\xef\xbb\xbf" + json_lines().replace(b"\n", b"\r\n") + b"\r\n",
    "a.ndjson": json_lines(),
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "in_one_line.json": json.dumps(ROWS, ensure_ascii=False).encode(),
    "of_lines.json": json_lines(),
    "a.csv": CSV.encode(),
    "a.jsonl.gz": gzip.compress(json_lines()),
    "two_streams.jsonl.gz": gzip.compress(json_lines()[:30]) + gzip.compress(json_lines()[30:]),
    "a.jsonl.zst": zstandard.compress(json_lines()),
    "two_frames.jsonl.zst": zstandard.compress(json_lines()[:30]) + zstandard.compress(json_lines()[30:]),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.CSV.zst": zstandard.compress(b"\xef\xbb\xbf" + CSV.encode()),
}


def read(path: Path, content: bytes, columns: list[str] | None = None) -> list[Record | Damage]:
    path.write_bytes(content)
    return list(read_records(str(path), columns))


def outline(found: list[Record | Damage]) -> list[int | tuple[int, str]]:
    """The number of each record, with the reason of what is lost."""
    return [entry.number if isinstance(entry, Record) else (entry.number, entry.reason) for entry in found]


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_records(tmp_path: Path, name: str) -> None:
    assert read(tmp_path / name, CONTAINERS[name]) == [Record(number, row) for number, row in enumerate(ROWS)]


def test_fields_of_a_tsv_are_never_quoted(tmp_path: Path) -> None:
    found = read(tmp_path / "a.tsv", b'name\ttext\na\t"one\nb\tand "two"\n')
    assert found == [Record(0, {"name": "a", "text": '"one'}), Record(1, {"name": "b", "text": 'and "two"'})]


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow", "a.csv"])
def test_of_tables_only_the_columns_that_are_asked_for_are_read(tmp_path: Path, name: str) -> None:
    found = read(tmp_path / name, CONTAINERS[name], ["text"])
    assert found == [Record(number, {"text": row["text"]}) for number, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("path", "container"),
    [
        ("A.JSONL.GZ", ".jsonl"),
        ("a.tar", ""),
        ("a.parquet.gz", ""),
        ("a.txt.gz", ""),
        ("s3://b/a.parquet", ".parquet"),
        ("csv", ""),
    ],
)
def test_the_name_says_the_container(path: str, container: str) -> None:
    assert container_of(path) == container


BAD_FILES = {
    "nothing.parquet": (b"", "file_empty"),
    "nothing.jsonl": (b"", "file_empty"),
    "text.parquet": (b"PAR1 is no Parquet file PAR1", "file_unreadable"),
    "cut.parquet": (CONTAINERS["a.parquet"][:-9], "file_unreadable"),
    "text.arrow": (b"this is no Arrow file", "file_unreadable"),
    "cut.arrow": (CONTAINERS["file.arrow"][:-20], "file_unreadable"),
    "text.json": (b"this is no JSON", "file_unreadable"),
    "number.json": (b"12", "file_unreadable"),
    "object.json": (b'{\n "a": [1]\n}', "file_unreadable"),
    "white.json": (b" \n\t", "file_unreadable"),
    "cut.json.gz": (gzip.compress(b"[{}]" * 99)[:9], "file_unreadable"),
    "no_gzip.csv.gz": (b"name,text\n1,2\n", "file_unreadable"),
    "quote.csv": (b'"name,text', "file_unreadable"),
    "a.xlsx": (b"PK", "file_of_unknown_kind"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_of_which_nothing_can_be_read_is_refused_in_one_line_that_names_it(
    tmp_path: Path, name: str
) -> None:
    content, reason = BAD_FILES[name]
    with pytest.raises(BadFileError) as caught:
        read(tmp_path / name, content)
    assert caught.value.reason == reason and str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow", "a.csv"])
def test_a_column_that_is_not_there_is_refused_with_its_nearest(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadFileError, match=r"no column 'txt'; did you mean 'text'\?") as caught:
        read(tmp_path / name, CONTAINERS[name], ["txt"])
    assert caught.value.reason == "column_missing"


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFileError, match="column 'a' is there 2 times"):
        read(tmp_path / "a.csv", b"a,b,a\n1,2,3\n", ["a"])
    assert read(tmp_path / "a.csv", b"a,b,a\n1,2,3\n", ["b"]) == [Record(0, {"b": "2"})]


def test_a_bad_line_of_json_costs_itself(tmp_path: Path) -> None:
    content = (
        b'{"a": 1}\n{"a": \n\n[1]\n{"a": "\xe9"}\n{"a": "\\uD800"}\n{"a": "\\ud83d\\ude00"}\n'
        + b"[" * 100_000
    )
    content += b'\n{"a": ' + b"1" * 5000 + b'}\n{"a": 2}'
    assert outline(read(tmp_path / "a.jsonl", content)) == [
        0,
        (1, "json_invalid"),
        # Line 2 is empty.
        (3, "row_not_object"),
        (4, "row_not_utf8"),
        (5, "row_not_utf8"),
        6,
        (7, "json_invalid"),
        (8, "json_invalid"),
        9,
    ]


def test_a_bad_item_of_a_json_list_costs_itself_unless_its_end_cannot_be_told(tmp_path: Path) -> None:
    good = '{"a": "[,]"}'
    items = [good, "[1]", "12", '{"a": "\\udc00"}', good]
    content = f" [{' , '.join(items)}, ".encode() + b'{"a": "\xe9"},' + f"{good} \n]\n".encode()
    assert outline(read(tmp_path / "a.json", content)) == [
        0,
        (1, "row_not_object"),
        (2, "row_not_object"),
        (3, "row_not_utf8"),
        4,
        (5, "row_not_utf8"),
        6,
    ]
    for broken, expected in (
        (f"[{good}, {{'a'}}, {good}]", [0, (1, "rest_unreadable")]),
        (f"[{good}, {good[:-3]}", [0, (1, "rest_unreadable")]),
        (f"[{good} {good}]", [0, (1, "rest_unreadable")]),
        (f"[{good},]", [0, (1, "rest_unreadable")]),
        (f"[{good}", [0, (1, "rest_unreadable")]),
        (f"[{good}] {good}", [0, (1, "rest_unreadable")]),
        ("[" * 100_000, [(0, "rest_unreadable")]),
        ("[]", []),
        ("[ \n]\n", []),
    ):
        assert outline(read(tmp_path / "a.json", broken.encode())) == expected, broken[:40]


@pytest.mark.parametrize("size", [(1 << 20) - 20, (1 << 20) - 1, 1 << 20, (3 << 20) + 5])
def test_items_of_a_json_list_may_end_anywhere_in_what_is_read_at_a_time(tmp_path: Path, size: int) -> None:
    rows = [{"a": "é" * (size // 2)}, {"a": 12}, {"a": "é" * (size // 2)}, {"b": [1, {"c": "]"}]}]
    found = read(tmp_path / "a.json", json.dumps(rows, ensure_ascii=False).encode())
    assert found == [Record(number, row) for number, row in enumerate(rows)]


def test_a_number_in_a_json_list_may_lie_across_what_is_read_at_a_time(tmp_path: Path) -> None:
    content = b"[" + b" " * ((1 << 20) - 3) + b"12345, {}]"
    assert content[: 1 << 20].endswith(b" 12")
    assert outline(read(tmp_path / "a.json", content)) == [(0, "row_not_object"), 1]


def test_a_bad_row_of_a_csv_costs_itself(tmp_path: Path) -> None:
    content = b'name,text\na,1\nb\nc,1,2\nd,"x"y\ne,\xe9\n\nf,"2\n2"\ng,"never ends\nh,3\n'
    assert outline(read(tmp_path / "a.csv", content)) == [
        0,
        (1, "row_malformed"),
        (2, "row_malformed"),
        (3, "csv_invalid"),
        (4, "row_not_utf8"),
        5,
        (6, "rest_unreadable"),
    ]


def test_what_is_longer_than_any_record_costs_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_RECORD_BYTES", 64)
    long = b'{"a": "' + b"x" * 200 + b'"}'
    assert outline(read(tmp_path / "a.jsonl", b'{"a": 1}\n' + long + b"\n" + b'{"a": 2}\n' + long)) == [
        0,
        (1, "row_too_many_bytes"),
        2,
        (3, "row_too_many_bytes"),
    ]
    exact = b'{"a": "' + b"x" * 54 + b'"}'
    assert len(exact) == 63 and outline(read(tmp_path / "a.jsonl", exact + b"\n{}")) == [0, 1]
    assert outline(read(tmp_path / "a.csv", b"a,b\n1,2\n3," + b"x" * 200 + b"\n4,5\n")) == [
        0,
        (1, "rest_unreadable"),
    ]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.csv.zst"])
def test_of_a_compressed_file_that_is_cut_off_the_rest_is_lost_by_name(tmp_path: Path, name: str) -> None:
    rows = [{"name": str(number), "text": os.urandom(500).hex()} for number in range(400)]
    plain = {
        ".jsonl": json_lines(rows),
        ".json": json.dumps(rows).encode(),
        ".csv": "\n".join(["name,text", *(",".join(row.values()) for row in rows)]).encode(),
    }[container_of(name)]
    packed = gzip.compress(plain) if name.endswith("gz") else zstandard.compress(plain)
    found = outline(read(tmp_path / name, packed[: len(packed) // 2]))
    count = len(found) - 1
    assert 100 < count < 300
    assert found[:count] == list(range(count)) and found[-1] == (count, "rest_unreadable")


def flipped(content: bytes, needle: bytes) -> bytes:
    """With one bit of the only occurrence of `needle` changed."""
    assert content.count(needle) == 1
    place = content.index(needle)
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def test_a_damaged_row_group_costs_its_rows(tmp_path: Path) -> None:
    table = pa.table({"text": [f"row number {number} of them" for number in range(10)]})
    content = parquet(
        table,
        row_group_size=4,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    found = read(tmp_path / "a.parquet", flipped(content, b"row number 5"))
    lost = [(number, "rows_unreadable") for number in range(4, 8)]
    assert outline(found) == [0, 1, 2, 3, *lost, 8, 9]
    assert all(
        "row group 1: " in entry.detail and "CRC" in entry.detail
        for entry in found
        if isinstance(entry, Damage)
    )


def test_more_lost_rows_than_the_file_has_bytes_are_one_loss() -> None:
    assert list(tables._lost_rows(100, 3, 10**12, "x")) == [Damage(3, "rest_unreadable", "x")]
    assert list(tables._lost_rows(100, 3, 2, "x")) == [Damage(n, "rows_unreadable", "x") for n in (3, 4)]


def test_a_text_of_a_table_that_is_no_utf8_costs_its_row(tmp_path: Path) -> None:
    table = pa.table({"text": ["first row", "other row", "third row"]})
    content = parquet(table, compression="none", use_dictionary=False, write_statistics=False)
    found = read(tmp_path / "a.parquet", content.replace(b"other", b"oth\xe9r"))
    assert outline(found) == [0, (1, "row_not_utf8"), 2]


def test_times_in_nanoseconds_cost_no_row(tmp_path: Path) -> None:
    stamp = pa.timestamp("ns", "UTC")
    table = pa.table(
        {
            "text": ["a", "b"],
            "at": pa.array([1_001, None], stamp),
            "took": pa.array([2_002, 3_003], pa.duration("ns")),
            "turns": pa.array([[{"at": 4_004}], []], pa.list_(pa.struct([("at", stamp)]))),
            "noon": pa.array([5_005, 6_006], pa.time64("ns")),
        }
    )
    for name, content in (("a.parquet", parquet(table)), ("a.arrow", arrow(pa.ipc.new_stream, table, 2))):
        first, second = read(tmp_path / name, content)
        assert isinstance(first, Record) and isinstance(second, Record)
        assert [(row.value["text"], row.value["noon"].microsecond) for row in (first, second)] == [
            ("a", 5),
            ("b", 6),
        ]
        assert first.value["at"].microsecond == 1 and first.value["took"].microseconds == 2
        assert first.value["turns"][0]["at"].microsecond == 4 and second.value["at"] is None


def test_a_number_of_too_many_digits_costs_its_item_of_a_list(tmp_path: Path) -> None:
    content = b'[{"a": 1}, {"a": ' + b"9" * 5000 + b'}, {"a": 3}]'
    found = read(tmp_path / "a.json", content)
    assert outline(found) == [0, (1, "json_invalid"), 2]


def test_a_damaged_batch_of_an_arrow_file_costs_its_rows(tmp_path: Path) -> None:
    table = pa.table({"text": [f"row {number}" for number in range(6)]})
    for new in (pa.ipc.new_stream, pa.ipc.new_file):
        content = arrow(new, table)
        # Of offsets 0, 5, 10 of the second batch, the last or the one before it becomes 2^24 more: beyond its text.
        offsets = b"\0\0\0\0\5\0\0\0\n\0\0\0"
        for place in (11, 7):
            place += content.index(offsets, content.index(offsets) + 1)
            found = read(tmp_path / "a.arrow", content[:place] + b"\1" + content[place + 1 :])
            assert outline(found) == [0, 1, (2, "rows_unreadable"), (3, "rows_unreadable"), 4, 5]


def test_a_batch_whose_rows_nobody_can_count_is_one_loss_and_of_a_stream_it_is_the_rest(
    tmp_path: Path,
) -> None:
    table = pa.table({"text": [f"row {number}" for number in range(6)]})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    for new, expected in (
        (pa.ipc.new_file, [0, 1, (2, "batch_unreadable"), 3, 4]),
        (pa.ipc.new_stream, [0, 1, (2, "rest_unreadable")]),
    ):
        content = arrow(lambda file, schema, new=new: new(file, schema, options=options), table)
        frames = [place for place in range(len(content)) if content.startswith(b"\x28\xb5\x2f\xfd", place)]
        place = frames[len(frames) // 2]
        found = read(tmp_path / "a.arrow", content[:place] + b"\0\0\0\0" + content[place + 4 :])
        assert outline(found) == expected


class Failing(io.BytesIO):
    """A file on a drive that fails behind byte 100."""

    def readinto(self, buffer: Any, /) -> int:
        if self.tell() > 100:
            raise OSError(errno.EIO, "drive on fire")
        return super().readinto(memoryview(buffer)[:64])

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() > 100 or size is None or size < 0 or size > 100:
            raise OSError(errno.EIO, "drive on fire")
        return super().read(size)


@pytest.mark.parametrize(
    "name", ["a.parquet", "stream.arrow", "file.arrow", "a.jsonl", "a.json", "a.csv", "a.jsonl.gz"]
)
def test_a_failing_drive_is_no_damage_of_the_file(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(
        records, "open_input", lambda unit: Failing(CONTAINERS[name] * (1 + 9 * ("json" in name)))
    )
    with pytest.raises(OSError, match="drive on fire") as caught:
        list(read_records(name))
    assert caught.value.errno == errno.EIO


def big_rows() -> Iterator[dict[str, str]]:
    for number in range(400):
        yield {"name": str(number), "text": f"{number:09d}" * 10_000}


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.zst", "a.json", "a.csv"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith((".parquet", ".arrow")):
        table = pa.Table.from_pylist(list(big_rows()))
        small_pages = parquet(table, data_page_size=1 << 20, write_batch_size=8)
        path.write_bytes(small_pages if name == "a.parquet" else arrow(pa.ipc.new_stream, table, 50))
        del table, small_pages
    else:
        plain = json_lines(list(big_rows()))
        if name == "a.csv":
            plain = "\n".join(["name,text", *(",".join(row.values()) for row in big_rows())]).encode()
        elif name == "a.json":
            plain = json.dumps(list(big_rows())).encode()
        path.write_bytes(zstandard.compress(plain) if name.endswith("zst") else plain)
        del plain
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    count = most = 0
    for record in read_records(str(path)):
        assert isinstance(record, Record) and len(record.value["text"]) == 90_000
        count, most = count + 1, max(most, pa.total_allocated_bytes() - before)
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 36 MB of text, in pieces of at most 8 MiB, held once by pyarrow and once or twice by Python.
    assert count == 400 and most < 18 << 20 and python < 24 << 20, (most, python)


def test_keys_are_those_of_a_column_or_name_and_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": "x"}\n{"id": 7}\nno\n{"id": ""}\n{"id": [1]}\n{}')

    def keys(column: str) -> list[tuple[str, str]]:
        found = keyed_records("web", str(path), None, column)
        return [(entry[0], "") if isinstance(entry, tuple) else (entry.key, entry.reason) for entry in found]

    assert keys("id") == [
        ("x", ""),
        ("7", ""),
        ("a.jsonl#2", "json_invalid"),
        ("a.jsonl#3", "no_key"),
        ("a.jsonl#4", "no_key"),
        ("a.jsonl#5", "no_key"),
    ]
    assert [key for key, _ in keys("")] == [f"a.jsonl#{number}" for number in range(6)]


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_a_page_that_memory_does_not_hold_is_refused_by_name_and_the_same_rows_in_small_pages_are_read(
    tmp_path: Path, compression: str
) -> None:
    table = pa.table({"id": range(60), "image": [{"bytes": bytes(1000), "path": "a"}] * 60})
    path = tmp_path / "a.parquet"
    options: dict[str, Any] = {"use_dictionary": False, "compression": compression, "row_group_size": 30}
    path.write_bytes(parquet(table, **options))
    # Of each value its length, in 4 bytes, and of all their definition and repetition levels.
    message = (
        r"row group 0, column 'image.bytes' has a page of 301\d\d bytes, of which memory holds 30000: write"
    )
    with pytest.raises(BadFileError, match=message) as error:
        list(read_records(str(path), ["image"], 30_000))
    assert error.value.reason == "page_too_large"
    for content, columns, most in (
        (parquet(table, **options), ["image"], 30_200),
        (parquet(table, **options), ["id"], 1000),
        (parquet(table, **options, write_batch_size=4, data_page_size=4000), None, 10_000),
    ):
        path.write_bytes(content)
        assert len(list(read_records(str(path), columns, most))) == 60
    assert tables.max_page_bytes(tables.WORKER_BYTES + 7000) == 2000


def test_a_column_that_does_not_begin_where_its_footer_says_costs_its_rows_and_no_memory(
    tmp_path: Path,
) -> None:
    table = pa.table({"id": range(6), "text": [f"text {n}" for n in range(6)]})
    path = tmp_path / "a.parquet"
    content = parquet(table, row_group_size=3, write_page_checksum=True)
    # Two bytes are gone at the end of the first row group, so that in the second, what is read as the size of a page is
    # its checksum.
    place = pq.read_metadata(pa.BufferReader(content)).row_group(1).column(0).dictionary_page_offset
    path.write_bytes(content[: place - 3] + content[place - 1 :])
    found = list(read_records(str(path)))
    assert [entry.number for entry in found] == list(range(6))
    assert not any(isinstance(entry, Record) for entry in found)
    assert pa.default_memory_pool().max_memory() < 1 << 30
    *_, last = found
    assert isinstance(last, Damage)
    assert f"column 'id' does not begin at byte {place}" in last.detail


def test_a_damaged_name_of_a_column_in_a_row_group_is_a_damaged_file(tmp_path: Path) -> None:
    content = parquet(pa.table({"a_text": ["x"] * 3}), store_schema=False)
    # The name stands in the schema, and once more at the column chunk: there it is no UTF-8 now.
    place = content.rindex(b"a_text")
    assert content.count(b"a_text") == 2
    path = tmp_path / "a.parquet"
    path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    with pytest.raises(BadFileError, match="not a readable Parquet file") as error:
        list(read_records(str(path), ["a_text"], 30_000))
    assert error.value.reason == "file_unreadable"


def test_a_line_that_can_be_read_and_not_written_again_costs_itself(tmp_path: Path) -> None:
    """Nested as deep as Python's reader goes, with an escape that has the line checked."""
    path = tmp_path / "a.jsonl"
    for depth in range(900, 1000):
        deep = '{"a": ' * depth + '"\\ud83d\\ude00"' + "}" * depth
        path.write_text(f'{deep}\n{{"n": 1}}\n')
        first, second = read_records(str(path))
        assert isinstance(first, Record) or first.reason == "json_invalid"
        assert isinstance(second, Record) and second.value == {"n": 1}

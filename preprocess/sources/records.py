"""Records of any container, one after another: what tables, JSON and comma-separated files have in common.

    .parquet                     row groups, a few MiB at a time         .arrow   IPC streams and files
    .jsonl .ndjson               one object per line                     .json    a list of objects, or lines
    .csv                         fields may be quoted                    .tsv     fields are never quoted
    the text ones also as .gz and .zst

Memory does not grow with the file. What is lost of a file is counted with a reason: a row, a row group, the rest
behind a fault. A file of which nothing can be read is a `BadFileError`.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from preprocess.inputs import open_input
from preprocess.sources.base import BadFileError
from shared.errors import closest

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (".parquet", ".arrow", *TEXT_SUFFIXES)
PACKED = {".gz": "gzip", ".zst": "zstd"}

# A longer line, list item or field is another kind of file, and is not read into memory to find out.
MAX_RECORD_BYTES = 64 << 20
# Rows of tables are turned into Python objects in pieces of about this size.
BATCH_BYTES = 8 << 20
BATCH_ROWS = 1024

_NOT_SPACE = re.compile(r"[^ \t\n\r]")

Value = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """Row or item `number` of a file, counted from 0 with those that are damaged; of JSON lines, the line."""

    number: int
    value: Value


@dataclass(frozen=True, slots=True)
class Damage:
    """A row that is lost; with the reason "rest_unreadable", all rows from `number` on."""

    number: int
    reason: str
    detail: str


def container_of(path: str) -> str:
    """The suffix in `SUFFIXES` that a file's name ends in, compression set aside; "" when it ends in none."""
    name = Path(path.lower())
    suffix = Path(name.stem).suffix if name.suffix in PACKED else name.suffix
    return suffix if suffix in (TEXT_SUFFIXES if name.suffix in PACKED else SUFFIXES) else ""


def read_records(unit: str, columns: Sequence[str] | None = None) -> Iterator[Record | Damage]:
    """The records of a file in their order; of tables only `columns`, each of which must be there.

    Objects of JSON come whole, whatever they hold.

    Raises:
        BadFileError: nothing of it can be read, or a column is not there.
        OSError: it cannot be read now; the executor tries again.
    """
    kind = container_of(unit)
    if not kind:
        raise BadFileError(
            "file_of_unknown_kind", f"{unit}: the name must end in one of {', '.join(SUFFIXES)}"
        )
    with closing(open_input(unit)) as file:
        if not file.read(1):
            raise BadFileError("file_empty", f"{unit}: 0 bytes; get it again")
        file.seek(0)
        match kind:
            case ".parquet":
                yield from _parquet_records(unit, file, columns)
            case ".arrow":
                yield from _arrow_records(unit, file, columns)
            case ".csv" | ".tsv":
                yield from _separated_records(unit, unpacked(unit, file), columns, kind)
            case ".json":
                yield from _json_records(unit, unpacked(unit, file))
            case _:
                yield from _line_records(unpacked(unit, file))


def unpacked(unit: str, file: BinaryIO) -> io.BufferedReader:
    """The content of a file whose name may end in .gz or .zst. A stream that is cut off is an error, not an end."""
    codec = PACKED.get(Path(unit.lower()).suffix)
    raw: Any = file if codec is None else pa.CompressedInputStream(pa.PythonFile(file, "r"), codec)
    return io.BufferedReader(raw, 1 << 20)


def is_damage(error: Exception) -> bool:
    """Whether an error of pyarrow or a decompressor tells of the content; without one, of the place it lies in."""
    return not isinstance(error, OSError) or error.errno is None


def _bad_file(unit: str, kind: str, error: Exception) -> BadFileError:
    return BadFileError("file_unreadable", f"{unit}: not a readable {kind} ({error}); get it again")


def _require_columns(unit: str, columns: Sequence[str] | None, names: Sequence[str]) -> None:
    for column in columns or ():
        if column not in names:
            raise BadFileError("column_missing", f"{unit}: no column {column!r}; {closest(column, names)}")


# Tables


def _parquet_records(unit: str, file: BinaryIO, columns: Sequence[str] | None) -> Iterator[Record | Damage]:
    """Rows by row group: one that is damaged costs the rows that were not read from it yet."""
    try:
        # With a buffer, a column is read page by page and not as a whole.
        table = pq.ParquetFile(file, page_checksum_verification=True, buffer_size=1 << 20)
        names = table.schema_arrow.names
    except (pa.ArrowException, OSError, ValueError) as error:
        if is_damage(error):
            raise _bad_file(unit, "Parquet file", error) from None
        raise
    _require_columns(unit, columns, names)
    groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
    if sum(group.num_rows for group in groups) != table.metadata.num_rows:
        raise _bad_file(unit, "Parquet file", ValueError("its footer contradicts itself"))
    first = 0
    for number, group in enumerate(groups):
        done = 0
        rows = max(1, min(BATCH_ROWS, BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)))
        try:
            for batch in table.iter_batches(rows, row_groups=[number], columns=columns, use_threads=False):
                yield from _rows(batch, first + done)
                done += batch.num_rows
            problem = "it ends early" if done < group.num_rows else ""
        except (pa.ArrowException, OSError, ValueError) as error:
            if not is_damage(error):
                raise
            problem = str(error)
        if problem:
            yield from _lost_rows(unit, first + done, group.num_rows - done, f"row group {number}: {problem}")
        first += group.num_rows


def _lost_rows(unit: str, first: int, count: int, detail: str) -> Iterator[Damage]:
    if count > os.path.getsize(unit):  # the count itself is damaged: nobody wants so many rejects
        yield Damage(first, "rest_unreadable", detail)
        return
    for number in range(first, first + count):
        yield Damage(number, "rows_unreadable", detail)


def _arrow_records(unit: str, file: BinaryIO, columns: Sequence[str] | None) -> Iterator[Record | Damage]:
    """Rows by record batch, checked in full before use: offsets in the file lead pyarrow anywhere in memory."""
    try:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        names = reader.schema.names
    except (pa.ArrowException, OSError, ValueError) as error:
        if is_damage(error):
            raise _bad_file(unit, "Arrow file", error) from None
        raise
    _require_columns(unit, columns, names)
    batches = iter(reader) if not is_file else map(reader.get_batch, range(reader.num_record_batches))
    first = 0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (pa.ArrowException, OSError, ValueError) as error:
            if not is_damage(error):
                raise
            yield Damage(first, "rest_unreadable", str(error))
            return
        batch = batch if columns is None else batch.select(list(columns))
        try:
            batch.validate(full=True)
        except pa.ArrowInvalid as error:
            yield from _lost_rows(unit, first, batch.num_rows, str(error))
        else:
            rows = max(1, min(BATCH_ROWS, BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)))
            for start in range(0, batch.num_rows, rows):
                yield from _rows(batch.slice(start, rows), first + start)
        first += batch.num_rows


def _rows(batch: pa.RecordBatch, first: int) -> Iterator[Record | Damage]:
    try:
        values = batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        if batch.num_rows == 1:
            reason = "row_not_utf8" if isinstance(error, UnicodeDecodeError) else "row_unreadable"
            yield Damage(first, reason, str(error))
            return
        for number in range(batch.num_rows):
            yield from _rows(batch.slice(number, 1), first + number)
        return
    for number, value in enumerate(values, first):
        yield Record(number, value)


# JSON


def _line_records(file: io.BufferedReader) -> Iterator[Record | Damage]:
    for number, line in _lines(file):
        if isinstance(line, Damage):
            yield line
        elif not line.isspace():
            yield _object(number, line)


def _lines(file: io.BufferedReader) -> Iterator[tuple[int, bytes | Damage]]:
    """Lines with their ends, numbered from 0. One that is too long is skipped to its end."""
    number = 0
    try:
        while line := file.readline(MAX_RECORD_BYTES):
            if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_RECORD_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield number, _too_long(number, "a line")
            else:
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
            number += 1
    except (OSError, pa.ArrowException) as error:
        if not is_damage(error):
            raise
        yield number, Damage(number, "rest_unreadable", str(error))


def _too_long(number: int, what: str) -> Damage:
    return Damage(number, "row_too_many_bytes", f"{what} of more than {MAX_RECORD_BYTES} bytes")


def _object(number: int, line: bytes) -> Record | Damage:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Damage(number, "row_not_utf8", str(error))
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of too many digits
        return Damage(number, "json_invalid", str(error))
    return _checked(number, value, b"\\ud" in line.lower())


def _checked(number: int, value: object, escapes: bool) -> Record | Damage:
    """`escapes`: it may hold half characters, which escapes can spell and no UTF-8 text holds."""
    if not isinstance(value, dict):
        return Damage(number, "row_not_object", f"expected an object, got {type(value).__name__}")
    if escapes:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return Damage(number, "row_not_utf8", str(error))
    return Record(number, cast(Value, value))


def _json_records(unit: str, file: io.BufferedReader) -> Iterator[Record | Damage]:
    """The items of a list as they come. A file of this name that begins with an object is read as JSON lines."""
    start = file.peek(1).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start == b"[":
        yield from _list_records(file)
        return
    lines = _line_records(file)
    first = next(lines, None)
    if not isinstance(first, Record):
        problem = first.detail if first else "it is white space"
        raise BadFileError(
            "file_unreadable",
            f"{unit}: neither a list of objects nor one object per line ({problem}); mend it",
        )
    yield first
    yield from lines


def _list_records(file: io.BufferedReader) -> Iterator[Record | Damage]:
    """Bytes that are no UTF-8 come as surrogates and cost their own item; behind a fault of syntax all is lost."""
    text = _TextWindow(file)
    number = 0
    try:
        text.take("[")
        while number or not text.sees("]"):
            item, source = text.take_value()
            yield _checked_text(number, item, source)
            number += 1
            if text.sees("]"):
                break
            text.take(",")
        text.take("]")
        text.take("")
    except (ValueError, RecursionError, OSError, pa.ArrowException) as error:
        if not is_damage(error):
            raise
        yield Damage(number, "rest_unreadable", str(error))


def _checked_text(number: int, item: object, source: str) -> Record | Damage:
    try:
        source.encode()
    except UnicodeEncodeError as error:
        return Damage(number, "row_not_utf8", str(error))
    return _checked(number, item, "\\ud" in source.lower())


class _TextWindow:
    """JSON text that is read as far as it is taken."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._json = json.JSONDecoder()
        self._text, self._position, self._ended = "", 0, False

    def sees(self, mark: str) -> bool:
        """Whether `mark` is what follows white space; "" is the end."""
        while True:
            rest = _NOT_SPACE.search(self._text, self._position)
            if rest is not None:
                self._position = rest.start()
                return bool(mark) and self._text.startswith(mark, self._position)
            self._position = len(self._text)
            if self._ended:
                return not mark
            self._read()

    def take(self, mark: str) -> None:
        if not self.sees(mark):
            raise ValueError(f"expected {mark or 'the end'!r}, found {self._text[self._position :][:20]!r}")
        self._position += len(mark)

    def take_value(self) -> tuple[object, str]:
        """The next value, and its text."""
        self.sees("")
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._position)
                if end < len(self._text) or self._ended:  # or it may be the beginning of a number
                    break
            except json.JSONDecodeError as error:
                if self._ended:
                    raise ValueError(error.msg) from None
                if len(self._text) - self._position > MAX_RECORD_BYTES:
                    raise ValueError(
                        f"{error.msg}, or an item of more than {MAX_RECORD_BYTES} bytes"
                    ) from None
            self._read()
        source = self._text[self._position : end]
        self._position = end
        return value, source

    def _read(self) -> None:
        """At least as much again, so that an item over many reads is not parsed too often."""
        rest = self._text[self._position :]
        data = self._file.read(max(1 << 20, len(rest)))
        self._text, self._position, self._ended = rest + self._decoder.decode(data, not data), 0, not data


# Comma-separated values


def _separated_records(
    unit: str, file: io.BufferedReader, columns: Sequence[str] | None, kind: str
) -> Iterator[Record | Damage]:
    """Rows under a row of names. One with a stray quote, or with more or fewer fields than names, is lost."""
    faults: list[Damage] = []

    def lines() -> Iterator[str]:
        for _, line in _lines(file):
            if isinstance(line, Damage):
                faults.append(line)
                return
            yield line.decode("utf-8", "surrogateescape")

    csv.field_size_limit(MAX_RECORD_BYTES)
    rows = csv.reader(
        lines(),
        delimiter="," if kind == ".csv" else "\t",
        quoting=csv.QUOTE_MINIMAL if kind == ".csv" else csv.QUOTE_NONE,
        strict=True,
    )
    try:
        names = next(rows)
    except (csv.Error, StopIteration) as error:
        raise _bad_file(unit, f"{kind} file", error) from None
    _require_columns(unit, columns, names)
    wanted = {name: names.index(name) for name in (names if columns is None else columns)}
    number = 0
    while True:
        try:
            fields = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            yield Damage(number, "csv_invalid", str(error))
            number += 1
            continue
        if fields:
            yield _separated(number, fields, len(names), wanted)
            number += 1
    for fault in faults:
        yield Damage(number, "rest_unreadable", fault.detail)


def _separated(number: int, fields: list[str], count: int, wanted: dict[str, int]) -> Record | Damage:
    if len(fields) != count:
        return Damage(number, "row_malformed", f"{len(fields)} fields, expected {count}")
    value = {name: fields[place] for name, place in wanted.items()}
    try:
        "".join(value.values()).encode()
    except UnicodeEncodeError as error:
        return Damage(number, "row_not_utf8", str(error))
    return Record(number, cast(Value, value))

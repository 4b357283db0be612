"""Rows of the input files, cut into chunks, in one order whatever the slice and however often a run resumes.

    .parquet   .csv   .tsv   .jsonl / .ndjson         the text files also as .gz or .zst
    conversations: what the chat source reads         .parquet   .arrow   .json   .jsonl / .ndjson

A file is read from its beginning to its end, a batch or a line at a time; a row becomes values only when somebody
asks for them, so that chunks which are done already cost only the reading. CSV is RFC 4180, TSV has no quoting
(as the published URL tables are written).
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from preprocess.fetch.config import CaptionsInput, ChatInput, DocumentsInput, Input
from preprocess.inputs import expand_paths_of, open_input
from preprocess.sources.records import Damage, container_of, read_records, unpacked
from preprocess.sources.records import Record as ReadRecord
from shared.errors import UserError, closest
from shared.remote import StoreError, shown

# Rows that pyarrow decodes at a time.
BATCH_ROWS = 512
# A longer line or field is another kind of file, and is not read into memory to find out.
MAX_LINE_BYTES = 64 << 20
# Lists and objects inside each other: far below what Python's stack has room for.
MAX_NESTING = 100

Record = dict[str, Any]


class RowError(ValueError):
    """A row that is none."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


# The row's values by column. Raises: RowError.
Row = Callable[[], Record]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What becomes one output file: consecutive rows of one input file."""

    number: int
    first_row: int  # counted over all input files
    rows: list[Row]
    # Of a Parquet file; None for text.
    schema: pa.Schema | None


def list_inputs(config: Input) -> list[str]:
    """The input files, patterns expanded, sorted, each once.

    Raises:
        UserError: a path does not exist, a pattern matches nothing, or a name says no format.
    """
    files = expand_paths_of("input", "input.paths", config.paths)
    for path in files:
        (_chat_format_of if isinstance(config, ChatInput) else _format_of)(path)
    return files


def iter_chunks(files: Sequence[str], config: Input, rows: int) -> Iterator[Chunk]:
    """All chunks of all files, in order; `rows` is the most that one holds."""
    number = first_row = 0
    for path in files:
        schema, iterator = _open(path, config)
        chunk: list[Row] = []
        for row in iterator:
            chunk.append(row)
            if len(chunk) == rows:
                yield Chunk(number, first_row, chunk, schema)
                number, first_row, chunk = number + 1, first_row + rows, []
        if chunk:
            yield Chunk(number, first_row, chunk, schema)
            number, first_row = number + 1, first_row + len(chunk)


def _format_of(path: str) -> str:
    name = Path(path.lower())
    packed = name.suffix in (".gz", ".zst")
    suffix = Path(name.stem).suffix if packed else name.suffix
    if suffix not in (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson") or (packed and suffix == ".parquet"):
        raise UserError(
            f"input: {shown(path)}: the name says no format; expected .parquet, .csv, .tsv or .jsonl, the last three "
            "also as .gz or .zst"
        )
    return suffix


def _chat_format_of(path: str) -> str:
    suffix = container_of(path)
    if suffix not in (".parquet", ".arrow", ".json", ".jsonl", ".ndjson"):
        raise UserError(
            f"input: {shown(path)}: the name says no format of conversations; expected .json, .jsonl (also as .gz or "
            ".zst), .parquet or .arrow"
        )
    return suffix


def _open(path: str, config: Input) -> tuple[pa.Schema | None, Iterator[Row]]:
    if isinstance(config, ChatInput):
        return None, _guarded(path, _chat_rows(path))
    kind = _format_of(path)
    if kind == ".parquet":
        return _open_parquet(path, config)
    if kind in (".jsonl", ".ndjson"):
        return None, _guarded(path, _json_rows(path))
    if isinstance(config, DocumentsInput):
        raise UserError(f"input: {shown(path)}: lists of texts and images need .parquet or .jsonl")
    return None, _guarded(path, _separated_rows(path, config, "," if kind == ".csv" else "\t"))


def _guarded(path: str, rows: Iterator[Row]) -> Iterator[Row]:
    """What stops the reading of a text file, as one line that names it. Rows lost behind it would not be counted."""
    try:
        yield from rows
    except StoreError:  # it may answer later
        raise
    except (OSError, csv.Error, pa.ArrowException) as error:
        raise UserError(
            f"input: {shown(path)}: cannot be read to its end ({error}); repair it or take it out"
        ) from None


# Parquet


def _open_parquet(path: str, config: CaptionsInput | DocumentsInput) -> tuple[pa.Schema, Iterator[Row]]:
    try:
        file = pq.ParquetFile(open_input(path), page_checksum_verification=True)
    except StoreError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"input: {shown(path)}: not a readable Parquet file ({error}); repair it") from None
    schema = file.schema_arrow
    text = (pa.types.is_string, pa.types.is_large_string)
    if isinstance(config, CaptionsInput):
        for column in filter(None, (config.url, config.caption)):
            _require(path, schema, column, lambda kind: any(test(kind) for test in text), "text")
    else:
        for column in (config.texts, config.images):
            _require(
                path,
                schema,
                column,
                lambda kind: (
                    (pa.types.is_list(kind) or pa.types.is_large_list(kind))
                    and any(test(kind.value_type) for test in text)
                ),
                "lists of text",
            )
    if config.key:
        _require(path, schema, config.key, lambda kind: not pa.types.is_nested(kind), "text or numbers")
    return schema, _guarded(path, _parquet_rows(file))


def _require(path: str, schema: pa.Schema, column: str, fits: Callable[[Any], bool], wanted: str) -> None:
    _require_column(path, column, schema.names)
    kind = schema.field(column).type
    if not fits(kind):
        raise UserError(f"input: {shown(path)}: column {column!r} is {kind}, expected {wanted}")


def _require_column(path: str, column: str, names: Sequence[str]) -> None:
    if column not in names:
        raise UserError(f"input: {shown(path)}: no column {column!r}; {closest(column, names)}")


def _parquet_rows(file: pq.ParquetFile) -> Iterator[Row]:
    for batch in file.iter_batches(BATCH_ROWS):
        for index in range(batch.num_rows):
            yield partial(_parquet_record, batch, index)


def _parquet_record(batch: pa.RecordBatch, index: int) -> Record:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError:
        raise RowError("row_malformed", "text that is not UTF-8") from None


# Text


@contextmanager
def _open_bytes(path: str) -> Generator[io.BufferedReader]:
    with closing(open_input(path)) as file:
        yield unpacked(path, file)


def _json_rows(path: str) -> Iterator[Row]:
    with _open_bytes(path) as file:
        while line := file.readline(MAX_LINE_BYTES):
            if len(line) == MAX_LINE_BYTES:
                raise OSError(f"a line of more than {MAX_LINE_BYTES >> 20} MiB")
            if not line.isspace():
                yield partial(_json_record, line)


def _json_record(line: bytes) -> Record:
    try:
        text = line.decode("utf-8-sig")
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise RowError("json_invalid", str(error)[:200]) from None
    if "\\ud" in text.lower():  # escapes can spell half characters, which no file of text holds
        require_unicode(json.dumps(record, ensure_ascii=False))
    if not isinstance(record, dict):
        raise RowError("row_malformed", f"expected a JSON object, got {type(record).__name__}")
    return record


def _separated_rows(path: str, config: CaptionsInput, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE_BYTES)
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    # Bytes that are no UTF-8 come through as lone surrogates, and fail their own row only.
    with (
        _open_bytes(path) as content,
        io.TextIOWrapper(content, "utf-8-sig", "surrogateescape", newline="") as file,
    ):
        lines = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        names = list(config.columns) or next(lines, [])
        for column in filter(None, (config.url, config.caption, config.key)):
            _require_column(path, column, names)
        for fields in lines:
            if fields:
                yield partial(_separated_record, names, fields)


def _separated_record(names: Sequence[str], fields: Sequence[str]) -> Record:
    if len(fields) != len(names):
        raise RowError("row_malformed", f"{len(fields)} fields, expected {len(names)}")
    require_unicode("".join(fields))
    return dict(zip(names, fields, strict=True))


# Conversations


def _chat_rows(path: str) -> Iterator[Row]:
    for entry in read_records(path):
        # Where the number of rows lost is not known, they would not be counted.
        if isinstance(entry, Damage) and entry.reason in ("rest_unreadable", "batch_unreadable"):
            raise OSError(entry.detail)
        yield partial(_chat_record, entry)


def _chat_record(entry: ReadRecord | Damage) -> Record:
    if isinstance(entry, Damage):
        raise RowError(entry.reason, entry.detail)
    return entry.value


# Values of a row


def key_of(record: Record, column: str, row: int) -> str:
    """The value of the key column, or without one the number of the row in all inputs.

    Raises:
        RowError: there is none.
    """
    if not column:
        return f"{row:010d}"
    value = record.get(column)
    if value is None or value == "" or isinstance(value, (list, dict)):
        raise RowError("no_key", f"column {column!r} is {'empty' if not value else type(value).__name__}")
    return str(value)


def require_unicode(text: str) -> None:
    """Raises: RowError: the text holds half characters, or stands for bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("row_malformed", "text that is not UTF-8") from None


def plain(value: Any, nesting: int = 0) -> Any:
    """A value of a row as JSON has it: bytes in base 64, dates and decimals as text, no NaN.

    Raises:
        RowError: lists and objects lie more than MAX_NESTING deep inside each other.
    """
    if nesting > MAX_NESTING:
        raise RowError("row_malformed", f"lists and objects more than {MAX_NESTING} deep inside each other")
    if isinstance(value, dict):
        return {str(name): plain(entry, nesting + 1) for name, entry in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, (list, tuple)):
        return [plain(entry, nesting + 1) for entry in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)

"""Records of tables: Parquet by row group, Arrow IPC (streams and files) by record batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from preprocess.sources.base import BadFileError
from preprocess.sources.record import Damage, Record, is_damage, require_columns, unreadable
from shared.page_header import read_page_header
from shared.remote import shown

# Rows are turned into Python objects in pieces of about this size.
BATCH_BYTES = 8 << 20
BATCH_ROWS = 1024
# What a worker holds beside the pages it reads, and how many times a page lies in memory while the next is read:
# measured 3.4 with pages of 200 MB, 3.5 where they are packed.
WORKER_BYTES = 350_000_000
PAGE_COPIES = 3.5
# Two values of up to 4 KiB, smallest and largest, and some integers.
PAGE_HEADER_BYTES = 64 << 10


class _Bounded:
    """A file of which no more is asked for than there is: sizes in a damaged file may be beyond all memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, file.seek(0, os.SEEK_END)
        self.seek, self.tell, self.close = file.seek, file.tell, file.close
        file.seek(0)

    @property
    def closed(self) -> bool:
        return self._file.closed

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, self._size))


def _bounded(file: BinaryIO) -> pa.PythonFile:
    return pa.PythonFile(_Bounded(file), "r")


def max_page_bytes(max_memory: int) -> int:
    """How large a page may be, unpacked, for a worker that may hold `max_memory` bytes."""
    return max(0, int((max_memory - WORKER_BYTES) / PAGE_COPIES))


def parquet_records(
    unit: str, file: BinaryIO, columns: Sequence[str] | None, most_page: int | None = None
) -> Iterator[Record | Damage]:
    """Rows by row group: one that is damaged costs the rows that were not read from it yet.

    Raises:
        BadFileError: nothing of it can be read, or a page has more than `most_page` bytes.
    """
    try:
        # With a buffer, and without another that holds the whole row group, a column is read page by page.
        options: dict[str, Any] = {"buffer_size": 1 << 20, "pre_buffer": False}
        table = pq.ParquetFile(_bounded(file), page_checksum_verification=True, **options)
        names = table.schema_arrow.names
    except (pa.ArrowException, OSError, ValueError) as error:
        if is_damage(error):
            raise unreadable(unit, "Parquet file", error) from None
        raise
    require_columns(unit, columns, names)
    size = file.seek(0, os.SEEK_END)
    groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
    if sum(group.num_rows for group in groups) != table.metadata.num_rows:
        raise unreadable(unit, "Parquet file", ValueError("its footer contradicts itself"))
    if most_page is not None:
        try:
            _require_small_pages(unit, file, groups, columns, most_page)
        except UnicodeDecodeError as error:  # a column's name, which the schema has once more
            raise unreadable(unit, "Parquet file", error) from None
    first = 0
    for number, group in enumerate(groups):
        done = 0
        rows = max(1, min(BATCH_ROWS, BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)))
        try:
            _require_first_pages(file, group, columns)
            for batch in table.iter_batches(rows, row_groups=[number], columns=columns, use_threads=False):
                yield from _rows(batch, first + done)
                done += batch.num_rows
            problem = "it ends early" if done < group.num_rows else ""
        except (pa.ArrowException, OSError, ValueError) as error:
            if not is_damage(error):
                raise
            problem = str(error)
        if problem:
            yield from _lost_rows(size, first + done, group.num_rows - done, f"row group {number}: {problem}")
        first += group.num_rows


def _wanted(group: Any, columns: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
    """Paths and chunks of the wanted columns of a row group."""
    for chunk in map(group.column, range(group.num_columns)):
        path = chunk.path_in_schema
        if columns is None or any(f"{path}.".startswith(f"{name}.") for name in columns):
            yield path, chunk


def _require_first_pages(file: BinaryIO, group: Any, columns: Sequence[str] | None) -> None:
    """Whoever reads a page takes memory for it first, gigabytes where a chunk does not begin where its footer says.

    Raises:
        ValueError: a page is larger than the chunk that it begins.
    """
    for path, chunk in _wanted(group, columns):
        file.seek(_first_page(chunk))
        try:
            page = read_page_header(memoryview(file.read(PAGE_HEADER_BYTES)), 0)
        except ValueError:
            continue  # reading it will say so
        if not 0 <= page.payload_bytes <= chunk.total_compressed_size:
            raise ValueError(f"column {path!r} does not begin at byte {_first_page(chunk)}")


def _first_page(chunk: Any) -> int:
    starts = (chunk.dictionary_page_offset, chunk.data_page_offset)
    return max(0, min(start for start in starts if start is not None))


def _require_small_pages(
    unit: str, file: BinaryIO, groups: Sequence[Any], columns: Sequence[str] | None, most: int
) -> None:
    """A page cannot be read in part, and one that is larger than memory ends the worker with all that lies behind it.

    Raises:
        BadFileError: a page of the wanted columns has more than `most` bytes.
    """
    for number, group in enumerate(groups):
        for column, chunk in _wanted(group, columns):
            if (size := _largest_page(file, chunk, most)) > most:
                raise BadFileError(
                    "page_too_large",
                    f"{shown(unit)}: row group {number}, column {column!r} has a page of {size} bytes, of which "
                    f"memory holds {most}: write the file again with smaller pages (pyarrow: write_batch_size=16), or "
                    f"set limits.max_memory to {int(size * PAGE_COPIES) + WORKER_BYTES}",
                )


def _largest_page(file: BinaryIO, chunk: Any, most: int) -> int:
    """Bytes of the first page above `most`, or 0. Headers are read only while such a page may still come."""
    position = _first_page(chunk)
    end, left = position + chunk.total_compressed_size, chunk.total_uncompressed_size
    while position < end and left > most:
        file.seek(position)
        try:
            page = read_page_header(memoryview(file.read(PAGE_HEADER_BYTES)), 0)
        except ValueError:
            return 0  # damaged: reading it will say so
        size = max(page.unpacked_bytes, page.payload_bytes)
        if size > most:
            return size
        left -= size + page.header_bytes
        position += page.header_bytes + max(0, page.payload_bytes)
    return 0


def arrow_records(unit: str, file: BinaryIO, columns: Sequence[str] | None) -> Iterator[Record | Damage]:
    """Rows by record batch, checked in full before use: offsets in the file lead pyarrow anywhere in memory."""
    try:
        is_file = file.read(6) == b"ARROW1"
        size = file.seek(0, os.SEEK_END)
        source = _bounded(file)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        names = reader.schema.names
    except (pa.ArrowException, OSError, ValueError) as error:
        if is_damage(error):
            raise unreadable(unit, "Arrow file", error) from None
        raise
    require_columns(unit, columns, names)
    first = 0
    for batch in _file_batches(reader) if is_file else _stream_batches(reader):
        if isinstance(batch, Exception):  # nothing says how many rows it has
            yield Damage(first, "batch_unreadable" if is_file else "rest_unreadable", str(batch))
            first += 1
            continue
        chosen = batch if columns is None else batch.select(list(columns))
        try:
            chosen.validate(full=True)
        except pa.ArrowInvalid as error:
            yield from _lost_rows(size, first, batch.num_rows, str(error))
        else:
            rows = max(1, min(BATCH_ROWS, BATCH_BYTES * batch.num_rows // max(1, chosen.nbytes)))
            for start in range(0, batch.num_rows, rows):
                yield from _rows(chosen.slice(start, rows), first + start)
        first += batch.num_rows


def _file_batches(reader: pa.RecordBatchFileReader) -> Iterator[pa.RecordBatch | Exception]:
    """Each batch, or why it cannot be read."""
    for number in range(reader.num_record_batches):
        try:
            yield reader.get_batch(number)
        except (pa.ArrowException, OSError, ValueError) as error:
            if not is_damage(error):
                raise
            yield error


def _stream_batches(reader: pa.RecordBatchStreamReader) -> Iterator[pa.RecordBatch | Exception]:
    """The batches up to the end, or to the first that cannot be read."""
    try:
        yield from reader
    except (pa.ArrowException, OSError, ValueError) as error:
        if not is_damage(error):
            raise
        yield error


def _lost_rows(size: int, first: int, count: int, detail: str) -> Iterator[Damage]:
    if count > size:  # bytes of the file: the count itself is damaged: nobody wants so many rejects
        yield Damage(first, "rest_unreadable", detail)
        return
    for number in range(first, first + count):
        yield Damage(number, "rows_unreadable", detail)


def _with_python_times(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Times in nanoseconds, which Python has no objects for, in whole microseconds; pandas writes the former."""
    types = [_python_time(kind) for kind in batch.schema.types]
    if types == batch.schema.types:
        return batch
    columns = [column.cast(kind, safe=False) for column, kind in zip(batch.columns, types, strict=True)]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _python_time(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_struct(kind):
        inner = [_python_time(field.type) for field in kind.fields]
        changed = inner != [field.type for field in kind.fields]
        return pa.struct([(f.name, t) for f, t in zip(kind.fields, inner, strict=True)]) if changed else kind
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        value = _python_time(kind.value_type)
        if value == kind.value_type:
            return kind
        return pa.list_(value) if pa.types.is_list(kind) else pa.large_list(value)
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    return pa.time64("us") if kind == pa.time64("ns") else kind


def _rows(batch: pa.RecordBatch, first: int) -> Iterator[Record | Damage]:
    try:
        values = _with_python_times(batch).to_pylist()
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

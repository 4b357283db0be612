"""Records of any container, one after another: what tables, JSON and comma-separated files have in common.

    .parquet                     row groups, a few MiB at a time         .arrow   IPC streams and files
    .jsonl .ndjson               one object per line                     .json    a list of objects, or lines
    .csv                         fields may be quoted                    .tsv     fields are never quoted
    the text ones also as .gz and .zst

Memory does not grow with the file. What is lost of a file is counted with a reason: a row, a row group, the rest
behind a fault. A file of which nothing can be read is a `BadFileError`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa

from preprocess.inputs import open_input
from preprocess.samples import Reject
from preprocess.sources.base import BadFileError
from preprocess.sources.lines import json_records, line_records, separated_records
from preprocess.sources.record import Damage, Record, Value
from preprocess.sources.tables import arrow_records, parquet_records
from shared.remote import shown, without_query

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["Damage", "Record", "Value", "container_of", "keyed_records", "read_records", "unpacked"]

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (".parquet", ".arrow", *TEXT_SUFFIXES)
PACKED = {".gz": "gzip", ".zst": "zstd"}


def container_of(path: str) -> str:
    """The suffix in `SUFFIXES` that a file's name ends in, compression set aside; "" when it ends in none."""
    name = Path(without_query(path).lower())
    suffix = Path(name.stem).suffix if name.suffix in PACKED else name.suffix
    return suffix if suffix in (TEXT_SUFFIXES if name.suffix in PACKED else SUFFIXES) else ""


def read_records(
    unit: str, columns: Sequence[str] | None = None, most_page: int | None = None
) -> Iterator[Record | Damage]:
    """The records of a file in their order; of tables only `columns`, each of which must be there.

    Objects of JSON come whole, whatever they hold. `most_page`: bytes of a page of Parquet that memory is there for.

    Raises:
        BadFileError: nothing of it can be read, or a column is not there.
        OSError: it cannot be read now; the executor tries again.
    """
    kind = container_of(unit)
    if not kind:
        raise BadFileError(
            "file_of_unknown_kind", f"{shown(unit)}: the name must end in one of {', '.join(SUFFIXES)}"
        )
    with closing(open_input(unit)) as file:
        if not file.read(1):
            raise BadFileError("file_empty", f"{shown(unit)}: 0 bytes; get it again")
        file.seek(0)
        match kind:
            case ".parquet":
                yield from parquet_records(unit, file, columns, most_page)
            case ".arrow":
                yield from arrow_records(unit, file, columns)
            case ".csv" | ".tsv":
                yield from separated_records(unit, unpacked(unit, file), columns, kind)
            case ".json":
                yield from json_records(unit, unpacked(unit, file))
            case _:
                yield from line_records(unpacked(unit, file))


def keyed_records(
    source: str, unit: str, columns: Sequence[str] | None, key: str, most_page: int | None = None
) -> Iterator[tuple[str, Value] | Reject]:
    """Each record with its key: the value of column `key`, or NAME#ROW where that is ""."""
    for record in read_records(unit, columns, most_page):
        place = f"{os.path.basename(shown(unit))}#{record.number}"
        if isinstance(record, Damage):
            yield Reject(source, place, record.reason, record.detail)
        elif not key:
            yield place, record.value
        elif isinstance(name := record.value.get(key), (str, int)) and name != "":
            yield str(name), record.value
        else:
            yield Reject(source, place, "no_key", f"{key!r} is {name!r:.60}, expected text or a whole number")


def unpacked(unit: str, file: BinaryIO) -> io.BufferedReader:
    """The content of a file whose name may end in .gz or .zst. A stream that is cut off is an error, not an end."""
    codec = PACKED.get(Path(without_query(unit).lower()).suffix)
    raw: Any = file if codec is None else _Unpacked(pa.CompressedInputStream(pa.PythonFile(file, "r"), codec))
    return io.BufferedReader(raw, 1 << 20)


class _Unpacked(io.RawIOBase):
    """A compressed stream that gives all that lies before a fault, and then the fault, also when asked again."""

    def __init__(self, stream: pa.CompressedInputStream) -> None:
        self._stream = stream
        self._fault: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer)
        size = 0
        while size < len(view) and self._fault is None:
            try:
                # A fault costs what the same call has decompressed before it.
                data = self._stream.read(min(16 << 10, len(view) - size))
            except (OSError, pa.ArrowException) as error:
                self._fault = error
                break
            if not data:
                return size
            view[size : size + len(data)] = data
            size += len(data)
        if self._fault is not None and not size:
            raise self._fault
        return size

"""Records of text files: JSON lines, JSON lists, and comma- or tab-separated values."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import cast

import pyarrow as pa

from preprocess.sources.base import BadFileError
from preprocess.sources.record import (
    MAX_RECORD_BYTES,
    Damage,
    Record,
    Value,
    is_damage,
    require_columns,
    unreadable,
)
from shared.remote import shown

_NOT_SPACE = re.compile(r"[^ \t\n\r]")


def line_records(file: io.BufferedReader) -> Iterator[Record | Damage]:
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
    return _checked(number, value, b"\\ud" in line or b"\\uD" in line)


def _checked(number: int, value: object, escapes: bool) -> Record | Damage:
    """`escapes`: it may hold half characters, which escapes can spell and no UTF-8 text holds."""
    if not isinstance(value, dict):
        return Damage(number, "row_not_object", f"expected an object, got {type(value).__name__}")
    if escapes:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return Damage(number, "row_not_utf8", str(error))
        except RecursionError as error:  # goes a little deeper than reading it did
            return Damage(number, "json_invalid", str(error))
    return Record(number, cast(Value, value))


def json_records(unit: str, file: io.BufferedReader) -> Iterator[Record | Damage]:
    """The items of a list as they come. A file of this name that begins with an object is read as JSON lines."""
    try:
        start = file.peek(1).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    except (OSError, pa.ArrowException) as error:
        if is_damage(error):
            raise unreadable(unit, "file of JSON", error) from None
        raise
    if start == b"[":
        yield from _list_records(file)
        return
    lines = line_records(file)
    first = next(lines, None)
    if not isinstance(first, Record):
        problem = first.detail if first else "it is white space"
        raise BadFileError(
            "file_unreadable",
            f"{shown(unit)}: neither a list of objects nor one object per line ({problem}); mend it",
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
            if text.fault:
                yield Damage(number, "json_invalid", text.fault)
            else:
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
    return _checked(number, item, "\\ud" in source or "\\uD" in source)


class _TextWindow:
    """JSON text that is read as far as it is taken."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._json = json.JSONDecoder(parse_int=self._whole_number)
        # What is wrong with the value that was taken last, though its end is known.
        self.fault = ""
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
            self.fault = ""
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

    def _whole_number(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError as error:  # Python's limit, as for lines of JSON
            self.fault = str(error)
            return 0

    def _read(self) -> None:
        """At least as much again, so that an item over many reads is not parsed too often."""
        rest = self._text[self._position :]
        pieces: list[bytes] = []
        wanted = max(1 << 20, len(rest))
        try:
            while wanted > 0 and (piece := self._file.read1(wanted)):
                pieces.append(piece)
                wanted -= len(piece)
        except (OSError, pa.ArrowException):
            if not pieces:  # else it comes again when these are used up
                raise
        data = b"".join(pieces)
        self._text, self._position, self._ended = rest + self._decoder.decode(data, not data), 0, not data


def separated_records(
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
        problem = faults[0].detail if faults else str(error) or "no row of names"
        raise unreadable(unit, f"{kind} file", ValueError(problem)) from None
    require_columns(unit, columns, names)
    wanted = {name: names.index(name) for name in (names if columns is None else columns)}
    number = 0
    while True:
        try:
            fields = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            # An open quote takes all that follows into its field.
            rest = str(error) == "unexpected end of data" and not faults
            yield Damage(number, "rest_unreadable" if rest else "csv_invalid", str(error))
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
